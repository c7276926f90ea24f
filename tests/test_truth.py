"""truth.py: what is true at every token, and what a critic makes of it, by hand."""

import json
import math

import pytest
import torch

import toy
from system import truth

RING = dict(zip("abcd", "bcda"))  # a → b → c → d → a


def phases(text, tokenizer, letter="a", steps=2):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    return truth.trace(RING, letter, steps, [*tokens, "<eos>"])


def test_trace_of_a_right_answer(tokenizer):
    expected = [
        ("work", True, 2),
        ("right", True, 2),
        ("work", True, 1),
        ("right", True, 1),
        ("work", True, 0),
        ("answer", True, 0),
    ]
    assert phases("b1c0####c", tokenizer) == [*expected, ("said right", True, 0)]


def test_trace_of_a_slip_with_and_without_the_mark(tokenizer):
    lost = phases("d1a0####a", tokenizer)
    assert [state[:2] for state in lost] == [
        ("work", True), ("wrong", True), ("work", False), ("wrong", False), ("work", False),
        ("answer", False), ("said wrong", False),
    ]  # fmt: skip
    redone = phases("d;b1c0####c", tokenizer)
    assert [state[:2] for state in redone[:4]] == [
        ("work", True),
        ("wrong", True),
        ("redo", True),
        ("right", True),
    ]
    assert redone[-1] == ("said right", True, 0)


def test_trace_of_a_guess_and_of_nonsense(tokenizer):
    assert phases("####c", tokenizer) == [
        ("work", True, 2),
        ("answer", True, 2),
        ("said right", True, 2),
    ]
    assert phases("b7", tokenizer)[-1][0] == "odd"


def test_best_values_are_the_mean_outcomes_of_what_is_true(world, tokenizer):
    world_file = json.loads((world / "world.json").read_text())
    after = world_file["map"]["a"]
    wrong = next(c for c in "bcd" if c != after)
    rows = {name: [] for name in ("token", "start", "length", "reward")}
    for text, reward in ((f"{after}0####{after}", 1.0), (f"{wrong}0####{wrong}", 0.0)) * 20:
        ids = (
            tokenizer("a1:")["input_ids"] + tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        )
        for name, value in (("token", ids), ("start", 3), ("length", 5), ("reward", reward)):
            rows[name].append(value)
    rows = {
        "token_BL": torch.tensor(rows["token"]), "prompt_length_B": torch.tensor(rows["start"]),
        "length_B": torch.tensor(rows["length"]), "reward_B": torch.tensor(rows["reward"]),
        "problem_B": torch.zeros(40, dtype=torch.long),
    }  # fmt: skip
    value_BT = truth.best_values(world, [{"problem": "a1", "answer": after}], tokenizer, rows, rows)
    # Both start from ("work", on track): 20 of 40 are right with 1 step left, 20 of 20 with none,
    # ⅔ over both, which weighs as two answers more. After the letter the two part, and all that
    # follows is certain but for that weight.
    start, after_step = (20 + 2 * 2 / 3) / 42, (20 + 2 * 2 / 3) / 22
    assert value_BT[0].tolist() == pytest.approx([start, 1, after_step, 1, 1])
    assert value_BT[1].tolist() == pytest.approx([start, 0, 0, 0, 0])


def rows_of(tokenizer, answers, rewards):
    """Rows of answers to the problem a2 (padded on the right)."""
    ids = [
        tokenizer("a2:")["input_ids"] + tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        for text in answers
    ]
    width = max(map(len, ids))
    return {
        "token_BL": torch.tensor([row + [0] * (width - len(row)) for row in ids]),
        "prompt_length_B": torch.full((len(ids),), 3),
        "length_B": torch.tensor([len(row) - 3 for row in ids]),
        "reward_B": torch.tensor(rewards), "problem_B": torch.zeros(len(ids)).long(),
    }  # fmt: skip


@pytest.fixture
def ring(tmp_path):
    (tmp_path / "world.json").write_text(json.dumps({"map": RING}))
    return tmp_path


def test_the_drop_is_over_each_step_that_starts_on_track_and_no_taken_back_letter_is_a_slip(
    ring, tokenizer
):
    #           right            slip, then lost     taken back, then right
    answers = ["b1c0####c", "d1a0####a", "d;b1c0####c", "####b"]
    rows = rows_of(tokenizer, answers, [1.0, 0.0, 1.0, 0.0])
    value_BT = torch.tensor(
        [[10.0 * i - t * t for t in range(9)] for i in range(4)]
    )  # V falls by (t + 2)² − t² = 4t + 4
    drop_N, slip_N = truth.step_drops(ring, [{"problem": "a2"}], tokenizer, rows, value_BT)
    assert drop_N.tolist() == [
        4,
        12,
        4,
        12,
        20,
    ]  # steps at t = 0, 2; at 0 (lost after it); at 2, 4; none
    assert slip_N.tolist() == [False, False, True, False, False]


def test_auc_by_hand():
    score_N, positive_N = (
        torch.tensor([0.1, 0.9, 0.5, 0.5]),
        torch.tensor([False, True, True, False]),
    )
    assert (
        truth.auc(score_N, positive_N) == (1 + 1 + 1 + 0.5) / 4
    )  # pairs: 0.9 beats both, 0.5 beats 0.1 and ties 0.5
    assert truth.auc(-score_N, positive_N) == 1 - 3.5 / 4
    assert math.isnan(truth.auc(score_N, torch.ones(4, dtype=torch.bool)))


def test_a_critic_that_knows_the_truth_scores_one_and_the_best_there_is(ring, tokenizer):
    rows = rows_of(
        tokenizer,
        ["b1c0####c", "b1c0####c", "d1a0####a", "d1a0####a"] * 20,
        [1.0, 1.0, 0.0, 0.0] * 20,
    )
    value_BT = torch.zeros(80, 7)
    value_BT[:, 0], value_BT[0::4, 1:], value_BT[1::4, 1:] = 0.5, 1.0, 1.0
    scores = toy.score_critic(ring, [{"problem": "a2"}], tokenizer, rows, value_BT)
    # The counts pool the steps left, so "work, on track" is one state: 3 · 40 of 160 are right,
    # V = ¾. The residuals are ¼ at 3 tokens of each right answer, −¾ at one of each wrong one,
    # else 0: Var[R − V] = (40 · 3/16 + 40 · 9/16) / 560, Var[R] = ¼.
    assert scores["slip_auc"] == 1 and scores["best_explained_variance"] == pytest.approx(
        1 - 30 / 140, abs=0.01
    )
    assert (
        toy.score_critic(ring, [{"problem": "a2"}], tokenizer, rows, torch.zeros(80, 7))["slip_auc"]
        == 0.5
    )


def test_the_best_critic_is_counted_on_the_other_half_of_the_answers(ring, tokenizer):
    # Equal texts, the even ones right and the odd ones wrong: each half is told the opposite.
    # R − V = ±1 where R = 1 or 0, so the variance left is 1, of ¼.
    rows = rows_of(tokenizer, ["b1c0####c"] * 8, [1.0, 0.0] * 4)
    scores = toy.score_critic(ring, [{"problem": "a2"}], tokenizer, rows, torch.zeros(8, 7))
    assert scores["best_explained_variance"] == pytest.approx(1 - 1 / (1 / 4))
