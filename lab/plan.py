"""What a run needs, on paper: memory of a GPU by part, operations and time of one step, and the flags that would make it fit.

    python train_vapo.py --plan --model Qwen/Qwen2.5-7B --gpus 8 --prompts 512 --mini_batch 512 --response_length 20480

Only the model's config.json is read. Parameters and activations come from dryrun.py, the rest from the formulas below, one a
function. Meant are float32 weights, gradients and AdamW's two moments of policy and critic, sharded over the GPUs (FSDP2: a layer
computes on weights gathered in bfloat16), or in the CPU's memory (--cpu_offload; the time of that is not counted); on every GPU a whole copy of the policy, which samples, or with --engine vllm its share
of one in the memory that --vllm_memory sets aside; and prompts dealt to the GPUs.
GB are 10⁹ bytes; B answers of a GPU, P and T tokens of prompt and answer, every one as long as it may be.
"""

from dataclasses import replace
from types import SimpleNamespace

import torch

import logprobs
from dryrun import activations, imagined, token_bytes
from run import require
from slots import FIRST_COLUMNS

COMPUTE_USE = 0.4  # share of --gpu_tflops that forward and backward passes reach
BANDWIDTH_USE = 0.7  # share of --gpu_bandwidth that decoding reaches
STAYS = ("weights", "AdamW's moments", "gradients", "copy that samples", "gathered weights")  # whatever the batches


def state_bytes(parameters, gpus):
    """n parameters in float32, sharded over N GPUs: weights 4n/N, gradients 4n/N, AdamW's two moments 8n/N."""
    return 4 * parameters / gpus, 4 * parameters / gpus, 8 * parameters / gpus


def gathered_bytes(layer, embeddings, size, backward):
    """Whole weights at hand: two layers (one at work, one on its way) and the embeddings; backward, also gradients of one and those.

    (2 · layer + embeddings) · size   [+ (layer + embeddings) · size]
    """
    return (2 * layer + embeddings + backward * (layer + embeddings)) * size


def table_columns(prompt, response, several_waves):
    """Columns K of `slots.Slots`: (P − 1 + FIRST_COLUMNS) · 2^k, the fewest in which the longest answer has room.

    The first answers begin at the left: K ≥ P + T − 1. Later ones begin anywhere, and the table doubles as long as an answer
    may fill more than ¾ of it: at worst ¾ K ≥ P + T − 1.
    """
    columns = prompt - 1 + FIRST_COLUMNS
    while columns * (0.75 if several_waves else 1) < prompt + response - 1:
        columns *= 2
    return columns


def logit_bytes(tokens, words, width, size, backward):
    """`logprobs.py`, N tokens: four slices in float32, three copies of the hidden states; backward, the logits it keeps, the
    output matrix's gradient, and one of the hidden states in float32.

    16 · max(SLICE, N) + 3 N D · size   [+ 4 · min(N V, max(KEEP, V D)) + V D · size + 4 N D]
    """
    kept = 4 * min(tokens * words, max(logprobs.KEEP, words * width))
    held = 16 * max(logprobs.SLICE, tokens) + 3 * tokens * width * size
    return held + backward * (kept + words * width * size + 4 * tokens * width)


def draw_bytes(rows, words, size):
    """`rollout.draw`: the logits of R rows as the model gives them, and four tables of their size in float32: R V · (size + 16)."""
    return rows * words * (size + 16)


def forward_operations(body, attention, rows, start, end):
    """Tokens `start` to `end` of each row, through the layers: rows · (2 · body · (end − start) + 2 · attention · (end² − start²)).

    body: parameters without embeddings and output matrix, two operations each. attention: layers · heads · width of a head; the
    token at position i takes 4 · attention · i, half for its products with the keys before it, half for the sum of their values.
    """
    return rows * (2 * body * (end - start) + 2 * attention * (end**2 - start**2))


def decode_bytes(steps, weights, answers, token, prompt, response):
    """Read while sampling: all weights at each step, and for each token of an answer the keys and values before it.

    steps · weights + B · token · (P T + T² / 2)
    """
    return steps * weights + answers * token * (prompt * response + response**2 / 2)


def rows_of(tokens, length, answers):
    """(rows, tokens of each): the fullest of `table.micro_batches`, with `tokens` tokens, or one row of `length` that has more."""
    rows = min(answers, -(-tokens // length))
    return rows, min(length, max(tokens, length) // rows)


def vllm_answers(share, weights, token, length):
    """Answers of `length` tokens whose keys and values fit beside the weights into a GPU's share for vLLM: ⌊(share − weights) / (length · token)⌋."""
    return max(0, int((share - weights) // (length * token)))


def shapes(settings):
    """What the formulas take: counts of the model, and the share of one GPU in the step."""
    narrow = settings.dtype != "float32"  # auto: the GPUs are CUDA's
    arithmetic = torch.bfloat16 if narrow else torch.float32
    seen = arithmetic if settings.gpus > 1 else torch.float32  # the weights: FSDP casts them, or else autocast, and keeps both
    policy = imagined(settings.model, seen, arithmetic, settings.gradient_checkpointing)
    config = policy.config.get_text_config()
    length, longest = settings.prompt_length + settings.response_length, getattr(config, "max_position_embeddings", None)
    said = f"{settings.model} has {longest} positions: lower --prompt_length + --response_length from {length}"
    require(not longest or length <= longest, said)
    first, last = policy.get_input_embeddings().weight, policy.get_output_embeddings().weight
    whole, trunk = (sum(p.numel() for p in part.parameters()) for part in (policy, policy.base_model))
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    prompts, samples = (settings.prompts, settings.samples) if settings.group_sampling else (settings.prompts * settings.samples, 1)
    here, updates = -(-prompts // settings.gpus), -(-prompts * samples // settings.mini_batch)
    updated = -(-prompts * samples // updates // settings.gpus)
    sampling, size, together = imagined(settings.model, arithmetic, arithmetic), 2 if narrow else 4, settings.tensor_parallel
    kept = getattr(config, "num_key_value_heads", None) or heads
    token = token_bytes(sampling) * -(-kept // together) / kept  # on a GPU: whole heads, and at least one
    slots = min(settings.sample_rows, here * samples * together)
    if settings.engine == "vllm":
        slots = min(slots, vllm_answers(settings.vllm_memory * settings.gpu_memory * 1e9, whole * size / together, token, length))
    return SimpleNamespace(
        training=policy, scoring=imagined(settings.model, seen, arithmetic), sampling=sampling, token=token,
        policy=whole, critic=0 if settings.critic_free else trunk + last.shape[1] + 1,  # a linear head
        body=trunk - first.numel(), layer=(trunk - first.numel()) // layers,
        embeddings=first.numel() + (0 if first is last else last.numel()), words=last.shape[0], width=last.shape[1],
        held=4 if seen == torch.float32 else 2,
        attention=layers * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads), size=size,
        length=length, prompts=here, answers=here * samples, slots=slots, updates=updates, heads=heads,
        read=min(here, max(1, settings.sample_rows // samples)),  # prompts at once
        updated=updated, micro=rows_of(settings.micro_batch_tokens, length, updated),
        scored=rows_of(4 * settings.micro_batch_tokens, length, here * samples),
    )  # fmt: skip


def memory(settings):
    """{part: (bytes while sampling, while scoring, in the update)} of one GPU at its fullest."""
    s = shapes(settings)
    away = settings.cpu_offload and settings.gpus > 1
    weights, gradients, moments = (0, 0, 0) if away else state_bytes(s.policy + s.critic, settings.gpus)
    copied = s.policy * s.size / settings.tensor_parallel
    if settings.engine != "vllm" and settings.gpus == 1 and s.size == 4:  # one GPU in float32 samples from the policy itself
        copied = 0
    gathered = [settings.gpus > 1 and gathered_bytes(s.layer, s.embeddings, s.size, backward) for backward in (False, True)]
    table = s.token * s.slots * table_columns(settings.prompt_length, settings.response_length, s.answers > s.slots)
    table += s.token * s.read * settings.prompt_length * (1 if s.read == s.prompts else 2)  # the prompts that wait, the next ones
    tables = (table, 0, 0)
    scoring = activations(s.scoring, *s.scored, backward=False)[1]
    kept, peak = activations(s.training, *s.micro)
    tokens = [rows * min(length, settings.response_length) for rows, length in (s.scored, s.micro)]
    logits = [logit_bytes(count, s.words, s.width, s.held, backward) for count, backward in zip(tokens, (False, True))]
    reading = max(activations(s.sampling, s.read, settings.prompt_length, backward=False)[1], draw_bytes(s.slots, s.words, s.size))
    if settings.engine == "vllm":  # which keeps its share all the time, and whose temporaries are in it
        away, reading, rest = False, 0, max(0, settings.vllm_memory * settings.gpu_memory * 1e9 - copied)
        tables = (rest, rest, rest)
    return {
        "weights": (weights, weights, weights),
        "AdamW's moments": (moments, moments, moments),
        "gradients": (0, 0, gradients),
        "copy that samples": (copied, 0, 0) if away else (copied, copied, copied),
        "gathered weights": (0, *gathered),
        "keys and values": tables,
        "activations": (0, 0, kept),
        "logits, temporaries": (reading, max(scoring, logits[0]), max(peak - kept, logits[1])),
    }


def totals(settings):
    """Bytes of one GPU while sampling, while scoring and in the update."""
    return [sum(column) for column in zip(*memory(settings).values())]


def step(settings, response):
    """{part: (operations, seconds)} of one GPU in one step (rollout and updates), every answer `response` tokens.

    Sampling: the prompts, then steps = ⌈B · N / slots⌉ · T for N GPUs that sample as one (or 1), bound by what is read or by what is
    computed. Scoring: one forward pass of
    policy and critic. Updates: three times that, four with checkpointing; the output matrix four times (its logits are made again).
    """
    s, prompt, end = shapes(settings), settings.prompt_length, settings.prompt_length + response
    head = 2 * s.words * s.width * response
    both = 1 if settings.critic_free else 2
    rate, bandwidth = settings.gpu_tflops * 1e12 * COMPUTE_USE, settings.gpu_bandwidth * 1e9 * BANDWIDTH_USE
    read = forward_operations(s.body, s.attention, s.prompts, 0, prompt)
    decoded = forward_operations(s.body, s.attention, s.answers, prompt, end) + s.answers * head
    together = settings.tensor_parallel
    steps = -(-s.answers * together // max(1, s.slots)) * response
    moved = decode_bytes(steps, s.policy * s.size / together, s.answers * together, s.token, prompt, response)
    scored = both * forward_operations(s.body, s.attention, s.answers, 0, end) + s.answers * head
    passes = 4 if settings.gradient_checkpointing else 3
    trained = passes * both * forward_operations(s.body, s.attention, s.updates * s.updated, 0, end) + 4 * s.updates * s.updated * head
    return {
        "sampling": (read + decoded, read / rate + max(moved / bandwidth, decoded / rate)),
        "scoring": (scored, scored / rate),
        "updates": (trained, trained / rate),
    }


def seconds(parts):
    """Of a step, from its parts."""
    return sum(taken for _, taken in parts.values())


def fits(settings):
    """Whether every phase has room, and vLLM for one answer at least."""
    return max(totals(settings)) <= settings.gpu_memory * 1e9 and shapes(settings).slots > 0


def remedies(settings):
    """[(flags, settings)]: what to change, each beside those before it, until the run fits or no flag is left that helps.

    Found one change at a time, for the fullest phase what costs least first; a policy whose copy takes more than a quarter of a
    GPU samples with vLLM over up to eight. More GPUs than prompts are no remedy: some would have none to sample.
    """
    now, limit = settings, settings.gpu_memory * 1e9
    while not fits(now):
        full, s, by_vllm = totals(now), shapes(now), now.engine == "vllm"
        phase = full.index(max(full))
        together = [n for n in (2, 4, 8) if n > now.tensor_parallel and now.gpus % n == 0 and s.heads % n == 0]
        at_once = now.micro_batch_tokens * (4 if phase == 1 else 1)
        stays = STAYS + ("keys and values",) * by_vllm
        batches_matter = sum(part[phase] for name, part in memory(now).items() if name in stays) < limit
        if together and (not s.slots if by_vllm else s.policy * s.size > limit / 4):
            now = replace(now, engine="vllm", tensor_parallel=together[-1])
        elif not s.slots and now.vllm_memory < 0.9:
            now = replace(now, vllm_memory=round(now.vllm_memory + 0.1, 2))
        elif batches_matter and phase == 0 and s.slots > 1 and not by_vllm:
            now = replace(now, sample_rows=s.slots // 2)
        elif batches_matter and phase == 2 and not now.gradient_checkpointing:
            now = replace(now, gradient_checkpointing=True)
        elif batches_matter and phase > 0 and at_once >= 2 * (now.prompt_length + now.response_length):
            now = replace(now, micro_batch_tokens=now.micro_batch_tokens // 2)
        elif now.gpus > 1 and not now.cpu_offload:
            now = replace(now, cpu_offload=True)
        elif 2 * now.gpus <= now.prompts * (1 if now.group_sampling else now.samples):
            now = replace(now, gpus=2 * now.gpus)
        else:
            break
    changes = []
    for names in (
        ("engine", "tensor_parallel"), ("vllm_memory",), ("gradient_checkpointing",), ("micro_batch_tokens",), ("cpu_offload",),
        ("sample_rows",), ("gpus",),
    ):  # fmt: skip
        if new := {name: getattr(now, name) for name in names if getattr(now, name) != getattr(settings, name)}:
            settings = replace(settings, **new)
            changes.append((" ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in new.items()), settings))
    return changes


def report(settings):
    """Prints the plan. Returns: {"gigabytes": (of one GPU while sampling, while scoring, in the update), "seconds", "fits"}."""
    s, full, limit = shapes(settings), totals(settings), settings.gpu_memory * 1e9
    print(f"on paper: {settings.model} on {settings.gpus} GPU{'s' * (settings.gpus > 1)} of {settings.gpu_memory:g} GB")
    print(f"policy {s.policy:,} parameters, critic {s.critic:,}; answers of at most {settings.response_length:,} tokens")
    beside = f"{s.slots} side by side" + f" on {settings.tensor_parallel} GPUs" * (settings.tensor_parallel > 1)
    print(
        f"one GPU: {s.prompts} prompts, {s.answers} answers, {beside}; {s.updates} updates of {s.updated} "
        f"answers, {s.micro[0]} x {s.micro[1]:,} tokens at once"
    )
    if settings.gpus > settings.prompts * (1 if settings.group_sampling else settings.samples):
        print(f"warning: more GPUs than prompts ({settings.prompts}): some have none to sample")

    def line(name, *columns):
        print(f"{name:34s}" + "".join(f"{column:>15s}" for column in columns))

    print()
    line("GB of one GPU", "sampling", "scoring", "update")
    for name, numbers in (memory(settings) | {"together": full}).items():
        line(name, *(f"{number / 1e9:.1f}" for number in numbers))
    line("", *("fits" if number <= limit else "does not fit" for number in full))
    if not s.slots:
        print(
            f"vLLM's {settings.vllm_memory:.0%} (--vllm_memory) of a GPU have no room beside its weights for one answer of {s.length:,} tokens"
        )

    lengths = (settings.response_length, max(1, settings.response_length // 2))
    steps = [step(settings, length) for length in lengths]
    print(f"\none step, if every answer has {lengths[0]:,} tokens, and if {lengths[1]:,}; one GPU's operations")
    for name in steps[0]:
        line(name, *(text for of in steps for text in (f"{of[name][0] / 1e15:,.0f} PFLOP", f"{of[name][1]:,.0f} s")))
    line("together", *(text for of in steps for text in ("", f"{seconds(of) / 3600:.2f} h")))
    line("answer tokens, all GPUs", *(text for length in lengths for text in ("", f"{settings.prompts * settings.samples * length:,}")))
    print(
        f"assumed: {COMPUTE_USE:.0%} of {settings.gpu_tflops:g} TFLOP/s, {BANDWIDTH_USE:.0%} of {settings.gpu_bandwidth:g} GB/s, prompts of "
        f"{settings.prompt_length:,} tokens; no time\nfor starting kernels, between GPUs, for verdicts and evaluations; no fragments of memory"
    )
    if not fits(settings):
        print()
        line("to make it fit", "sampling", "scoring", "update", "one step")
        now = settings
        for flag, now in remedies(settings):
            hours = seconds(step(now, now.response_length)) / 3600
            line(flag, *(f"{number / 1e9:.1f}" for number in totals(now)), f"{hours:.2f} h")
        if not fits(now):
            copied = memory(now)["copy that samples"][0] / 1e9
            print(f"still too much, and no flag is left; {copied:.1f} GB are the copy that samples")
    return {"gigabytes": tuple(number / 1e9 for number in full), "seconds": seconds(steps[0]), "fits": fits(settings)}
