"""Runs that are killed, stopped, run out of disk or meet a NaN: nothing is lost, nothing is silently changed."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_bad_input import fails_with
from test_vapo import SMALL, metrics_of, vapo_run, without_clock
from transformers import AutoConfig, AutoModelForCausalLM

import checkpoint
import losses
import run as run_file
import train_vapo

if sys.platform == "win32":
    pytest.skip("needs fork and signals", allow_module_level=True)


class Forks:
    """A process that forks runs; see forks.py."""

    def __init__(self):
        command = [sys.executable, str(Path(__file__).parent / "forks.py")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n"

    def __call__(self, argv, log, script="train_vapo", **fault):
        task = {"script": script, "argv": list(map(str, argv)), "log": str(log)} | fault
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def forks():
    forks = Forks()
    yield forks
    forks.process.kill()


def flags_of(world, out):
    return [f"@{world}/train_vapo.args", *SMALL, "--save_every=1", "--steps=4", "--pretrain_passes=3", f"--out={out}"]


def remains(out):
    """What a run leaves behind that must not depend on its fate."""
    weights = [(out / name / "model.safetensors").read_bytes() for name in ("policy", "critic", "value/critic")]
    return weights, without_clock(metrics_of(out)), without_clock(metrics_of(out / "value"))


@pytest.fixture(scope="module")
def undisturbed(world, forks, tmp_path_factory):
    """(what remains of it, how long it took) of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("faults") / "run"
    ended = forks(flags_of(world, out), out.with_suffix(".log"))
    assert ended["status"] == 0, out.with_suffix(".log").read_text()[-2000:]
    assert [line["step"] for line in metrics_of(out)] == [0, 1, 2, 3, 4]
    return remains(out), ended["seconds"]


def go_on(world, forks, out, log):
    """Resumes a run, or starts it again where there is nothing to resume; returns what remains of it."""
    argv = [f"--resume={out}"] if (out / "config.json").exists() else flags_of(world, out)
    assert forks(argv, log)["status"] == 0, log.read_text()[-2000:]
    return remains(out)


def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(world, forks, undisturbed, tmp_path, request):
    expected, seconds = undisturbed
    moments, struck = random.Random(0), 0
    for number in range(request.config.getoption("--kills")):
        out, log = tmp_path / f"run{number}", tmp_path / f"run{number}.log"
        struck += forks(flags_of(world, out), log, after=moments.uniform(0.1, 0.95) * seconds, what="kill")["status"] == -9
        assert go_on(world, forks, out, log) == expected, number
        shutil.rmtree(out)
    assert struck > number / 2


@pytest.mark.parametrize(
    "at",
    [
        ("rollout", "sample", 5), ("ppo", "backward", 5), ("train_value", "objective_columns", 5), ("checkpoint", "checksum", 8),
        ("checkpoint", "write", 6), ("checkpoint", "dcp.save", 6), ("checkpoint", "write_json", 5), ("checkpoint", "saved", 7),
        ("checkpoint", "export", 2), ("checkpoint", "export", 3),
    ],
    ids=lambda at: f"{at[0]}.{at[1]}-{at[2]}",
)  # fmt: skip
def test_a_run_killed_in_the_middle_of_anything_ends_as_if_it_had_not_been(world, forks, undisturbed, tmp_path, at):
    out, log = tmp_path / "run", tmp_path / "log"
    assert forks(flags_of(world, out), log, at=at, what="kill")["status"] == -9
    assert go_on(world, forks, out, log) == undisturbed[0]
    assert not list((out / "checkpoint").glob("*.tmp")) and len(checkpoint.saved(out)) == 2


@pytest.mark.parametrize(
    "at", [("model", "ready", 1), ("rollout", "sample", 1), ("train_value", "objective_columns", 5), ("model", "ready", 3),
           ("rollout", "sample", 3), ("ppo", "backward", 5)]
)  # fmt: skip
@pytest.mark.parametrize("what, number", [("term", 15), ("int", 2)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(world, forks, undisturbed, tmp_path, at, what, number):
    out, log = tmp_path / "run", tmp_path / "log"
    assert forks(flags_of(world, out), log, at=at, what=what)["status"] == 128 + number
    assert f"stopped by SIG{what.upper()}: " in log.read_text() and "--resume" in log.read_text()
    steps = len(metrics_of(out)) if (out / "metrics.jsonl").exists() else 0
    assert at[0] != "model" or steps == 0  # neither an evaluation nor a rollout is begun
    ended = forks([f"--resume={out}"], log, at=("ppo", "backward", 1), what="kill")  # what it saved is enough: it repeats no step
    assert ended["status"] == -9 and (steps == 0 or len(metrics_of(out)) == steps)
    assert go_on(world, forks, out, log) == undisturbed[0]


def test_a_signal_while_pretraining_answers_are_sampled_keeps_them_and_fits_nothing(world, forks, undisturbed, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    assert forks(flags_of(world, out), log, at=("rollout", "sample", 1), what="term")["status"] == 128 + 15
    assert (out / "value" / "answers.pt").exists() and not (out / "value" / "metrics.jsonl").exists()


@pytest.mark.parametrize("at", [("rollout", "sample", 4), ("torch.distributed.checkpoint.filesystem", "FileSystemWriter.write_data", 6)])
def test_ctrl_c_twice_stops_at_once_even_in_a_save(world, forks, undisturbed, tmp_path, at):
    out, log = tmp_path / "run", tmp_path / "log"
    assert forks(flags_of(world, out), log, at=at, what="twice")["status"] == 128 + 2
    assert "SIGINT: finishing this step" in log.read_text() and "stopped at once" in log.read_text()
    assert go_on(world, forks, out, log) == undisturbed[0]


@pytest.mark.parametrize("at", [("checkpoint", "write", 1), ("checkpoint", "export", 1), ("checkpoint", "export", 2)])
def test_a_full_disk_elsewhere_is_one_line_and_leaves_nothing_half_written(world, forks, undisturbed, tmp_path, at):
    out, log = tmp_path / "run", tmp_path / "log"
    ended = forks(flags_of(world, out), log, at=at, what="full")
    assert ended["status"] == 2, log.read_text()
    assert len([line for line in log.read_text().splitlines() if line.startswith("error: ") and "File too large" in line]) == 1
    assert not list(out.rglob("*.tmp"))
    assert go_on(world, forks, out, log) == undisturbed[0]


@pytest.mark.parametrize("other, last", [({"hidden_size": 64}, 1), ({"num_hidden_layers": 1}, 1), ({"num_hidden_layers": 1}, 0)])
def test_another_model_in_place_of_the_runs_own_is_refused(world, tmp_path, capsys, other, last):
    base = shutil.copytree(world / "base", tmp_path / "base")
    config = AutoConfig.from_pretrained(base, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    vapo_run(world, tmp_path / "run", "--steps=1", "--no_value_pretraining", f"--model={base}")
    if last == 0:  # where the optimisers have no moments yet
        shutil.rmtree(tmp_path / "run" / "checkpoint" / "step-000001")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, **other)).save_pretrained(base)
    fails_with(capsys, train_vapo.main, [f"--resume={tmp_path}/run", "--steps=2"], "does not fit", "is --model still the model")


@pytest.mark.parametrize("number, saved", [(5, ["step-000000"]), (7, ["step-000002", "step-000001"])])
def test_a_full_disk_leaves_the_checkpoints_before_whole(world, forks, undisturbed, tmp_path, number, saved):
    out, log = tmp_path / "run", tmp_path / "log"
    ended = forks(flags_of(world, out), log, at=("checkpoint", "save", number), what="full")  # three of value pretraining come first
    text = log.read_text()
    assert ended["status"] == 2 and "error: cannot write the checkpoint" in text and "File too large" in text and "make room" in text
    assert [path.name for path in checkpoint.saved(out)] == saved and not list((out / "checkpoint").glob("*.tmp"))
    assert not any(checkpoint.damage(path) for path in checkpoint.saved(out))
    assert go_on(world, forks, out, log) == undisturbed[0]


@pytest.mark.parametrize("name", ["rest.pt", "whole.json", "__0_0.distcp", ".metadata"])
@pytest.mark.parametrize("how", ["shorter", "changed", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(world, forks, undisturbed, tmp_path, name, how):
    out, log = tmp_path / "run", tmp_path / "log"
    if name != "rest.pt" and how == "gone":
        pytest.skip("as rest.pt")
    forks(flags_of(world, out), log, at=("rollout", "sample", 4), what="kill")  # in the third rollout
    path = checkpoint.saved(out)[0] / name
    whole = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(
            whole[:-3]
            if how == "shorter"
            else whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :]
        )
    assert go_on(world, forks, out, log) == undisturbed[0]
    assert f"the checkpoint {path.parent} is damaged" in log.read_text() and path.parent.name in ("step-000002", "step-000001")


def nan_at(monkeypatch, calls):
    """Has the policy loss be NaN in those calls of it."""
    counted, policy_loss = [], losses.policy_loss

    def broken(*args):
        counted.append(1)
        return policy_loss(*args) * (float("nan") if len(counted) in calls else 1.0)

    monkeypatch.setattr(losses, "policy_loss", broken)


def test_a_step_that_is_not_finite_is_skipped_counted_and_kept(world, tmp_path, monkeypatch):
    flags = ["--no_value_pretraining", "--steps=2", "--mini_batch=8", "--micro_batch_tokens=10000"]  # three steps a rollout
    nan_at(monkeypatch, {2})
    vapo_run(world, tmp_path, *flags)
    lines = metrics_of(tmp_path)
    assert [line["bad_steps"] for line in lines[1:]] == [1, 0]
    assert all(line[name] is not None for line in lines[1:] for name in ("policy_loss", "policy_grad_norm", "critic_grad_norm"))
    (kept,) = (tmp_path / "bad_batches").iterdir()
    stored = torch.load(kept, weights_only=True)
    assert kept.name == "step-000001-1.pt" and len(stored["batch"]["length_B"]) == 8 and "adv_BT" in stored["batch"]
    assert stored["metrics"]["policy_loss"] != stored["metrics"]["policy_loss"]  # NaN
    directory, rest = checkpoint.load(tmp_path)
    assert rest["policy_scheduler"]["last_epoch"] == 5  # of six


def test_a_run_of_nothing_but_nan_stops_and_says_where_to_look(world, tmp_path, monkeypatch, capsys):
    nan_at(monkeypatch, range(1, 1000))
    argv = [f"@{world}/train_vapo.args", *SMALL, "--no_value_pretraining", "--steps=9", "--max_bad_steps=4", f"--out={tmp_path}/run"]
    fails_with(capsys, train_vapo.main, argv, "4 optimiser steps in a row were not finite (policy_loss, policy_grad_norm)", "bad_batches")
    assert len(list((tmp_path / "run" / "bad_batches").iterdir())) == 4
    assert checkpoint.load(tmp_path / "run")[1]["step"] == 0


def test_a_lost_log_is_not_a_lost_run(world, tmp_path, capsys):
    log = run_file.Log(tmp_path / "run")
    log.metrics(0, {"loss": 1.0})
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("in the way")
    for step in (1, 2):
        log.metrics(step, {"loss": 1.0})
        log.samples(step, [{"text": ""}])
    assert capsys.readouterr().err.count("warning: cannot write the log") == 1
    vapo_run(world, tmp_path / "other", "--steps=1", "--no_value_pretraining")
    (tmp_path / "other" / "metrics.jsonl").unlink(), shutil.rmtree(tmp_path / "other" / "tb")
    train_vapo.main([f"--resume={tmp_path}/other", "--steps=2"])
    assert [line["step"] for line in metrics_of(tmp_path / "other")] == [2]
