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

from ablate import GROUPS, PIECES, ROWS, Settings
from lab import effects
from lab.plot import draw, need
from system.jobs import lines_of
from system.run import exit_on_bad_input
from system.settings import parse

# AIME 2024, avg@32, of Qwen2.5-32B without each piece (arXiv 2504.05118, table 1); VAPO has 60.
PAPER = dict(zip(PIECES, (11, 33, 45, 46, 53, 54, 55)))
TITLES = list(PIECES.values())
METHODS = ("vapo", "dapo", "grpo", "vc_ppo", "ppo", "perfect_critic", "critic_surprise")
CRITICS = ("vapo", "critic_surprise", "perfect_critic", "ppo")
RESPONSES = {"mean": "mean of training", "final": "final"}
CRITIC = ("explained_variance", "best_explained_variance", "slip_auc")
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
    for path in sorted((out / "raw").glob("*-*.jsonl")):
        row, seed = path.stem.rsplit("-", 1)
        if row in ROWS:
            first, *lines = lines_of(path)
            own = {"row": row, "seed": int(seed), "title": ROWS[row][0]}
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
    first, lines = parts.get(rows[0]), []
    for row in filter(parts.__contains__, rows):
        part = parts[row]
        apart = [(part[r] - first[r]).dropna() if row != rows[0] and first is not None else ()
                 for r in RESPONSES]  # fmt: skip
        late = [show(part[name].mean()) for name in CRITIC]
        cells = [interval(part[r]) for r in RESPONSES] + [interval(numbers) for numbers in apart]
        counts = f"{part['answers'].mean():.0f}", f"{part['minutes'].mean():.1f}", len(part)
        lines.append([ROWS[row][0], *cells, *late, *counts])
    return markdown(["", "mean of training", "final", "mean, minus VAPO's", "final, minus VAPO's",
                     "explained variance late", "of possible", "first-slip AUC", "answers",
                     "minutes", "seeds"], lines)  # fmt: skip


def ceiling(runs, rows):
    """What a better critic could bring in a world: by how much a perfect one leads DAPO there."""
    mean = runs.groupby("row")[list(RESPONSES)].mean()
    pair = [row for end in ("perfect_critic", "dapo") for row in rows if row.endswith(end)]
    if len(pair) < 2 or mean.index.isin(pair).sum() < 2:
        return []
    lead = mean.loc[pair[0]] - mean.loc[pair[1]]
    few = ": below 0.05, so this world cannot reward a better critic" * bool(lead.max() < 0.05)
    by = f"{lead['mean']:+.3f} in the mean, {lead['final']:+.3f} in the end"
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
        lines.append([title, 60 - PAPER[list(PIECES)[i]], *cells])
    text = [f"{len(part)} runs, {part['title'].nunique()} of 128 combinations. Main effect: the "
            "mean of all runs with the piece minus that of all without.",
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
    def curves(rows, y, title, *limits, x="step"):
        return title, x.replace("step", "rollouts"), partial(lines, log, rows, x, y, limits)

    rows, mean = set(runs["row"]), found.get("mean")
    return [
        ("effects.png", found, "Left the paper's losses; then our main effects, 95% intervals.",
         (13, 3.6), [("paper: points of AIME 2024 lost without it", "", partial(dots, None))] + [
             (f"main effect on the accuracy, {title}", "", partial(dots, found.get(r)))
             for r, title in RESPONSES.items()]),
        ("interactions.png", found and (0, 1) in mean["effect"],
         "How much more a piece does where another is on, halved; on the diagonal its main effect. "
         "A star: the interval excludes 0.", (9, 6.5),
         [("effects and interactions on the mean of training", "", partial(heat_map, mean))]),
        ("curves.png", found, "All runs of the cube, by the piece that explains most.", (7.5, 4.5),
         [("accuracy of the training rollouts", "rollouts", partial(all_curves, log, mean))]),
        ("methods.png", "vapo" in rows, "Who learns fastest, and who is best at the end.",
         (7.5, 4.5), [curves(METHODS, "test_accuracy", "held-out accuracy", 0, 1)]),
        ("critics.png", "vapo" in rows, "The critic through RL, beside what any could know.",
         (13, 3.6), [curves(CRITICS, CRITIC[0], "explained variance of the critic", -0.2, 1),
                     curves(CRITICS, CRITIC[1], "of the best possible critic", -0.2, 1),
                     curves(CRITICS, CRITIC[2], "first-slip AUC", 0.4, 1)]),
        ("length.png", {"30_dapo", "dapo", "300_dapo"} <= rows,
         "Accuracy minus DAPO's, by the length of an answer.", (13, 7),
         [(title, "tokens", partial(by_length, runs, r)) for r, title in RESPONSES.items()]),
        ("long.png", "long_dapo" in rows, "Three times as many rollouts.", (11, 4),
         [curves(GROUPS["long"], "test_accuracy", "held-out accuracy", 0, 1, x=x)
          for x in ("answers", "gradient_steps")]),
        ("evpo.png", "vapo" in rows and "advantage_variance" in log,
         "A dot a rollout. Claimed (arXiv 2604.19485): below 1 only right of 0, where the critic "
         "explains something. That is so for λ = 1; λ < 1 lowers it too.", (6, 4.5),
         [("variance of the advantages / of the outcomes", "explained variance",
           partial(evpo, log))]),
    ]
# fmt: on


def lines(log, rows, x, y, limits, axis):
    """A metric's mean over seeds, and a band from lowest to highest."""
    import seaborn

    own = log.reindex(columns=dict.fromkeys(["row", "step", "title", x, y]))
    own = own[own["row"].isin(rows)].dropna(subset=[y])
    own = own.assign(**{x: own.groupby(["row", "step"])[x].transform("mean")})
    seaborn.lineplot(own, x=x, y=y, hue="title", errorbar=("pi", 100), ax=axis)
    axis.set(ylim=limits, ylabel="", xlabel="")


def dots(found, axis):
    """The seven main effects and their intervals, or the paper's losses."""
    if found:
        effect, half = ([found[name][i,] for i in range(7)] for name in ("effect", "half"))
        axis.errorbar(effect, range(7), xerr=half, fmt="o", capsize=3)
        axis.axvline(0, color="k", lw=1)
    else:
        axis.barh(range(7), [60 - left for left in PAPER.values()], color="C1")
    axis.set(yticks=range(7), yticklabels=[""] * 7 if found else TITLES, ylim=(6.5, -0.5))


def heat_map(found, axis):
    import seaborn

    sets = [[tuple(sorted({i, j})) for j in range(7)] for i in range(7)]
    effect = [[found["effect"][w] for w in row] for row in sets]
    said = [[f"{e:+.3f}" + "*" * bool(abs(e) > found["half"][w]) for w, e in zip(*pair)]
            for pair in zip(sets, effect)]  # fmt: skip
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
    mean = runs.groupby("row")[response].mean()
    for row in (row.removeprefix("30_") for row in GROUPS["30"] if row != "30_dapo"):
        apart = [mean.get(p + row, nan) - mean[f"{p}dapo"] for p in ("30_", "", "300_")]
        axis.plot(("30", "100", "300"), apart, "o-", label=ROWS[row][0])
    axis.axhline(0, color="k", lw=1)


def evpo(log, axis):
    import seaborn

    own = log[log["row"].isin(CRITICS)].dropna(subset=["advantage_variance", "explained_variance"])
    how = {"x": "explained_variance", "y": "advantage_variance", "hue": "title", "s": 8}
    seaborn.scatterplot(own, ax=axis, **how)
    axis.axhline(1, color="k", lw=1)
    axis.axvline(0, color="k", lw=1)
    axis.set(xlim=(-1, 1), ylim=(0, 1.5), xlabel="", ylabel="")


@exit_on_bad_input
def main(argv=None):
    out = parse(Settings, argv, __doc__).out
    need("pandas", "scipy", "seaborn")
    runs = report(Path(out))
    print(f"{out}: {len(runs)} finished runs")
    return runs


if __name__ == "__main__":
    main()
