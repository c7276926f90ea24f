"""dapo.py and its part in the run: group advantage, dynamic sampling, overlong punishment."""

import pytest
import torch

import dapo
import rollout
import train_vapo
from system.run import BadInput


def test_group_advantage_by_hand():
    # Group 1: mean ½, std ½.
    # Group 2: mean ¼, std √(3/16) = √3/4: (1 − ¼)/(√3/4) = √3, (0 − ¼)/(√3/4) = −1/√3.
    reward_B = torch.tensor([1.0, 0, 0, 1, 0, 0, 1, 0])
    expected = [1, -1, -1, 1, -(3**-0.5), -(3**-0.5), 3**0.5, -(3**-0.5)]
    assert dapo.group_advantage(reward_B, 4).tolist() == pytest.approx(expected)
    assert dapo.group_advantage(7 - 3 * reward_B, 4).tolist() == pytest.approx(
        [-a for a in expected]
    )  # scale and shift do not matter


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -1e6])
def test_a_group_all_right_or_all_wrong_teaches_nothing(reward):
    assert dapo.group_advantage(torch.full((16,), reward), 16).tolist() == [0] * 16


def test_rows_that_are_no_whole_groups_are_refused():
    with pytest.raises(AssertionError, match="no groups of 4"):
        dapo.group_advantage(torch.zeros(6), 4)


def test_mixed_groups_go_by_the_verdict():
    correct_B = torch.tensor([1, 1, 0, 0, 0, 1]).bool()
    assert dapo.mixed_groups(correct_B, 2).tolist() == [False, False, False, False, True, True]
    assert dapo.mixed_groups(correct_B, 3).tolist() == [True] * 6


def test_overlong_punishment_at_its_corners():
    length_B = torch.tensor([1, 79, 80, 81, 90, 100, 101, 500])  # L_max = 100, L_cache = 20
    punished_B = dapo.overlong_punishment(length_B, 100, 20)
    assert punished_B.tolist() == pytest.approx([0, 0, 0, -0.05, -0.5, -1, -1, -1])
    punished_B = dapo.overlong_punishment(torch.tensor([0, 50, 100]), 100, 100)
    assert punished_B.tolist() == pytest.approx([0, -0.5, -1])
    assert dapo.overlong_punishment(torch.tensor([99, 100]), 100, 1).tolist() == [0, -1]
    for cache in (0, 101):
        with pytest.raises(AssertionError, match="^the cache is a part of the longest answer$"):
            dapo.overlong_punishment(length_B, 100, cache)


def test_a_right_answer_at_the_limit_is_worth_more_than_a_short_wrong_one():
    """Right, cut at nothing but as long as may be: 1 − 1 = 0. Wrong and short: −1, not 0."""
    dapo_settings = train_vapo.Settings(**train_vapo.PRESETS["dapo"])
    right, wrong = dapo_settings.reward_correct, dapo_settings.reward_wrong
    punished_B = dapo.overlong_punishment(torch.tensor([100, 5]), 100, 20)
    assert (torch.tensor([right, wrong]) + punished_B).tolist() == [0, -1]


@pytest.fixture
def collect(monkeypatch):
    """collect(batches, settings …) → (rows, drawn). A batch is given as the texts of its groups'
    verdicts: "10" is right, wrong."""

    def collect(batches, prompts, dynamic_sampling):
        source = iter(batches)

        def judged(*_):
            verdicts = "".join(next(source))
            correct_B = torch.tensor([verdict == "1" for verdict in verdicts])
            length_B = torch.arange(1, len(verdicts) + 1)
            return {
                "correct_B": correct_B, "length_B": length_B,
                "reward_B": length_B % 2 + correct_B.float(),  # of no use: it is shaped
                "prompt_length_B": torch.ones_like(length_B),
                "token_BL": torch.ones(len(verdicts), len(verdicts) + 1).long(),
            }  # fmt: skip

        monkeypatch.setattr(rollout, "judged", judged)
        monkeypatch.setattr(rollout, "next_problems", lambda *_: None)
        how = {"prompts": prompts, "samples": 2, "dynamic_sampling": dynamic_sampling}
        generators, settings = {"order": None, "sample": None}, train_vapo.Settings(**how)
        return rollout.collect(None, None, [], None, settings, generators, {})

    return collect


def test_collect_draws_until_the_batch_is_full_of_mixed_groups_and_counts_all_it_drew(collect):
    drawn = (["11", "10", "00"], ["00", "00", "11"], ["01", "11", "10"], ["10", "10", "10"])
    rows, drawn = collect(drawn, prompts=3, dynamic_sampling=10)
    # from the first and the third batch
    assert rows["correct_B"].int().tolist() == [1, 0, 0, 1, 1, 0]
    assert rows["length_B"].tolist() == [3, 4, 1, 2, 5, 6]
    assert drawn == {"accuracy": pytest.approx((3 + 2 + 4) / 18), "generations": 3, "answers": 18}


def test_the_punishment_is_by_the_limit_and_beside_the_verdict(monkeypatch):
    # L_max = 100, though no answer is that long; L_cache = 0.2 · 100
    length_B, correct_B = torch.tensor([80, 85, 90, 95]), torch.tensor([1, 0, 1, 0]).bool()
    rows = {"length_B": length_B, "correct_B": correct_B, "reward_B": correct_B.float()}
    monkeypatch.setattr(rollout, "judged", lambda *_: {n: c.clone() for n, c in rows.items()})
    how = {"prompts": 1, "samples": 4, "response_length": 100}
    for overlong, rewards in ((0.2, [1, -0.25, 0.5, -0.75]), (0.0, [1, 0, 1, 0])):
        settings = train_vapo.Settings(overlong=overlong, **how)
        given, _ = rollout.collect(
            None, None, [None], None, settings, {"order": None, "sample": None}, {"queue": [0]}
        )
        assert given["reward_B"].tolist() == pytest.approx(rewards)
        assert torch.equal(given["correct_B"], correct_B)


def test_collect_takes_no_more_groups_than_it_needs(collect):
    rows, drawn = collect([["10", "11"], ["10", "01"]], prompts=2, dynamic_sampling=2)
    assert rows["correct_B"].int().tolist() == [1, 0, 1, 0] and drawn["generations"] == 2


def test_collect_stops_at_its_limit_with_a_clear_message(collect):
    batches = (["11", "10"], ["11", "11"], ["00", "00"], ["10", "10"])
    said = r"found 1 of 2 groups .* in 3 batches .* raise --dynamic_sampling"
    with pytest.raises(BadInput, match=said):
        collect(batches, prompts=2, dynamic_sampling=3)


def test_without_dynamic_sampling_the_first_batch_is_the_rollout(collect):
    rows, drawn = collect([["11", "00"]], prompts=2, dynamic_sampling=0)
    assert rows["correct_B"].int().tolist() == [1, 1, 0, 0]
    assert drawn == {"accuracy": 0.5, "generations": 1, "answers": 4}
