"""The curves of one or several runs as a picture: reads metrics.jsonl, writes curves.png.

python plot.py runs/NAME                                   # writes runs/NAME/curves.png
python plot.py runs/A runs/B --labels A B --out both.png   # several runs in one picture
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from run import BadInput, exit_on_bad_input, flag, parse_settings, require

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
    try:
        import matplotlib
    except ImportError:
        raise BadInput("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 6.5), constrained_layout=True)
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
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


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
    draw([read(run) for run in settings.runs], labels, path)
    print(path)
    return path


if __name__ == "__main__":
    main()
