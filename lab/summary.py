"""A run as text: what `plot.py RUN` prints beside its curves."""

SUMMARY = ("test_accuracy", "test_greedy_accuracy", "test_length", "accuracy", "reward", "length", "truncated", "entropy", "explained_variance",
           "value_loss", "policy_loss", "nll_loss", "approx_kl", "clip_high", "policy_grad_norm", "critic_grad_norm", "sampler_gap")  # fmt: skip


def summarise(lines, label):
    """A run as text: each metric at first, at its lowest and highest, and last; where the time went; what went wrong."""
    if not lines:
        return f"{label}: nothing logged yet"
    last = lines[-1]
    text = [f"{label}: {last['step']} rollouts, {last.get('gradient_steps', 0):.0f} optimiser steps, {last.get('answers', 0):.0f} answers"]
    text.append(f"{'':22s}{'first':>10s}{'lowest (rollout)':>20s}{'highest (rollout)':>20s}{'last':>10s}")
    for name in SUMMARY:
        points = [(line[name], line["step"]) for line in lines if line.get(name) is not None]
        if points:
            (low, at_low), (high, at_high) = min(points), max(points)
            text.append(
                f"{name:22s}{points[0][0]:10.4g}{f'{low:.4g} ({at_low})':>20s}{f'{high:.4g} ({at_high})':>20s}{points[-1][0]:10.4g}"
            )
    seconds = {name: sum(line.get(f"seconds_{name}") or 0 for line in lines) for name in ("sample", "score", "update", "eval")}
    whole = sum(seconds.values()) or 1
    text.append(f"{whole / 60:.1f} minutes: " + ", ".join(f"{name} {taken / whole:.0%}" for name, taken in seconds.items()))
    steps, bad = [line["step"] for line in lines], sum(line.get("bad_steps") or 0 for line in lines)
    text += [f"warning: {bad:.0f} optimiser steps were not finite and were skipped: see bad_batches/"] * bool(bad)
    text += ["warning: steps are missing or repeated in metrics.jsonl"] * (steps != list(range(steps[0], steps[0] + len(steps))))
    return "\n".join(text)
