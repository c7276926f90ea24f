"""bench.py: both sides of a comparison do the same work, and the table says what was measured."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_bad_input import fails_with

import bench
import model
import problems as problem_files


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


def test_trl_trains_on_our_answers_and_has_our_gradient(world, monkeypatch, capsys):
    pytest.importorskip("trl", reason="TRL is not installed")
    import against_trl

    tokenizer, policy = model.load_tokenizer(str(world / "base")), model.load_policy(str(world / "base"), torch.device("cpu"))
    asked = SimpleNamespace(prompt_template="{problem}:", prompt_length=8, chat_template=False, drop_long_prompts=False)
    problems = problem_files.prompted_problems(f"{world}/train.jsonl", tokenizer, asked)
    monkeypatch.setattr(bench, "subject", lambda *_: (policy, tokenizer, problems, None, None, 40))
    monkeypatch.setattr(against_trl, "PROBLEMS", 8)
    monkeypatch.setattr(against_trl, "SIZES", (16, 64))
    lines = bench.main(["--parts", "trl", "--repeats", "1", "--device", "cpu"])  # it asserts that the gradients are equal
    assert [line["part"] for line in lines] == ["update, toy", "old log-probs and update, toy"]
    assert all(line["ours"] > 0 and line["theirs"] > 0 for line in lines)
    assert "relative difference" in capsys.readouterr().out


def test_without_trl_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    fails_with(capsys, bench.main, ["--parts", "trl"], "--parts trl needs the package trl: pip install trl datasets")
