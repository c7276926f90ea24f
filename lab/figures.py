"""The figures of the ablations, for report.py. `runs` is {row: {seed: lines}}, as there."""

from functools import partial
from statistics import fmean

from ablate import GROUPS, PIECES, ROWS, RUN
from lab.plot import curve, draw, draw_curves

# fmt: off
# AIME 2024, avg@32, of Qwen2.5-32B (arXiv 2504.05118, table 1).
PAPER = {"vapo": 60, "no_value_pretraining": 11, "no_decoupled_gae": 33,
         "no_length_adaptive_gae": 45, "no_clip_higher": 46, "no_token_level_loss": 53,
         "no_positive_nll": 54, "no_group_sampling": 55, "ppo": 5, "dapo": 50}
TITLES = {row: title for row, (title, _) in ROWS.items()}
RIVALS = ("vapo", "dapo", "grpo", "vc_ppo", "ppo")
CRITICS = ("vapo", "no_value_pretraining", "ppo")


def draw_all(runs, summary, positions, value, out):
    """Draws what there is data for into OUT; returns [(file name, what to see in it)].
    Args: summary, {row: numbers}; positions, the lines of bias.py; value, of value pretraining."""
    def by_steps(rows, name, title, *limits):
        return title, "gradient steps", partial(bands, runs, rows, name, limits)

    def fitting(title, *curves):
        return title, "optimiser steps", partial(draw_curves, curves)

    def by_token(title, curves):
        return title, "token position", partial(draw_curves, curves)

    vapo, single = "vapo" in runs, any(row.startswith("ppo_with_") for row in runs)
    swept = vapo and set(GROUPS["alpha"][1:]) & set(runs)
    figures = [  # file, whether there is data for it, what to see in it, inches, panels of `draw`
        ("methods.png", vapo,
         "Who learns fastest, and who is best at the end, at the same number of gradient steps.",
         (7.5, 4.5), [by_steps(RIVALS, "test_accuracy",
                               "held-out accuracy at T = 1 (mean and range over seeds)", 0, 1)]),
        ("dynamics.png", vapo,
         "Length and accuracy should grow and entropy fall without collapse. (Accuracy: all "
         "answers drawn; DAPO's entropy: those that it kept.)", (13, 3.8), [
             by_steps(RIVALS, "test_length", "held-out response length (tokens)"),
             by_steps(RIVALS, "entropy", "entropy (nats)"),
             by_steps(RIVALS, "accuracy", "accuracy of the training rollouts")]),
        ("critics.png", vapo,
         "The critic through RL, beside what any critic could know.", (13, 3.6), [
             by_steps(CRITICS, "explained_variance", "explained variance of the critic", -0.2, 1),
             by_steps(CRITICS, "best_explained_variance", "of the best possible critic", -0.2, 1),
             by_steps(CRITICS, "slip_auc", "first-slip AUC", 0.4, 1)]),
        ("ablation.png", len(set(PAPER) & set(summary)) > 1,
         "Each bar left is the paper's, right ours; sorted by the paper's.", (11, 4.7), [
             ("paper: AIME 2024, avg@32 (%)", "", partial(bars, summary, False)),
             ("here: held-out accuracy (%)", "", partial(bars, summary, True))]),
        ("pieces.png", single,
         "What one piece does alone, and what the others cannot make up for: its distance from "
         "each dashed line.", (8.5, 4.5), [
             ("held-out accuracy with one piece taken from VAPO, or given to PPO", "accuracy",
              partial(pieces, summary))]),
        ("bias.png", positions,
         "On held-out problems: a reward model as critic is off the dashed line before the end, so "
         "its advantages are not 0 on average.", (11, 3.8), [
             by_token("mean V", means(positions, "value")),
             by_token("mean advantage at λ = 0.95", means(positions, "advantage"))]),
        ("pretraining.png", value,
         "What value pretraining reaches on held-out problems.", (13, 3.6), [
             fitting("held-out value loss", (curve(value, "value_loss"), "o-", None)),
             fitting("explained variance", (curve(value, "explained_variance"), "o-", "the critic"),
                     (curve(value, "best_explained_variance"), "k--", "the best possible")),
             fitting("first-slip AUC", (curve(value, "slip_auc"), "o-", None))]),
        ("alpha.png", swept, "The sweep of α that the paper lacks.", (6, 3.6), [
            ("final held-out accuracy by α (mean ± 95% interval)", "α", partial(sweep, summary))]),
    ]
    figures = [figure for figure in figures if figure[1]]
    for name, _, _, size, panels in figures:
        draw(out / name, size, panels)
    return [(name, sentence) for name, _, sentence, *_ in figures]
# fmt: on


def bands(runs, rows, name, limits, axis):
    """A metric's mean over seeds, and a band from lowest to highest."""
    first = axis.get_subplotspec().is_first_col()
    for i, row in enumerate(row for row in rows if row in runs):
        numbers = {}
        for line in sum(runs[row].values(), []):
            if line.get(name) is not None:
                numbers.setdefault(line.get("gradient_steps", 0), []).append(line[name])
        most = max(map(len, numbers.values()), default=0)
        numbers = {step: ys for step, ys in sorted(numbers.items()) if len(ys) == most}
        low, mean, high = ([f(ys) for ys in numbers.values()] for f in (min, fmean, max))
        axis.plot(list(numbers), mean, color=f"C{i}", label=TITLES[row] if first else None)
        axis.fill_between(list(numbers), low, high, color=f"C{i}", alpha=0.15, linewidth=0)
    axis.set_ylim(*limits)


def bars(summary, ours, axis):
    """The rows that the paper has too, by its numbers or by ours."""
    rows = sorted((row for row in PAPER if row in summary), key=PAPER.get)
    numbers = [100 * summary[row]["accuracy"] if ours else PAPER[row] for row in rows]
    half = [100 * summary[row]["half"] for row in rows] if ours else None
    colors = ["C1" if row in ("ppo", "dapo") else "C0" for row in rows]
    axis.barh(range(len(rows)), numbers, xerr=half, color=colors)
    axis.set_yticks(range(len(rows)), ["" if ours else TITLES[row] for row in rows])


def pieces(summary, axis):
    """VAPO without each piece, PPO with it: a small dot a seed, a large one their mean."""
    names = [piece for piece in PIECES if f"ppo_with_{piece}" in summary][::-1]
    finals = {row: list(numbers["finals"].values()) for row, numbers in summary.items()}
    for color, end, prefix, label, shift in (
        ("C0", "vapo", "no_", "VAPO without it", 0.12),
        ("C1", "ppo", "ppo_with_", "PPO with it alone", -0.12),
    ):
        if end in finals:
            axis.axvline(fmean(finals[end]), color=color, ls="--", lw=1, label=TITLES[end])
        for y, name in enumerate(names):
            if numbers := finals.get(prefix + name):
                at, shown = [y + shift] * len(numbers), None if y else label
                axis.scatter(numbers, at, s=10, color=color, alpha=0.5)
                axis.scatter(fmean(numbers), y + shift, s=50, color=color, label=shown)
    axis.set_yticks(range(len(names)), [PIECES[name] for name in names])
    axis.set_xlim(-0.02, 1)


def means(positions, what):
    """Lines of VC-PPO's bias figure (arXiv 2503.01491 §3)."""

    def points(name):
        return [(line["position"], line[name]) for line in positions]

    zero = [(t, 0) for t, _ in points("outcome")]
    outcome = (points("outcome"), "k--", "mean outcome of the answers that get there")
    return [outcome if what == "value" else (zero, "k--", None),
            (points(f"{what}_before"), "C0", "reward model as critic"),
            (points(f"{what}_after"), "C1", "after value pretraining")]  # fmt: skip


def sweep(summary, axis):
    rows = [row for row in GROUPS["alpha"] if row in summary]
    points = sorted((ROWS[row][1].get("alpha", RUN["alpha"]), row) for row in rows)
    y, half = ([summary[row][name] for _, row in points] for name in ("accuracy", "half"))
    axis.errorbar([alpha for alpha, _ in points], y, yerr=half, fmt="o-", capsize=3)
    axis.set_xscale("log")
