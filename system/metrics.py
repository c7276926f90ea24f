"""Numbers of a rollout's optimiser steps: summed over micro-batches, averaged over steps."""


def add(sums, found, micro):
    """Adds a micro-batch's numbers (scalar tensors), and its size; of names in _max, the larger."""
    for name, value in found.items():
        before, value = sums.get(name, 0.0), value.item()
        sums[name] = max(before, value) if name.endswith("_max") else before + value
    sums["padded_tokens"] = sums.get("padded_tokens", 0) + micro["token_BL"].numel()


def of_mini_batch(sums, batch):
    """The sums over all micro-batches and ranks, those that count tokens as shares of them."""
    tokens, prompts = int(batch["length_B"].sum()), int(batch["prompt_length_B"].sum())
    shares = {name: sums[name] / tokens for name in ("clip_low", "clip_high", "approx_kl")}
    padding = 1 - (tokens + prompts) / sums.pop("padded_tokens")
    return sums | shares | {"padding": padding}


def means(updates):
    """Means over a rollout's optimiser steps; of those skipped only where all were."""
    good = [update for update in updates if not update["bad_steps"]] or updates
    mean = {name: sum(update[name] for update in good) / len(good) for name in updates[0]}
    largest = max(update["ratio_max"] for update in good)
    return mean | {"ratio_max": largest, "bad_steps": sum(u["bad_steps"] for u in updates)}


def speeds(seconds, rows):
    """Where the time of a rollout went, and response tokens a second."""
    tokens = int(rows["length_B"].sum())
    return {f"seconds_{name}": taken for name, taken in seconds.items()} | {
        "sample_tokens_per_second": tokens / seconds["sample"],
        "train_tokens_per_second": tokens / seconds["update"],
    }
