"""What the finished runs of ablate.py say: the table, the findings, the figures. Reads OUT/raw, writes OUT/README.md and PNGs.

A run is the list of its lines of metrics.jsonl, `runs` is {row: {seed: lines}}, a curve is [(step, number)]. All seeds of a
row share one world, one base model and one pretrained critic, so that the intervals are of RL alone.
"""

import json
import math
from pathlib import Path

import torch

import plot

# Student's t, 97.5% quantile for 1, 2, 3 … degrees of freedom
T975 = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093,
]  # fmt: skip


def mean_interval(numbers):
    """(mean, half width of its 95% interval): t · s / √n; the half is NaN for a single number."""
    mean = sum(numbers) / len(numbers)
    if len(numbers) < 2:
        return mean, math.nan
    variance = sum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1)
    t = T975[len(numbers) - 2] if len(numbers) - 2 < len(T975) else 2.09  # a little wide beyond 20 seeds
    return mean, t * math.sqrt(variance / len(numbers))


def ranks(numbers):
    """Ranks from 1, ties share their mean."""
    return [sum(y < x for y in numbers) + (sum(y == x for y in numbers) + 1) / 2 for x in numbers]


def rank_correlation(xs, ys):
    """Spearman's ρ: the correlation of the ranks."""
    if len(xs) < 2:
        return math.nan
    pair = torch.tensor([ranks(xs), ranks(ys)], dtype=torch.float64)
    return torch.corrcoef(pair)[0, 1].item()


def read_raw(out, rows):
    """{row: {seed: lines}} of the finished runs in OUT/raw, in the order of `rows`."""
    runs = {}
    for path in sorted((Path(out) / "raw").glob("*-*.jsonl")):
        row, seed = path.stem.rsplit("-", 1)
        if row in rows and seed.isdigit():
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            runs.setdefault(row, {})[int(seed)] = [line for line in lines if "step" in line]
    return {row: runs[row] for row in rows if row in runs}


def curve(lines, name="test_accuracy"):
    """[(step, number)] where it was logged."""
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def mean_curve(by_seed, name="test_accuracy"):
    """[(step, mean over seeds)], at the steps that every seed has."""
    curves = [dict(curve(lines, name)) for lines in by_seed.values()]
    steps = sorted(set.intersection(*map(set, curves)))
    return [(step, sum(c[step] for c in curves) / len(curves)) for step in steps]


def last_quarter(points):
    """The numbers of a curve in the last quarter of its steps."""
    return [y for step, y in points if step >= 0.75 * points[-1][0]]


def summarise(runs):
    """{row: numbers} from `read_raw`: what the table says of each row."""
    best_dapo = max((y for _, y in mean_curve(runs["dapo"])), default=math.nan) if "dapo" in runs else math.nan
    summary = {}
    for row, by_seed in runs.items():
        finals = {seed: curve(lines)[-1][1] for seed, lines in by_seed.items()}
        mean, half = mean_interval(list(finals.values()))
        falls = []
        for lines in by_seed.values():  # below the best so far, not below a best to come
            points = curve(lines)
            falls += last_quarter([(step, max(best for _, best in points[: i + 1]) - y) for i, (step, y) in enumerate(points)])
        numbers = {"seeds": len(finals), "accuracy": mean, "half": half, "fall": max(falls)}
        shared = [seed for seed in finals if seed in runs.get("vapo", {})]
        if row != "vapo" and shared:
            vapo = {seed: curve(runs["vapo"][seed])[-1][1] for seed in shared}
            numbers["difference"], numbers["difference_half"] = mean_interval([finals[seed] - vapo[seed] for seed in shared])
        reached = [step for step, y in mean_curve(by_seed) if y >= best_dapo]
        per_rollout = by_seed[min(by_seed)][-1]["gradient_steps"] / by_seed[min(by_seed)][-1]["step"]
        numbers["steps_to_dapo"] = round(reached[0] * per_rollout) if reached else None
        numbers["answers"] = sum(lines[-1]["answers"] for lines in by_seed.values()) / len(by_seed)
        seconds = [sum(y for line in lines for name, y in line.items() if name.startswith("seconds_")) for lines in by_seed.values()]
        numbers["minutes"] = sum(seconds) / len(seconds) / 60
        tails = [last_quarter(curve(lines, "accuracy")) for lines in by_seed.values()]
        numbers["training_accuracy"] = sum(sum(tail) / len(tail) for tail in tails) / len(tails)
        summary[row] = numbers
    return summary


def table(summary, rows, titles, paper):
    """The Markdown table of some rows."""
    lines = [
        "| | paper: AIME 2024 | here: accuracy | minus VAPO, paired | steps to DAPO's best | answers | minutes | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def pm(x, half):
        return f"{x:.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")

    for row in rows:
        n = summary[row]
        difference = pm(n["difference"], n["difference_half"]) if "difference" in n else ""
        lines.append(
            f"| {titles[row]} | {paper.get(row, '')} | {pm(n['accuracy'], n['half'])} | {difference} | {'–' if n['steps_to_dapo'] is None else n['steps_to_dapo']} | "
            f"{n['answers']:.0f} | {n['minutes']:.1f} | {n['seeds']} |"
        )
    return "\n".join(lines)


def findings(runs, summary, value, paper):
    """What a reader of the paper would ask of the table, each with what came out; a list of lines. `value`: the lines of
    value pretraining."""
    lines = []
    pieces = [row for row in summary if row.startswith("no_") and "difference" in summary[row]]
    below = [row for row in pieces if summary[row]["difference"] < 0]
    surely = [row for row in below if summary[row]["difference"] + summary[row]["difference_half"] < 0]
    if pieces:
        lines.append(f"Without one piece, below VAPO: {len(below)} of {len(pieces)} rows; the 95% interval excludes 0: {len(surely)}.")
        above = [row for row in pieces if summary[row]["difference"] - summary[row]["difference_half"] > 0]
        lines[-1] += f" Above VAPO with an interval that excludes 0: {len(above)}."
    shared = [row for row in paper if row in summary]
    if len(shared) > 2:
        rho = rank_correlation([paper[row] for row in shared], [summary[row]["accuracy"] for row in shared])
        lines.append(f"Rank correlation with the paper's table over {len(shared)} rows: {rho:.2f}.")
    if "vapo" in summary and "dapo" in summary:
        best = max(y for _, y in mean_curve(runs["dapo"]))
        ours, last = summary["vapo"]["steps_to_dapo"], summary["dapo"]["steps_to_dapo"]
        share = f": {ours / last:.0%}" if ours is not None and last else ""
        reached = "VAPO never reaches it" if ours is None else f"VAPO reaches it after {ours}{share}"
        lines.append(f"DAPO's best score, {best:.3f} (mean over seeds), comes after {last} gradient steps; {reached} (the paper: 60%).")
    if "vapo" in summary:
        lines.append(f"VAPO's largest fall below its best so far, in the last quarter of any seed: {summary['vapo']['fall']:.3f}.")
        through = [curve(lines_, "slip_auc") for lines_ in runs["vapo"].values()]
        if all(through):
            tails = [y for points in through for y in last_quarter(points)]
            lines.append(f"First-slip AUC of VAPO's critic in the last quarter of RL: {sum(tails) / len(tails):.2f}.")
    kept = [line for line in value if line.get("best_explained_variance")]
    if kept:
        line = min(kept, key=lambda line: line["value_loss"])
        share = line["explained_variance"] / line["best_explained_variance"]
        lines.append(
            f"The pretrained critic, on held-out problems: explained variance {line['explained_variance']:.3f}, {share:.0%} of the best "
            f"possible; first-slip AUC {line['slip_auc']:.2f}."
        )
    return lines


def provenance(out):
    """One line: how many runs, on which revisions, versions and machines."""
    configs = [json.loads(path.read_text().partition("\n")[0])["config"]["on"] for path in sorted((out / "raw").glob("*-*.jsonl"))]
    told = [
        f"{name} {', '.join(sorted({str(on.get(name, '?')) for on in configs}))}" for name in ("revision", "torch", "device", "threads")
    ]
    return f"{len(configs)} runs; {'; '.join(told)}."


def report(out, groups, titles, paper, alpha):
    """OUT/README.md and the figures, from OUT/raw. Returns the summary.

    Args: groups, {group: rows} of "paper", "added", "alpha" and "tuning"; titles, {row: title}; paper, {row: its number there};
        alpha, that of VAPO's row.
    """
    out = Path(out)
    runs = read_raw(out, titles)
    if not runs:
        return {}
    summary = summarise(runs)
    value = plot.lines_of(out / "raw" / "value.jsonl")
    text = ["# Results", "", "Written by `python ablate.py` from the files in raw/.", "", provenance(out), ""]
    shown = [row for row in groups["paper"] if row in summary]
    if shown:
        text += ["Accuracy: held-out problems, T = 1, after the last rollout; mean over seeds ± 95% interval (Student's t). The intervals"]
        text += ["are of RL alone: all seeds share the world, the base model and the critics. Answers and minutes are those of RL; the"]
        text += ["rows with a pretrained critic share one fit on 8,192 answers more.", "", table(summary, shown, titles, paper), ""]
        text += [f"- {line}" for line in findings(runs, summary, value, paper)] + [""]
    added = [row for row in groups["added"] if row in summary]
    if set(added) - {"ppo"}:
        text += ["## PPO with one piece", "", table(summary, added, titles, {}), ""]
    swept = [row for row in groups["alpha"] if row in summary]
    if set(swept) - {"vapo"}:
        text += ["## α of length-adaptive GAE", "", table(summary, swept, titles, {}), ""]
    tuned = [row for row in groups["tuning"] if row in summary]
    if tuned:
        text += [
            "## Learning rates",
            "",
            "Accuracy of the training rollouts, mean of the last quarter; on seeds that no other table uses.",
            "",
        ]
        text += ["| | training accuracy | seeds |", "|---|---|---|"]
        text += [f"| {titles[row]} | {summary[row]['training_accuracy']:.3f} | {summary[row]['seeds']} |" for row in tuned] + [""]
    for name, sentence in plot.ablation_figures(runs, summary, titles, paper, alpha, out):
        text += [f"![{name}]({name})", "", sentence, ""]
    (out / "README.md").write_text("\n".join(text))
    return summary
