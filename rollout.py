"""Sampling many answers to many prompts, and judging them.

`sample` writes a batch of answers as a table of rows (table.py): the engines differ, the distribution does not.
slots: a fixed number of slots, one answer each. Prompts are read once and their cache copied for the samples; an answer that
    ends leaves its slot to one that waits, so short answers never wait for long ones. All slots write at one common column,
    `now`: a row that enters finds its prompt in the columns just before. Its tokens stand side by side, as with left padding,
    so that one copy serves all rows and the model's own masks, sliding windows too, are right as they are.
hf: transformers' `generate`, the plain reference.
A third, vllm, stands in vllm_engine.py.

Shapes: B = P·G rows for P prompts with G samples each, the samples of one prompt side by side; L prompt + response tokens;
T response tokens; R slots; V vocabulary.
"""

from functools import partial

import torch
from tqdm import tqdm
from transformers import DynamicCache, TopPLogitsWarper
from transformers.cache_utils import DynamicLayer

import distributed
import model
import table
from dapo import mixed_groups
from math_verifier import MathVerifier
from model import autocast, policy_logprobs
from run import BadInput, require
from slots import Slots, static_columns
from verifier import verify

END_OF_TURN = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>")
COMPACT_BELOW = 0.75  # with no answer waiting, slots are given up when less than this share of them is in use
STEPS_UNSEEN = 8  # tokens between two looks at what has ended, on a device that a look would hold up
SCORED_TOKENS = 16384  # of a forward pass, where `generate` has no log-probs to give
CACHED = 2**20  # numbers that `draw` works on at a time on a CPU
BLOCK = 128  # words that `draw` counts together


def next_problems(problems, count, order):
    """The next `count` indices into an endless shuffle of the problems; `order` (generator, queue) remembers where it stands."""
    while len(order["queue"]) < count:
        order["queue"] += torch.randperm(len(problems), generator=order["generator"]).tolist()
    chosen, order["queue"] = order["queue"][:count], order["queue"][count:]
    return chosen


def sampler_of(policy, settings):
    """What `sample` takes as the policy, for --engine: the policy itself, a bfloat16 copy of it, or vLLM with its weights."""
    if settings.engine == "vllm":
        from vllm_engine import engine

        return engine(settings, policy)
    sampler = model.sampling_copy(policy)
    if settings.compile_decode:  # its weights are updated in place: once is enough
        sampler.compiled = torch.compile(sampler.forward, mode="reduce-overhead", dynamic=False)
    return sampler


def refresh(sampler, policy):
    """Gives what `sampler_of` made the policy's weights of now."""
    sampler.refresh(policy) if hasattr(sampler, "refresh") else model.refresh(sampler, policy)


@torch.no_grad()
def sample(
    policy, tokenizer, problems, samples, max_tokens, temperature, generator, sample_rows=256, progress=None, top_p=1.0, engine="slots"
):
    """`samples` answers to each problem from the policy, π(·|s)^(1/temperature) token by token; temperature 0 is greedy.

    In training nothing of the distribution is cut off (top-p = 1), so the log-probs are those of the update; below 1, the
    least likely tokens of together at most 1 − top_p are.

    Args: problems, dicts with "prompt" (token ids), or pairs of an index and such a dict; max_tokens, the longest response;
        generator, a torch.Generator on the policy's device; sample_rows, answers side by side (the slots); progress, a tqdm label.
    Returns: rows (table.py) without verdict and reward, `problem_B` counting the problems given.
    """
    device, prompts = policy.device, [problem["prompt"] for problem in problems]
    together = getattr(policy, "tensor_parallel", 1)  # ranks that sample as one
    own = distributed.share(prompts, together)
    if distributed.world() > 1:  # one draw from the generator, which is the same on all ranks, makes each rank's own
        drawn = torch.randint(2**62, (1,), generator=generator, device=device).item()
        generator = torch.Generator(device).manual_seed(drawn + distributed.rank() // together)
    eos_N = torch.tensor(eos_ids(policy, tokenizer), device=device)
    pick = partial(draw, temperature=temperature, top_p=top_p)
    bar = tqdm(total=len(own) * samples, desc=progress, unit="answer", disable=progress is None, leave=False)
    if not own:  # fewer problems than ranks
        columns = nothing(max_tokens, device, engine)
    elif engine == "slots":
        columns = sample_in_slots(policy, own, samples, max_tokens, pick, generator, eos_N, sample_rows, bar)
    elif engine == "vllm":
        columns = policy.answers(own, samples, max_tokens, temperature, top_p, generator, eos_N, bar)
    else:
        columns = sample_with_generate(policy, own, samples, max_tokens, temperature, top_p, generator, eos_N, sample_rows, bar)
    bar.close()
    token_BT, logp_BT, length_B, stop_B = distributed.gather_columns(columns)
    longest = int(length_B.max())
    token_BT = torch.where(torch.arange(longest, device=device) < length_B[:, None], token_BT[:, :longest], 0)
    prompt_PL, prompt_length_P = left_padded(prompts, device)
    prompt_length_B = prompt_length_P.repeat_interleave(samples)
    token_BL = torch.cat([prompt_PL.repeat_interleave(samples, dim=0), token_BT], dim=1)
    rows = {
        "token_BL": table.push_left(token_BL, prompt_PL.shape[1] - prompt_length_B),
        "prompt_length_B": prompt_length_B,
        "length_B": length_B,
        "stop_B": stop_B,
        "problem_B": torch.arange(len(prompts), device=device).repeat_interleave(samples),
    }
    if logp_BT is None:  # `generate` would have to hold the logits of all tokens to tell
        logp_BT = torch.zeros(token_BT.shape, device=device)
        for index in table.micro_batches(rows, SCORED_TOKENS):
            part = table.take(rows, index)
            logp_BT[index, : int(part["length_B"].max())] = policy_logprobs(policy, part, temperature or 1.0)[0]
    return rows | {"sampled_logp_BT": logp_BT[:, :longest] * table.response_mask(rows)}


def nothing(max_tokens, device, engine):
    """What an engine returns for no prompts."""
    token_BT = torch.zeros(0, max_tokens, dtype=torch.long, device=device)
    logp_BT = None if engine == "hf" else token_BT.float()
    return token_BT, logp_BT, token_BT[:, 0], token_BT[:, 0].bool()


def left_padded(prompts, device):
    """(prompt_PL, prompt_length_P): all prompts end in the last column. The padding's id does not matter: it is masked."""
    length_P = torch.tensor([len(prompt) for prompt in prompts], device=device)
    prompt_PL = torch.zeros(len(prompts), int(length_P.max()), dtype=torch.long, device=device)
    for row_L, prompt in zip(prompt_PL, prompts):
        row_L[len(row_L) - len(prompt) :] = torch.tensor(prompt, device=device)
    return prompt_PL, length_P


def sample_in_slots(policy, prompts, samples, max_tokens, pick, generator, eos_N, slots, bar):
    """Returns: (token_BT, logp_BT, length_B, stop_B), columns past an answer's end undefined."""
    device, answers = policy.device, len(prompts) * samples
    slots, steps_unseen = min(slots, answers), 1 if device.type == "cpu" else STEPS_UNSEEN
    # One row more than there are answers: what slots without an answer write goes there.
    token_BT = torch.zeros(answers + 1, max_tokens, dtype=torch.long, device=device)
    logp_BT = torch.zeros(answers + 1, max_tokens, device=device)
    length_B = torch.zeros(answers + 1, dtype=torch.long, device=device)
    stop_B = torch.zeros(answers + 1, dtype=torch.bool, device=device)
    row_R = torch.full((slots,), answers, device=device)  # which answer a slot writes
    last_R, position_R = torch.zeros(2, slots, dtype=torch.long, device=device)  # its last token, and where that stands
    longest_prompt = max(map(len, prompts))
    cache, entered, read_from, read_to = None, 0, 0, 0
    compiled = getattr(policy, "compiled", None)
    static = static_columns(longest_prompt + max_tokens) if compiled else 0
    while True:
        free_R = (row_R == answers).nonzero()[:, 0]
        while entered < answers and len(free_R):
            if entered == read_to * samples:  # the next prompts, as many as could fill all slots, are read at once
                read_from, read_to = read_to, min(len(prompts), read_to + max(1, slots // samples))
                read, prompt_PL, prompt_length_P = read_prompts(policy, prompts[read_from:read_to])
                cache = cache or Slots(read, slots, longest_prompt - 1, static)
            count = min(len(free_R), read_to * samples - entered)
            enter_R, free_R = free_R[:count], free_R[count:]
            row_R[enter_R] = torch.arange(entered, entered + count, device=device)
            prompt_R = row_R[enter_R] // samples - read_from
            last_R[enter_R], position_R[enter_R] = prompt_PL[prompt_R, -1], prompt_length_P[prompt_R] - 1
            cache.enter(enter_R, read, prompt_R, prompt_length_P[prompt_R] - 1)
            entered += count
        for _ in range(steps_unseen):
            cache.make_room(row_R < answers, longest_prompt)
            if compiled:
                torch.compiler.cudagraph_mark_step_begin()
            with autocast(policy):
                logit_RV = (compiled or policy)(
                    input_ids=last_R[:, None], attention_mask=cache.mask(), position_ids=position_R[:, None],
                    past_key_values=cache, use_cache=True,
                ).logits[:, -1]  # fmt: skip
            cache.advance()
            last_R, logp_R = pick(logit_RV, generator)
            t_R = length_B[row_R].clamp(max=max_tokens - 1)
            token_BT[row_R, t_R], logp_BT[row_R, t_R] = last_R, logp_R
            length_B[row_R] = t_R + 1
            stop_B[row_R] = torch.isin(last_R, eos_N)
            row_R = torch.where(stop_B[row_R] | (t_R + 1 == max_tokens), answers, row_R)
            position_R = position_R + (row_R < answers)  # there may be no next position
            length_B[answers] = 0
        alive = int((row_R < answers).sum())
        bar.update(entered - alive - bar.n)
        if alive == 0 and entered == answers:
            return token_BT[:-1], logp_BT[:-1], length_B[:-1], stop_B[:-1]
        if not compiled and entered == answers and alive < COMPACT_BELOW * len(row_R):
            keep = (row_R < answers).nonzero()[:, 0]
            row_R, last_R, position_R = row_R[keep], last_R[keep], position_R[keep]
            cache.keep(keep)


def read_prompts(policy, prompts):
    """(cache, prompt_PL, prompt_length_P): the prompts, left-padded, read by the policy's trunk into a cache of their own."""
    prompt_PL, length_P = left_padded(prompts, policy.device)
    width = prompt_PL.shape[1]
    mask_PL = torch.arange(width, device=policy.device) >= width - length_P[:, None]
    position_PL = (mask_PL.cumsum(dim=1) - 1).clamp(min=0)
    read = DynamicCache()
    with autocast(policy):
        policy.base_model(
            input_ids=prompt_PL, attention_mask=mask_PL.long(), position_ids=position_PL, past_key_values=read, use_cache=True
        )
    plain = all(type(layer) is DynamicLayer for layer in read.layers)
    require(plain, f"{type(policy).__name__} keeps more than keys and values: sample with --engine hf")
    return read, prompt_PL, length_P


def sample_with_generate(policy, prompts, samples, max_tokens, temperature, top_p, generator, eos_N, slots, bar):
    """As `sample_in_slots`, by `generate`, a batch of prompts at a time; no log-probs. Its random numbers come from a seed of ours."""
    device, count = policy.device, max(1, slots // samples)
    token_BT, length_B, stop_B = [], [], []
    how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {"do_sample": False}
    for start in range(0, len(prompts), count):
        prompt_PL, length_P = left_padded(prompts[start : start + count], device)
        prompt_PL, length_P = prompt_PL.repeat_interleave(samples, dim=0), length_P.repeat_interleave(samples)
        width = prompt_PL.shape[1]
        mask_PL = (torch.arange(width, device=device) >= width - length_P[:, None]).long()
        with autocast(policy), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator, device=device)))
            whole_BL = policy.generate(
                prompt_PL, attention_mask=mask_PL, max_new_tokens=max_tokens, eos_token_id=eos_N.tolist(), pad_token_id=0, **how
            )
        answer_BT = torch.nn.functional.pad(whole_BL[:, width:], (0, max_tokens + width - whole_BL.shape[1]))
        ends_BT = torch.isin(answer_BT, eos_N)
        stop_B.append(ends_BT.any(dim=1))
        length_B.append(torch.where(stop_B[-1], ends_BT.long().argmax(dim=1) + 1, max_tokens))
        token_BT.append(answer_BT)
        bar.update(len(answer_BT))
    return torch.cat(token_BT), None, torch.cat(length_B), torch.cat(stop_B)


def draw(logit_RV, generator, temperature=1.0, top_p=1.0):
    """One token a row, and its log-prob at that temperature and top-p; the most likely one at temperature 0.

    The smallest token a with Σ_{v ≤ a} π_v > u,  u uniform in [0, 1): the inverse of the distribution function, first over
    blocks of words, then within one. (`torch.multinomial` draws a number for every word: 5 to 10 times slower at 50,000.)
    """
    if temperature == 0:
        uniform_R = torch.zeros(len(logit_RV), device=logit_RV.device)
    else:
        uniform_R = torch.rand(len(logit_RV), generator=generator, device=logit_RV.device, dtype=torch.float64)

    def some(logit_RV, uniform_R):
        logit_RV = logit_RV.float() if temperature in (0, 1) else logit_RV.float() / temperature
        if top_p < 1:
            logit_RV = TopPLogitsWarper(top_p)(None, logit_RV)
        if temperature == 0:
            return torch.log_softmax(logit_RV, dim=-1).max(dim=-1)[::-1]
        return inverse_distribution(logit_RV, uniform_R)

    # On a CPU a few rows at a time: what fits into its cache is three times as fast.
    parts = max(1, logit_RV.numel() // CACHED) if logit_RV.device.type == "cpu" else 1
    drawn = [some(*part) for part in zip(logit_RV.tensor_split(parts), uniform_R.tensor_split(parts))]
    return tuple(torch.cat(column_R) for column_R in zip(*drawn))


def inverse_distribution(logit_RV, uniform_R):
    """(token_R, logp_R): see `draw`; uniform_R float64."""
    weight_RV = (logit_RV - logit_RV.amax(dim=-1, keepdim=True)).exp_()  # in place where it can be: new memory costs more than exp
    if missing := -weight_RV.shape[1] % BLOCK:
        weight_RV = torch.nn.functional.pad(weight_RV, (0, missing))
    weight_RNB = weight_RV.unflatten(1, (-1, BLOCK))
    block_RN = weight_RNB.sum(dim=-1).double()
    until_RN = block_RN.cumsum(dim=-1)
    at_R1 = uniform_R[:, None] * until_RN[:, -1:]
    chosen_R1 = torch.searchsorted(until_RN, at_R1, right=True).clamp(max=block_RN.shape[1] - 1)
    # Within the block: which share of it is left to go. Sums round, so the share is kept below 1: no word of weight 0 is taken.
    share_R1 = 1 - (until_RN.gather(1, chosen_R1) - at_R1) / block_RN.gather(1, chosen_R1)
    inner_RB = weight_RNB.gather(1, chosen_R1[..., None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(dim=-1)
    token_R1 = chosen_R1 * BLOCK + torch.searchsorted(inner_RB, share_R1.clamp(0, 1 - 1e-12) * inner_RB[:, -1:], right=True)
    logp_R1 = weight_RV.gather(1, token_R1).double().log() - until_RN[:, -1:].log()
    return token_R1[:, 0], logp_R1[:, 0].float()


def eos_ids(policy, tokenizer):
    """All token ids that end an answer: the tokenizer's EOS, those of the model's generation config, and the special tokens
    that end a turn in the chat formats in use, which neither of the two may list."""
    listed = policy.generation_config.eos_token_id
    listed = listed if isinstance(listed, (list, tuple)) else [listed]
    turns = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special and token.content in END_OF_TURN]
    return sorted({tokenizer.eos_token_id, *(i for i in listed if i is not None), *turns})


def verifier_of(settings):
    """verify(text, answer) → bool, as --verifier and --bare_number say."""
    return partial(MathVerifier() if settings.verifier == "math_verify" else verify, bare_number=settings.bare_number)


def judge(rows, tokenizer, problems, verify=verify, reward_correct=1.0, reward_wrong=0.0):
    """Adds correct_B, the verifier's verdict, and reward_B, what is optimised; returns the rows. A truncated answer is
    terminal, and wrong: its last words may be half of a number."""
    right_B = torch.zeros_like(rows["stop_B"], dtype=torch.int)
    mine = distributed.share(torch.arange(len(right_B), device=right_B.device))
    if len(mine):
        own = table.take(rows, mine)
        said = zip(table.texts(own, tokenizer), own["problem_B"].tolist(), own["stop_B"].tolist())
        verdicts = [whole and verify(text, problems[i]["answer"]) for text, i, whole in said]
        right_B[mine] = torch.tensor(verdicts, dtype=torch.int, device=right_B.device)
    rows["correct_B"] = distributed.add_up(right_B).bool()
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
            parts.append(table.take(rows, keep_B.nonzero()[: (prompts - kept) * samples, 0]))
            kept += len(parts[-1]["length_B"]) // samples
    drawn = {"accuracy": sum(correct) / len(correct), "generations": len(correct)}
    return table.concatenate(parts), drawn | {"answers": len(correct) * prompts * samples}
