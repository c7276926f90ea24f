"""What the finished runs of ablate.py say: reads OUT/raw, writes OUT/README.md and the figures.

    python -m lab.report --out results

A run has two responses: `final`, its accuracy on held-out problems after the last rollout, and
`mean`, the accuracy of its training rollouts, mean over all of them (the area under the curve): who
is best in the end, and who is fastest. Intervals are 95% (Student's t). `runs` has a row a run,
`log` a row a line of metrics.jsonl.
"""

import re
from functools import partial
from math import isnan, nan
from pathlib import Path

from ablate import GROUPS, MAIN, PIECES, ROWS, Settings
from lab import effects
from lab.plot import draw, need
from system.jobs import lines_of
from system.run import exit_on_bad_input
from system.settings import parse

# What Qwen2.5-32B loses of 60 on AIME 2024, avg@32, without each (arXiv 2504.05118, table 1).
PAPER = (49, 27, 15, 14, 7, 6, 5)
TITLES = list(PIECES.values())
METHODS = ("vapo", "dapo", "grpo", "vc_ppo", "ppo", "perfect_critic", "critic_surprise")
CRITICS = ("vapo", "critic_surprise", "perfect_critic", "ppo")
RESPONSES = {"mean": "mean of training", "final": "final"}
CRITIC = ("explained_variance", "best_explained_variance", "slip_auc")
COLOURS = {title: f"C{i}" for i, (title, _) in enumerate(MAIN.values())}
SEEDS = {"hue": "title", "palette": COLOURS, "errorbar": ("pi", 100)}  # mean; lowest to highest
SECTIONS = {"main": "100 tokens", "30": "30 tokens", "300": "300 tokens", "long": "72 rollouts"}


def interval(numbers):
    """ "mean ± half", half = t · s / √n; without the half for one number, "" for none."""
    n = len(numbers)
    return show(numbers.mean(), effects.half_width(n**-0.5, (numbers.std(), n - 1))) if n else ""


def show(mean, half=nan):
    return "" if isnan(mean) else f"{mean:.3f}" + ("" if isnan(half) else f" ± {half:.3f}")


def markdown(head, lines):
    lines = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def read(out):
    """(runs, log) of the finished runs in OUT/raw whose rows ablate.py has."""
    import pandas as pd

    runs, log = [], []
    for row, (title, _) in ROWS.items():
        for path in sorted((out / "raw").glob(f"{row}-[0-9]*.jsonl")):
            first, *lines = lines_of(path)
            own = {"row": row, "seed": int(path.stem.rpartition("-")[2]), "title": title}
            table = pd.DataFrame(lines).assign(**own)
            runs.append(own | first["config"]["on"] | {
                "final": table["test_accuracy"].dropna().iloc[-1],
                "mean": table["accuracy"].mean(), "answers": table["answers"].iloc[-1],
                "minutes": table.filter(like="seconds_").sum().sum() / 60,
                "collapse": effects.collapse(table["accuracy"].dropna()),
                **table[table["step"] > 0.75 * len(lines)].reindex(columns=CRITIC).mean(),
            })  # fmt: skip
            log.append(table)
    return pd.DataFrame(runs), pd.concat(log, ignore_index=True) if log else None


def methods(runs, rows):
    """A table of rows: both responses, and what they have over the first row's, by seed."""
    parts = {row: part.set_index("seed") for row, part in runs.groupby("row")}
    first, lines = parts.get(rows[0], runs[:0]), []
    for row, part in ((row, parts[row]) for row in rows if row in parts):
        apart = [(part[r] - first[r]).dropna() if row != rows[0] else () for r in RESPONSES]
        late = [show(part[name].mean()) for name in CRITIC]
        cells = [interval(part[r]) for r in RESPONSES] + [interval(numbers) for numbers in apart]
        counts = f"{part['answers'].mean():.0f}", f"{part['minutes'].mean():.1f}", len(part)
        lines.append([ROWS[row][0], *cells, *late, *counts])
    return markdown(["", "mean of training", "final", "mean, minus VAPO's", "final, minus VAPO's",
                     "explained variance late", "of possible", "first-slip AUC", "answers",
                     "minutes", "seeds"], lines)  # fmt: skip


def ceiling(runs, rows):
    """What a better critic could bring in a world: by how much a perfect one leads DAPO there."""
    pair = [row for end in ("perfect_critic", "dapo") for row in rows if row.endswith(end)]
    parts = [runs[runs["row"] == row].set_index("seed")[list(RESPONSES)] for row in pair]
    if len(parts) < 2 or not len(lead := (parts[0] - parts[1]).dropna()):
        return []
    few = ": below 0.05, so this world cannot reward a better critic" * (max(lead.mean()) < 0.05)
    by = f"{interval(lead['mean'])} in the mean, {interval(lead['final'])} in the end"
    return [f"A perfect critic leads DAPO by {by}{few}."]


def cube(runs):
    """{response: what lab/effects.py finds of it} of the cube's runs; {} with fewer than 16."""
    part = runs[runs["row"].str.startswith("cube_")]
    bits, block, found = list(part["title"]), part["seed"].to_numpy(), {}
    for name in RESPONSES if len(part) >= 16 else ():
        y = part[name].to_numpy()
        effect, unit, residual = effects.effects(bits, block, y)
        whole = part if len(part) >= 256 else part[block == block.min()]  # as they differ in level
        value = whole.groupby("title")[name].mean().to_dict()
        errors = {"of the two replicates": effects.error_of_replicates(bits, block, y)}
        for b, cube_b in part.groupby("seed"):
            how = (list(cube_b["title"]), cube_b[name].to_numpy())
            errors[f"of orders of four and more, seed {b}"] = effects.error_of_high_orders(*how)
        errors["of the residual"] = residual
        error = next((error for error in errors.values() if error[1] >= 20), residual)
        half = {w: effects.half_width(unit[w], error) for w in effect}
        more = effects.between_blocks(bits, block, y)
        apart = [show(d, effects.half_width(one, error)) for d, one in more]
        found[name] = dict(effect=effect, half=half, errors=errors, value=value, apart=apart)
    return found


def predictions(out):
    """{piece: its main effects at 100 tokens on the responses}, as out/predictions.md has them."""
    text = path.read_text() if (path := out / "predictions.md").exists() else ""
    rows = re.findall(r"^\| (.+?) \|" + r" ([+-]\S+) \|" * 6, text, re.M)
    said = {name: (float(cells[3]), float(cells[2])) for name, *cells in rows}
    return [said.get(title.replace("-example", ""), (nan, nan)) for title in TITLES]


def cube_text(found, runs, log, out):
    """The cube in Markdown: effects, corners, collapses, predictions; errors, interactions."""
    part = runs[runs["row"].str.startswith("cube_")]
    effect, half, value = ({r: found[r][n] for r in RESPONSES} for n in ("effect", "half", "value"))
    shapley = [effects.shapley(value[r]) for r in RESPONSES]
    without, alone = effects.corners(value["mean"])
    lines, right, predicted = [], 0, predictions(out)
    for i, title in enumerate(TITLES):
        fell = (f"{part[part['title'].str[i] == b]['collapse'].gt(0).mean():.0%}" for b in "10")
        right += sum(said * effect[r][i,] > 0 for said, r in zip(predicted[i], RESPONSES))
        cells = [show(effect[r][i,], half[r][i,]) for r in RESPONSES]
        cells += map(show, (shapley[0][i], shapley[1][i], without[i], alone[i]))
        cells += [*fell, *(f"{said:+.2f}" for said in predicted[i])]
        cells += (found[r]["apart"][i] for r in RESPONSES)
        lines.append([title, PAPER[i], *cells])
    text = [f"{len(part)} runs, {part['title'].nunique()} of 128 combinations. Main effect: the "
            "mean of all runs with the piece minus that of all without (least squares).",
            markdown(["", "paper: AIME 2024 lost without it", "mean of training", "final",
                      "Shapley, mean", "Shapley, final", "VAPO − VAPO without it, mean",
                      "PPO with it − PPO, mean", "runs that fell, with", "without",
                      "predicted, mean", "predicted, final", "seed 1, half the learning rate, "
                      "− seed 0, mean", "the same, final"], lines),
            f"Signs predicted right: {right} of 14."]  # fmt: skip
    for r, title in RESPONSES.items():
        told = (f"{s:.4f} {n} ({free} degrees of freedom)"
                for n, (s, free) in found[r]["errors"].items() if free)  # fmt: skip
        text.append(f"Standard deviation of one run, {title}: {'; '.join(told)}. The first with 20 "
                    "degrees or more is the intervals'.")  # fmt: skip
        pairs = sorted((w for w in effect[r] if len(w) == 2), key=lambda w: -abs(effect[r][w]))
        told = (f"{TITLES[i]} × {TITLES[j]} {show(effect[r][i, j], half[r][i, j])}"
                for i, j in pairs[:5])  # fmt: skip
        text += [f"Largest interactions, {title}: {'; '.join(told)}."] if pairs else []
    fell = part[part["collapse"] > 0]
    text.append(f"{len(fell)} runs fell below half of their best training accuracy.")
    names = ["step", "accuracy", "explained_variance", "ratio_max", "length", "entropy"]
    for run in fell[:2].itertuples():
        own = log[(log["row"] == run.row) & (log["seed"] == run.seed)]
        near = own[own["step"].between(max(1, run.collapse - 4), run.collapse + 2)]
        table = markdown(names, near.reindex(columns=names).map("{:.3g}".format).to_numpy())
        text += [f"What came first in {run.row}, seed {run.seed}:", table]
    return text


def report(out):
    """Writes OUT/README.md and the figures. Returns: `runs`."""
    runs, log = read(out)
    if not len(runs):
        return runs
    found = cube(runs)
    told = (f"{name} {', '.join(sorted(set(map(str, runs[name]))))}"
            for name in ("revision", "torch", "device", "threads") if name in runs)  # fmt: skip
    text = ["# Results", "Written by `python ablate.py` from the files in raw/.",
            f"{len(runs)} runs; {'; '.join(told)}."]  # fmt: skip
    text += ["## The seven pieces", *cube_text(found, runs, log, out)] if found else []
    for group, title in SECTIONS.items():
        if runs["row"].isin(GROUPS[group]).any():
            text += [f"## {title}", methods(runs, GROUPS[group]), *ceiling(runs, GROUPS[group])]
    for name, there, sentence, size, panels in figures(runs, log, found):
        if there:
            draw(out / name, size, panels)
            text += [f"![{name}]({name})", sentence]
    (out / "README.md").write_text("\n\n".join(text) + "\n")
    return runs


# fmt: off
def figures(runs, log, found):
    """[(file, whether there is data for it, what to see in it, inches, panels of `draw`)]."""
    def curves(rows, y, title, *limits, x="step", said="rollouts"):
        return title, said, partial(lines, log, rows, x, y, limits)

    rows, mean = set(runs["row"]), found.get("mean")
    return [
        ("effects.png", found, "Left the paper's losses, right our main effects, 95% intervals.",
         (11, 4), [("without it, in the paper", "points of AIME 2024 lost",
                    lambda axis: axis.barh(TITLES[::-1], PAPER[::-1], color="0.6")),
                   ("main effect here", "change of accuracy (0 to 1)", partial(dots, found))]),
        ("interactions.png", found and (0, 1) in mean["effect"],
         "What a piece does more beside another, halved; diagonal: main effects; *: not 0 (95%).",
         (9, 6.5), [("change of accuracy, mean of training", "", partial(heat_map, mean))]),
        ("curves.png", found, "All runs of the cube, by the piece that explains most.", (7.5, 4.5),
         [("accuracy of the training rollouts", "rollouts", partial(all_curves, log, mean))]),
        ("methods.png", "vapo" in rows, "Who learns fastest, and who is best at the end.",
         (7.5, 4.5), [curves(METHODS, "test_accuracy", "held-out accuracy", 0, 1)]),
        ("critics.png", "vapo" in rows, "The critic through RL, beside what any could know.",
         (13, 3.6), [curves(CRITICS, CRITIC[0], "explained variance of the critic", -0.2, 1),
                     curves(CRITICS, CRITIC[1], "of the best possible critic", -0.2, 1),
                     curves(CRITICS, CRITIC[2], "first-slip AUC", 0.4, 1)]),
        ("length.png", {"30_dapo", "dapo", "300_dapo"} <= rows,
         "By the length of an answer, with the same seed: the mean of three, lowest to highest.",
         (13, 7), [(f"accuracy minus DAPO's, {title}", "tokens", partial(by_length, runs, r))
                   for r, title in RESPONSES.items()]),
        ("long.png", "long_dapo" in rows, "Three times as many rollouts.", (11, 4),
         [curves(GROUPS["long"], "test_accuracy", "held-out accuracy", 0.3, 1, x=x, said=said)
          for x, said in [("answers", "answers drawn"), ("gradient_steps", "optimiser steps")]]),
        ("evpo.png", "vapo" in rows and "advantage_variance" in log,
         "A dot a rollout; what lies beyond is on the edge. Claimed (arXiv 2604.19485): below 1 "
         "only where the critic explains something. So it is for λ = 1; λ < 1 lowers it too.",
         (6, 4.5), [("variance: advantages / outcomes", "explained variance", partial(evpo, log))]),
    ]
# fmt: on


def lines(log, rows, x, y, limits, axis):
    """A metric's mean over seeds, and a band from lowest to highest."""
    import seaborn

    own = log[log["row"].isin(rows)].reindex(columns=["row", "title", y, *{"step", x}])
    own = own.assign(**{x: own.groupby(["row", "step"])[x].transform("mean")})
    seaborn.lineplot(own, x=x, y=y, ax=axis, **SEEDS)
    axis.set(ylim=limits, ylabel="", xlabel="")


def dots(found, axis):
    """The seven main effects and their 95% intervals, the first on top."""
    for k, (response, of) in enumerate(found.items()):
        effect, half = ([of[name][i,] for i in range(7)] for name in ("effect", "half"))
        place = [6.1 - i - k / 5 for i in range(7)]
        axis.errorbar(effect, place, xerr=half, fmt="o", capsize=3, label=RESPONSES[response])
    axis.axvline(0, color="k", lw=1)
    axis.set(yticks=range(7), yticklabels=[""] * 7, ylim=(-0.7, 6.7))


def heat_map(found, axis):
    import seaborn

    sets = [[tuple(sorted({i, j})) for j in range(7)] for i in range(7)]
    effect = [[found["effect"][w] for w in row] for row in sets]
    said = [[f"{round(e, 3) + 0:+.3f}" + "*" * bool(abs(e) > found["half"][w])
             for w, e in zip(*pair)] for pair in zip(sets, effect)]  # fmt: skip
    how = {"xticklabels": TITLES, "yticklabels": TITLES, "cmap": "PuOr_r", "center": 0}
    seaborn.heatmap(effect, annot=said, fmt="", ax=axis, **how)


def all_curves(log, found, axis):
    import seaborn

    most = max(range(7), key=lambda i: abs(found["effect"][i,]))
    own = log[log["row"].str.startswith("cube_")].dropna(subset=["accuracy"])
    said = {"1": f"with {TITLES[most]}", "0": "without"}
    own = own.assign(piece=own["title"].str[most].map(said), run=own["row"] + own["seed"].map(str))
    how = {"hue": "piece", "hue_order": said.values(), "units": "run", "estimator": None}
    seaborn.lineplot(own, x="step", y="accuracy", lw=0.5, alpha=0.6, ax=axis, **how)
    axis.set(ylim=(0, 1), xlabel="", ylabel="")


def by_length(runs, response, axis):
    """Minus DAPO's with the same seed: the mean, and a bar from the lowest seed to the highest."""
    import seaborn

    own = runs[runs["title"].isin(COLOURS) & ~runs["row"].str.startswith("long")]
    own = own.assign(tokens=own["row"].str.extract(r"^(30|300)_")[0].fillna("100"))
    of = own.pivot_table(response, ["tokens", "seed"], "title")
    apart = of.sub(of["DAPO"], axis=0).melt(value_name="apart", ignore_index=False).reset_index()
    how = SEEDS | {"order": ["30", "100", "300"], "hue_order": [*COLOURS], "lw": 1.5}
    seaborn.pointplot(apart, x="tokens", y="apart", dodge=0.35, markersize=4, ax=axis, **how)
    axis.set(xlabel="", ylabel="")


def evpo(log, axis):
    import seaborn

    own = log[log["row"].isin(CRITICS)].dropna(subset=["advantage_variance", "explained_variance"])
    own = own.assign(x=own["explained_variance"].clip(-1), y=own["advantage_variance"].clip(0, 1.5))
    seaborn.scatterplot(own, x="x", y="y", hue="title", palette=COLOURS, s=8, ax=axis)
    axis.axhline(1, color="k", lw=1)
    axis.axvline(0, color="k", lw=1)
    axis.set(xlim=(-1.03, 1), ylim=(0, 1.53), xlabel="", ylabel="")


@exit_on_bad_input
def main(argv=None):
    out = parse(Settings, argv, __doc__).out
    need("pandas", "scipy", "seaborn")
    runs = report(Path(out))
    print(f"{out}: {len(runs)} finished runs")
    return runs


if __name__ == "__main__":
    main()
