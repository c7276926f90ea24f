"""plot.py: the curves of runs, and a run as text."""

import json

import pytest
from helpers import fails_with

from lab import plot


def test_a_summary_says_where_a_metric_stood_and_what_went_wrong():
    counts = [{"gradient_steps": 8, "answers": 64}, {"gradient_steps": 24, "answers": 192}]
    lines = [
        {"step": 0, "test_accuracy": 0.25, "seconds_eval": 3.0},
        {"step": 1, "entropy": 0.5, "seconds_sample": 6.0, "bad_steps": 2} | counts[0],
        {"step": 3, "entropy": 0.125, "test_accuracy": 0.75, "seconds_sample": 3.0} | counts[1],
    ]
    text = plot.summarise(lines, "mine")
    assert text.startswith("mine: 3 rollouts, 24 optimiser steps, 192 answers\n")
    rows = [line.split() for line in text.splitlines()]
    assert ["test_accuracy", "0.25", "0.25", "(0)", "0.75", "(3)", "0.75"] in rows
    assert ["entropy", "0.5", "0.125", "(3)", "0.5", "(1)", "0.125"] in rows
    assert "0.2 minutes: sample 75%" in text and "2 optimiser steps were not finite" in text
    assert "steps are missing" in text
    assert "warning" not in plot.summarise(lines[:1], "mine")
    assert plot.summarise([], "mine") == "mine: nothing logged yet"


@pytest.fixture
def runs(tmp_path):
    """Two run directories."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lines = [{"step": i, "accuracy": i / 9, "test_accuracy": i / 9} for i in range(4)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    return tmp_path


def test_run_directories_need_no_flag(runs, capsys):
    assert plot.main([f"{runs}/a"]) == f"{runs}/a/curves.png"
    assert (runs / "a" / "curves.png").stat().st_size > 5000
    assert "a: 3 rollouts" in capsys.readouterr().out
    flags = ["--out", f"{runs}/pictures/both.png"]
    assert plot.main([f"{runs}/a", f"{runs}/b", *flags]) == flags[-1]
    assert plot.main(["--runs", f"{runs}/a", f"{runs}/b", *flags]) == flags[-1]
    said = capsys.readouterr().out
    assert "a: 3 rollouts" in said and "b: 3 rollouts" in said


@pytest.mark.parametrize(
    "flags, fragment",
    [
        ([], "give a run directory"),
        (["nowhere"], "cannot read the metrics of nowhere"),
    ],
)
def test_bad_flags_end_with_one_line(flags, fragment, capsys):
    fails_with(capsys, plot.main, flags, fragment)


def test_a_damaged_log_ends_with_one_line(runs, capsys):
    (runs / "a" / "metrics.jsonl").write_text('{"step": 1')
    fails_with(capsys, plot.main, [f"{runs}/a"], f"cannot read the metrics of {runs}/a")
