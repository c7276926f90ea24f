"""A batch of answers as a table: a dict of columns, "rows", that is cut, shuffled and glued like any other.

    token_BL         prompt + response, padded on the right           problem_B   index into the problems
    prompt_length_B  tokens of the prompt                             correct_B   the verifier's verdict (bool)
    length_B         tokens of the response, EOS included             reward_B    what is optimised
    stop_B           True: ended by EOS; False: cut at the limit      sampled_logp_BT  the sampler's log-probs

No mask is ever derived from a pad id: the lengths say where a row ends. Columns named _BL and _BT are cut to the longest row.
Shapes: B rows; L prompt + response tokens; T response tokens.
"""

import torch

from distributed import add_up, deal
from gae import explained_variance
from model import critic_values


def response_mask(rows):
    """mask_BT: 1 on response tokens, from the lengths alone."""
    width = int(rows["length_B"].max())
    return (torch.arange(width, device=rows["length_B"].device) < rows["length_B"][:, None]).float()


def take(rows, index_N):
    """The given rows, with the columns of tokens cut to the longest of them."""
    part = {name: column[index_N] for name, column in rows.items()}
    longest = int(part["length_B"].max())
    whole = int((part["prompt_length_B"] + part["length_B"]).max())
    cut = {"BL": whole, "BT": longest}
    return {name: column[:, : cut[name[-2:]]] if name[-2:] in cut else column for name, column in part.items()}


def concatenate(parts):
    """Rows below rows, padded with zeros to the widest."""
    together = {}
    for name in parts[0]:
        columns = [part[name] for part in parts]
        if columns[0].dim() == 2:
            width = max(column.shape[1] for column in columns)
            columns = [torch.nn.functional.pad(column, (0, width - column.shape[1])) for column in columns]
        together[name] = torch.cat(columns)
    return together


def push_left(token_BL, offset_B):
    """Moves each row left by its offset; zeros come in on the right."""
    position_BL = torch.arange(token_BL.shape[1], device=token_BL.device) + offset_B[:, None]
    moved_BL = token_BL.gather(1, position_BL.clamp(max=token_BL.shape[1] - 1))
    return torch.where(position_BL < token_BL.shape[1], moved_BL, 0)


def micro_batches(rows, tokens):
    """Index tensors of rows of like length; a micro-batch, padded to its longest row, has at most `tokens` tokens, or one row.

    Every row is in one, the shortest in the first.
    """
    length_B, order_B = (rows["prompt_length_B"] + rows["length_B"]).sort(stable=True)
    starts = [0]
    for i, length in enumerate(length_B.tolist()):
        if (i + 1 - starts[-1]) * length > tokens and i > starts[-1]:
            starts.append(i)
    return order_B.tensor_split(starts[1:])


def texts(rows, tokenizer):
    """The responses as text, without special tokens."""
    columns = zip(rows["token_BL"].tolist(), rows["prompt_length_B"].tolist(), rows["length_B"].tolist())
    return [tokenizer.decode(token_L[start : start + length], skip_special_tokens=True) for token_L, start, length in columns]


@torch.no_grad()
def values(critic, rows, micro_batch_tokens, shift=0):
    """value_BT of all rows, `micro_batch_tokens` at a time; 0 on padding (`shift`: see `model.critic_values`)."""
    value_BT = torch.zeros_like(response_mask(rows))
    for index in deal(micro_batches(rows, micro_batch_tokens)):
        part = take(rows, index)
        value_BT[index, : int(part["length_B"].max())] = critic_values(critic, part, shift) * response_mask(part)
    return add_up(value_BT)


def rollout_metrics(rows):
    """What is known of a rollout before the update (the glossary in the README defines each name)."""
    mask_BT = response_mask(rows)
    tokens = mask_BT.sum()
    numbers = {
        "reward": rows["reward_B"].mean(),
        "length": rows["length_B"].float().mean(),
        "length_max": rows["length_B"].max(),
        "truncated": 1 - rows["stop_B"].float().mean(),
        "entropy": (rows["entropy_BT"] * mask_BT).sum() / tokens,
        "sampler_gap": ((rows["sampled_logp_BT"] - rows["old_logp_BT"]).abs() * mask_BT).sum() / tokens,
        "importance": (rows["importance_BT"] * mask_BT).sum() / tokens,
        "advantage": (rows["adv_BT"] * mask_BT).sum() / tokens,
    }
    if "old_value_BT" in rows:
        last_B1 = rows["length_B"][:, None] - 1
        numbers |= {
            "explained_variance": explained_variance(rows["old_value_BT"], rows["reward_B"][:, None] * mask_BT, mask_BT),
            "value_first": rows["old_value_BT"][:, 0].mean(),
            "value_last": rows["old_value_BT"].gather(1, last_B1).mean(),
            "lambda_min": rows["lam_B"].min(),
            "lambda": rows["lam_B"].mean(),
            "lambda_max": rows["lam_B"].max(),
        }
    return numbers


@torch.no_grad()
def describe_samples(critic, tokenizer, problems, rows, samples):
    """The first two answers to the first four problems, with the verdict and, of a critic, V at every token."""
    index = [i for i in range(min(4 * samples, len(rows["length_B"]))) if i % samples < 2]
    part = take(rows, torch.tensor(index, device=rows["length_B"].device))
    value_BT = critic_values(critic, part) if critic else torch.zeros(len(index), 0)
    described = []
    for i, text in enumerate(texts(part, tokenizer)):
        problem = problems[int(part["problem_B"][i])]
        described.append({
            "problem": problem["problem"], "answer": problem["answer"], "response": text,
            "correct": bool(part["correct_B"][i]), "finish": "stop" if part["stop_B"][i] else "length",
            "values": [round(value, 4) for value in value_BT[i, : int(part["length_B"][i])].tolist()],
        })  # fmt: skip
    return described
