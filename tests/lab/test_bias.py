"""bias.py: V and advantage by position are those that a reader computes from the answers."""

import json

import pytest
import torch
from helpers import fails_with

import model
import train_value
from lab import bias
from system import checkpoint, loading


@pytest.fixture(scope="module")
def fitted(world, tmp_path_factory):
    """A directory with a reward model in reward/, a critic in value/ and their answers."""
    out = tmp_path_factory.mktemp("bias")
    flags = [f"@{world}/train_value.args", "--device=cpu", "--answers=256", "--passes=1"]
    train_value.main([*flags, "--objective=reward", f"--out={out}/reward"])
    answers = f"--reuse_answers={out}/reward/answers.pt"
    train_value.main([*flags, answers, f"--out={out}/value"])
    return out


def flags_of(fitted, out):
    return [f"--before={fitted}/reward/critic", f"--after={fitted}/value/critic", "--device=cpu",
            f"--answers={fitted}/reward/answers.pt", "--fewest=3", f"--out={out}"]  # fmt: skip


def test_lines_are_means_over_the_held_out_answers_that_get_there(fitted, tmp_path):
    lines = bias.main(flags_of(fitted, tmp_path / "new" / "positions.jsonl"))
    text = (tmp_path / "new" / "positions.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == lines and len(lines) > 3
    rows = checkpoint.read(fitted / "reward" / "answers.pt")["rows"]
    _, rows = train_value.split_by_problem(rows, 0.1, 0)
    critic = loading.load_critic(str(fitted / "value" / "critic"), torch.device("cpu"))
    value_BT, length_B = model.all_values(critic, rows, 10**6), rows["length_B"]
    for line in lines:
        t, there_B = line["position"], length_B > line["position"]
        assert line["answers"] == there_B.sum() >= 3
        outcome_N = rows["reward_B"][there_B]
        close = {"rel": 1e-3, "abs": 1e-5}
        assert line["outcome"] == pytest.approx(outcome_N.mean().item(), **close)
        assert line["value_after"] == pytest.approx(value_BT[there_B, t].mean().item(), **close)
        advantages = []  # Σ 0.95^l δ, answer by answer
        for i in there_B.nonzero()[:, 0].tolist():
            values = [*value_BT[i, t : length_B[i]].tolist(), 0.0]
            deltas = [after - before for before, after in zip(values, values[1:])]
            deltas[-1] += rows["reward_B"][i].item()
            advantages.append(sum(0.95**k * delta for k, delta in enumerate(deltas)))
        mean = sum(advantages) / len(advantages)
        assert line["advantage_after"] == pytest.approx(mean, rel=1e-3, abs=1e-4)
    gone = set(range(int(length_B.max()))) - {line["position"] for line in lines}
    assert all((length_B > t).sum() < 3 for t in gone)


@pytest.mark.parametrize("missing", ["before", "after", "answers", "out"])
def test_a_missing_flag_ends_with_one_line(fitted, tmp_path, missing, capsys):
    flags = [f for f in flags_of(fitted, tmp_path / "x") if not f.startswith(f"--{missing}=")]
    fails_with(capsys, bias.main, flags, f"give --{missing}")


def test_a_wrong_number_ends_with_one_line(fitted, tmp_path, capsys):
    flags = [*flags_of(fitted, tmp_path / "x"), "--lam=1.5"]
    fails_with(capsys, bias.main, flags, "--lam must be between 0 and 1")
