"""report.py: a table whose numbers can be followed by hand, findings, figures."""

import json
import re
from pathlib import Path

import pytest
from helpers import fails_with

from ablate import GROUPS
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
    critic = {"explained_variance": 0.3, "best_explained_variance": 0.5, "slip_auc": 0.9}
    late = curve(0.4, 0.6, 0.7, 0.7)
    late[7] |= critic
    late[8] |= critic | {"explained_variance": 0.1}
    late[6] |= {"explained_variance": -9.0}  # the last quarter of 8 rollouts is 7 and 8
    out = kept(tmp_path, {
        "vapo-0": curve(0.4, 0.7, 0.8, 0.9), "vapo-1": late,
        "dapo-0": curve(0.3, 0.4, 0.5, 0.7, answers=150),
        "dapo-1": curve(0.3, 0.4, 0.5, 0.6, answers=150),
        "perfect_critic-0": curve(0.4, 0.4, 0.5, 0.688), "300_dapo-0": curve(0.5),
        "300_perfect_critic-0": curve(0.6), "no_such_row-0": curve(0.1),
    })  # fmt: skip
    runs = report.main([f"--out={out}"])
    assert len(runs) == 7
    # Of seed 0, which both have: trained (0.4 + 0.4 + 0.5 + 0.688 − 0.3 − 0.4 − 0.5 − 0.7) / 8, in
    # the end 0.688 − 0.7; then 0.3 − 0.25, 0.6 − 0.5.
    text = (out / "README.md").read_text()
    few = ": below 0.05, so this world cannot reward a better critic."
    assert f"leads DAPO by 0.011 in the mean, -0.012 in the end{few}" in text
    assert "leads DAPO by 0.050 in the mean, 0.100 in the end.\n" in text
    # Finals 0.9 and 0.7: mean 0.8, s = √0.02, half = 12.706 · √0.02 / √2 = 1.2706. Trained at half
    # of the accuracies: means 0.35 and 0.3, half = 12.706 · 0.05 / 2
    assert (
        "| VAPO | 0.325 ± 0.318 | 0.800 ± 1.271 |  |  | 0.200 | 0.500 | 0.900 | 800 | 12.0 | 2 |"
        in text
    )
    # 0.7 − 0.9 and 0.6 − 0.7: mean −0.15, half = 12.706 · 0.05; trained: −0.1125 and −0.075
    said = "| DAPO | 0.231 ± 0.079 | 0.650 ± 0.635 | -0.094 ± 0.238 | -0.150 ± 0.635 |"
    assert said in text and "7 runs; revision abc." in text
    for name in ("methods.png", "critics.png"):
        assert (out / name).stat().st_size > 5000


def test_the_cube_as_a_table_with_its_predictions_and_its_falls(tmp_path):
    """Piece 1 is worth 0.2 in the end, half of that in training; one run falls."""
    runs = {f"{row}-0": curve(0.5 + 0.2 * (row[5] == "1")) for row in GROUPS["cube"][:16]}
    runs["cube_0000000-0"] = [dict(line) for line in curve(0.5, 0.5)]
    runs["cube_0000000-0"][3]["accuracy"] = 0.1
    out = kept(tmp_path, runs)
    said = "| value pretraining | +0.01 | +0.01 | -0.02 | +0.04 | +0.01 | +0.01 |\n"
    (out / "predictions.md").write_text(said)
    report.main([f"--out={out}"])
    text = (out / "README.md").read_text()
    assert "16 runs, 16 of 128 combinations" in text and "1 runs fell below half" in text
    row = next(line for line in text.splitlines() if line.startswith("| value pretraining | 49 |"))
    cells = row.split(" | ")
    # 8 runs with it trained at 0.35; without it, seven at 0.25 and one at (0.25 · 3 + 0.1) / 4
    assert cells[2].startswith(f"{0.35 - (7 * 0.25 + 0.2125) / 8:.3f} ±")
    assert cells[3].startswith("0.200 ±") and cells[8:10] == ["0%", "12%"]
    assert cells[10:12] == ["+0.04", "-0.02"] and "Signs predicted right: 1 of 14" in text
    assert "| 3 | 0.1 |" in text and (out / "effects.png").stat().st_size > 5000


def test_the_second_replicate_beside_the_first(tmp_path):
    """Piece 1 is worth 0.2 in the first, 0.3 in the second, of sixteen runs, all worse:
    values that need all runs alike (what VAPO has over VAPO without it) come from the first."""
    runs = {f"{row}-0": curve(0.5 + 0.2 * (row[5] == "1")) for row in GROUPS["cube"]}
    runs |= {f"{row}-1": curve(0.1 + 0.3 * (row[5] == "1")) for row in GROUPS["cube"][:16]}
    report.main([f"--out={kept(tmp_path, runs)}"])
    text = (tmp_path / "README.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| value pretraining | 49 |"))
    cells = row.strip("| ").split(" | ")
    # (128 · 0.2 + 16 · 0.3) / 144 = 0.211; in training half of everything
    assert cells[3].startswith("0.211 ±") and cells[6] == "0.100"
    assert cells[-2].startswith("0.050 ±") and cells[-1].startswith("0.100 ±")


def test_fifteen_runs_of_the_cube_are_not_yet_a_fraction_of_it(tmp_path):
    runs = {f"{row}-0": curve(0.5) for row in GROUPS["cube"][:15]}
    report.main([f"--out={kept(tmp_path, runs)}"])
    assert "The seven pieces" not in (tmp_path / "README.md").read_text()


def test_every_figure_is_drawn_where_its_runs_are(tmp_path):
    numbers = {"explained_variance": 0.1, "advantage_variance": 0.9}
    lines = [line | numbers if line["step"] else line for line in curve(0.5, 0.6)]
    rows = [*GROUPS["cube"], *GROUPS["main"], *GROUPS["30"], *GROUPS["300"], *GROUPS["long"]]
    out = kept(tmp_path, {f"{row}-0": lines for row in rows})
    report.main([f"--out={out}"])
    text = (out / "README.md").read_text()
    drawn = set(re.findall(r"\]\((\w+\.png)\)", text))
    assert drawn == {path.name for path in out.glob("*.png")} and len(drawn) == 8
    assert "128 of 128" in text and "## 300 tokens" in text and "Largest interactions" in text


def test_intervals_by_hand():
    pandas = pytest.importorskip("pandas")
    assert report.interval(pandas.Series([1.0, 2.0, 3.0])) == "2.000 ± 2.484"  # 4.303 / √3
    assert report.interval(pandas.Series([5.0])) == "5.000" and report.interval([]) == ""


def test_the_results_in_this_repository_are_what_their_raw_files_say(tmp_path):
    for name in ("raw", "predictions.md"):
        (tmp_path / name).symlink_to(RESULTS / name)
    report.main([f"--out={tmp_path}"])
    again, stored = (out / "README.md" for out in (tmp_path, RESULTS))
    assert again.read_text().split() == stored.read_text().split()
    names = re.findall(r"\]\((\w+\.png)\)", again.read_text())
    assert names and all((RESULTS / name).stat().st_size > 5000 for name in names)


def test_without_runs_it_writes_nothing_and_without_seaborn_it_says_so(
    tmp_path, capsys, monkeypatch
):
    assert not len(report.main([f"--out={tmp_path}/none"]))
    assert capsys.readouterr().out.count("\n") == 1 and not (tmp_path / "none").exists()
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    said = "tables and pictures need pandas scipy seaborn: pip install pandas scipy seaborn"
    fails_with(capsys, report.main, [f"--out={tmp_path}/none"], said)
