"""train_value.py: what is fitted, where it starts, when it stops."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from test_vapo import without_clock
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import model
import rollout
import table
import train_value
import train_vapo
from system import checkpoint, distributed, loading

SMALL = ["--device=cpu", "--answers=1024", "--samples=8", "--passes=4", "--lr=3e-3",
         "--patience=4", "--micro_batch_tokens=4096"]  # fmt: skip


def value_run(world, out, *flags):
    return train_value.main([f"@{world}/train_value.args", *SMALL, f"--out={out}", *flags])


def answers_of(out):
    """All rows that a run has sampled."""
    return torch.load(Path(out) / "answers.pt", weights_only=True)["rows"]


def rows_of(out, device="cpu"):
    """The first eight of them."""
    rows = {name: column.to(device) for name, column in answers_of(out).items()}
    return table.take(rows, torch.arange(8, device=device))


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """One run of value pretraining: (its directory, the metrics it returned)."""
    out = tmp_path_factory.mktemp("value")
    return out, value_run(world, out)


def test_pretraining_moves_the_critic_and_never_the_policy(world, tmp_path, monkeypatch):
    loaded, load_policy = [], loading.load_policy

    def spy(*arguments):
        loaded.append(load_policy(*arguments))
        return loaded[-1]

    monkeypatch.setattr(loading, "load_policy", spy)
    metrics = value_run(world, tmp_path)
    policy, untouched = loaded[0], load_policy(str(world / "base"), torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), untouched.parameters()))
    assert all(weight.grad is None for weight in policy.parameters())
    critic = loading.load_critic(metrics["critic"], torch.device("cpu"))
    trunks = (network.model.layers[0].mlp.up_proj.weight for network in (critic, policy))
    assert not torch.equal(*trunks)
    assert critic.score.weight.abs().sum() > 0


def test_pretraining_beats_a_constant_and_no_critic_beats_the_best(run):
    _, metrics = run
    assert 0.05 < metrics["explained_variance"] < metrics["best_explained_variance"] <= 1


def test_every_pass_is_measured_and_logged(run):
    out, metrics = run
    lines = lines_of(out)
    assert [line["step"] for line in lines] == list(range(lines[-1]["step"] + 1))
    passes = [line for line in lines if "explained_variance" in line]
    assert len(passes) == 5 and {"value_loss", "value_first", "value_last"} <= passes[-1].keys()
    lowest = min(line["value_loss"] for line in passes)
    assert lowest == pytest.approx(metrics["value_loss"], abs=1e-6)


def test_value_looks_before_every_token_and_reward_after_the_last():
    rows = {"length_B": torch.tensor([3, 1]), "reward_B": torch.tensor([1.0, 2.0]),
            "correct_B": torch.tensor([True, True])}  # of no use here  # fmt: skip
    target_BT, mask_BT, shift = train_value.objective_columns(rows, "value")
    assert target_BT.tolist() == [[1, 1, 1], [2, 0, 0]] and shift == 0
    assert mask_BT.tolist() == [[1, 1, 1], [1, 0, 0]]
    _, mask_BT, shift = train_value.objective_columns(rows, "reward")
    assert mask_BT.tolist() == [[0, 0, 1], [1, 0, 0]] and shift == 1


def test_a_reward_model_is_worse_than_a_critic_before_the_end(world, run, tmp_path):
    out, metrics = run
    reward = value_run(world, tmp_path, "--objective=reward", f"--reuse_answers={out}/answers.pt")
    critic = loading.load_critic(reward["critic"], torch.device("cpu"))
    as_critic, _ = train_value.measure(critic, answers_of(out), "value", 64)
    assert as_critic["explained_variance"] < metrics["explained_variance"]
    assert reward["explained_variance"] > as_critic["explained_variance"]


def test_stored_answers_are_used_again_and_only_for_the_same_run(
    world, run, tmp_path, monkeypatch, capsys
):
    out, _ = run
    monkeypatch.setattr(rollout, "sample", lambda *_, **__: pytest.fail("sampled again"))
    again = f"--reuse_answers={out}/answers.pt"
    value_run(world, tmp_path, "--passes=1", again)
    with pytest.raises(SystemExit) as stop:
        value_run(world, tmp_path / "other", "--temperature=0.5", again)
    assert stop.value.code == 2 and "another temperature" in capsys.readouterr().err


def test_rewards_pass_into_the_values(world, tmp_path):
    rewards = ["--reward_correct=0", "--reward_wrong=-2"]
    metrics = value_run(world, tmp_path, *rewards, "--passes=1", "--lr=1e-9")
    assert -2 < metrics["value_first"] < -0.5


def test_a_short_file_is_asked_several_times_and_one_problem_is_too_few(world, tmp_path, capsys):
    lines = (world / "train.jsonl").read_text().splitlines()
    another = next(line for line in lines if line != lines[0])
    (tmp_path / "two.jsonl").write_text(f"{lines[0]}\n{another}")
    (tmp_path / "one.jsonl").write_text(lines[0])
    flags = {name: f"--train={tmp_path}/{name}.jsonl" for name in ("one", "two")}
    value_run(world, tmp_path / "two", flags["two"], "--answers=64", "--passes=1")
    assert answers_of(tmp_path / "two")["problem_B"].bincount().tolist() == [32, 32]
    with pytest.raises(SystemExit) as stop:
        value_run(world, tmp_path / "one", flags["one"], "--answers=16")
    assert stop.value.code == 2 and "at least 2 problems" in capsys.readouterr().err


def test_a_critic_is_not_overwritten(world, run, capsys):
    with pytest.raises(SystemExit) as stop:
        value_run(world, run[0])
    assert stop.value.code == 2 and "holds a critic already" in capsys.readouterr().err


def test_it_stops_when_the_held_out_loss_rises_and_keeps_the_best_pass(world, run, tmp_path):
    out, _ = run
    flags = ["--passes=50", "--lr=1", "--patience=1", f"--reuse_answers={out}/answers.pt"]
    metrics = value_run(world, tmp_path, *flags)
    measured = [line["value_loss"] for line in lines_of(tmp_path) if "value_loss" in line]
    assert len(measured) < 50 and measured[-1] >= metrics["value_loss"]
    assert metrics["value_loss"] == pytest.approx(min(measured), abs=1e-6)
    # the saved critic is that of the best pass: here the first one, a constant, before the learning
    # rate ruined it
    critic = loading.load_critic(metrics["critic"], torch.device("cpu"))
    saved, _ = train_value.measure(critic, answers_of(out), "value", 64)
    assert metrics["step"] == 0 and saved["value_last"] == pytest.approx(metrics["value_first"])


def signal_at(monkeypatch, number, name="value_gradients"):
    """Has a SIGTERM come in that optimiser step (or other call) of value pretraining; returns what
    counts them."""
    calls, whole = [], getattr(train_value, name)

    def struck(*args, **options):
        calls.append(1)
        if len(calls) == number:
            signal.raise_signal(signal.SIGTERM)
        return whole(*args, **options)

    monkeypatch.setattr(train_value, name, struck)
    return calls


# A pass is 15 steps: in its middle, after its last step, in the very first one.
@pytest.mark.parametrize("step, passes", [(20, 1), (30, 1), (1, 0)])
def test_a_stop_inside_a_pass_repeats_it_and_ends_bit_for_bit_like_the_undisturbed_run(
    world, run, tmp_path, monkeypatch, capsys, step, passes
):
    out, metrics = run
    shutil.copy(out / "answers.pt", tmp_path)
    with monkeypatch.context() as patch:
        steps = signal_at(patch, step)
        with pytest.raises(SystemExit) as stop:
            value_run(world, tmp_path)
    whole = step % 15 == 0  # then the pass is measured and saved first
    assert stop.value.code == 128 + signal.SIGTERM and len(steps) == step
    assert f"pass {passes + 1 + whole} of it begins again" in capsys.readouterr().err
    assert not (tmp_path / "critic").exists()
    with monkeypatch.context() as patch:
        steps = signal_at(patch, 0)
        resumed = value_run(world, tmp_path)
    assert len(steps) == 60 - 15 * (passes + whole)
    for name in ("step", "value_loss", "explained_variance"):
        assert resumed[name] == metrics[name]
    assert without_clock(lines_of(tmp_path)) == without_clock(lines_of(out))
    weights = [(where / "critic" / "model.safetensors").read_bytes() for where in (tmp_path, out)]
    assert weights[0] == weights[1]
    assert not (tmp_path / "best").exists() and not checkpoint.saved(tmp_path)


@pytest.mark.parametrize(
    "name, number, said",
    [("value_gradients", 20, "pass 2 of it begins again"), ("measure", 1, "pass 1 of it begins"),
     ("sampled_answers", 1, "nothing of it is done yet")],
)  # fmt: skip
def test_a_stop_with_answers_from_elsewhere_says_what_is_done(
    world, run, tmp_path, monkeypatch, capsys, name, number, said
):
    with pytest.raises(SystemExit) as stop:
        signal_at(monkeypatch, number, name)
        value_run(world, tmp_path, f"--reuse_answers={run[0]}/answers.pt")
    error = capsys.readouterr().err
    assert stop.value.code == 128 + signal.SIGTERM and said in error
    assert f"the same command with --out {tmp_path}, or --resume" in error


def test_best_is_never_of_a_pass_that_is_not_saved(world, run, tmp_path, monkeypatch):
    """Another number of processes might not find that pass the best."""
    again, best, save = f"--reuse_answers={run[0]}/answers.pt", [], checkpoint.save
    path = tmp_path / "best" / "model.safetensors"

    def killed(*args):
        best.append(path.read_bytes() if path.exists() else None)
        if len(best) == 3:  # pass 2, the best by then
            raise KeyboardInterrupt
        save(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(checkpoint, "save", killed)
        value_run(world, tmp_path, again)
    assert path.read_bytes() == best[2] != best[1] and best[0] is None
    losses = [line["value_loss"] for line in lines_of(tmp_path) if "value_loss" in line]
    assert len(losses) == 3 and min(losses) == losses[2]


def test_what_is_decided_of_the_held_out_numbers_rank_0_decides(world, run, tmp_path, monkeypatch):
    from_rank_0 = distributed.from_rank_0

    def other(value):  # as if rank 0's numbers were other than this one's
        told = isinstance(value, dict) and "value_loss" in value
        return from_rank_0(value) | {"value_loss": 0.9} if told else from_rank_0(value)

    monkeypatch.setattr(distributed, "from_rank_0", other)
    flags = ["--patience=1", f"--reuse_answers={run[0]}/answers.pt"]
    assert value_run(world, tmp_path, *flags)["value_loss"] == 0.9
    # One pass over 115 problems with 8 answers each, in batches of 64: no better than before it.
    assert lines_of(tmp_path)[-1]["step"] == 15


def test_an_error_in_the_fit_has_a_line_of_its_own(world, run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        flags = ["--lr=1e30", "--max_grad_norm=1e30"]
        value_run(world, tmp_path, *flags, f"--reuse_answers={run[0]}/answers.pt")
    lines = capsys.readouterr().err.split("\n")  # not at the end of a progress bar
    assert stop.value.code == 2 and sum(line.startswith("error: value") for line in lines) == 1


@pytest.mark.parametrize(
    "flags", [["--passes=50", "--lr=1", "--patience=1"], ["--passes=2"]], ids=["patience", "passes"]
)
def test_what_is_killed_between_its_last_pass_and_its_end_fits_no_more(
    world, run, tmp_path, monkeypatch, flags
):
    def killed(*_):
        raise KeyboardInterrupt

    flags = [*flags, f"--reuse_answers={run[0]}/answers.pt"]
    metrics = value_run(world, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        patch.setattr("system.run.Log.close", killed)
        with pytest.raises(SystemExit):
            value_run(world, tmp_path / "part", *flags)
    assert value_run(world, tmp_path / "part", *flags)["step"] == metrics["step"]
    part, whole = (without_clock(lines_of(tmp_path / name)) for name in ("part", "whole"))
    assert part == whole


def test_critic_from_a_policy_starts_at_the_mean_reward(world, run, device):
    critic = loading.load_critic(str(world / "base"), device, mean_reward=0.25)
    value_BT = model.critic_values(critic, rows_of(run[0], device))
    assert (value_BT == 0.25).all()
    assert critic.config.classifier_dropout == 0 and not critic.training


def test_critic_from_a_reward_model_gives_the_reward_models_scores(world, run, tmp_path, capsys):
    torch.manual_seed(0)
    from_base = AutoModelForSequenceClassification.from_pretrained
    reward_model = from_base(world / "base", num_labels=1, dtype=torch.float32).eval()
    reward_model.save_pretrained(tmp_path / "reward")
    rows = rows_of(run[0])
    critic = loading.load_critic(str(tmp_path / "reward"), torch.device("cpu"))
    value_BT = model.critic_values(critic, rows, shift=1)
    for i, length in enumerate(rows["length_B"].tolist()):
        tokens = rows["token_BL"][i : i + 1, : int(rows["prompt_length_B"][i]) + length]
        score = reward_model(tokens).logits[0, 0]
        torch.testing.assert_close(value_BT[i, length - 1], score, rtol=1e-4, atol=1e-5)

    from_base(world / "base", num_labels=2).save_pretrained(tmp_path / "two")
    AutoTokenizer.from_pretrained(world / "base").save_pretrained(tmp_path / "two")
    flags = [f"--init={tmp_path}/two", f"--reuse_answers={run[0]}/answers.pt"]
    with pytest.raises(SystemExit) as stop:
        value_run(world, tmp_path / "out", *flags)
    assert stop.value.code == 2 and "2 labels" in capsys.readouterr().err


def test_short_answers_come_first_and_the_learning_rate_falls_to_zero_if_asked(
    world, run, tmp_path, monkeypatch
):
    out, _ = run
    rates, lengths, step, take = [], [], torch.optim.AdamW.step, table.take

    def spy(optimizer, *rest):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *rest)

    def spy_take(rows, index, *device):
        if len(index) == 64 and len(rows["length_B"]) > 512:  # a batch of the rows to fit
            lengths.append(rows["length_B"][index].float().mean().item())
        return take(rows, index, *device)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    monkeypatch.setattr(table, "take", spy_take)
    flags = ["--passes=1", "--short_passes=2", "--batch=64", "--decay", "--lr=0.001"]
    value_run(world, tmp_path, *flags, f"--reuse_answers={out}/answers.pt")
    # nine problems of ten: 922 of 1024 answers, more or less
    short, whole = -(-(922 // 2) // 64), -(-922 // 64)
    total = len(rates)
    assert abs(total - (2 * short + whole)) <= 2
    assert rates[:3] == pytest.approx([1e-4 * (s + 1) * (1 - s / total) for s in range(3)])
    assert rates[-3:] == pytest.approx([1e-3 * left / total for left in (3, 2, 1)])
    assert max(lengths[: 2 * (short - 1)]) < min(lengths[2 * (short - 1) :])


def test_answers_to_one_problem_are_all_fitted_or_all_held_out():
    rows = {"problem_B": torch.tensor([7, 3, 9, 5, 1] * 3), "length_B": torch.ones(15).long(),
            "prompt_length_B": torch.ones(15).long()}  # fmt: skip
    for seed in range(3):
        fitted, held_out = train_value.split_by_problem(rows, 0.4, seed)
        assert len(fitted["length_B"]) == 9 and len(held_out["length_B"]) == 6
        assert not set(fitted["problem_B"].tolist()) & set(held_out["problem_B"].tolist())


def test_value_pretraining_in_a_run_has_the_runs_settings_and_its_own(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(train_value, "pretrain", lambda settings, policy: asked.append(settings))
    run = {"model": "m", "train": "t", "seed": 5, "temperature": 0.7, "reward_wrong": -1.0}
    own = {"pretrain_lr": 0.1, "pretrain_answers": 20, "pretrain_passes": 3}
    settings = train_vapo.Settings(**run, **own, lr=0.2, critic_lr=0.3, reward_model="fit")
    start = train_value.starting_critic(settings, tmp_path, None)
    assert start == str(tmp_path / "value" / "critic")
    reward, value = asked
    expected = run | {"lr": 0.1, "answers": 20, "passes": 3}
    for settings in asked:
        assert {name: getattr(settings, name) for name in expected} == expected
    assert (reward.objective, reward.init, reward.reuse_answers) == ("reward", "", "")
    directory = tmp_path / "reward_model"
    came_from = str(directory / "critic"), str(directory / "answers.pt")
    assert (value.objective, value.init, value.reuse_answers) == ("value", *came_from)
