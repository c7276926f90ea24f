"""Sampling many answers to many prompts, and judging them: a rollout, as a table of rows.

    collect                  a whole rollout; with dynamic sampling, batches until it is full
      judged                 answers to the next problems of the queue: sampled, and judged
        sample               by one of three engines of the same distribution: slots, hf, vllm
        judge                verdict and reward

Shapes: B = P·G rows for P prompts with G samples each, the samples of one prompt side by side;
L prompt + response tokens; T response tokens.
"""

from functools import partial

import torch
from tqdm import tqdm

import dapo
import table
from model import all_logprobs
from system import distributed, loading, reward
from system.equality import equal
from system.generate import sample_with_generate
from system.math_equality import MathEquality
from system.run import BadInput
from system.slots import sample_in_slots
from verifier import verify

SCORED_TOKENS = 16384  # of a forward pass, where `generate` has no log-probs to give


def verifier_of(settings):
    """verify(text, answer) → bool, as --verifier and --bare_number say."""
    same = MathEquality() if settings.verifier == "math_verify" else equal
    return partial(verify, bare_number=settings.bare_number, equal=same)


def collect(sampler, tokenizer, problems, verify, settings, generators, progress):
    """The judged answers of one rollout: P prompts × G samples, or (piece 7 off) P·G × 1.
    With --dynamic_sampling N, of groups neither all right nor all wrong, from at most N batches
    (arXiv 2503.14476 §3.2). The queue of problems is in `progress`.
    Returns: (rows, {"accuracy", "answers", "generations"} of all that was drawn for them)."""
    prompts, samples = settings.rollout_shape()
    parts, kept, correct = [], 0, []
    while kept < prompts:
        if settings.dynamic_sampling and len(correct) == settings.dynamic_sampling:
            said = f"found {kept} of {prompts} groups with right and wrong answers in"
            said += f" {len(correct)} batches of them: the problems are too easy or too hard for"
            said += " this policy by now; raise --dynamic_sampling, or take other problems"
            raise BadInput(f"dynamic sampling {said}")
        chosen = next_problems(len(problems), prompts, progress, generators["order"])
        how = (samples, settings, generators["sample"], "sampling")
        rows = judged(sampler, tokenizer, problems, chosen, verify, *how)
        if cache := round(settings.overlong * settings.response_length):  # beside the verdict
            length_B, longest = rows["length_B"], settings.response_length
            rows["reward_B"] += dapo.overlong_punishment(length_B, longest, cache)
        correct.append(rows["correct_B"].float().mean().item())
        if settings.dynamic_sampling:
            mixed_B = dapo.mixed_groups(rows["correct_B"], samples)
            if not mixed_B.any():
                continue
            rows = table.take(rows, mixed_B.nonzero()[: (prompts - kept) * samples, 0])
        parts.append(rows)
        kept += len(rows["length_B"]) // samples
    drawn = {"accuracy": sum(correct) / len(correct), "generations": len(correct)}
    return table.concatenate(parts), drawn | {"answers": len(correct) * prompts * samples}


def judged(sampler, tokenizer, problems, chosen, verify, samples, settings, generator, label):
    """`samples` judged answers to each of the chosen problems (indices)."""
    rows = sample(sampler, tokenizer, [problems[i] for i in chosen], samples,
                  settings.response_length, settings.temperature, generator,
                  settings.sample_rows, progress=label, engine=settings.engine)  # fmt: skip
    rows["problem_B"] = rows["problem_B"].new_tensor(chosen)[rows["problem_B"]]
    judge(rows, tokenizer, problems, verify, settings)
    return rows


def next_problems(problems, count, progress, generator):
    """The next `count` indices of an endless shuffle of so many problems."""
    while len(progress["queue"]) < count:
        progress["queue"] += torch.randperm(problems, generator=generator).tolist()
    chosen, progress["queue"] = progress["queue"][:count], progress["queue"][count:]
    return chosen


@torch.no_grad()
def sample(
    policy, tokenizer, problems, samples, max_tokens, temperature, generator, sample_rows=256,
    progress=None, top_p=1.0, engine="slots",
):  # fmt: skip
    """`samples` answers to each problem, token by token from π(·|s)^(1/temperature); 0 is greedy.
    In training nothing of the distribution is cut off (top-p = 1), so the log-probs are those of
    the update; below 1, the least likely tokens, of together at most 1 − top_p, are.
    Args: policy, what `sampler_of` returns; problems, dicts with "prompt" (token ids); max_tokens,
        the longest response; sample_rows, answers side by side; progress, a tqdm label.
    Returns: rows (table.py) without verdict and reward; problem_B counts the problems given."""
    device, prompts = policy.device, [problem["prompt"] for problem in problems]
    together = getattr(policy, "tensor_parallel", 1)  # ranks that sample as one
    own = distributed.share(prompts, together)
    if distributed.world() > 1:  # one draw, the same on all ranks, makes each rank's own
        drawn = torch.randint(2**62, (1,), generator=generator, device=device).item()
        generator = torch.Generator(device).manual_seed(drawn + distributed.rank() // together)
    eos_N = torch.tensor(loading.eos_ids(policy, tokenizer), device=device)
    hidden = progress is None or distributed.rank() > 0
    bar = tqdm(total=len(own) * samples, desc=progress, unit="answer", disable=hidden, leave=False)
    how = (own, samples, max_tokens, temperature, top_p, generator, eos_N)
    if not own and engine != "vllm":  # fewer problems than ranks; vLLM's compare their answers
        token_BT = torch.zeros(0, max_tokens, dtype=torch.long, device=device)
        logp_BT = None if engine == "hf" else token_BT.float()
        columns = token_BT, logp_BT, token_BT[:, 0], token_BT[:, 0].bool()
    elif engine == "vllm":
        columns = policy.answers(*how, bar)
    else:
        sampled = sample_in_slots if engine == "slots" else sample_with_generate
        columns = sampled(policy, *how, sample_rows, bar)
    bar.close()
    columns = [column if column is None else column.cpu() for column in columns]
    token_BT, logp_BT, length_B, stop_B = distributed.gather_columns(columns)
    longest, prompt_lengths = int(length_B.max()), torch.tensor(list(map(len, prompts)))
    off_BT = torch.arange(longest) >= length_B[:, None]
    token_BT = token_BT[:, :longest].masked_fill(off_BT, 0)
    token_BL = torch.zeros(len(length_B), int(prompt_lengths.max()) + longest, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        own, end = slice(i * samples, (i + 1) * samples), len(prompt)
        token_BL[own, :end] = torch.tensor(prompt)
        token_BL[own, end : end + longest] = token_BT[own]
    rows = {
        "token_BL": token_BL, "prompt_length_B": prompt_lengths.repeat_interleave(samples),
        "length_B": length_B, "stop_B": stop_B,
        "problem_B": torch.arange(len(prompts)).repeat_interleave(samples),
    }  # fmt: skip
    if logp_BT is None:
        logp_BT, _ = all_logprobs(policy, rows, temperature or 1.0, SCORED_TOKENS)
    rows["sampled_logp_BT"] = logp_BT[:, :longest].masked_fill(off_BT, 0.0)
    return rows


def judge(rows, tokenizer, problems, verify=verify, settings=None):
    """Adds correct_B, the verdict, and reward_B, what is optimised: by default --reward_correct or
    --reward_wrong (1, 0); by --reward, what it says, whose bool, if it returns one, is the verdict.
    A truncated answer is terminal, and wrong: its last words may be half of a number."""
    high, low = getattr(settings, "reward_correct", 1.0), getattr(settings, "reward_wrong", 0.0)
    mine, answers = distributed.share(torch.arange(len(rows["stop_B"]))), []
    if len(mine):
        part = table.take(rows, mine)
        asked = [problems[i] for i in part["problem_B"].tolist()]
        answers = list(zip(asked, table.texts(part, tokenizer), part["stop_B"].tolist()))
    found = []
    for (number, correct), (problem, text, ended) in zip(reward.ask(settings, answers), answers):
        right = ended and (verify(text, problem["answer"]) if correct is None else correct)
        found.append(((high if right else low) if number is None else number, right))
    found_2B = torch.zeros(2, len(rows["stop_B"]))
    found_2B[:, mine] = torch.tensor(found, dtype=torch.float).reshape(-1, 2).T
    rows["reward_B"], right_B = distributed.add_up(found_2B)
    rows["correct_B"] = right_B.bool()
