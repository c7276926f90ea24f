"""How fast is each part of a step, beside what one would use instead?

    python -m lab.bench                            # all parts but vllm, in the embedded world
    python -m lab.bench --parts vllm               # one of them, where vLLM is installed
    python -m lab.bench --model DIR --train FILE   # and any other flag of train_vapo.py

Both sides have the same inputs, in one process, and take turns. A line has both median speeds and
the turns' ratios, ours to the other: median, lowest, highest. Last: shares of the device's limits.
"""

from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from torch.utils.benchmark import timer

import gae
import losses
import model
import rollout
import table
import toy
import train_vapo
from lab import plan
from system import loading, run, settings
from system.settings import flag
from train_value import value_gradients


def seconds(function):
    """(wall-clock seconds of one call, the device's work included; what it returned)."""
    started, result = timer(), function()  # timer waits for the device
    return timer() - started, result


def side_by_side(title, against, ours, theirs, repeats):
    """Prints and returns one line of the table, a dict.
    ours, theirs: functions; of those that return rows, response tokens a second count."""
    speeds = [], []
    for _ in range(repeats):
        for side, function in zip(speeds, (ours, theirs)):
            taken, rows = seconds(function)
            per_token = isinstance(rows, dict)
            side.append((int(rows["length_B"].sum()) if per_token else 1) / taken)
    ratios = [mine / other for mine, other in zip(*speeds)]
    line = {"part": title, "against": against, "unit": "tok/s" if per_token else "times/s",
            "ours": median(speeds[0]), "theirs": median(speeds[1]), "ratio": median(ratios),
            "lowest": min(ratios), "highest": max(ratios)}  # fmt: skip
    print("{part:28s} {ours:9,.1f} {unit}   {against:26s} {theirs:9,.1f} {unit}   {ratio:6.2f}x "
          "({lowest:.2f} to {highest:.2f})".format(**line), flush=True)  # fmt: skip
    return line


def bench_gae(asked, generator):
    """512 answers of 4,096 tokens, a λ for each, against the recursion token by token."""
    value_BT, lam_B = (torch.rand(size, device=generator.device) for size in ((512, 4096), 512))
    reward_BT, mask_BT = torch.zeros_like(value_BT), torch.ones_like(value_BT)

    def loop():  # as it stands in most trainers
        adv_B, next_B, advantages = 0.0, 0.0, []
        for t in reversed(range(value_BT.shape[1])):
            adv_B = reward_BT[:, t] + next_B - value_BT[:, t] + lam_B * adv_B
            next_B = value_BT[:, t]
            advantages.append(adv_B)
        return torch.stack(advantages[::-1], dim=1)

    ours = partial(gae.gae, reward_BT, value_BT, mask_BT, lam_B)
    return "GAE, 512 x 4096", "a loop over the tokens", ours, loop


def sample(sampler, tokenizer, problems, asked, generator):
    """Rows of answers (table.py), every other one called right."""
    how = (asked.samples, asked.response_length, asked.temperature, generator, asked.sample_rows)
    rows = rollout.sample(sampler, tokenizer, problems, *how, engine=asked.engine)
    rows["correct_B"] = torch.arange(len(rows["length_B"])) % 2 == 0
    return rows | {"reward_B": rows["correct_B"].float()}


def bench_sampling(engine, asked, generator):
    """Tokens a second of a rollout, to the last of all answers, with their log-probs."""
    policy, tokenizer, (problems,) = model.set_up(asked, [asked.train])
    how, other = (tokenizer, problems[: asked.prompts]), replace(asked, engine=engine)
    ours = partial(sample, loading.sampling_copy(policy), *how, asked, generator)
    theirs = partial(sample, loading.sampler_of(policy, other), *how, other, generator)
    return "sampling", f"--engine {engine}", ours, theirs


def scored(asked, generator):
    """(policy, a critic, a mini-batch scored as by train_vapo.train, asked)."""
    policy, tokenizer, (problems,) = model.set_up(asked, [asked.train])
    sampler = loading.sampling_copy(policy)
    rows = sample(sampler, tokenizer, problems[: asked.prompts], asked, generator)
    rows = next(table.mini_batches(rows, asked.mini_batch, torch.Generator()))
    critic = loading.load_critic(asked.model, policy.device, dtype=asked.dtype)
    torch.nn.init.normal_(loading.value_head(critic).weight, std=0.1)  # at 0 no gradient passes
    train_vapo.score(policy, critic, rows, asked)
    train_vapo.advantages(rows, asked)
    return policy, critic, rows, asked


def update(policy, critic, rows, asked, plain=False):
    """Makes the gradients of a mini-batch, as train_vapo.train does, and throws them away.
    plain: over rows as they come, 16 at a time, with log_softmax of whole logits."""
    batch, every_B = dict(rows), torch.arange(len(rows["length_B"]))
    train_vapo.weights(batch, asked)
    if not plain:
        value_gradients(critic, batch, asked)
        train_vapo.policy_gradients(policy, batch, asked)
    for index_N in every_B.split(16) if plain else ():
        part = table.take(batch, index_N, policy.device)
        with loading.autocast(policy):
            hidden_BTD = model.response_hidden(policy.base_model, part)
            logp_BTV = policy.get_output_embeddings()(hidden_BTD).float().log_softmax(-1)
        logp_BT = logp_BTV.gather(2, table.response_tokens(part)[..., None])[..., 0]
        value_BT = losses.value_loss(model.critic_values(critic, part), part["target_BT"])
        clip = (part["old_logp_BT"], part["adv_BT"], asked.eps_low, asked.eps_high)
        policy_BT = losses.policy_loss(logp_BT, *clip) * part["policy_weight_BT"]
        nll_BT = asked.mu * losses.nll_loss(logp_BT) * part["nll_weight_BT"]
        (policy_BT + nll_BT + value_BT * part["critic_weight_BT"]).sum().backward()
    policy.zero_grad()
    critic.zero_grad()
    return rows


def bench_update(asked, generator):
    """Response tokens a second of a mini-batch, forward and backward of policy and critic."""
    ours = partial(update, *scored(asked, generator))
    return "update", "16 rows, whole logits", ours, partial(ours, plain=True)


def of_the_limit(asked, speeds, device):
    """What share of a device's limit (a copy; a product of bfloat16 matrices) decoding and updates
    reach. Bytes a token: weights / slots + keys and values of (P + T/2). Operations a token: 6 for
    each parameter of policy and critic, 8 with checkpointing; without attention's, and prompts'."""
    s, size = plan.shapes(asked), 2 ** (13 if device.type == "cuda" else 10)
    full = torch.zeros(size, size, device=device)
    half = full.bfloat16()
    copied, product = (min(seconds(function)[0] for _ in range(5))
                       for function in (full.clone, partial(torch.mm, half, half)))  # fmt: skip
    kept = s.token * (asked.prompt_length + asked.response_length / 2)
    moved = speeds["sampling"] * (s.policy * s.size / s.slots + kept)
    work = speeds["update"] * (6 + 2 * asked.gradient_checkpointing) * (s.policy + s.critic)
    return {"decoding, of the device's bytes a second": moved * copied / (2 * full.nbytes),
            "update, of its operations a second": work * product / (2 * size**3)}  # fmt: skip


# fmt: off
PARTS = {"gae": bench_gae, "sampling": partial(bench_sampling, "hf"),
         "update": bench_update, "vllm": partial(bench_sampling, "vllm")}


@dataclass(frozen=True)
class Settings(plan.Settings):
    PACKAGES = train_vapo.Settings.PACKAGES
    parts: list[str] = flag(list(PARTS)[:-1], "which", (
        f"must be of {', '.join(PARTS)}", lambda parts: set(parts) <= set(PARTS)))
    repeats: int = flag(5, "turns of each side", settings.AT_LEAST_1)
    json: str = flag("", "also write the numbers to this file")
# fmt: on


@run.exit_on_bad_input
def main(argv=None):
    defaults = {"train": "-", "test": "-"}  # some parts need no problems
    asked = settings.parse(Settings, argv, __doc__, defaults)
    if set(asked.parts) - {"gae"}:
        defaults |= toy.defaults("train_vapo", asked.model)
        asked = settings.parse(Settings, argv, __doc__, defaults)
    train_vapo.Settings.check(asked)
    device = run.pick_device(asked.device)
    if device.type == "cpu" and asked.dtype == "auto":  # the plan takes it for a GPU's bfloat16
        asked = replace(asked, dtype="float32")
    on, lines = run.describe(device) | {"model": asked.model}, []
    print("bench: " + ", ".join(f"{name} {value}" for name, value in on.items()))
    for part in map(PARTS.get, asked.parts):
        generator = run.seeded_generator(0, "bench", device)
        lines.append(side_by_side(*part(asked, generator), asked.repeats))
    speeds = {line["part"].partition(",")[0]: line["ours"] for line in lines}
    shares = of_the_limit(asked, speeds, device) if {"sampling", "update"} <= speeds.keys() else {}
    print("".join(f"{name}: {share:.1%}\n" for name, share in shares.items()), end="")
    if asked.json:
        run.write_json(asked.json, {"on": on, "lines": lines, "shares": shares})
    return lines


if __name__ == "__main__":
    main()
