"""ablate.py: rows that change one thing, and runs that are not repeated."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from test_vapo import saved_network

import ablate
import train_value
import train_vapo
from system import jobs
from system.run import BadInput
from system.settings import parse

SMALL = {"device": "cpu", "steps": 1, "prompts": 16, "samples": 4, "mini_batch": 8,
         "eval_samples": 1, "save_every": 0, "response_length": 24, "warmup": 0,
         "lr": 2e-3}  # fmt: skip


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """A directory as `prepare` leaves it, around the tests' small world."""
    runs = tmp_path_factory.mktemp("ablate")
    (runs / "world").symlink_to(world)
    flags = [f"@{world}/train_value.args", "--answers=512", "--passes=3", "--response_length=24"]
    train_value.main([*flags, "--objective=reward", f"--out={runs}/reward_model"])
    flags += [f"--reuse_answers={runs}/reward_model/answers.pt"]
    flags += [f"--init={runs}/reward_model/critic"]
    train_value.main([*flags, f"--out={runs}/value"])
    train_value.main([*flags, "--critic_surprise", f"--out={runs}/surprise"])
    return runs


def settings_of(row, runs):
    preset = train_vapo.PRESETS[ablate.ROWS[row][1].get("preset", "vapo")]
    return parse(train_vapo.Settings, ablate.run_flags(row, 0, runs), "", preset)


def changed(row, other, runs):
    """Names of the settings in which two rows differ."""
    one, two = (vars(settings_of(name, runs)) for name in (row, other))
    return {name for name, value in one.items() if value != two[name]} - {"out"}


def outcome(row, runs, out):
    """(policy, critic) after one rollout of a row, each as one vector; no critic: None."""
    small = [f"--{name}={value}" for name, value in SMALL.items()]
    train_vapo.main([*ablate.run_flags(row, 0, runs), *small, f"--out={out / row}"])
    vectors = []
    for network in (saved_network(out / row, name) for name in ("policy", "critic")):
        weights = [weight.flatten() for weight in network.values()]
        vectors.append(torch.cat(weights) if weights else None)
    return vectors


def test_every_row_changes_the_outcome_of_one_step_and_nothing_else(runs, tmp_path):
    vapo = settings_of("vapo", runs)
    for row in ablate.MAIN:
        own, settings = ablate.ROWS[row][1], settings_of(row, runs)
        expected = set(own) - ({"lr"} if own.get("lr") == vapo.lr else set())
        if "preset" in expected:  # a preset brings its own
            expected |= set(train_vapo.PRESETS[row])
        if settings.critic != vapo.critic:  # without it, what else it starts from
            expected |= {"critic"} | ({"reward_model"} if settings.reward_model else set())
        assert changed(row, "vapo", runs) == expected, row
    vapo = outcome("vapo", runs, tmp_path)
    again = outcome("vapo", runs, tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(vapo, again))
    for row in list(ablate.MAIN)[1:]:
        # that one moves the critic first, and through it the policy
        index = 1 if row == "no_decoupled_gae" else 0
        moved = outcome(row, runs, tmp_path)[index] - vapo[index]
        assert moved.abs().max() > 1e-6, row


def test_the_cube_is_all_combinations_and_nothing_else_changes(runs):
    assert len(set(ablate.GROUPS["cube"])) == 128
    vapo, ppo = "cube_1111111", "cube_0000000"
    assert changed(vapo, "vapo", runs) == set(ablate.CUBE_RUN)
    assert changed(ppo, "ppo", runs) == {"preset", *ablate.CUBE_RUN}
    assert changed("cube_1010110", vapo, runs) == {
        "decoupled_gae", "clip_higher", "group_sampling"}  # fmt: skip
    assert changed("cube_0111111", vapo, runs) == {"value_pretraining", "critic", "reward_model"}
    assert "--lr=0.0001" in ablate.run_flags(vapo, 1, runs)  # half, and half in no other row
    assert "--lr=0.0002" in ablate.run_flags("vapo", 1, runs)


@pytest.mark.parametrize("runs_done", (16, 32, 64, 128))
def test_a_part_of_the_cube_is_a_regular_fraction_of_resolution_four(runs_done):
    """Signs ±1: any two main effects, and a main effect and any interaction of two, are orthogonal
    in the runs that come first."""
    done = [row.removeprefix("cube_") for row in ablate.GROUPS["cube"][:runs_done]]
    sign_NP = torch.tensor([[2.0 * int(bit) - 1 for bit in bits] for bits in done])
    assert ablate.syndrome("0100010") == 2 ^ 6 and {"1111111", "0000000"} <= set(done)
    pair_NQ = torch.stack([sign_NP[:, i] * sign_NP[:, j] for i in range(7) for j in range(i)], 1)
    assert torch.equal(sign_NP.T @ sign_NP, runs_done * torch.eye(7))
    assert not (sign_NP.T @ pair_NQ).any() and not sign_NP.sum(0).any()


def test_worlds_of_other_lengths_and_longer_runs_change_nothing_else(runs):
    assert ablate.start_of("30_vapo", runs) == runs / "start" / "30"
    assert ablate.start_of("cube_1111111", runs) == runs / "start" / "100"
    assert changed("300_dapo", "dapo", runs) == set()
    assert changed("long_ppo", "ppo", runs) == {"steps"}
    assert changed("vapo_64", "vapo", runs) == {"prompts", "mini_batch"}
    assert len(ablate.GROUPS["30"]) == len(ablate.GROUPS["300"]) == len(ablate.MAIN) == 10


def test_what_is_missing_is_said_with_its_hours(tmp_path, calls, capsys):
    """A finished run of 8 rollouts took 1.5 minutes each; two like it are missing, two at once."""
    finished(tmp_path / "runs" / "vapo-0", "vapo", 0, curve(0.1, 0.2, 0.3, 0.4))
    jobs.keep(tmp_path / "runs" / "vapo-0", tmp_path / "out" / "raw" / "vapo-0.jsonl")
    waiting = [("ppo", 0), ("cube_1111111", 1), ("300_vapo", 0)]
    said = jobs.time_left(waiting, tmp_path / "runs", tmp_path / "out" / "raw", 2)
    assert said == (
        "3 runs are missing: 0.2 h, 2 side by side, and 1 of a kind that has not been run yet"
    )
    flags = [*flags_of(tmp_path, "vapo"), "--seeds", "0"]
    ablate.main(flags)
    ablate.main(flags)
    assert "\n0 runs are missing" in capsys.readouterr().out


def test_a_row_in_several_seeds_says_so_in_its_flags(runs):
    flags = ablate.run_flags("dapo", 3, runs)
    assert "--seed=3" in flags


def curve(*accuracies):
    """Lines of a run that is tested every 2 of its rollouts, with 4 gradient steps each."""
    lines = [{"step": 0, "test_accuracy": 0.1}]
    for step in range(1, 2 * len(accuracies) + 1):
        accuracy = accuracies[(step - 1) // 2]
        seconds = {"seconds_sample": 30.0, "seconds_update": 60.0}
        line = {"step": step, "gradient_steps": 4 * step, "answers": 100 * step}
        line |= seconds | {"accuracy": accuracy / 2}
        if step % 2 == 0:
            line |= {"test_accuracy": accuracy, "test_length": 9.0, "entropy": 1.0, "reward": 0.5}
        lines.append(line)
    return lines


def finished(directory, row, seed, lines):
    """A run directory as `train_vapo.py` leaves it, as far as ablate.py reads it."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"settings": ablate.row_settings(row, seed), "on": {}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def calls(monkeypatch):
    """What ablate.py calls, done at once, but for reports; a row named no_decoupled_gae fails."""
    called = []

    def call(script, argv, log):
        if script == "lab.report":
            return
        starts = ("--out=", "--resume=")
        target = next(str(flag) for flag in argv if str(flag).startswith(starts))
        directory = Path(target.partition("=")[2])
        row, seed = directory.name.rsplit("-", 1)
        called.append((row, int(seed), "--resume" in target))
        if row == "no_decoupled_gae":
            raise BadInput("train_vapo.py ended with exit code 2, see the log: no such thing")
        finished(directory, row, int(seed), curve(0.5))

    monkeypatch.setattr(ablate.jobs, "call", call)
    monkeypatch.setattr(ablate, "prepare", lambda *_: None)
    return called


def flags_of(tmp_path, *rows):
    return [f"--runs={tmp_path}/runs", f"--out={tmp_path}/out", "--jobs=1", "--rows", *rows]


def test_ablate_repeats_no_finished_run_and_resumes_a_stopped_one(tmp_path, calls):
    flags = [*flags_of(tmp_path, "vapo", "dapo"), "--seeds"]
    finished(tmp_path / "runs" / "dapo-1", "dapo", 1, curve(0.1))  # stopped on its way
    ablate.main([*flags, "0"])
    assert calls == [("vapo", 0, False), ("dapo", 0, False)]
    ablate.main([*flags, "0", "1"])
    assert calls[2:] == [("vapo", 1, False), ("dapo", 1, True)]
    ablate.main([*flags, "0", "1"])
    assert len(calls) == 4


def test_a_run_made_with_other_settings_is_not_taken_for_the_rows(
    tmp_path, calls, monkeypatch, capsys
):
    flags = [*flags_of(tmp_path, "vapo"), "--seeds", "0"]
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
    with pytest.raises(SystemExit) as error:
        ablate.main([*flags_of(tmp_path, "no_decoupled_gae", "ppo"), "--seeds", "0"])
    said = capsys.readouterr().err
    assert error.value.code == 2 and "1 runs failed: no_decoupled_gae, seed 0:" in said
    raw = tmp_path / "out" / "raw"
    assert (raw / "ppo-0.jsonl").exists() and not (raw / "no_decoupled_gae-0.jsonl").exists()
    import_module("lab.report").main([f"--out={tmp_path}/out"])
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| PPO | 0.250 | 0.500 |  |  |" in text  # one row, one seed, nothing to compare with


def test_the_cube_has_two_seeds_unless_asked(tmp_path, calls, monkeypatch):
    monkeypatch.setitem(ablate.GROUPS, "cube", ["cube_1111111"])
    ablate.main(flags_of(tmp_path, "cube"))
    assert [(row, seed) for row, seed, _ in calls] == [("cube_1111111", 0), ("cube_1111111", 1)]


def test_an_unknown_row_is_refused(capsys):
    with pytest.raises(SystemExit):
        ablate.main(["--rows", "vapoo"])
    assert "there is no vapoo" in capsys.readouterr().err


def test_a_script_runs_on_one_core_and_if_it_fails_the_last_line_of_its_log_says_why(tmp_path):
    log = tmp_path / "logs" / "log"
    script = tmp_path / "script.py"
    lines = ("import os, sys, system", "print(os.environ['OMP_NUM_THREADS'], sys.argv[1:])",
             "sys.exit(print('error: no') or int(sys.argv[1]))")  # fmt: skip
    script.write_text("\n".join(lines))
    jobs.call(script, [0, "x"], log)
    jobs.call("platform", [], log)  # a module, by python -m
    said = f"script.py ended with exit code 2, see {log}: error: no"
    with pytest.raises(BadInput, match=said):
        jobs.call(script, [2], log)
    lines = log.read_text().splitlines()
    assert lines[:2] == ["1 ['0', 'x']", "error: no"] and lines[-2:] == ["1 ['2']", "error: no"]


def test_jobs_side_by_side_are_told_apart_and_a_fault_is_no_bad_input():
    def bad():
        raise BadInput("no such file")

    ended = {name: rest for name, *rest in jobs.side_by_side({"bad": bad, "good": dict}, 2)}
    assert ended["good"] == [{}, None]
    assert ended["bad"][0] is None and str(ended["bad"][1]) == "no such file"
    with pytest.raises(ZeroDivisionError):
        list(jobs.side_by_side({"fault": lambda: 1 / 0}, 1))
