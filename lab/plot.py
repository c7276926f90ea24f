"""Runs as pictures, from their metrics.jsonl.

    python -m lab.plot runs/NAME                                  # writes runs/NAME/curves.png
    python -m lab.plot runs/A runs/B --out both.png

A run is the list of its lines; a curve is [(step, number)].
"""

import sys
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from system import run, settings
from system.jobs import lines_of
from system.settings import flag

# fmt: off
PANELS = {  # title: {metric: style}
    "accuracy: held-out (line), training (dots)": {"test_accuracy": "o-", "accuracy": "."},
    "response length: held-out (line), training (dots)": {"test_length": "o-", "length": "."},
    "truncated share of the answers": {"truncated": "-"},
    "entropy of the policy (nats per token)": {"entropy": "-"},
    "explained variance (line), the best possible (dots)": {
        "explained_variance": "-", "best_explained_variance": "."},
    "V at the first (line) and last token (dots)": {"value_first": "-", "value_last": "."},
    "λ_policy, mean over answers": {"lambda": "-"},
    "gradient norm: policy (line), critic (dots)": {
        "policy_grad_norm": "-", "critic_grad_norm": "."},
    "largest ratio": {"ratio_max": "-"},
    "tokens clipped: above (line), below (dots)": {"clip_high": "-", "clip_low": "."},
    "KL within a rollout (nats per token)": {"approx_kl": "-"},
    "sampler gap (nats per token)": {"sampler_gap": "-"}}


@dataclass(frozen=True)
class Settings(settings.Settings):
    runs: list[str] = flag([], "run directories; as the first arguments they need no --runs")
    out: str = flag("", "picture to write; default: curves.png in the first run directory")
# fmt: on


def curve(lines, name):
    """[(step, number)] of a metric, where it was logged."""
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def need(*packages):
    """Raises: BadInput if one is not installed."""
    missing = " ".join(name for name in packages if find_spec(name) is None)
    run.require(not missing, f"tables and pictures need {missing}: pip install {missing}")


def draw_curves(curves, axis):
    """Draws curves (points, matplotlib's format, label)."""
    for points, style, label in curves:
        axis.plot(*(zip(*points) if points else [(), ()]), style, label=label, markersize=4)


def draw(path, size, panels, rows=1):
    """A PNG of so many inches; a panel is (title, name of x, a function that draws on an axis)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, len(panels) // rows, squeeze=False).flat
    for axis, (title, x, paint) in zip(axes, panels):
        paint(axis)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(x, fontsize=9)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


@run.exit_on_bad_input
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    positional = argv and not argv[0].startswith("-")
    asked = settings.parse(Settings, ["--runs", *argv] if positional else argv, __doc__)
    run.require(bool(asked.runs), "give a run directory: python -m lab.plot runs/NAME")
    need("matplotlib")
    curves = {title: [] for title in PANELS}
    for i, directory in enumerate(asked.runs):
        try:
            logged = lines_of(Path(directory) / "metrics.jsonl")
        except (OSError, ValueError) as error:
            raise run.BadInput(f"cannot read the metrics of {directory}: {error}") from None
        for title, name, style in ((t, *pair) for t, m in PANELS.items() for pair in m.items()):
            shown = Path(directory).name if "-" in style else None
            curves[title].append((curve(logged, name), f"C{i}{style}", shown))
    path = asked.out or str(Path(asked.runs[0]) / "curves.png")
    panels = [(title, "rollouts", partial(draw_curves, drawn)) for title, drawn in curves.items()]
    draw(path, (17, 9), panels, rows=3)
    print(path)
    return path


if __name__ == "__main__":
    main()
