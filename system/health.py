"""Is a run well? Rules over its metrics (docs/metrics.md), each said once, when it is first broken.

docs/health.md has pictures of a run that is well and of four that are not.
"""

from tqdm import tqdm

from system.run import say_once

# Nats a token: float32 rounds by 1e-6, bfloat16 made 0.04 of SmolLM2's.
SMALL_GAP, LARGE_GAP = 1e-3, 0.2

# What is wrong: (whether it is, by a rollout's metrics n and the best training accuracy before it;
# what to try).
RULES = {
    "a step was skipped, its loss or gradient was not finite": (
        lambda n, best: n["bad_steps"] > 0,
        "lower --lr, --critic_lr or --max_grad_norm"),
    "most answers are cut at --response_length": (
        lambda n, best: n["truncated"] > 0.5,
        "raise it, or use a model or prompt that comes to an end"),
    "training accuracy is below half of its best": (
        lambda n, best: n["accuracy"] < 0.5 * best,
        "go back to an earlier checkpoint with a lower --lr"),
    "the policy moves far within a rollout: approx_kl is above 0.02": (
        lambda n, best: n["approx_kl"] > 0.02,
        "lower --lr, or raise --warmup"),
    "the critic is worse than a constant": (
        lambda n, best: n.get("explained_variance", 0) < -0.25,
        "pretrain it for longer, or lower --critic_lr"),
    "the critic explains less than 5% of its first rollout": (
        lambda n, best: n["step"] == 1 and n.get("explained_variance", 1) < 0.05,
        "pretrain it (piece 1), for longer or with a higher --pretrain_lr"),
    "the sampler is not the policy, and nothing corrects for that": (
        lambda n, best: n["sampler_gap"] > SMALL_GAP and n["importance"] == 1,
        "leave --is_clip out"),
    "the sampler draws from another distribution than is trained": (
        lambda n, best: n["sampler_gap"] > LARGE_GAP,
        "--dtype float32, or another --engine"),
}  # fmt: skip


def watch(step, numbers, progress):
    """Says which rules a rollout's metrics are the first to break. Keeps in `progress`, and so in
    the checkpoint, that rollout of each rule, and the best training accuracy."""
    since, best = progress.setdefault("health", {}), progress.get("best_accuracy", 0.0)
    for wrong, (is_broken, _) in RULES.items():
        if wrong not in since and is_broken(numbers | {"step": step}, best):
            since[wrong] = step
            tqdm.write(f"warning: {told(wrong, step)}")
    if numbers["importance"] != 1:
        said = "the sampler's log-probs are not quite the training's (sampler_gap): the policy loss"
        say_once(f"note: {said} is corrected by importance weights, see --is_clip")
    progress["best_accuracy"] = max(best, numbers["accuracy"])


def told(wrong, step):
    return f"{wrong}, since rollout {step}: {RULES[wrong][1]} (docs/health.md)"


def summary(progress):
    """What a run says of itself in the end."""
    since = progress.get("health", {}).items()
    print("\n".join(told(*pair) for pair in since) or "no rule of docs/health.md was broken")
