"""What a run needs, on paper: memory of a GPU by part, operations and time of one step.

    python -m lab.plan --model Qwen/Qwen2.5-7B --gpus 8 --prompts 512 --response_length 20480

Takes the flags of train_vapo.py and reads the model's config.json only. Parameters and activations
come from dryrun.py, the rest from the formulas below. Policy and critic, float32, with gradients
and AdamW's moments, are sharded (FSDP2). Every GPU has a whole copy of the policy to sample from,
or with --engine vllm its part of one. All answers are as long as may be. GB are 10⁹ bytes.
"""

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import torch

import logprobs
import train_vapo
from lab.dryrun import activations, imagined, token_bytes
from system import run, settings
from system.loading import require_positions
from system.settings import AT_LEAST_1, POSITIVE, flag
from system.slots import FIRST_COLUMNS

COMPUTE_USE = 0.4  # share of --gpu_tflops that forward and backward passes reach
BANDWIDTH_USE = 0.7  # share of --gpu_bandwidth that decoding reaches
# fmt: off
LESS = {  # flags with which a phase needs less memory
    "sampling": "a lower --sample_rows", "scoring": "a lower --micro_batch_tokens",
    "update": "--gradient_checkpointing, a lower --micro_batch_tokens"}


@dataclass(frozen=True)
class Settings(train_vapo.Settings):
    gpus: int = flag(1, "how many GPUs", AT_LEAST_1)
    gpu_memory: float = flag(80.0, "GB of one GPU", POSITIVE)
    gpu_tflops: float = flag(989.0, "10^12 operations a second of a GPU (H100, bfloat16)", POSITIVE)
    gpu_bandwidth: float = flag(3350.0, "GB a second between a GPU and its memory (H100)", POSITIVE)
    # fmt: on

    def check(self):
        run.require(bool(self.model), "give --model: a directory or hub name")
        parallel, vllm = self.tensor_parallel, self.engine == "vllm"
        said = f"--tensor_parallel {parallel} is for --engine vllm, and --gpus a multiple of it"
        run.require(parallel == 1 or (vllm and self.gpus % parallel == 0), said)
        # A plan needs no problems, no CUDA, and no other packages.
        planned = {"train": "-", "test": "-", "device": "cpu", "engine": "hf"}
        planned |= {"tensor_parallel": 1, "verifier": "exact"}
        super(Settings, replace(self, **planned)).check()

    def processes(self):
        return self.gpus


def state_bytes(parameters, gpus):
    """(4n/N, 4n/N, 8n/N): weights, gradients, AdamW's moments of n parameters on N GPUs."""
    return 4 * parameters / gpus, 4 * parameters / gpus, 8 * parameters / gpus


def table_columns(prompt, response, several_waves):
    """Columns K of `slots.Slots`, the fewest (P − 1 + FIRST_COLUMNS) · 2^k ≥ P + T − 1; after the
    first wave answers begin anywhere, and the table doubles until ¾ K ≥ P + T − 1."""
    columns = prompt - 1 + FIRST_COLUMNS
    while columns * (0.75 if several_waves else 1) < prompt + response - 1:
        columns *= 2
    return columns


def logit_bytes(tokens, words, width, size, memory, backward):
    """`logprobs.py` over N tokens: four slices and three copies of the hidden states; backward, the
    logits it keeps, and the gradients of output matrix and hidden states.
    16 min(N V, slice_on_gpu) + 3 N D size [+ 4 min(N V, max(KEEP, V D)) + V D size + 4 N D]"""
    kept = 4 * min(tokens * words, max(logprobs.KEEP, words * width))
    slices = 16 * min(tokens * words, logprobs.slice_on_gpu(memory))
    held = slices + 3 * tokens * width * size
    return held + backward * (kept + words * width * size + 4 * tokens * width)


def table_bytes(answers, prompt, response):
    """Token ids of 8 bytes, and seven columns of numbers of 4 (table.py): B (8 (P + T) + 28 T)."""
    return answers * (8 * (prompt + response) + 28 * response)


def forward_operations(body, attention, rows, start, end):
    """Of tokens `start` to `end` of each row; the one at position i takes 2 body + 4 attention · i.
    body: parameters of the layers; attention: layers · heads · width of a head."""
    return rows * (2 * body * (end - start) + 2 * attention * (end**2 - start**2))


def decode_bytes(steps, weights, answers, token, prompt, response):
    """Weights, keys and values read in sampling: steps · weights + B · token · (P T + T² / 2)."""
    return steps * weights + answers * token * (prompt * response + response**2 / 2)


def rows_of(tokens, length, answers):
    """(rows, tokens of each) of the fullest of `table.micro_batches`; one row may have more."""
    rows = min(answers, -(-tokens // length))
    return rows, min(length, max(tokens, length) // rows)


def vllm_answers(share, weights, token, length):
    """⌊(share − weights) / (length · token)⌋: answers whose keys and values fit in vLLM's share."""
    return max(0, int((share - weights) // (length * token)))


def shapes(asked):
    """What the formulas take: counts of the model, and one GPU's part of the step."""
    low, vllm, together = asked.dtype != "float32", asked.engine == "vllm", asked.tensor_parallel
    dtype, size = (torch.bfloat16, 2) if low else (torch.float32, 4)  # auto: GPUs are CUDA's
    # The weights that layers see: FSDP casts them; autocast does too, but keeps both.
    seen, held = (dtype, size) if asked.gpus > 1 else (torch.float32, 4)
    training = imagined(asked.model, seen, dtype, asked.gradient_checkpointing)
    sampling, config = imagined(asked.model, dtype, dtype), training.config.get_text_config()
    length = asked.prompt_length + asked.response_length
    require_positions(config, length, asked.model)
    policy, trunk = training.num_parameters(), training.base_model.num_parameters()
    first, last = training.get_input_embeddings().weight, training.get_output_embeddings().weight
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    token = token_bytes(sampling) * -(-kept // together) / kept  # whole heads
    prompts, samples = asked.rollout_shape()
    here, updates = -(-prompts // asked.gpus), -(-prompts * samples // asked.mini_batch)
    updated = -(-prompts * samples // updates // asked.gpus)
    slots, share = min(asked.sample_rows, here * samples * together), 0
    # One GPU in float32 samples from the policy itself.
    copied = policy * size / together * (vllm or low or asked.gpus > 1)
    if vllm:
        share = asked.vllm_memory * asked.gpu_memory * 1e9
        slots = min(slots, vllm_answers(share, copied, token, length))
    return SimpleNamespace(
        training=training, scoring=imagined(asked.model, seen, dtype), sampling=sampling,
        policy=policy, critic=0 if asked.critic_free else trunk + last.shape[1] + 1,
        body=trunk - first.numel(), layer=(trunk - first.numel()) // layers,
        embeddings=first.numel() + (0 if first is last else last.numel()),
        words=last.shape[0], width=last.shape[1], attention=layers * heads * head_width,
        size=size, held=held, token=token, copied=copied, share=share, length=length,
        prompts=here, answers=here * samples, slots=slots, updates=updates, updated=updated,
        read=min(here, max(1, asked.sample_rows // samples)),  # prompts at once
        micro=rows_of(asked.micro_batch_tokens, length, updated),
        scored=rows_of(4 * asked.micro_batch_tokens, length, here * samples),
    )  # fmt: skip


def memory(asked):
    """{part: (bytes while sampling, while scoring, in the update)} of one GPU at its fullest."""
    s, several, vllm = shapes(asked), asked.gpus > 1, asked.engine == "vllm"
    weights, gradients, moments = state_bytes(s.policy + s.critic, asked.gpus)
    columns = table_columns(asked.prompt_length, asked.response_length, s.answers > s.slots)
    waiting = s.read * asked.prompt_length * (1 if s.read == s.prompts else 2)  # and the next ones
    _, reading = activations(s.sampling, s.read, asked.prompt_length, backward=False)
    # `slots.draw`: logits as the model gives them, and four tables of their size in float32.
    reading = max(reading, s.slots * s.words * (s.size + 16))
    tables = (s.token * (s.slots * columns + waiting), 0, 0)
    if vllm:  # it keeps its share, and has its temporaries in it
        reading, tables = 0, (max(0, s.share - s.copied),) * 3
    _, scoring = activations(s.scoring, *s.scored, backward=False)
    kept, peak = activations(s.training, *s.micro)
    how = (s.words, s.width, s.held, asked.gpu_memory * 1e9)
    scored, trained = (logit_bytes(rows * min(length, asked.response_length), *how, backward)
                       for (rows, length), backward in ((s.scored, False), (s.micro, True)))
    # Whole weights: two layers, at work and on its way, and the embeddings; gradients, of one.
    gathered, more = (several * s.size * (n * s.layer + s.embeddings) for n in (2, 1))
    return {
        "weights": (weights, weights, weights),
        "AdamW's moments": (moments, moments, moments),
        "gradients": (0, 0, gradients),
        "copy that samples": (s.copied, s.copied, s.copied),
        "gathered weights": (0, gathered, gathered + more),
        "keys and values": tables,
        "activations": (0, 0, kept),
        "logits, temporaries": (reading, max(scoring, scored), max(peak - kept, trained)),
    }


def step(asked):
    """{phase: (operations, seconds)} of one GPU in one step, every answer as long as may be.
    Sampling: the prompts, then ⌈B · N / slots⌉ · T steps for N GPUs that sample as one, bound by
    what they read or compute. Scoring: a forward pass of policy and critic. Updates: three times
    that, four with checkpointing; the output matrix four times, for its logits are made again."""
    s, prompt, response = shapes(asked), asked.prompt_length, asked.response_length
    end = prompt + response
    rate, bandwidth = asked.gpu_tflops * 1e12 * COMPUTE_USE, asked.gpu_bandwidth * 1e9
    together, both, updated = asked.tensor_parallel, 2 - asked.critic_free, s.updates * s.updated
    forward, head = partial(forward_operations, s.body, s.attention), 2 * s.words * s.width
    read, decoded = forward(s.prompts, 0, prompt), forward(s.answers, prompt, end)
    decoded += s.answers * head * response
    steps = -(-s.answers * together // max(1, s.slots)) * response
    how = (s.policy * s.size / together, s.answers * together, s.token, prompt, response)
    moved = decode_bytes(steps, *how) / (bandwidth * BANDWIDTH_USE)
    scored = both * forward(s.answers, 0, end) + s.answers * head * response
    passes = both * (3 + asked.gradient_checkpointing)
    trained = passes * forward(updated, 0, end) + 4 * updated * head * response
    return {"sampling": (read + decoded, read / rate + max(moved, decoded / rate)),
            "scoring": (scored, scored / rate), "updates": (trained, trained / rate)}  # fmt: skip


def line(name, *columns):
    print(f"{name:34s}" + "".join(f"{column:>15s}" for column in columns))


def report(asked):
    """Prints the plan. Returns: {"gigabytes": of one GPU in each phase, "seconds", "fits"}."""
    s, parts, limit = shapes(asked), memory(asked), asked.gpu_memory * 1e9
    full = [sum(column) for column in zip(*parts.values())]
    phases, (rows, length), response = step(asked), s.micro, asked.response_length
    seconds = sum(taken for _, taken in phases.values())
    on = f" on {asked.tensor_parallel} GPUs" * (asked.tensor_parallel > 1)
    print(f"on paper: {asked.model}, {asked.gpus} x {asked.gpu_memory:g} GB")
    print(f"policy {s.policy:,} parameters, critic {s.critic:,}; answers of {response:,} tokens")
    print(f"one GPU: {s.prompts} prompts, {s.answers} answers, {s.slots} side by side{on}", end="")
    print(f"; {s.updates} updates of {s.updated} answers, {rows} x {length:,} tokens at once\n")
    line("GB of one GPU", "sampling", "scoring", "update")
    for name, numbers in (parts | {"together": full}).items():
        line(name, *(f"{number / 1e9:.1f}" for number in numbers))
    line("", *("fits" if number <= limit else "does not fit" for number in full))
    table = table_bytes(asked.prompts * asked.samples, asked.prompt_length, asked.response_length)
    print(f"CPU memory of each process: a rollout's table, {table / 1e9:.1f} GB, at most twice")
    if not s.slots:
        print(f"--vllm_memory has no room beside its weights for one answer of {s.length:,} tokens")
    if max(full) > limit:
        phase, less = list(LESS.items())[full.index(max(full))]
        less = f"{less}, --engine vllm --tensor_parallel N, more --gpus"
        print(f"fullest: {phase}; less memory with {less}")
    line("\none step, operations of one GPU")
    for name, (work, taken) in phases.items():
        line(name, f"{work / 1e15:,.0f} PFLOP", f"{taken:,.0f} s")
    line("together", "", f"{seconds / 3600:.2f} h")
    compute = f"{COMPUTE_USE:.0%} of {asked.gpu_tflops:g} TFLOP/s"
    reading = f"{BANDWIDTH_USE:.0%} of {asked.gpu_bandwidth:g} GB/s"
    print(f"assumed: {compute}, {reading}, prompts of {asked.prompt_length:,} tokens; no time for")
    print("starting kernels, between GPUs, for verdicts and evaluations; no fragments of memory")
    fits = max(full) <= limit and s.slots > 0
    return {"gigabytes": tuple(number / 1e9 for number in full), "seconds": seconds, "fits": fits}


@run.exit_on_bad_input
def main(argv=None):
    preset = settings.parse(Settings, argv, __doc__).preset
    asked = settings.parse(Settings, argv, __doc__, train_vapo.PRESETS[preset])
    asked.check()
    return report(asked)


if __name__ == "__main__":
    main()
