"""Runs as pictures, from their metrics.jsonl.

    python -m lab.plot runs/NAME                                  # writes runs/NAME/curves.png
    python -m lab.plot runs/A runs/B --out both.png

A run is a table, a row a line of metrics.jsonl.
"""

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from system import run, settings
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


def need(*packages):
    """Raises: BadInput if one is not installed."""
    missing = " ".join(name for name in packages if find_spec(name) is None)
    run.require(not missing, f"tables and pictures need {missing}: pip install {missing}")


def curves(runs, metrics, axis):
    """Draws metrics {name: matplotlib's format} of runs {directory: table}, a colour a run."""
    for i, (directory, log) in enumerate(runs.items()):
        for name, style in metrics.items():
            points = log.reindex(columns=["step", name]).dropna()
            label = directory.name if "-" in style else None
            axis.plot(*points.to_numpy().T, f"C{i}{style}", label=label, markersize=4)


def draw(path, size, panels, rows=1):
    """A PNG of so many inches; a panel is (title, name of x, a function that draws on an axis)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, len(panels) // rows, squeeze=False).flat
    for axis, (title, x, paint) in zip(axes, panels):
        paint(axis)
        axis.set_title(title, fontsize=10)
        axis.set(xlabel=x, axisbelow=True)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8, framealpha=0.5)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


@run.exit_on_bad_input
def main(argv=None):
    asked = settings.parse(Settings, argv, __doc__, first="--runs")
    run.require(bool(asked.runs), "give a run directory: python -m lab.plot runs/NAME")
    need("pandas", "matplotlib")
    import pandas

    runs = {}
    for directory in map(Path, asked.runs):
        try:
            runs[directory] = pandas.read_json(directory / "metrics.jsonl", lines=True)
        except (OSError, ValueError) as error:
            raise run.BadInput(f"cannot read the metrics of {directory}: {error}") from None
    path = asked.out or str(Path(asked.runs[0]) / "curves.png")
    panels = [(title, "rollouts", partial(curves, runs, names)) for title, names in PANELS.items()]
    draw(path, (17, 9), panels, rows=3)
    print(path)
    return path


if __name__ == "__main__":
    main()
