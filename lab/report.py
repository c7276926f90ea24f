"""What the finished runs of ablate.py say: reads OUT/raw, writes OUT/README.md and the figures.

    python -m lab.report --out results

`runs` is {row: {seed: lines of metrics.jsonl}}, a curve is [(step, number)].
"""

import math
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

from ablate import GROUPS, ROWS, Settings
from lab.plot import curve, draw, draw_curves, need
from system.jobs import lines_of
from system.run import exit_on_bad_input
from system.settings import parse

# fmt: off
# AIME 2024, avg@32, of Qwen2.5-32B (arXiv 2504.05118, table 1).
PAPER = {"vapo": 60, "no_value_pretraining": 11, "no_decoupled_gae": 33,
         "no_length_adaptive_gae": 45, "no_clip_higher": 46, "no_token_level_loss": 53,
         "no_positive_nll": 54, "no_group_sampling": 55, "ppo": 5, "dapo": 50}
TITLES = {row: title for row, (title, _) in ROWS.items()}
RIVALS = ("vapo", "dapo", "grpo", "vc_ppo", "ppo")
CRITICS = ("vapo", "no_value_pretraining", "ppo")
# fmt: on
HEAD = (
    "| | paper: AIME 2024 | here: accuracy | minus VAPO, paired | steps to DAPO's best | answers | "
    f"minutes | seeds |\n{'|---' * 8}|\n"
)
ACCURACY = """\
Accuracy: held-out problems, T = 1, after the last rollout; mean over seeds ± 95% interval
(Student's t). The intervals are of RL alone: all seeds share the world, the base model and the
critics. Answers and minutes are those of RL; the rows with a pretrained critic share one fit on
8,192 answers more."""


def mean_interval(numbers):
    """(mean, half width of its 95% interval): t · s / √n; the half is NaN for a single number."""
    from scipy import stats

    n = len(numbers)
    t = stats.t.ppf(0.975, n - 1)
    return fmean(numbers), t * stdev(numbers) / math.sqrt(n) if n > 1 else math.nan


def read_raw(out):
    """{row: {seed: lines}} of the finished runs in OUT/raw, in the order of ROWS."""
    runs = {row: {} for row in ROWS}
    for path in sorted((out / "raw").glob("*-*.jsonl")):
        row, seed = path.stem.rsplit("-", 1)
        if row in runs and seed.isdigit():
            runs[row][int(seed)] = [line for line in lines_of(path) if "step" in line]
    return {row: by_seed for row, by_seed in runs.items() if by_seed}


def mean_curve(by_seed):
    """[(step, mean held-out accuracy over seeds)], at the steps that every seed has."""
    curves = [dict(curve(lines, "test_accuracy")) for lines in by_seed.values()]
    steps = sorted(set.intersection(*map(set, curves)))
    return [(step, fmean(points[step] for points in curves)) for step in steps]


def summarise(runs):
    """{row: numbers} from `read_raw`: what the table says of each row."""
    best_dapo = max(y for _, y in mean_curve(runs["dapo"])) if "dapo" in runs else math.nan
    summary = {}
    for row, by_seed in runs.items():  # VAPO first
        own = {seed: curve(lines, "test_accuracy")[-1][1] for seed, lines in by_seed.items()}
        logged = sum(by_seed.values(), [])
        seconds = sum(y for line in logged for name, y in line.items() if "seconds_" in name)
        reached = [step for step, y in mean_curve(by_seed) if y >= best_dapo]
        last = by_seed[min(by_seed)][-1]
        updates = last["gradient_steps"] / last["step"]
        mean, half = mean_interval(list(own.values()))
        vapo = summary["vapo"]["finals"] if "vapo" in summary else {}
        summary[row] = {
            "accuracy": mean, "half": half, "finals": own, "seeds": len(own),
            "steps_to_dapo": round(reached[0] * updates) if reached else None,
            "answers": fmean(lines[-1]["answers"] for lines in by_seed.values()),
            "minutes": seconds / len(own) / 60}  # fmt: skip
        if paired := [own[seed] - vapo[seed] for seed in own if seed in vapo]:
            summary[row] |= zip(("difference", "difference_half"), mean_interval(paired))
    return summary


def table(summary, rows, paper):
    """The Markdown table of some rows; paper: {row: its number there}."""

    def interval(mean, half):
        return f"{mean:.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")

    lines = []
    for row, n in ((row, summary[row]) for row in rows):
        apart = interval(n["difference"], n["difference_half"]) if "difference" in n else ""
        steps = "–" if n["steps_to_dapo"] is None else n["steps_to_dapo"]
        cells = (TITLES[row], paper.get(row, ""), interval(n["accuracy"], n["half"]), apart, steps,
                 f"{n['answers']:.0f}", f"{n['minutes']:.1f}", n["seeds"])  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return HEAD + "\n".join(lines)


def provenance(out):
    """One line: how many runs, on which revisions, versions and machines."""
    ons = [lines_of(path)[0]["config"]["on"] for path in (out / "raw").glob("*-*.jsonl")]
    told = [f"{name} {', '.join(sorted({str(on.get(name, '?')) for on in ons}))}"
            for name in ("revision", "torch", "device", "threads")]  # fmt: skip
    return f"{len(ons)} runs; {'; '.join(told)}."


def report(out):
    """Writes OUT/README.md and the figures. Returns: what `summarise` does; {} without runs."""
    runs = read_raw(out)
    if not runs:
        return {}
    summary = summarise(runs)
    path = out / "start" / "value" / "metrics.jsonl"
    value = lines_of(path) if path.exists() else []
    text = ["# Results", "Written by `python ablate.py` from the files in raw/.", provenance(out)]
    if shown := [row for row in GROUPS["paper"] if row in summary]:
        text += [ACCURACY, table(summary, shown, PAPER)]
    for name, there, sentence, size, panels in figures(runs, summary, value):
        if there:
            draw(out / name, size, panels)
            text += [f"![{name}]({name})", sentence]
    (out / "README.md").write_text("\n\n".join(text) + "\n")
    return summary


# fmt: off
def figures(runs, summary, value):
    """[(file, whether there is data for it, what to see in it, inches, panels of `draw`)].
    Args: summary, {row: numbers}; value, the lines of value pretraining."""
    def by_steps(rows, name, title, *limits):
        return title, "gradient steps", partial(bands, runs, rows, name, limits)

    def fitting(title, *curves):
        return title, "optimiser steps", partial(draw_curves, curves)

    vapo = "vapo" in runs
    return [
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
        ("pretraining.png", value,
         "What value pretraining reaches on held-out problems.", (13, 3.6), [
             fitting("held-out value loss", (curve(value, "value_loss"), "o-", None)),
             fitting("explained variance", (curve(value, "explained_variance"), "o-", "the critic"),
                     (curve(value, "best_explained_variance"), "k--", "the best possible")),
             fitting("first-slip AUC", (curve(value, "slip_auc"), "o-", None))]),
    ]
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


@exit_on_bad_input
def main(argv=None):
    out = parse(Settings, argv, __doc__).out
    need("matplotlib", "scipy")
    summary = report(Path(out))
    print(f"{out}: {len(summary)} rows have finished runs")
    return summary


if __name__ == "__main__":
    main()
