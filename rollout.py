"""Sampling many answers to many prompts, and judging them.

A batch of answers is a dict of columns, "rows", that is cut and shuffled like any table:

    token_BL         prompt + response, padded on the right           problem_B   index into the problems
    prompt_length_B  tokens of the prompt                             correct_B   the verifier's verdict (bool)
    length_B         tokens of the response, EOS included             reward_B    what is optimised
    stop_B           True: ended by EOS; False: cut at the limit      sampled_logp_BT  the sampler's log-probs

B = P·G rows for P prompts with G samples each, the samples of one prompt side by side; L prompt + response tokens;
T response tokens; R rows still being sampled; V vocabulary.
"""

from functools import partial

import torch
from tqdm import tqdm
from transformers import TopPLogitsWarper

from dapo import mixed_groups
from gae import explained_variance
from math_verifier import MathVerifier
from model import autocast, critic_values
from run import BadInput
from verifier import verify

END_OF_TURN = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>")
COMPACT_BELOW = 0.75  # finished rows are dropped from the cache when less than this share of its rows is alive


def next_problems(problems, count, order):
    """The next `count` indices into an endless shuffle of the problems; `order` (generator, queue) remembers where it stands."""
    while len(order["queue"]) < count:
        order["queue"] += torch.randperm(len(problems), generator=order["generator"]).tolist()
    chosen, order["queue"] = order["queue"][:count], order["queue"][count:]
    return chosen


@torch.no_grad()
def sample(policy, tokenizer, problems, samples, max_tokens, temperature, generator, sample_rows=256, progress=None, top_p=1.0):
    """`samples` answers to each problem from the policy, π(·|s)^(1/temperature) token by token; temperature 0 is greedy.

    Each prompt is read once and its cache repeated for its samples. In training nothing of the distribution is cut off
    (top-p = 1), so the log-probs are those of the update; below 1, the least likely tokens of together at most 1 − top_p are.

    Args: problems, dicts with "prompt" (token ids), or pairs of an index and such a dict; max_tokens, the longest response;
        generator, a torch.Generator on the policy's device; sample_rows, answers side by side; progress, a tqdm label.
    Returns: rows without verdict and reward, `problem_B` counting the problems given.
    """
    eos_N = torch.tensor(eos_ids(policy, tokenizer), device=policy.device)
    prompts_at_once = max(1, sample_rows // samples)
    parts = []
    bar = tqdm(total=len(problems) * samples, desc=progress, unit="answer", disable=progress is None, leave=False)
    for start in range(0, len(problems), prompts_at_once):
        prompts = [problem["prompt"] for problem in problems[start : start + prompts_at_once]]
        part = sample_together(policy, prompts, samples, max_tokens, temperature, generator, eos_N, bar, top_p)
        part["problem_B"] += start
        parts.append(part)
    bar.close()
    return concatenate(parts)


def sample_together(policy, prompts, samples, max_tokens, temperature, generator, eos_N, bar, top_p=1.0):
    """One batch of prompts, left-padded so that all of them end, and go on, in the same column; rows as `sample` has them."""
    device, count = policy.device, len(prompts)
    prompt_length_P = torch.tensor([len(prompt) for prompt in prompts], device=device)
    width = int(prompt_length_P.max())
    prompt_PL = torch.zeros(count, width, dtype=torch.long, device=device)  # the padding's id does not matter: masked
    for i, prompt in enumerate(prompts):
        prompt_PL[i, width - len(prompt) :] = torch.tensor(prompt, device=device)
    mask_RL = torch.arange(width, device=device) >= width - prompt_length_P[:, None]
    position_RL = (mask_RL.cumsum(dim=1) - 1).clamp(min=0)

    with autocast(policy):
        output = policy(input_ids=prompt_PL, attention_mask=mask_RL.long(), position_ids=position_RL, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    cache.batch_repeat_interleave(samples)
    logit_RV = output.logits[:, -1].repeat_interleave(samples, dim=0)
    mask_RL = mask_RL.repeat_interleave(samples, dim=0).long()
    position_R = prompt_length_P.repeat_interleave(samples)

    rows = count * samples
    token_BT = torch.zeros(rows, max_tokens, dtype=torch.long, device=device)
    logp_BT = torch.zeros(rows, max_tokens, device=device)
    length_B = torch.full((rows,), max_tokens, device=device)
    stop_B = torch.zeros(rows, dtype=torch.bool, device=device)
    row_R = torch.arange(rows, device=device)  # which answer each row of the cache writes
    alive_R = torch.ones(rows, dtype=torch.bool, device=device)
    alive = rows
    for t in range(max_tokens):
        token_R, logp_R = draw(logit_RV, temperature, generator, top_p)
        token_BT[row_R, t] = torch.where(alive_R, token_R, 0)
        logp_BT[row_R, t] = torch.where(alive_R, logp_R, 0.0)
        ends_R = alive_R & torch.isin(token_R, eos_N)
        length_B[row_R[ends_R]] = t + 1
        stop_B[row_R[ends_R]] = True
        alive_R = alive_R & ~ends_R
        before, alive = alive, int(alive_R.sum())
        bar.update(before - alive)
        if alive == 0 or t + 1 == max_tokens:
            bar.update(alive)
            break
        if alive < COMPACT_BELOW * len(row_R):
            keep = alive_R.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            token_R, row_R, mask_RL, position_R = token_R[keep], row_R[keep], mask_RL[keep], position_R[keep]
            alive_R = alive_R[keep]
        mask_RL = torch.cat([mask_RL, torch.ones_like(mask_RL[:, :1])], dim=1)
        with autocast(policy):
            output = policy(
                input_ids=token_R[:, None], attention_mask=mask_RL, position_ids=position_R[:, None],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
        logit_RV, position_R = output.logits[:, -1], position_R + 1

    longest = int(length_B.max())
    prompt_length_B = prompt_length_P.repeat_interleave(samples)
    prompt_BL = prompt_PL.repeat_interleave(samples, dim=0)
    return {
        "token_BL": push_left(torch.cat([prompt_BL, token_BT[:, :longest]], dim=1), width - prompt_length_B),
        "prompt_length_B": prompt_length_B,
        "length_B": length_B,
        "stop_B": stop_B,
        "sampled_logp_BT": logp_BT[:, :longest],
        "problem_B": torch.arange(count, device=device).repeat_interleave(samples),
    }


def draw(logit_RV, temperature, generator, top_p=1.0):
    """One token a row and its log-prob at that temperature and top-p; the most likely one at temperature 0."""
    logit_RV = logit_RV.float() / (temperature or 1.0)
    if top_p < 1:
        logit_RV = TopPLogitsWarper(top_p)(None, logit_RV)
    logp_RV = torch.log_softmax(logit_RV, dim=-1)
    if temperature == 0:
        token_R = logp_RV.argmax(dim=-1)
    else:
        token_R = torch.multinomial(logp_RV.exp(), 1, generator=generator)[:, 0]
    return token_R, logp_RV.gather(1, token_R[:, None])[:, 0]


def push_left(token_BL, offset_B):
    """Moves each row left by its offset; zeros come in on the right."""
    position_BL = torch.arange(token_BL.shape[1], device=token_BL.device) + offset_B[:, None]
    moved_BL = token_BL.gather(1, position_BL.clamp(max=token_BL.shape[1] - 1))
    return torch.where(position_BL < token_BL.shape[1], moved_BL, 0)


def eos_ids(policy, tokenizer):
    """All token ids that end an answer: the tokenizer's EOS, those of the model's generation config, and the special tokens
    that end a turn in the chat formats in use, which neither of the two may list."""
    listed = policy.generation_config.eos_token_id
    listed = listed if isinstance(listed, (list, tuple)) else [listed]
    turns = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special and token.content in END_OF_TURN]
    return sorted({tokenizer.eos_token_id, *(i for i in listed if i is not None), *turns})


def texts(rows, tokenizer):
    """The responses as text, without special tokens."""
    columns = zip(rows["token_BL"].tolist(), rows["prompt_length_B"].tolist(), rows["length_B"].tolist())
    return [tokenizer.decode(token_L[start : start + length], skip_special_tokens=True) for token_L, start, length in columns]


def verifier_of(settings):
    """verify(text, answer) → bool, as --verifier and --bare_number say."""
    return partial(MathVerifier() if settings.verifier == "math_verify" else verify, bare_number=settings.bare_number)


def judge(rows, tokenizer, problems, verify=verify, reward_correct=1.0, reward_wrong=0.0):
    """Adds correct_B, the verifier's verdict, and reward_B, what is optimised; returns the rows. A truncated answer is
    terminal, and wrong: its last words may be half of a number."""
    answers = [problems[i]["answer"] for i in rows["problem_B"].tolist()]
    said = zip(texts(rows, tokenizer), answers, rows["stop_B"].tolist())
    verdicts = [whole and verify(text, answer) for text, answer, whole in said]
    rows["correct_B"] = torch.tensor(verdicts, device=rows["length_B"].device)
    rows["reward_B"] = torch.where(rows["correct_B"], reward_correct, reward_wrong)
    return rows


def refill(answers, prompts, samples, generations=None):
    """A rollout from batches of judged answers; with dynamic sampling, of groups that are neither all right nor all wrong.

    Args: answers, a function that returns the next batch of `prompts` groups of `samples` answers; generations, the most
        batches to draw for one rollout, or None: the first batch is taken as it is.
    Returns: (rows of exactly `prompts` groups, {"accuracy", "answers", "generations"} of all that was drawn for them).
    Raises: BadInput when that many batches do not hold enough mixed groups.
    """
    parts, kept, correct = [], 0, []
    while kept < prompts:
        if generations is not None and len(correct) == generations:
            raise BadInput(
                f"dynamic sampling found {kept} of {prompts} groups with right and wrong answers in {generations} batches of them: "
                "the problems are too easy or too hard for this policy by now; raise --generations, or take other problems"
            )
        rows = answers()
        correct.append(rows["correct_B"].float().mean().item())
        if generations is None:
            parts, kept = [rows], prompts
        elif (keep_B := mixed_groups(rows["correct_B"], samples)).any():
            parts.append(take(rows, keep_B.nonzero()[: (prompts - kept) * samples, 0]))
            kept += len(parts[-1]["length_B"]) // samples
    drawn = {"accuracy": sum(correct) / len(correct), "generations": len(correct)}
    return concatenate(parts), drawn | {"answers": len(correct) * prompts * samples}


@torch.no_grad()
def values(critic, rows, micro_batch, shift=0):
    """value_BT of all rows, `micro_batch` at a time; 0 on padding (`shift`: see `model.critic_values`)."""
    value_BT = torch.zeros_like(response_mask(rows))
    for index in micro_batches(rows, micro_batch):
        part = take(rows, index)
        value_BT[index, : int(part["length_B"].max())] = critic_values(critic, part, shift) * response_mask(part)
    return value_BT


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


def micro_batches(rows, size):
    """Yields index tensors of at most `size` rows of like length, so that little is padded; every row is in one."""
    order_B = (rows["prompt_length_B"] + rows["length_B"]).sort(stable=True).indices
    yield from order_B.split(size)


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
