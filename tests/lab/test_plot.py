"""plot.py: the curves of runs."""

import json

import pytest
from helpers import fails_with

from lab import plot


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
    flags = ["--out", f"{runs}/pictures/both.png"]
    assert plot.main([f"{runs}/a", f"{runs}/b", *flags]) == flags[-1]
    assert plot.main(["--runs", f"{runs}/a", f"{runs}/b", *flags]) == flags[-1]
    assert capsys.readouterr().out.count(".png") == 3


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
