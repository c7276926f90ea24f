"""ablate.py: rows that change one thing, runs that are not repeated, and a table whose numbers can be followed by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
from test_vapo import saved_network

import ablate
import report
import train_vapo
from run import BadInput

SMALL = {
    "device": "cpu", "steps": 1, "prompts": 16, "samples": 4, "mini_batch": 8, "eval_samples": 1, "save_every": 0, "response_length": 24,
    "warmup": 0, "lr": 2e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """A directory as `prepare` leaves it, around the tests' small world."""
    runs = tmp_path_factory.mktemp("ablate")
    (runs / "world").symlink_to(world)
    flags = [f"@{world}/train_value.args", "--answers=512", "--passes=3", "--response_length=24"]
    ablate.call("train_value.py", [*flags, "--objective=reward", f"--out={runs}/reward_model"], runs / "reward_model.log")
    flags += [f"--reuse_answers={runs}/reward_model/answers.pt"]
    ablate.call("train_value.py", [*flags, f"--out={runs}/value"], runs / "value.log")
    flags += [f"--init={runs}/reward_model/critic", f"--out={runs}/value_from_reward_model"]
    ablate.call("train_value.py", flags, runs / "value.log")
    return runs


def settings_of(row, runs):
    preset = ablate.ROWS[row][1].get("preset", "vapo")
    overrides = [f"--{name}={value}" for name, value in train_vapo.PRESETS[preset].items()]
    return train_vapo.parse_settings(train_vapo.Settings, overrides + ablate.run_flags(row, 0, runs), "")


def outcome(row, runs, out):
    """(policy, critic) after one rollout of a row, each as one vector; no critic: None."""
    small = [f"--{name}={value}" for name, value in SMALL.items()]
    train_vapo.main([*ablate.run_flags(row, 0, runs), *small, f"--out={out / row}"])
    networks = [saved_network(out / row, name) for name in ("policy", "critic")]
    return [torch.cat([weight.flatten() for weight in network.values()]) if network else None for network in networks]


def test_every_row_of_the_paper_changes_the_outcome_of_one_step_and_nothing_else(runs, tmp_path):
    vapo = settings_of("vapo", runs)
    for row in ablate.GROUPS["paper"][1:]:
        own = ablate.ROWS[row][1]
        changed = {name for name, value in vars(settings_of(row, runs)).items() if value != getattr(vapo, name)}
        expected = set(own) - ({"lr"} if own.get("lr") == vapo.lr else set())
        if "preset" in expected:  # a preset brings its own; a row without a pretrained critic says what else it starts from
            expected |= set(train_vapo.PRESETS[row])
        if settings_of(row, runs).critic == "":
            expected |= {"critic"} | ({"reward_model"} if settings_of(row, runs).reward_model else set())
        assert changed - {"out"} == expected, row
    vapo = outcome("vapo", runs, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(vapo, outcome("vapo", runs, tmp_path / "again")))
    for row in ablate.GROUPS["paper"][1:]:
        index = 1 if row == "no_decoupled_gae" else 0  # that one moves the critic first, and through it the policy
        assert (outcome(row, runs, tmp_path)[index] - vapo[index]).abs().max() > 1e-6, row


def test_ppo_with_one_piece_is_ppo_but_for_that_piece(runs):
    ppo = settings_of("ppo", runs)
    assert len(ablate.GROUPS["added"]) == 8
    for row in ablate.GROUPS["added"][1:]:
        piece = row.removeprefix("ppo_with_")
        changed = {name for name, value in vars(settings_of(row, runs)).items() if value != getattr(ppo, name)} - {"out"}
        assert changed == {piece} | ({"critic", "reward_model"} if piece == "value_pretraining" else set()), row
        assert getattr(settings_of(row, runs), piece) and not getattr(ppo, piece)


def test_a_row_in_several_seeds_says_so_in_its_flags(runs):
    assert "--seed=3" in ablate.run_flags("dapo", 3, runs) and f"--out={runs}/dapo-3" in ablate.run_flags("dapo", 3, runs)


def finished(directory, row, seed, lines):
    """A run directory as `train_vapo.py` leaves it, as far as ablate.py reads it."""
    directory.mkdir(parents=True, exist_ok=True)
    flags = ablate.to_flags(ablate.row_settings(row, seed))
    (directory / "config.json").write_text(json.dumps({"settings": flags, "on": {}}))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """What ablate.py calls, done at once; a row named no_clip_higher fails."""
    called = []

    def call(script, argv, log):
        target = next(str(flag).split("=", 1) for flag in argv if str(flag).startswith(("--out=", "--resume=")))
        directory = Path(target[1])
        row, seed = directory.name.rsplit("-", 1)
        called.append((row, int(seed), "resume" in target[0]))
        if row == "no_clip_higher":
            raise BadInput("train_vapo.py ended with exit code 2, see the log: no such thing")
        finished(directory, row, int(seed), curve(0.5))

    monkeypatch.setattr(ablate, "call", call)
    monkeypatch.setattr(ablate, "prepare", lambda *_: None)
    return called


def test_ablate_repeats_no_finished_run_and_resumes_a_stopped_one(tmp_path, calls):
    flags = [f"--runs={tmp_path}/runs", f"--out={tmp_path}/out", "--jobs=1", "--rows", "vapo", "dapo", "--seeds"]
    finished(tmp_path / "runs" / "dapo-1", "dapo", 1, curve(0.1))  # stopped on its way
    ablate.main([*flags, "0"])
    assert calls == [("vapo", 0, False), ("dapo", 0, False)]
    ablate.main([*flags, "0", "1"])
    assert calls[2:] == [("vapo", 1, False), ("dapo", 1, True)]
    ablate.main([*flags, "0", "1"])
    assert len(calls) == 4


def test_a_run_made_with_other_settings_is_not_taken_for_the_rows(tmp_path, calls, monkeypatch, capsys):
    flags = [f"--runs={tmp_path}/runs", f"--out={tmp_path}/out", "--rows", "vapo", "--seeds", "0"]
    ablate.main(flags)
    monkeypatch.setitem(ablate.LEARNING_RATES, "vapo", 0.5)
    with pytest.raises(SystemExit):
        ablate.main(flags)
    assert "vapo-0.jsonl has another lr than vapo has now" in capsys.readouterr().err
    (tmp_path / "out" / "raw" / "vapo-0.jsonl").unlink()
    with pytest.raises(SystemExit):
        ablate.main(flags)
    assert "runs/vapo-0 has another lr" in capsys.readouterr().err and len(calls) == 1


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path, calls, capsys):
    rows = ["--rows", "no_clip_higher", "ppo", "--seeds", "0", "--jobs=1"]
    with pytest.raises(SystemExit) as error:
        ablate.main([*rows, f"--runs={tmp_path}/runs", f"--out={tmp_path}/out"])
    assert error.value.code == 2 and "1 runs failed: no_clip_higher, seed 0:" in capsys.readouterr().err
    assert (tmp_path / "out" / "raw" / "ppo-0.jsonl").exists() and not (tmp_path / "out" / "raw" / "no_clip_higher-0.jsonl").exists()
    assert "| PPO | 5 | 0.500 |  | – |" in (tmp_path / "out" / "README.md").read_text()  # one row, one seed, nothing to compare with


def test_two_at_once_do_not_take_the_same_run(tmp_path, calls, capsys):
    flags = ["--rows", "vapo", "--seeds", "0", f"--runs={tmp_path}/runs", f"--out={tmp_path}/out"]
    with ablate.lock(tmp_path / "runs"), pytest.raises(SystemExit) as error:
        ablate.main(flags)
    assert error.value.code == 2 and "another ablate.py is at work" in capsys.readouterr().err and not calls
    ablate.main(flags)
    assert calls == [("vapo", 0, False)]


def test_an_unknown_row_is_refused(capsys):
    with pytest.raises(SystemExit):
        ablate.main(["--rows", "vapoo"])
    assert "there is no vapoo" in capsys.readouterr().err


def curve(*accuracies, answers=100):
    """Lines of a run that is tested every 2 of its rollouts, with 4 gradient steps each."""
    lines = [{"step": 0, "test_accuracy": 0.1}]
    for i, accuracy in enumerate(accuracies):
        numbers = {"accuracy": accuracy / 2, "seconds_sample": 30.0, "seconds_update": 60.0}
        lines.append({"step": 2 * i + 1, "gradient_steps": 8 * i + 4, "answers": (2 * i + 1) * answers} | numbers)
        numbers |= {"test_accuracy": accuracy, "test_length": 9.0, "entropy": 1.0, "reward": 0.5}
        lines.append({"step": 2 * i + 2, "gradient_steps": 8 * i + 8, "answers": (2 * i + 2) * answers} | numbers)
    return lines


def test_the_table_is_computed_from_the_files_as_by_hand(tmp_path):
    finished = {
        "vapo-0": curve(0.4, 0.7, 0.8, 0.9), "vapo-1": curve(0.4, 0.6, 0.7, 0.7),
        "dapo-0": curve(0.3, 0.4, 0.5, 0.7, answers=150), "dapo-1": curve(0.3, 0.4, 0.5, 0.6, answers=150),
        "no_clip_higher-0": curve(0.1, 0.2, 0.6, 0.5), "no_clip_higher-1": curve(0.1, 0.2, 0.2, 0.4),
    }  # fmt: skip
    (tmp_path / "raw").mkdir()
    for name, lines in finished.items():
        (tmp_path / "raw" / f"{name}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in [{"config": {"on": {"revision": "abc"}}}, *lines])
        )
    runs = report.read_raw(tmp_path, ablate.ROWS)
    summary = report.summarise(runs)
    # Finals 0.9 and 0.7: mean 0.8, s = √0.02, half = 12.706 · √0.02 / √2 = 1.2706
    assert summary["vapo"]["accuracy"] == pytest.approx(0.8) and summary["vapo"]["half"] == pytest.approx(1.2706)
    # 0.5 − 0.9 and 0.4 − 0.7: mean −0.35, s = √0.005, half = 12.706 · 0.05 = 0.6353
    row = summary["no_clip_higher"]
    assert row["difference"] == pytest.approx(-0.35) and row["difference_half"] == pytest.approx(0.6353)
    assert row["fall"] == pytest.approx(0.1)  # seed 0 ends at 0.5 after 0.6, both in its last quarter
    # DAPO's best mean is 0.65, after 8 rollouts = 32 gradient steps; VAPO's mean is 0.65 after 4 = 16; the third never.
    assert [summary[row]["steps_to_dapo"] for row in ("dapo", "vapo", "no_clip_higher")] == [32, 16, None]
    assert summary["dapo"]["answers"] == 1200 and summary["vapo"]["minutes"] == pytest.approx(8 * 1.5)
    lines = report.findings(runs, summary, [], ablate.PAPER)
    assert (
        "below VAPO: 1 of 1 rows; the 95% interval excludes 0: 0. Above VAPO with an interval that excludes 0: 0." in lines[0]
        and "over 3 rows: 1.00" in lines[1]
    )
    assert "0.650 (mean over seeds), comes after 32 gradient steps; VAPO reaches it after 16: 50%" in lines[2]
    assert lines[3].endswith("0.000.")
    titles = {row: title for row, (title, _) in ablate.ROWS.items()}
    report.report(tmp_path, ablate.GROUPS, titles, ablate.PAPER, 0.5)
    text = (tmp_path / "README.md").read_text()
    assert "| w/o clip-higher | 46 | 0.450 ± 0.635 | -0.350 ± 0.635 | – | 800 | 12.0 | 2 |" in text
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("methods.png", "ablation.png", "dynamics.png"))


def test_the_sweep_the_learning_rates_and_the_critic_are_told_apart(tmp_path):
    (tmp_path / "raw").mkdir()
    runs = {
        "vapo-0": curve(0.4, 0.8), "alpha_0.1-0": curve(0.3, 0.6), "ppo-0": curve(0.2, 0.3), "ppo_with_positive_nll-0": curve(0.2, 0.5), "ppo_lr_0.0001-100": curve(0.1, 0.2, 0.4, 0.6), "ppo_lr_0.0001-101": curve(0.2, 0.2, 0.2, 0.2)
    }  # fmt: skip
    value = [
        {"step": 0, "value_loss": 0.1, "explained_variance": 0.0, "best_explained_variance": 0.4, "slip_auc": 0.5},
        {"step": 1, "train_value_loss": 0.01},
        {"step": 2, "value_loss": 0.05, "explained_variance": 0.3, "best_explained_variance": 0.4, "slip_auc": 0.8},
        {"step": 4, "value_loss": 0.06, "explained_variance": 0.1, "best_explained_variance": 0.4, "slip_auc": 0.9},  # past the best pass
    ]
    for name, lines in (runs | {"value": value}).items():
        lines = [{"config": {"on": {}}}, *lines]
        (tmp_path / "raw" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.report(tmp_path, ablate.GROUPS, {row: title for row, (title, _) in ablate.ROWS.items()}, ablate.PAPER, 0.5)
    text = (tmp_path / "README.md").read_text()
    assert "| PPO with positive-example NLL |  | 0.500 | -0.300 |" in text.partition("## PPO with one piece")[2].partition("## α of")[0]
    sweep, rates = text.partition("## α of")[2].split("## Learning rates")
    assert "| VAPO, α = 0.1 |  | 0.600 | -0.200 |" in sweep and "| VAPO |" in sweep and "PPO |" not in sweep
    # The last quarter of 8 rollouts is 6, 7 and 8: trained at half of 0.4, 0.6, 0.6, mean 0.2667; the other seed 0.1: together 0.183.
    assert "| ppo, lr 0.0001 | 0.183 | 2 |" in rates and "α" not in rates.partition("!")[0]
    assert "explained variance 0.300, 75% of the best possible; first-slip AUC 0.80." in text
    assert "pieces.png" in text and (tmp_path / "pieces.png").stat().st_size > 5000


def test_a_best_score_at_the_start_is_no_never(tmp_path):
    runs = {"vapo": {0: curve(0.05, 0.2)}, "dapo": {0: curve(0.05, 0.05)}}
    summary = report.summarise(runs)
    assert summary["vapo"]["steps_to_dapo"] == summary["dapo"]["steps_to_dapo"] == 0
    assert "VAPO reaches it after 0 (the paper" in " ".join(report.findings(runs, summary, [], ablate.PAPER))


def test_intervals_and_rank_correlation_by_hand():
    mean, half = report.mean_interval([1.0, 2.0, 3.0])  # s = 1, t = 4.303, √3
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))
    assert report.mean_interval([5.0])[0] == 5 and math.isnan(report.mean_interval([5.0])[1])
    assert report.ranks([3, 1, 3, 2]) == [3.5, 1, 3.5, 2]
    assert report.rank_correlation([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(1 - 6 * 2 / (4 * 15))
