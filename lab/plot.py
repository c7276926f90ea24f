"""Pictures: the curves of one or several runs, and the figures of ablate.py. Reads metrics.jsonl, writes PNGs.

python plot.py runs/NAME                                   # prints a summary, writes runs/NAME/curves.png
python plot.py runs/A runs/B --labels A B --out both.png   # several runs in one picture
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

import gae
from run import BadInput, exit_on_bad_input, flag, parse_settings, require
from summary import summarise

# title, the metrics in it (the first as a line, a second as dots), and whether its axis starts at 0 and ends at 1
PANELS = [
    ("accuracy: held-out (line), training rollouts (dots)", ("test_accuracy", "accuracy"), True),
    ("response length in tokens: held-out (line), training (dots)", ("test_length", "length"), False),
    ("entropy of the policy (nats per token)", ("entropy",), False),
    ("explained variance of the critic", ("explained_variance",), True),
    ("V at the first (line) and last token (dots)", ("value_first", "value_last"), True),
    ("λ_policy, mean over answers", ("lambda",), True),
]


@dataclass(frozen=True)
class Settings:
    runs: list[str] = field(default_factory=list, metadata={"help": "run directories (may also be given without --runs)"})
    labels: list[str] = field(default_factory=list, metadata={"help": "one label a run; default: the directories' names"})
    out: str = flag("", "picture to write; default: curves.png in the first run directory")


def read(run_dir):
    """The lines of a run's metrics.jsonl. Raises: BadInput."""
    try:
        return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise BadInput(f"cannot read the metrics of {run_dir}: {error}") from None


def draw(runs, labels, path):
    """Draws PANELS for the runs (lists of lines) into a PNG."""
    figure, axes = subplots(2, 3, figsize=(13, 6.5))
    for axis, (title, names, unit) in zip(axes.flat, PANELS):
        for i, (lines, label) in enumerate(zip(runs, labels)):
            for name, style in zip(names, ("-", ".") if len(names) > 1 else ("-",)):
                points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
                if points:
                    marker = {"marker": "o", "markersize": 4} if style == "-" and name.startswith("test_") else {}
                    axis.plot(*zip(*points), style, color=f"C{i}", label=label if style == "-" else None, **marker)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("rollouts", fontsize=9)
        axis.grid(alpha=0.3)
        if unit:
            axis.set_ylim(-0.02, 1.02)
    if len(runs) > 1:
        axes.flat[0].legend(fontsize=9)
    save(figure, path)


def subplots(rows, columns, figsize):
    """matplotlib's figure and axes, without a screen. Raises: BadInput if matplotlib is not there."""
    try:
        import matplotlib
    except ImportError:
        raise BadInput("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=figsize, constrained_layout=True)


def save(figure, path):
    from matplotlib import pyplot

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def band(axis, by_seed, name, label, color, unit="gradient_steps"):
    """Mean of a metric over seeds as a line, smallest to largest as a band, against the gradient steps."""
    points = {}
    for lines in by_seed.values():
        for line in lines:
            if line.get(name) is not None:
                points.setdefault(line.get(unit) or 0, []).append(line[name])
    steps = sorted(step for step in points if len(points[step]) == max(map(len, points.values())))
    if steps:
        axis.plot(steps, [sum(points[s]) / len(points[s]) for s in steps], color=color, label=label)
        axis.fill_between(steps, [min(points[s]) for s in steps], [max(points[s]) for s in steps], color=color, alpha=0.15, linewidth=0)


def finish(axis, title, x, legend=True):
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x, fontsize=9)
    axis.grid(alpha=0.3)
    if legend:
        axis.legend(fontsize=8)


def draw_methods(runs, titles, path):
    figure, axes = subplots(1, 1, figsize=(7.5, 4.5))
    for i, row in enumerate(("vapo", "dapo", "grpo", "vc_ppo", "ppo")):
        if row in runs:
            band(axes, runs[row], "test_accuracy", titles[row], f"C{i}")
    axes.set_ylim(0, 1)
    finish(axes, "held-out accuracy at T = 1 (mean and range over seeds)", "gradient steps")
    save(figure, path)


def draw_dynamics(runs, titles, path):
    figure, axes = subplots(1, 3, figsize=(13, 3.8))
    for axis, (name, title) in zip(
        axes,
        (
            ("test_length", "held-out response length (tokens)"),
            ("entropy", "entropy (nats)"),
            ("accuracy", "accuracy of the training rollouts"),
        ),
    ):
        for i, row in enumerate(("vapo", "dapo", "grpo", "vc_ppo", "ppo")):
            if row in runs:
                band(axis, runs[row], name, titles[row], f"C{i}")
        finish(axis, title, "gradient steps", legend=name == "test_length")
    save(figure, path)


def draw_bars(summary, titles, paper, path):
    rows = sorted((row for row in paper if row in summary), key=lambda row: paper[row])
    figure, axes = subplots(1, 2, figsize=(11, 0.35 * len(rows) + 1.2))
    for axis, numbers, errors, title in (
        (axes[0], [paper[row] for row in rows], None, "paper: AIME 2024, avg@32 (%)"),
        (
            axes[1],
            [100 * summary[row]["accuracy"] for row in rows],
            [100 * summary[row]["half"] for row in rows],
            "here: held-out accuracy (%)",
        ),
    ):
        axis.barh([titles[row] for row in rows], numbers, xerr=errors, color=["C1" if row in ("ppo", "dapo") else "C0" for row in rows])
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3, axis="x")
    axes[1].set_yticklabels([])
    save(figure, path)


def draw_pieces(runs, titles, path):
    """Every piece from both ends: VAPO without it, PPO with it; a small dot a seed, a large one their mean."""
    pieces = [row.removeprefix("ppo_with_") for row in runs if row.startswith("ppo_with_")][::-1]
    figure, axis = subplots(1, 1, figsize=(8.5, 0.45 * len(pieces) + 1.4))
    for color, end, name, label in (("C0", "vapo", "no_{}", "VAPO without it"), ("C1", "ppo", "ppo_with_{}", "PPO with it alone")):
        for y, row in [(None, end), *((y, name.format(piece)) for y, piece in enumerate(pieces))]:
            finals = [[line["test_accuracy"] for line in lines if "test_accuracy" in line][-1] for lines in runs.get(row, {}).values()]
            if not finals:
                continue
            mean = sum(finals) / len(finals)
            if y is None:
                axis.axvline(mean, color=color, linestyle="--", linewidth=1, label=titles[end])
                continue
            shift = 0.12 if end == "vapo" else -0.12
            axis.scatter(finals, [y + shift] * len(finals), s=10, color=color, alpha=0.5)
            axis.scatter([mean], [y + shift], s=50, color=color, label=label if y == 0 else None)
    axis.set_yticks(range(len(pieces)), [titles[f"ppo_with_{piece}"].removeprefix("PPO with ") for piece in pieces])
    axis.set_xlim(-0.02, 1)
    finish(axis, "held-out accuracy with one piece taken from VAPO, or given to PPO", "accuracy")
    save(figure, path)


def draw_bias(lines, path):
    """VC-PPO's bias figure, from bias.py's lines."""
    figure, axes = subplots(1, 2, figsize=(11, 3.8))
    position = [line["position"] for line in lines]
    axes[0].plot(position, [line["outcome"] for line in lines], "k--", label="mean outcome of the answers that get there")
    for i, (name, label) in enumerate((("before", "reward model as critic"), ("after", "after value pretraining"))):
        axes[0].plot(position, [line[f"value_{name}"] for line in lines], color=f"C{i}", label=label)
        axes[1].plot(position, [line[f"advantage_{name}"] for line in lines], color=f"C{i}", label=label)
    axes[1].axhline(0, color="k", linestyle="--", linewidth=1)
    finish(axes[0], "mean V", "token position")
    finish(axes[1], "mean advantage at λ = 0.95", "token position")
    save(figure, path)


def draw_reach(alpha, lengths, path):
    """How much of an outcome of 1 reaches token t: the advantage where V = 0."""
    figure, axes = subplots(1, len(lengths), figsize=(5.5 * len(lengths), 3.6))
    for axis, length in zip(axes, lengths):
        length_B = torch.tensor([length])
        zero_BT = torch.zeros(1, length)
        reward_BT = gae.terminal_reward(torch.ones(1), length_B, length)
        adaptive = gae.length_adaptive_lambda(length_B, alpha)
        for lam, label in ((1.0, "λ = 1"), (0.95, "λ = 0.95"), (adaptive, f"adaptive, α = {alpha:g}: λ = {adaptive.item():.3f}")):
            axis.plot(gae.gae(reward_BT, zero_BT, zero_BT + 1, lam)[0].tolist(), label=label)
        finish(axis, f"an answer of {length} tokens: the outcome's weight at token t", "token position")
    save(figure, path)


def draw_pretraining(value, path):
    figure, axes = subplots(1, 3, figsize=(13, 3.6))
    for axis, name, title in zip(
        axes, ("value_loss", "explained_variance", "slip_auc"), ("held-out value loss", "explained variance", "first-slip AUC")
    ):
        points = [(line["step"], line[name]) for line in value if line.get(name) is not None]
        axis.plot(*zip(*points), "o-", markersize=3, label="the critic")
        if name == "explained_variance":
            best = [line["best_explained_variance"] for line in value if line.get("best_explained_variance") is not None]
            axis.axhline(best[-1], color="k", linestyle="--", label="the best possible")
        finish(axis, title, "optimiser steps", legend=name == "explained_variance")
    save(figure, path)


def draw_lambda(alphas, path):
    figure, axis = subplots(1, 1, figsize=(6, 3.6))
    length_B = torch.arange(1, 401)
    for alpha in alphas:
        axis.plot(length_B.tolist(), gae.length_adaptive_lambda(length_B, alpha).tolist(), label=f"α = {alpha:g}")
    axis.axhline(0.95, color="k", linestyle="--", linewidth=1, label="0.95")
    finish(axis, "λ_policy = 1 − 1/(α l), clamped to [0, 1)", "response length l (tokens)")
    save(figure, path)


def draw_critics(runs, titles, path):
    figure, axes = subplots(1, 3, figsize=(13, 3.6))
    for i, row in enumerate(("vapo", "no_value_pretraining", "ppo")):
        if row in runs:
            for axis, name in zip(axes, ("explained_variance", "best_explained_variance", "slip_auc")):
                band(axis, runs[row], name, titles[row], f"C{i}")
    for axis, title in zip(axes, ("explained variance of the critic", "of the best possible critic", "first-slip AUC")):
        axis.set_ylim(-0.2 if "AUC" not in title else 0.4, 1)
        finish(axis, title, "gradient steps", legend=title.endswith("AUC"))
    save(figure, path)


def draw_alpha(summary, alpha, path):
    points = [(float(row.removeprefix("alpha_")), summary[row]) for row in summary if row.startswith("alpha_")]
    points = sorted([*points, (alpha, summary["vapo"])], key=lambda point: point[0])
    figure, axis = subplots(1, 1, figsize=(6, 3.6))
    axis.errorbar([a for a, _ in points], [n["accuracy"] for _, n in points], yerr=[n["half"] for _, n in points], fmt="o-", capsize=3)
    axis.set_xscale("log")
    finish(axis, "final held-out accuracy by α (mean ± 95% interval)", "α", legend=False)
    save(figure, path)


def lines_of(path):
    """The numbers of a file that ablate.py kept, without its first line, the settings; none if there is no file."""
    return [line for line in map(json.loads, path.read_text().splitlines()) if "config" not in line] if path.exists() else []


def ablation_figures(runs, summary, titles, paper, alpha, out):
    """Draws what there is data for into OUT; returns [(file name, what to see in it)]. `runs` and `summary`: ablate.py's."""
    drawn = []

    def figure(name, sentence, draw, *arguments):
        draw(*arguments, out / name)
        drawn.append((name, sentence))

    if "vapo" in runs:
        figure(
            "methods.png",
            "Who learns fastest, and who is best at the end, at the same number of gradient steps.",
            draw_methods,
            runs,
            titles,
        )
        figure(
            "dynamics.png",
            "Length and accuracy should grow and entropy fall without collapse. (Accuracy: all answers drawn; DAPO's entropy: those that it kept.)",
            draw_dynamics,
            runs,
            titles,
        )
        figure("critics.png", "The critic through RL, beside what any critic could know.", draw_critics, runs, titles)
    if len(set(paper) & set(summary)) > 1:
        figure("ablation.png", "Each bar left is the paper's, right ours; sorted by the paper's.", draw_bars, summary, titles, paper)
    if any(row.startswith("ppo_with_") for row in runs):
        figure(
            "pieces.png",
            "What one piece does alone, and what the others cannot make up for: its distance from each dashed line.",
            draw_pieces,
            runs,
            titles,
        )
    if positions := lines_of(out / "positions.jsonl"):
        figure(
            "bias.png",
            "On held-out problems: a reward model as critic is off the dashed line before the end, so its advantages are not 0 on average.",
            draw_bias,
            positions,
        )
    value = lines_of(out / "raw" / "value.jsonl")
    if value:
        figure(
            "pretraining.png",
            "What value pretraining reaches on held-out problems.",
            draw_pretraining,
            value,
        )
    figure(
        "reach.png",
        "λ = 0.95 hides the outcome from the start of a long answer; adaptive λ gives every length the same share.",
        draw_reach,
        alpha,
        (40, 300),
    )
    figure("lambda.png", "Short answers get a short horizon, long ones a long one.", draw_lambda, (0.05, 0.2, alpha, 1.0))
    if "vapo" in summary and any(row.startswith("alpha_") for row in summary):
        figure("alpha.png", "The sweep of α that the paper lacks.", draw_alpha, summary, alpha)
    return drawn


@exit_on_bad_input
def main(argv=None):
    """Runs the script; returns the path of the picture."""
    import sys

    argv = list(sys.argv[1:] if argv is None else argv)
    settings = parse_settings(Settings, ["--runs", *argv] if argv and not argv[0].startswith("-") else argv, __doc__)
    require(bool(settings.runs), "give at least one run directory: python plot.py runs/NAME")
    labels = settings.labels or [Path(run).name for run in settings.runs]
    require(len(labels) == len(settings.runs), f"{len(settings.runs)} runs need as many --labels, not {len(labels)}")
    path = settings.out or str(Path(settings.runs[0]) / "curves.png")
    runs = [read(run) for run in settings.runs]
    for lines, label in zip(runs, labels):
        print(summarise(lines, label) + "\n")
    draw(runs, labels, path)
    print(path)
    return path


if __name__ == "__main__":
    main()
