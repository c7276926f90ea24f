"""report.py: a table whose numbers can be followed by hand, findings, figures."""

import json
import math
import re
from pathlib import Path

import pytest
from helpers import fails_with

from lab import plot, report

RESULTS = Path(__file__).parent.parent.parent / "results"


def curve(*accuracies, answers=100):
    """Lines of a run that is tested every 2 of its rollouts, with 4 gradient steps each."""
    lines = [{"step": 0, "test_accuracy": 0.1}]
    for i, accuracy in enumerate(accuracies):
        numbers = {"accuracy": accuracy / 2, "seconds_sample": 30.0, "seconds_update": 60.0}
        for step in (2 * i + 1, 2 * i + 2):
            counts = {"step": step, "gradient_steps": 4 * step, "answers": step * answers}
            lines.append(counts | numbers)
        lines[-1] |= {"test_accuracy": accuracy, "test_length": 9.0, "entropy": 1.0, "reward": 0.5}
    return lines


def kept(out, runs):
    """OUT/raw as ablate.py leaves it, with the lines of each of these runs."""
    (out / "raw").mkdir(parents=True)
    for name, lines in runs.items():
        lines = [{"config": {"on": {"revision": "abc"}, "settings": ["--seed=0"]}}, *lines]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (out / "raw" / f"{name}.jsonl").write_text(text)
    return out


def test_the_table_is_computed_from_the_files_as_by_hand(tmp_path):
    out = kept(tmp_path, {
        "vapo-0": curve(0.4, 0.7, 0.8, 0.9), "vapo-1": curve(0.4, 0.6, 0.7, 0.7),
        "dapo-0": curve(0.3, 0.4, 0.5, 0.7, answers=150),
        "dapo-1": curve(0.3, 0.4, 0.5, 0.6, answers=150),
        "no_clip_higher-0": curve(0.1, 0.2, 0.6, 0.5),
        "no_clip_higher-1": curve(0.1, 0.2, 0.2, 0.4),
    })  # fmt: skip
    runs = report.read_raw(out)
    summary = report.summarise(runs)
    # Finals 0.9 and 0.7: mean 0.8, s = √0.02, half = 12.706 · √0.02 / √2 = 1.2706
    assert summary["vapo"]["accuracy"] == pytest.approx(0.8)
    assert summary["vapo"]["half"] == pytest.approx(1.2706, rel=1e-4)
    # 0.5 − 0.9 and 0.4 − 0.7: mean −0.35, s = √0.005, half = 12.706 · 0.05 = 0.6353
    row = summary["no_clip_higher"]
    assert row["difference"] == pytest.approx(-0.35)
    assert row["difference_half"] == pytest.approx(0.6353, rel=1e-4)
    # DAPO's best mean is 0.65, after 8 rollouts = 32 gradient steps; VAPO's mean is 0.65 after
    # 4 = 16; the third never.
    steps = [summary[row]["steps_to_dapo"] for row in ("dapo", "vapo", "no_clip_higher")]
    assert steps == [32, 16, None]
    assert summary["dapo"]["answers"] == 1200
    assert summary["vapo"]["minutes"] == pytest.approx(8 * 1.5)
    report.main([f"--out={out}"])
    text = (out / "README.md").read_text()
    said = "| w/o clip-higher | 46 | 0.450 ± 0.635 | -0.350 ± 0.635 | – | 800 | 12.0 | 2 |"
    assert said in text and "6 runs; revision abc;" in text
    for name in ("methods.png", "ablation.png", "dynamics.png"):
        assert (out / name).stat().st_size > 5000


def test_single_pieces_learning_rates_and_the_critic_are_told_apart(tmp_path):
    known = {"best_explained_variance": 0.4}
    value = [
        {"step": 0, "value_loss": 0.1, "explained_variance": 0.0, "slip_auc": 0.5} | known,
        {"step": 1, "train_value_loss": 0.01},
        {"step": 2, "value_loss": 0.05, "explained_variance": 0.3, "slip_auc": 0.8} | known,
        # Past the best pass.
        {"step": 4, "value_loss": 0.06, "explained_variance": 0.1, "slip_auc": 0.9} | known,
    ]
    out = kept(tmp_path, {
        "vapo-0": curve(0.4, 0.8), "ppo-0": curve(0.2, 0.3),
    })  # fmt: skip
    (out / "start" / "value").mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in value)
    (out / "start" / "value" / "metrics.jsonl").write_text(text)
    report.main([f"--out={out}"])
    assert (out / "pretraining.png").stat().st_size > 5000


def test_one_run_alone_is_no_reason_to_fail(tmp_path):
    report.main([f"--out={kept(tmp_path, {'ppo-0': curve(0.5)})}"])
    assert "| PPO | 5 | 0.500 |  | – |" in (tmp_path / "README.md").read_text()


def test_a_best_score_at_the_start_is_no_never():
    runs = {"vapo": {0: curve(0.05, 0.2)}, "dapo": {0: curve(0.05, 0.05)}}
    summary = report.summarise(runs)
    assert summary["vapo"]["steps_to_dapo"] == summary["dapo"]["steps_to_dapo"] == 0


def test_intervals_by_hand():
    mean, half = report.mean_interval([1.0, 2.0, 3.0])  # s = 1, t = 4.303, √3
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3), rel=1e-4)
    mean, half = report.mean_interval([5.0])
    assert mean == 5 and math.isnan(half)


def test_the_results_in_this_repository_are_what_their_raw_files_say(tmp_path):
    (tmp_path / "raw").symlink_to(RESULTS / "raw")
    (tmp_path / "start").symlink_to(RESULTS / "start")
    report.main([f"--out={tmp_path}"])
    again, stored = (out / "README.md" for out in (tmp_path, RESULTS))
    assert again.read_text().split() == stored.read_text().split()
    names = re.findall(r"\]\((\w+\.png)\)", again.read_text())
    assert len(names) == 4 and all((tmp_path / name).stat().st_size > 5000 for name in names)


def test_without_runs_it_writes_nothing_and_without_matplotlib_it_says_so(
    tmp_path, capsys, monkeypatch
):
    assert report.main([f"--out={tmp_path}/none"]) == {}
    assert capsys.readouterr().out.count("\n") == 1 and not (tmp_path / "none").exists()
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    said = "tables and pictures need matplotlib scipy: pip install matplotlib scipy"
    fails_with(capsys, report.main, [f"--out={tmp_path}/none"], said)
