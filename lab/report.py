"""What the finished runs of ablate.py say: reads OUT/raw, writes OUT/README.md and the figures.

    python -m lab.report --out results

`runs` is {row: {seed: lines of metrics.jsonl}}, a curve is [(step, number)].
"""

import math
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from statistics import fmean, stdev

from ablate import GROUPS, ROWS, Settings
from lab.figures import PAPER, TITLES, draw_all
from lab.plot import curve, need
from system.jobs import lines_of
from system.run import exit_on_bad_input
from system.settings import parse

HEAD = (
    "| | paper: AIME 2024 | here: accuracy | minus VAPO, paired | steps to DAPO's best | answers | "
    f"minutes | seeds |\n{'|---' * 8}|\n"
)
ACCURACY = """\
Accuracy: held-out problems, T = 1, after the last rollout; mean over seeds ± 95% interval
(Student's t). The intervals are of RL alone: all seeds share the world, the base model and the
critics. Answers and minutes are those of RL; the rows with a pretrained critic share one fit on
8,192 answers more."""
RATES = """\
Accuracy of the training rollouts, mean of the last quarter; on seeds that no other table uses."""
FINDINGS = (  # each is said if all its numbers are known
    "Without one piece, below VAPO: {below} of {pieces} rows; the 95% interval excludes 0: {surely}"
    ". Above VAPO with an interval that excludes 0: {above}.",
    "Rank correlation with the paper's table over {rows} rows: {rho:.2f}.",
    "DAPO's best score, {best:.3f} (mean over seeds), comes after {last} gradient steps; VAPO "
    "{reaches} (the paper: 60%).",
    "VAPO's largest fall below its best so far, in the last quarter of any seed: {fall:.3f}.",
    "First-slip AUC of VAPO's critic in the last quarter of RL: {auc:.2f}.",
    "The pretrained critic, on held-out problems: explained variance {explained_variance:.3f}, "
    "{share:.0%} of the best possible; first-slip AUC {slip_auc:.2f}.",
)


def mean_interval(numbers):
    """(mean, half width of its 95% interval): t · s / √n; the half is NaN for a single number."""
    from scipy import stats

    n = len(numbers)
    t = stats.t.ppf(0.975, n - 1)
    return fmean(numbers), t * stdev(numbers) / math.sqrt(n) if n > 1 else math.nan


def rank_correlation(xs, ys):
    """Spearman's ρ: the correlation of the ranks."""
    from scipy import stats

    return stats.spearmanr(xs, ys).statistic


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


def last_quarter(points):
    """The numbers of a curve in the last quarter of its steps."""
    return [y for step, y in points if step >= 0.75 * points[-1][0]]


def summarise(runs):
    """{row: numbers} from `read_raw`: what the table says of each row."""
    best_dapo = max(y for _, y in mean_curve(runs["dapo"])) if "dapo" in runs else math.nan
    summary = {}
    for row, by_seed in runs.items():  # VAPO first
        own, falls, seconds, trained, answers = {}, [], [], [], []
        for seed, lines in by_seed.items():
            points = curve(lines, "test_accuracy")
            own[seed] = points[-1][1]
            answers.append(lines[-1]["answers"])
            bests = accumulate((y for _, y in points), max)  # so far, not those to come
            falls += last_quarter([(step, best - y) for (step, y), best in zip(points, bests)])
            trained.append(fmean(last_quarter(curve(lines, "accuracy"))))
            seconds += [y for line in lines for name, y in line.items() if "seconds_" in name]
        reached = [step for step, y in mean_curve(by_seed) if y >= best_dapo]
        last = by_seed[min(by_seed)][-1]
        updates = last["gradient_steps"] / last["step"]
        mean, half = mean_interval(list(own.values()))
        vapo = summary["vapo"]["finals"] if "vapo" in summary else {}
        summary[row] = {
            "accuracy": mean, "half": half, "finals": own, "seeds": len(own), "fall": max(falls),
            "steps_to_dapo": round(reached[0] * updates) if reached else None,
            "answers": fmean(answers), "minutes": sum(seconds) / len(own) / 60,
            "training_accuracy": fmean(trained)}  # fmt: skip
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


def findings(runs, summary, value):
    """What a reader of the paper would ask of the table, as lines. value: of value pretraining."""
    known, vapo, dapo = {}, summary.get("vapo"), summary.get("dapo")
    apart = [(n["difference"], n["difference_half"]) for row, n in summary.items()
             if row.startswith("no_") and "difference" in n]  # fmt: skip
    if apart:
        known |= {"pieces": len(apart), "below": sum(x < 0 for x, _ in apart)}
        known["surely"] = sum(x + half < 0 for x, half in apart)
        known["above"] = sum(x - half > 0 for x, half in apart)
    shared = [row for row in PAPER if row in summary]
    if len(shared) > 2:
        pairs = [(PAPER[row], summary[row]["accuracy"]) for row in shared]
        known |= {"rows": len(shared), "rho": rank_correlation(*map(list, zip(*pairs)))}
    if vapo and dapo:
        known["best"] = max(y for _, y in mean_curve(runs["dapo"]))
        ours, last = vapo["steps_to_dapo"], dapo["steps_to_dapo"]
        share = f": {ours / last:.0%}" if ours is not None and last else ""
        reaches = "never reaches it" if ours is None else f"reaches it after {ours}{share}"
        known |= {"last": last, "reaches": reaches}
    if vapo:
        known["fall"] = vapo["fall"]
        slips = [last_quarter(curve(lines, "slip_auc")) for lines in runs["vapo"].values()]
        known |= {"auc": fmean(sum(slips, []))} if all(slips) else {}
    if judged := [line for line in value if line.get("best_explained_variance")]:
        kept = min(judged, key=lambda line: line["value_loss"])
        share = kept["explained_variance"] / kept["best_explained_variance"]
        known |= kept | {"share": share}
    lines = []
    for text in FINDINGS:
        with suppress(KeyError):
            lines.append(text.format(**known))
    return lines


def provenance(out):
    """One line: how many runs, on which revisions, versions and machines."""
    paths = (out / "raw").glob("*-*.jsonl")
    ons = [lines_of(path)[0]["config"]["on"] for path in paths]
    told = [f"{name} {', '.join(sorted({str(on.get(name, '?')) for on in ons}))}"
            for name in ("revision", "torch", "device", "threads")]  # fmt: skip
    return f"{len(ons)} runs; {'; '.join(told)}."


def report(out):
    """Writes OUT/README.md and the figures. Returns: what `summarise` does; {} without runs."""
    runs = read_raw(out)
    if not runs:
        return {}
    summary = summarise(runs)
    paths = out / "positions.jsonl", out / "raw" / "value.jsonl"
    positions, value = (lines_of(path) if path.exists() else [] for path in paths)
    value = [line for line in value if "step" in line]
    text = ["# Results", "Written by `python ablate.py` from the files in raw/.", provenance(out)]
    shown = {group: [row for row in rows if row in summary] for group, rows in GROUPS.items()}
    if shown["paper"]:
        text += [ACCURACY, table(summary, shown["paper"], PAPER)]
        text.append("\n".join(f"- {line}" for line in findings(runs, summary, value)))
    for group, title in (("added", "PPO with one piece"), ("alpha", "α of length-adaptive GAE")):
        if set(shown[group]) - {GROUPS[group][0]}:
            text += [f"## {title}", table(summary, shown[group], {})]
    if shown["tuning"]:
        lines = ["| | training accuracy | seeds |", "|---|---|---|"]
        for row, n in ((row, summary[row]) for row in shown["tuning"]):
            lines.append(f"| {TITLES[row]} | {n['training_accuracy']:.3f} | {n['seeds']} |")
        text += ["## Learning rates", RATES, "\n".join(lines)]
    for name, sentence in draw_all(runs, summary, positions, value, out):
        text += [f"![{name}]({name})", sentence]
    (out / "README.md").write_text("\n\n".join(text) + "\n")
    return summary


@exit_on_bad_input
def main(argv=None):
    """Runs the script; returns what `report` does."""
    out = parse(Settings, argv, __doc__).out
    need("matplotlib", "scipy")
    summary = report(Path(out))
    print(f"{out}: {len(summary)} rows have finished runs")
    return summary


if __name__ == "__main__":
    main()
