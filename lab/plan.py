"""What a run needs, on paper: the memory of a GPU, by part.

    python -m lab.plan --model Qwen/Qwen2.5-7B --gpus 8 --prompts 512 --response_length 20480

Takes the flags of train_vapo.py and reads the model's config.json only. Parameters are counted, the
rest follows from the formulas below, which are those of Llama's kind of layer (Llama, Mistral,
Qwen); for another kind they are a guide. Policy and critic, float32, with gradients and AdamW's
moments, are sharded (FSDP2). Every GPU has a whole copy of the policy to sample from, or with
--engine vllm its part of one; one GPU with --lora has none, and what is frozen in bfloat16.
All answers are as long as may be. GB are 10⁹ bytes.
"""

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import logprobs
import train_vapo
from system import lora, run, settings
from system.loading import checkpoint_gradients, loaded, require_positions
from system.settings import AT_LEAST_1, POSITIVE, flag
from system.slots import FIRST_COLUMNS

# fmt: off

@dataclass(frozen=True)
class Settings(train_vapo.Settings):
    gpus: int = flag(1, "how many GPUs", AT_LEAST_1)
    gpu_memory: float = flag(80.0, "GB of one GPU", POSITIVE)
    # fmt: on
    PACKAGES = ()  # a plan needs none, no problems, and no CUDA

    def check(self):
        run.require(bool(self.model), "give --model: a directory or hub name")
        super(Settings, replace(self, train="-", test="-", device="cpu")).check()

    def processes(self):
        return self.gpus


def table_columns(prompt, response, several_waves):
    """Columns K of `slots.Slots`, the fewest (P − 1 + FIRST_COLUMNS) · 2^k ≥ P + T − 1; after the
    first wave answers begin anywhere, and the table doubles until ¾ K ≥ P + T − 1."""
    columns = prompt - 1 + FIRST_COLUMNS
    while columns * (0.75 if several_waves else 1) < prompt + response - 1:
        columns *= 2
    return columns


def logit_bytes(tokens, words, width, size, memory):
    """`logprobs.py` over N tokens: four slices and three copies of the hidden states; the logits it
    keeps, and the gradients of output matrix and hidden states.
    16 min(N V, slice_on_gpu) + 3 N D size + 4 min(N V, max(KEEP, V D)) + V D size + 4 N D"""
    kept = 4 * min(tokens * words, max(logprobs.KEEP, words * width))
    slices = 16 * min(tokens * words, logprobs.slice_on_gpu(memory))
    return slices + 3 * tokens * width * size + kept + words * width * size + 4 * tokens * width


def layer_bytes(model, held, size):
    """What autograd keeps of a layer, bytes a token: of D, the width of the sums between layers, E
    of keys, Q of queries, F of the MLP, and H heads:  a D + s (2 Q + 2 E + 4 F) + 4 H + 8.
    s, bytes of a number in a product; a, of the two norms: 24 in float32, 16 in bfloat16, 26 where
    the weights are float32 and the products bfloat16 (autocast)."""
    norms = {(4, 4): 24, (2, 2): 16, (4, 2): 26}[held, size]
    rest = size * (2 * model.queries + 2 * model.keys + 4 * model.mlp)
    return norms * model.width + rest + 4 * model.heads + 8


def rows_of(tokens, length, answers):
    """(rows, tokens of each) of the fullest of `table.micro_batches`; one row may have more."""
    rows = min(answers, -(-tokens // length))
    return rows, min(length, max(tokens, length) // rows)


def shapes(asked):
    """Numbers of the model by its config (parameters, and the widths that the formulas take), and
    of one GPU's part of the step. Raises: BadInput without a config, a causal LM for it, or the
    checkpointing asked for."""
    config, make = loaded(AutoConfig.from_pretrained, asked.model), AutoModelForCausalLM.from_config
    text = config.get_text_config()
    length = asked.prompt_length + asked.response_length
    require_positions(text, length, asked.model)
    with torch.device("meta"):
        network = loaded(lambda _, **how: make(config), asked.model)
        policy, trunk = network.num_parameters(), network.base_model.num_parameters()
        first, last = network.get_input_embeddings().weight, network.get_output_embeddings().weight
        network.compute_dtype = torch.float32
        lora.adapt(checkpoint_gradients(network, asked.gradient_checkpointing), asked.lora, 0)
    heads, layers = text.num_attention_heads, text.num_hidden_layers
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    kept = getattr(text, "num_key_value_heads", None) or heads
    low, several, together = asked.dtype != "float32", asked.gpus > 1, asked.tensor_parallel
    vllm, size = asked.engine == "vllm", 2 if low else 4
    critic = 0 if asked.critic_free else trunk + last.shape[1] + 1
    learns, frozen = policy + critic, 0
    if asked.lora:  # the adapters of both, and the critic's head
        adapters = sum(weight.numel() for weight in lora.trained(network))
        frozen = policy + bool(critic) * trunk
        learns = (1 + bool(critic)) * adapters + learns - frozen
    token = 2 * layers * -(-kept // together) * head * size  # of keys and values; whole heads
    prompts, samples = asked.rollout_shape()
    here, updates = -(-prompts // asked.gpus), -(-prompts * samples // asked.mini_batch)
    slots, share = min(asked.sample_rows, here * samples * together), 0
    # One GPU samples from the policy itself where that is in the right dtype.
    copied = policy * size / together * (vllm or (low and not asked.lora) or several)
    if vllm:  # its share, and as many answers as have room in it
        share = asked.vllm_memory * asked.gpu_memory * 1e9
        slots = max(0, min(slots, int((share - copied) // (length * token))))
    updated = -(-prompts * samples // updates // asked.gpus)
    return SimpleNamespace(
        policy=policy, critic=critic, layers=layers, layer=(trunk - first.numel()) // layers,
        embeddings=first.numel() + (0 if first is last else last.numel()), heads=heads,
        words=last.shape[0], width=text.hidden_size, queries=heads * head, keys=kept * head,
        mlp=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        learns=learns, frozen=frozen, size=size, token=token, copied=copied,
        share=share, length=length, slots=slots, updates=updates, updated=updated, prompts=here,
        answers=here * samples, micro=rows_of(asked.micro_batch_tokens, length, updated),
        held=size if several or asked.lora else 4,  # FSDP casts weights; autocast keeps both
    )  # fmt: skip


def memory(asked):
    """{part: (bytes while sampling, in the update)} of one GPU at its fullest.
    Of n parameters on N GPUs: weights and gradients 4 n / N each, AdamW's moments 8 n / N; of those
    that --lora freezes, weights alone, and on one GPU in the dtype of the passes. Beside what a
    layer keeps, its tensors at work: s (4 D + 3 F) a token, and one layer's if it runs again."""
    s, several = shapes(asked), asked.gpus > 1
    learns, frozen = 4 * s.learns / asked.gpus, s.frozen * (4 if several else s.size) / asked.gpus
    columns = table_columns(asked.prompt_length, asked.response_length, s.answers > s.slots)
    read = min(s.prompts, max(1, asked.sample_rows // asked.samples))  # prompts at once
    waiting = read * asked.prompt_length * (1 if read == s.prompts else 2)  # and the next ones
    work = s.size * (4 * s.width + 3 * s.mlp)
    # `slots.draw`: logits as the model gives them, and four tables of their size in float32.
    drawing = max(read * asked.prompt_length * work, s.slots * s.words * (s.size + 16))
    tables = (s.token * (s.slots * columns + waiting), 0)
    if s.share:  # vLLM's: it keeps that, and has its temporaries in it
        drawing, tables = 0, (max(0, s.share - s.copied),) * 2
    (rows, length), layer = s.micro, layer_bytes(s, s.held, s.size)
    kept, cast = s.layers * layer, 2 * s.layers * s.layer * (s.held != s.size)  # by autocast
    if asked.gradient_checkpointing:
        kept, cast, work = s.layers * s.held * s.width, 0, work + layer
    kept = rows * length * (kept + 2 * s.held * s.width) + cast  # the last norm too
    answer, head = rows * min(length, asked.response_length), s.words * s.width * s.held
    logits = logit_bytes(answer, s.words, s.width, s.held, asked.gpu_memory * 1e9)
    logits -= bool(s.frozen) * head  # a frozen matrix has no gradient
    # A tied one's as output waits for that as embeddings, to be summed when all else is gone.
    tied = 3 * head * (s.embeddings == s.words * s.width and not s.frozen) - kept
    # Whole weights: two layers, at work and on its way, and the embeddings; gradients, of one.
    gathered = several * s.size * (3 * s.layer + 2 * s.embeddings)
    return {
        "weights": (learns + frozen, learns + frozen),
        "AdamW's moments": (2 * learns, 2 * learns),
        "gradients": (0, learns),
        "copy that samples": (s.copied, s.copied),
        "gathered weights": (0, gathered),
        "keys and values": tables,
        "activations": (0, kept),
        "logits, temporaries": (drawing, max(rows * length * work, logits, tied)),
    }


def report(asked):
    """Prints the plan. Returns: {"gigabytes": of one GPU in both phases, "fits"}."""
    s, parts, limit = shapes(asked), memory(asked), asked.gpu_memory * 1e9
    full, (rows, length) = [sum(column) for column in zip(*parts.values())], s.micro
    row = ("{:34s}" + 2 * "{:>15s}").format
    on = f" on {asked.tensor_parallel} GPUs" * (asked.tensor_parallel > 1)
    print(f"on paper: {asked.model}, {asked.gpus} x {asked.gpu_memory:g} GB")
    longest = f"answers of {asked.response_length:,} tokens"
    print(f"policy {s.policy:,} parameters, critic {s.critic:,}; {longest}")
    print(f"one GPU: {s.prompts} prompts, {s.answers} answers, {s.slots} side by side{on}", end="")
    print(f"; {s.updates} updates of {s.updated} answers, {rows} x {length:,} tokens at once\n")
    print(row("GB of one GPU", "sampling", "update"))
    for name, numbers in (parts | {"together": full}).items():
        print(row(name, *(f"{number / 1e9:.1f}" for number in numbers)))
    print(row("", *("fits" if number <= limit else "does not fit" for number in full)))
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
