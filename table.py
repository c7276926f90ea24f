"""What a row is. A batch of answers is a table: a dict of columns, one row an answer, "rows".

column            what it is                                         written by            over
token_BL          prompt + response, padded on the right             rollout.sample        rollout
prompt_length_B   tokens of the prompt                               rollout.sample        rollout
length_B          tokens of the response, EOS included               rollout.sample        rollout
stop_B            True: ended by EOS; False: cut at the limit        rollout.sample        rollout
problem_B         index into the problems                            rollout.sample        rollout
sampled_logp_BT   log π of the tokens, as the sampler has it         rollout.sample        rollout
correct_B         the verdict (bool), by the verifier or --reward    rollout.judge         rollout
reward_B          what is optimised, R                               rollout.judge         rollout
old_logp_BT       log π_old of the tokens, by the training code      train_vapo.score      rollout
entropy_BT        H(π_old) before each token, nats                   train_vapo.score      rollout
old_value_BT      V before each token (with a critic)                train_vapo.score      rollout
importance_BT     min(π_old / π_sampler, C)                          train_vapo.advantages rollout
adv_BT            advantage Â                                        train_vapo.advantages rollout
lam_B             λ_policy (with a critic)                           train_vapo.advantages rollout
target_BT         what V is fitted to (with a critic)                train_vapo.advantages rollout
policy_weight_BT  weight of a token in the policy loss               train_vapo.weights  mini-batch
nll_weight_BT     weight of a token in the NLL loss                  train_vapo.weights  mini-batch
critic_weight_BT  weight of a token in the value loss                train_vapo.weights  mini-batch

A column may be computed from those above it. One of the rollout may depend on the whole rollout,
in which the samples of one prompt stand side by side; `mini_batches` shuffles them. One of the
mini-batch may depend on that; micro-batches only cut, so nothing may be computed over one. Value
pretraining writes target_BT and critic_weight_BT itself.

Columns named _BL and _BT are cut to the longest row; a rollout's are 0 beyond a row's end. No mask
is ever derived from a pad id: the lengths say where a row ends. A table is in the CPU's memory (the
paper's, 8,192 answers of 20,480 tokens, has 6 GB); only micro-batches go to the GPU, by `take`.
Shapes: B rows; L prompt + response tokens; T response tokens.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

from gae import explained_variance


def response_mask(rows):
    """mask_BT: 1 on response tokens, from the lengths alone."""
    width = int(rows["length_B"].max())
    t_T = torch.arange(width, device=rows["length_B"].device)
    return (t_T < rows["length_B"][:, None]).float()


def response_tokens(rows):
    """token_BT: the response tokens, moved to the left edge."""
    width = int(rows["length_B"].max())
    t_T = torch.arange(width, device=rows["token_BL"].device)
    position_BT = rows["prompt_length_B"][:, None] + t_T
    last = rows["token_BL"].shape[1] - 1
    return rows["token_BL"].gather(1, position_BT.clamp(max=last))


def take(rows, index_N, device=None):
    """The given rows, on the device, with the columns of tokens cut to the longest of them."""
    part = {name: column[index_N] for name, column in rows.items()}
    widths = {"BL": int((part["prompt_length_B"] + part["length_B"]).max()),
              "BT": int(part["length_B"].max())}  # fmt: skip
    return {name: (column[:, : widths[name[-2:]]] if name[-2:] in widths else column).to(device)
            for name, column in part.items()}  # fmt: skip


def concatenate(parts):
    """Rows below rows, padded with zeros to the widest."""
    columns = {name: [row for part in parts for row in part[name]] for name in parts[0]}
    return {name: pad_sequence(rows, True) if rows[0].dim() else torch.stack(rows)
            for name, rows in columns.items()}  # fmt: skip


def mini_batches(rows, size, generator):
    """Yields the rows, shuffled, in optimiser mini-batches as even as can be, of at most `size`."""
    count = -(-len(rows["length_B"]) // size)
    order_B = torch.randperm(len(rows["length_B"]), generator=generator)
    for index_N in order_B.tensor_split(count):
        yield take(rows, index_N)


def micro_batches(rows, tokens):
    """Index tensors of rows of like length, each row in one, the shortest in the first.
    A micro-batch, padded to its longest row, has at most `tokens` tokens, or one row."""
    length_B, order_B = (rows["prompt_length_B"] + rows["length_B"]).sort(stable=True)
    starts = [0]
    for i, length in enumerate(length_B.tolist()):
        if (i + 1 - starts[-1]) * length > tokens and i > starts[-1]:
            starts.append(i)
    return order_B.tensor_split(starts[1:])


def texts(rows, tokenizer):
    """The responses as text, without special tokens."""
    columns = (rows[name] for name in ("token_BL", "prompt_length_B", "length_B"))
    answers = (token_L[start : start + length] for token_L, start, length in zip(*columns))
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


def sampler_gap(rows):
    """Mean of |log π_sampler − log π_old| over tokens, nats: 1e-6 in float32, 0.04 in bfloat16."""
    gap_BT = (rows["sampled_logp_BT"] - rows["old_logp_BT"]).abs() * response_mask(rows)
    return gap_BT.sum() / rows["length_B"].sum()


def rollout_metrics(rows):
    """What is known of a rollout before the update (docs/metrics.md defines each name)."""
    mask_BT = response_mask(rows)
    tokens = mask_BT.sum()
    numbers = {
        "reward": rows["reward_B"].mean(),
        "length": rows["length_B"].float().mean(),
        "length_max": rows["length_B"].max(),
        "truncated": 1 - rows["stop_B"].float().mean(),
        "entropy": (rows["entropy_BT"] * mask_BT).sum() / tokens,
        "sampler_gap": sampler_gap(rows),
        "importance": (rows["importance_BT"] * mask_BT).sum() / tokens,
        "advantage": (rows["adv_BT"] * mask_BT).sum() / tokens,
    }
    if "old_value_BT" in rows:
        value_BT, adv_BT = rows["old_value_BT"], rows["adv_BT"]
        outcome_BT = rows["reward_B"][:, None] * mask_BT
        last_B1 = rows["length_B"][:, None] - 1
        numbers |= {
            "explained_variance": explained_variance(value_BT, outcome_BT, mask_BT),
            "advantage_variance": 1 - explained_variance(outcome_BT - adv_BT, outcome_BT, mask_BT),
            "value_first": value_BT[:, 0].mean(),
            "value_last": value_BT.gather(1, last_B1).mean(),
            "lambda_min": rows["lam_B"].min(),
            "lambda": rows["lam_B"].mean(),
            "lambda_max": rows["lam_B"].max(),
        }
    return numbers
