"""bench.py: both sides of a comparison do the same work, and the table says what was measured."""

import json

import pytest

import bench


def test_the_line_has_medians_and_the_spread_of_the_turns_ratios(monkeypatch):
    # Ours takes 1, 2 and 4 seconds, the other 3, 3 and 4: ratios 3, 1.5 and 1 for 12 tokens each.
    taken = iter([1, 3, 2, 3, 4, 4])
    monkeypatch.setattr(bench, "seconds", lambda function, device: (next(taken), function()))
    line = bench.side_by_side("part", "other", lambda: 12, lambda: 12, bench.Settings(repeats=3), None)
    assert (line["ratio"], line["lowest"], line["highest"]) == (1.5, 1, 3)
    assert (line["ours"], line["theirs"]) == (6, 4)
    assert "6 tok/s" in bench.describe_line(line) and "1.50x (1.00 to 3.00)" in bench.describe_line(line)


def test_it_runs_and_writes_what_it_printed(tmp_path, capsys):
    lines = bench.main(["--parts", "gae", "draw", "--repeats", "1", "--device", "cpu", "--json", str(tmp_path / "bench.json")])
    stored = json.loads((tmp_path / "bench.json").read_text())
    assert stored["lines"] == lines and [line["part"] for line in lines] == ["GAE, 512 x 4096", "draw, 64 rows"]
    printed = capsys.readouterr().out
    assert all(bench.describe_line(line) in printed for line in lines)


@pytest.mark.parametrize("flags", [["--parts", "gea"], ["--models", "7B"], ["--repeats", "0"]])
def test_bad_flags_end_with_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(flags)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
