"""Runs that are killed, stopped, run out of disk or meet a NaN: nothing is lost, nothing is
silently changed."""

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_bad_input import fails_with
from test_vapo import FAST, SMALL, metrics_of, rest_of, vapo_run, without_clock
from transformers import AutoConfig, AutoModelForCausalLM

import losses
import train_vapo
from system import checkpoint, run as run_file

if sys.platform == "win32":
    pytest.skip("needs fork and signals", allow_module_level=True)


def always(count, *cases):
    """Parameters of which all but the first `count` need --all."""
    marks = [() if i < count else pytest.mark.slow for i in range(len(cases))]
    return [pytest.param(*case, marks=mark) for case, mark in zip(cases, marks)]


def name_of(at):
    return f"{at[0]}.{at[1]}-{at[2]}" if isinstance(at, tuple) else None


class Forks:
    """A process that forks runs; see forks.py."""

    def __init__(self):
        command = [sys.executable, str(Path(__file__).parent / "forks.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, **pipes, text=True)
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
    """Three passes of three steps, the second the best; then four rollouts of three steps."""
    pretraining = ["--pretrain_passes=3", "--pretrain_answers=192", "--pretrain_lr=1e-2"]
    args = [f"@{world}/train_vapo.args", *SMALL, *pretraining]
    return [*args, "--save_every=1", "--steps=4", f"--out={out}"]


def remains(out):
    """What a run leaves behind that must not depend on its fate."""
    networks = ("policy", "critic", "value/critic")
    weights = [(out / name / "model.safetensors").read_bytes() for name in networks]
    return weights, without_clock(metrics_of(out)), without_clock(metrics_of(out / "value"))


@pytest.fixture(scope="module")
def undisturbed(world, forks, tmp_path_factory):
    """(what remains of it, how long it took) of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("faults") / "run"
    log = out.with_suffix(".log")
    ended = forks(flags_of(world, out), log)
    assert ended["status"] == 0, log.read_text()[-2000:]
    assert [line["step"] for line in metrics_of(out)] == [0, 1, 2, 3, 4]
    losses = [line.get("value_loss") for line in metrics_of(out / "value")]
    assert len(losses) == 10 and losses[6] == min(filter(None, losses))
    return remains(out), ended["seconds"]


@pytest.fixture
def run(world, forks, undisturbed, tmp_path):
    """run(**fault): starts the run; see Run."""
    return Run(world, forks, undisturbed[0], tmp_path)


class Run:
    """The run with a fault in it, and how it goes on."""

    def __init__(self, world, forks, expected, folder):
        self.world, self.forks, self.expected = world, forks, expected
        self.out, self.log = folder / "run", folder / "log"

    def __call__(self, **fault):
        """Returns: its exit status."""
        return self.forks(flags_of(self.world, self.out), self.log, **fault)["status"]

    def resume(self, **fault):
        return self.forks([f"--resume={self.out}"], self.log, **fault)["status"]

    def said(self):
        return self.log.read_text()

    def goes_on_as_if_nothing_had_happened(self):
        """Resumes it, or starts it again where there is nothing to resume."""
        status = self.resume() if (self.out / "config.json").exists() else self()
        assert status == 0, self.said()[-2000:]
        return remains(self.out) == self.expected


def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(run, undisturbed, request):
    kills = request.config.getoption("--kills")
    kills = (20 if request.config.getoption("--all") else 3) if kills is None else kills
    moments, struck = random.Random(0), 0
    for number in range(kills):
        after = moments.uniform(0.1, 0.95) * undisturbed[1]
        struck += run(after=after, what="kill") == -9
        assert run.goes_on_as_if_nothing_had_happened(), number
        shutil.rmtree(run.out)
    assert struck > number / 2


@pytest.mark.parametrize(
    "at",
    always(
        4,
        [("system.checkpoint", "remove", 1)],  # pretraining's critic has its name by then
        [("train_value", "value_gradients", 5)],  # the second pass, its second step
        [("train_vapo", "policy_gradients", 5)],
        [("system.checkpoint", "dcp.save", 7)],  # of step 2
        [("system.checkpoint", "export", 3)],  # the best critic replaces one
        [("system.checkpoint", "write", 8)],
        [("system.checkpoint", "checksum", 20)],
        [("system.checkpoint", "write_json", 7)],
        [("pathlib", "Path.rename", 10)],  # it gets its name
        [("pathlib", "Path.rename", 11)],  # an old one loses its own
        [("rollout", "next_problems", 3)],
        [("system.run", "Log.close", 1)],  # pretraining is done, its critic has no name yet
        [("system.checkpoint", "export", 4)],  # the policy, then the critic
        [("system.checkpoint", "export", 5)],
    ),
    ids=name_of,
)
def test_a_run_killed_in_the_middle_of_anything_ends_as_if_it_had_not_been(run, at):
    assert run(at=at, what="kill") == -9, run.said()
    assert run.goes_on_as_if_nothing_had_happened()
    assert not list((run.out / "checkpoint").glob("*.tmp"))
    assert len(checkpoint.saved(run.out)) == 2 and not (run.out / "value/checkpoint").exists()


@pytest.mark.parametrize(
    "what, number, at",
    always(
        3,
        ("term", 15, ("train_value", "value_gradients", 5)),
        ("int", 2, ("train_vapo", "policy_gradients", 5)),
        ("term", 15, ("system.loading", "shard", 1)),
        ("term", 15, ("rollout", "next_problems", 2)),
        ("term", 15, ("rollout", "sample", 1)),
        ("term", 15, ("system.loading", "shard", 3)),
        ("term", 15, ("train_vapo", "policy_gradients", 5)),
        ("int", 2, ("train_value", "value_gradients", 5)),
        ("int", 2, ("system.loading", "shard", 1)),
        ("int", 2, ("rollout", "next_problems", 2)),
        ("int", 2, ("rollout", "sample", 1)),
        ("int", 2, ("system.loading", "shard", 3)),
    ),
    ids=name_of,
)
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(run, what, number, at):
    assert run(at=at, what=what) == 128 + number
    assert f"stopped by SIG{what.upper()}: " in run.said() and "--resume" in run.said()
    metrics = run.out / "metrics.jsonl"
    steps = len(metrics_of(run.out)) if metrics.exists() else 0
    assert at[0] != "system.loading" or steps == 0  # neither an evaluation nor a rollout is begun
    if at[1] == "value_gradients":
        assert "pass 2 of it begins again" in run.said()
    # what it saved is enough: it repeats no step of the run
    assert run.resume(at=("train_vapo", "policy_gradients", 1), what="kill") == -9
    assert steps == 0 or len(metrics_of(run.out)) == steps
    assert run.goes_on_as_if_nothing_had_happened()


def test_what_a_resumed_run_was_told_is_not_forgotten_when_it_is_stopped(
    world, tmp_path, monkeypatch, capsys
):
    vapo_run(world, tmp_path, *FAST)
    policy_gradients = train_vapo.policy_gradients

    def struck(*args):
        signal.raise_signal(signal.SIGTERM)
        return policy_gradients(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train_vapo, "policy_gradients", struck)
        train_vapo.main([f"--resume={tmp_path}", "--steps=3"])
    assert f"rollout 2 of 3 is saved: python train_vapo.py --resume {tmp_path}" in (
        capsys.readouterr().err
    )
    train_vapo.main([f"--resume={tmp_path}"])
    assert [line["step"] for line in metrics_of(tmp_path)] == [0, 1, 2, 3]


def test_a_signal_while_pretraining_answers_are_sampled_keeps_them_and_fits_nothing(run):
    assert run(at=("rollout", "sample", 1), what="term") == 128 + 15
    value = run.out / "value"
    assert (value / "answers.pt").exists() and not (value / "metrics.jsonl").exists()


WRITE_DATA = ("torch.distributed.checkpoint.filesystem", "FileSystemWriter.write_data", 7)


@pytest.mark.parametrize(
    "at", always(1, [WRITE_DATA], [("rollout", "next_problems", 3)]), ids=name_of
)
def test_ctrl_c_twice_stops_at_once_even_in_a_save(run, at):
    assert run(at=at, what="twice") == 128 + 2
    assert "SIGINT: finishing this step" in run.said() and "stopped at once" in run.said()
    assert run.goes_on_as_if_nothing_had_happened()


@pytest.mark.parametrize(
    "at",
    always(
        1,
        [("system.checkpoint", "export", 2)],
        [("system.checkpoint", "write", 1)],
        [("system.checkpoint", "export", 1)],
        [("system.checkpoint", "export", 4)],
    ),
    ids=name_of,
)
def test_a_full_disk_elsewhere_is_one_line_and_leaves_nothing_half_written(run, at):
    assert run(at=at, what="full") == 2, run.said()
    (error,) = (line for line in run.said().splitlines() if "error: " in line)
    assert "File too large" in error
    assert not list(run.out.rglob("*.tmp"))
    assert run.goes_on_as_if_nothing_had_happened()


# Four saves of value pretraining come first.
@pytest.mark.parametrize(
    "number, saved", always(1, (8, ["step-000002", "step-000001"]), (6, ["step-000000"]))
)
def test_a_full_disk_leaves_the_checkpoints_before_whole(run, number, saved):
    assert run(at=("system.checkpoint", "save", number), what="full") == 2
    for words in ("error: cannot write the checkpoint", "File too large", "make room"):
        assert words in run.said()
    kept = checkpoint.saved(run.out)
    assert [path.name for path in kept] == saved
    assert not list((run.out / "checkpoint").glob("*.tmp"))
    assert not any(checkpoint.damage(path) for path in kept)
    assert run.goes_on_as_if_nothing_had_happened()


@pytest.mark.parametrize(
    "name, how",
    always(
        2,
        ("rest.pt", "shorter"), ("__0_0.distcp", "changed"), ("checksums.json", "changed"),
        ("rest.pt", "changed"), ("rest.pt", "gone"), ("checksums.json", "shorter"),
        ("checksums.json", "gone"), ("__0_0.distcp", "shorter"), ("__0_0.distcp", "gone"),
        (".metadata", "shorter"), (".metadata", "changed"), (".metadata", "gone"),
    ),
)  # fmt: skip
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(run, name, how):
    assert run(at=("rollout", "next_problems", 3), what="kill") == -9
    path = checkpoint.saved(run.out)[0] / name
    whole = path.read_bytes()
    half = len(whole) // 2
    if how == "gone":
        path.unlink()
    elif how == "shorter":
        path.write_bytes(whole[:-3])
    else:
        path.write_bytes(whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :])
    assert run.goes_on_as_if_nothing_had_happened()
    assert f"the checkpoint {path.parent} is damaged" in run.said()
    assert path.parent.name == "step-000002"


@pytest.mark.parametrize(
    "other, last",
    [({"hidden_size": 64}, 1), ({"num_hidden_layers": 1}, 1), ({"num_hidden_layers": 1}, 0)],
)
def test_another_model_in_place_of_the_runs_own_is_refused(world, tmp_path, capsys, other, last):
    base, out = shutil.copytree(world / "base", tmp_path / "base"), tmp_path / "run"

    def replace_by(**sizes):
        config = AutoConfig.from_pretrained(base, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(base)

    replace_by(num_hidden_layers=2)
    vapo_run(world, out, *FAST, f"--model={base}")
    if last == 0:  # where the optimisers have no moments yet
        shutil.rmtree(out / "checkpoint" / "step-000001")
    replace_by(**other)
    said = ("does not fit", "are --model and revision those of its start?")
    fails_with(capsys, train_vapo.main, [f"--resume={out}", "--steps=2"], *said)


def nan_at(monkeypatch, calls):
    """Has the policy loss be NaN in those calls of it."""
    counted, policy_loss = [], losses.policy_loss

    def broken(*args):
        counted.append(1)
        return policy_loss(*args) * (float("nan") if len(counted) in calls else 1.0)

    monkeypatch.setattr(losses, "policy_loss", broken)


def test_a_step_that_is_not_finite_is_skipped_counted_and_kept(world, tmp_path, monkeypatch):
    nan_at(monkeypatch, {2})
    three_steps = ["--mini_batch=8", "--micro_batch_tokens=10000"]
    vapo_run(world, tmp_path, *FAST, "--steps=2", *three_steps)
    lines = metrics_of(tmp_path)[1:]
    assert [line["bad_steps"] for line in lines] == [1, 0]
    for name in ("policy_loss", "policy_grad_norm", "critic_grad_norm"):
        assert all(line[name] is not None for line in lines)
    (kept,) = (tmp_path / "bad_batches").iterdir()
    stored = torch.load(kept, weights_only=True)
    assert kept.name == "step-000001-1.pt"
    assert len(stored["batch"]["length_B"]) == 8 and "adv_BT" in stored["batch"]
    assert stored["metrics"]["policy_loss"] != stored["metrics"]["policy_loss"]  # NaN
    assert lines[1]["gradient_steps"] == 5  # of six


def test_a_run_of_nothing_but_nan_stops_and_says_where_to_look(
    world, tmp_path, monkeypatch, capsys
):
    nan_at(monkeypatch, range(1, 1000))
    monkeypatch.setattr(checkpoint, "MAX_BAD_STEPS", 4)
    out = tmp_path / "run"
    argv = [f"@{world}/train_vapo.args", *SMALL, *FAST, "--steps=9", f"--out={out}"]
    said = "4 optimiser steps in a row were not finite (policy_loss, policy_grad_norm)"
    fails_with(capsys, train_vapo.main, argv, said, "bad_batches")
    assert len(list((out / "bad_batches").iterdir())) == 4
    assert rest_of(out)["progress"]["step"] == 0


def test_a_lost_log_is_not_a_lost_run(world, tmp_path, capsys):
    log = run_file.Log(tmp_path / "run")
    log.metrics(0, {"loss": 1.0})
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("in the way")
    for step in (1, 2):
        log.metrics(step, {"loss": 1.0})
        log.samples(step, [{"text": ""}])
    assert capsys.readouterr().err.count("warning: cannot write the log") == 1
    other = tmp_path / "other"
    vapo_run(world, other, *FAST)
    (other / "metrics.jsonl").unlink()
    shutil.rmtree(other / "tb")
    train_vapo.main([f"--resume={other}", "--steps=2"])
    assert [line["step"] for line in metrics_of(other)] == [2]
