"""What a run needs, on paper: the memory of a GPU, by part.

    python -m lab.plan --model Qwen/Qwen2.5-7B --gpus 8 --prompts 512 --response_length 20480

Takes the flags of train_vapo.py and reads the model's config.json only. Parameters and activations
come from dryrun.py, the rest from the formulas below. Policy and critic, float32, with gradients
and AdamW's moments, are sharded (FSDP2). Every GPU has a whole copy of the policy to sample from,
or with --engine vllm its part of one; one GPU with --lora has none, and what is frozen in bfloat16.
All answers are as long as may be. GB are 10⁹ bytes.
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
from system.lora import trained
from system.settings import AT_LEAST_1, POSITIVE, flag
from system.slots import FIRST_COLUMNS

# fmt: off

@dataclass(frozen=True)
class Settings(train_vapo.Settings):
    gpus: int = flag(1, "how many GPUs", AT_LEAST_1)
    gpu_memory: float = flag(80.0, "GB of one GPU", POSITIVE)
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
    training = imagined(asked.model, seen, dtype, asked.gradient_checkpointing, asked.lora)
    sampling, config = imagined(asked.model, dtype, dtype), training.config.get_text_config()
    length = asked.prompt_length + asked.response_length
    require_positions(config, length, asked.model)
    policy, trunk = sampling.num_parameters(), sampling.base_model.num_parameters()
    first, last = training.get_input_embeddings().weight, training.get_output_embeddings().weight
    critic = 0 if asked.critic_free else trunk + last.shape[1] + 1
    learns, frozen = policy + critic, 0
    if asked.lora:  # the adapters of both, and the critic's head
        adapters, networks = sum(weight.numel() for weight in trained(training)), 1 + bool(critic)
        frozen = policy + bool(critic) * trunk
        learns = networks * adapters + policy + critic - frozen
    kept = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    token = token_bytes(sampling) * -(-kept // together) / kept  # whole heads
    prompts, samples = asked.rollout_shape()
    here, updates = -(-prompts // asked.gpus), -(-prompts * samples // asked.mini_batch)
    updated = -(-prompts * samples // updates // asked.gpus)
    slots, share = min(asked.sample_rows, here * samples * together), 0
    # One GPU samples from the policy itself where that is in the right dtype.
    copied = policy * size / together * (vllm or (low and not asked.lora) or asked.gpus > 1)
    if vllm:
        share = asked.vllm_memory * asked.gpu_memory * 1e9
        slots = min(slots, vllm_answers(share, copied, token, length))
    return SimpleNamespace(
        training=training, sampling=sampling,
        scoring=imagined(asked.model, seen, dtype, False, asked.lora),
        policy=policy, critic=critic, learns=learns, frozen=frozen,
        layer=(trunk - first.numel()) // config.num_hidden_layers,
        embeddings=first.numel() + (0 if first is last else last.numel()),
        words=last.shape[0], width=last.shape[1], size=size, held=held, token=token,
        copied=copied, share=share, length=length, slots=slots, updates=updates,
        updated=updated, prompts=here, answers=here * samples,
        read=min(here, max(1, asked.sample_rows // samples)),  # prompts at once
        micro=rows_of(asked.micro_batch_tokens, length, updated),
        scored=rows_of(4 * asked.micro_batch_tokens, length, here * samples),
    )  # fmt: skip


def memory(asked):
    """{part: (bytes while sampling, while scoring, in the update)} of one GPU at its fullest.
    Of n parameters on N GPUs: weights and gradients 4 n / N each, AdamW's moments 8 n / N; of those
    that --lora freezes, weights alone, and on one GPU in the dtype of the passes."""
    s, several, vllm = shapes(asked), asked.gpus > 1, asked.engine == "vllm"
    learns, frozen = 4 * s.learns / asked.gpus, s.frozen * (4 if several else s.size) / asked.gpus
    weights = learns + frozen
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
    scored, updated = (logit_bytes(rows * min(length, asked.response_length), *how, backward)
                       for (rows, length), backward in ((s.scored, False), (s.micro, True)))
    updated -= bool(s.frozen) * s.words * s.width * s.held  # a frozen matrix has no gradient
    # Whole weights: two layers, at work and on its way, and the embeddings; gradients, of one.
    gathered, more = (several * s.size * (n * s.layer + s.embeddings) for n in (2, 1))
    return {
        "weights": (weights, weights, weights),
        "AdamW's moments": (2 * learns, 2 * learns, 2 * learns),
        "gradients": (0, 0, learns),
        "copy that samples": (s.copied, s.copied, s.copied),
        "gathered weights": (0, gathered, gathered + more),
        "keys and values": tables,
        "activations": (0, 0, kept),
        "logits, temporaries": (reading, max(scoring, scored), max(peak - kept, updated)),
    }


def report(asked):
    """Prints the plan. Returns: {"gigabytes": of one GPU in each phase, "fits"}."""
    s, parts, limit = shapes(asked), memory(asked), asked.gpu_memory * 1e9
    full, (rows, length) = [sum(column) for column in zip(*parts.values())], s.micro
    row = ("{:34s}" + 3 * "{:>15s}").format
    on = f" on {asked.tensor_parallel} GPUs" * (asked.tensor_parallel > 1)
    print(f"on paper: {asked.model}, {asked.gpus} x {asked.gpu_memory:g} GB")
    longest = f"answers of {asked.response_length:,} tokens"
    print(f"policy {s.policy:,} parameters, critic {s.critic:,}; {longest}")
    print(f"one GPU: {s.prompts} prompts, {s.answers} answers, {s.slots} side by side{on}", end="")
    print(f"; {s.updates} updates of {s.updated} answers, {rows} x {length:,} tokens at once\n")
    print(row("GB of one GPU", "sampling", "scoring", "update"))
    for name, numbers in (parts | {"together": full}).items():
        print(row(name, *(f"{number / 1e9:.1f}" for number in numbers)))
    print(row("", *("fits" if number <= limit else "does not fit" for number in full)))
    table = table_bytes(asked.prompts * asked.samples, asked.prompt_length, asked.response_length)
    print(f"CPU memory of each process: a rollout's table, {table / 1e9:.1f} GB, at most twice")
    if not s.slots:
        print(f"--vllm_memory has no room beside its weights for one answer of {s.length:,} tokens")
    if max(full) > limit:
        print("less memory: --gradient_checkpointing, fewer --sample_rows or --micro_batch_tokens,")
        print("--engine vllm --tensor_parallel N, --lora RANK, more --gpus")
    print(f"assumed: prompts of {asked.prompt_length:,} tokens; no fragments of memory")
    fits = max(full) <= limit and s.slots > 0
    return {"gigabytes": tuple(number / 1e9 for number in full), "fits": fits}


@run.exit_on_bad_input
def main(argv=None):
    parse = partial(settings.parse, Settings, argv, __doc__)
    asked = parse(train_vapo.PRESETS[parse().preset])
    asked.check()
    return report(asked)


if __name__ == "__main__":
    main()
