"""effects.py: on responses that are known, so that the effects are."""

import math
from itertools import product

import numpy as np
import pytest

from ablate import GROUPS
from lab import effects

CUBE = ["".join(bits) for bits in product("01", repeat=7)]
ORDER = [row.removeprefix("cube_") for row in GROUPS["cube"]]


def response(bits):
    """0.5, and 0.1 with piece 1, −0.04 with piece 3, and 0.08 more with pieces 1 and 2 together."""
    b = [int(bit) for bit in bits]
    return 0.5 + 0.1 * b[0] - 0.04 * b[2] + 0.08 * b[0] * b[1]


def test_effects_of_a_known_response_by_hand():
    """With piece 2 in half of the runs, piece 1 is worth 0.1 + 0.08 / 2, piece 2 0.08 / 2. Where
    piece 2 is on, piece 1 is worth 0.18, where it is off 0.1: the interaction is half of 0.08."""
    y = [response(bits) for bits in CUBE]
    effect, unit, (sigma, free) = effects.effects(CUBE, [0] * 128, y)
    by_hand = {(0,): 0.14, (1,): 0.04, (2,): -0.04, (0, 1): 0.04}
    for set_, found in effect.items():
        assert found == pytest.approx(by_hand.get(set_, 0.0), abs=1e-12), set_
    with_1, without_1 = ([y for y, bits in zip(y, CUBE) if bits[0] == b] for b in "10")
    assert effect[0,] == pytest.approx(np.mean(with_1) - np.mean(without_1))
    # A difference of two means of 64 runs: σ √(2 / 64)
    assert unit[0,] == pytest.approx(math.sqrt(2 / 64)) and unit[5, 6] == pytest.approx(unit[0,])
    assert len(effect) == 7 + 21 and free == 128 - 29 and sigma < 1e-12


@pytest.mark.parametrize("runs", (16, 32, 64))
def test_main_effects_of_the_first_runs_are_those_of_the_whole_cube(runs):
    done = ORDER[:runs]
    effect, *_ = effects.effects(done, [0] * runs, [response(bits) for bits in done])
    assert [effect[i,] for i in range(7)] == pytest.approx([0.14, 0.04, -0.04, 0, 0, 0, 0])
    assert len(effect) == (28 if runs == 64 else 7)


def test_a_replicate_that_is_better_throughout_changes_no_effect():
    bits, block = CUBE + CUBE, [0] * 128 + [1] * 128
    y = [response(run) + 0.3 * b for run, b in zip(bits, block)]
    effect, unit, (sigma, free) = effects.effects(bits, block, y)
    assert effect[0,] == pytest.approx(0.14) and sigma < 1e-12 and free == 256 - 30
    assert unit[0,] == pytest.approx(math.sqrt(2 / 128))


def test_what_a_second_replicate_says_otherwise():
    """In the second, of sixteen runs, piece 1 is worth 0.05 more, and all runs 0.3 more."""
    half = ORDER[:16]
    bits, block = CUBE + half, [0] * 128 + [1] * 16
    y = [response(run) for run in CUBE]
    y += [response(run) + 0.3 + 0.05 * int(run[0]) for run in half]
    more = effects.between_blocks(bits, block, y)
    assert [difference for difference, _ in more] == pytest.approx([0.05] + [0] * 6)
    # Two differences of means: of 64 runs each, of 8 each
    assert [unit for _, unit in more] == pytest.approx([math.sqrt(2 / 64 + 2 / 8)] * 7)
    few = effects.between_blocks(bits[:-1], block[:-1], y[:-1])
    assert all(math.isnan(number) for pair in few for number in pair) and len(few) == 7


def test_the_error_of_one_run_by_hand_and_from_noise():
    # d = −1, −3: mean −2, Σ (d − mean)² = 2, and σ² = 2 / (2 · (2 − 1)) = 1
    sigma, free = effects.error_of_replicates(
        ["a", "b", "a", "b", "c"], [0, 0, 1, 1, 0], [1, 2, 2, 5, 9]
    )
    assert (sigma, free) == (pytest.approx(1.0), 1)
    noise = 0.05 * np.random.default_rng(0).standard_normal(256)
    y = np.array([response(bits) for bits in CUBE + CUBE]) + noise
    found = effects.error_of_replicates(CUBE + CUBE, [0] * 128 + [1] * 128, y)
    assert found == (pytest.approx(0.05, rel=0.15), 127)
    assert effects.error_of_high_orders(CUBE, y[:128]) == (pytest.approx(0.05, rel=0.2), 64)
    assert effects.error_of_high_orders(CUBE[:64], y[:64])[1] == 0
    *_, residual = effects.effects(CUBE + CUBE, [0] * 128 + [1] * 128, y)
    assert residual == (pytest.approx(0.05, rel=0.15), 226)
    # 95%: t of 120 degrees is 1.980
    assert effects.half_width(0.125, (0.05, 120)) == pytest.approx(1.980 * 0.05 / 8, rel=1e-3)


def test_shapley_values_share_what_all_bring_and_an_interaction_equally():
    value = {bits: response(bits) for bits in CUBE}
    found = effects.shapley(value)
    # The 0.08 of pieces 1 and 2 is shared by them
    assert found == pytest.approx([0.14, 0.04, -0.04, 0, 0, 0, 0])
    random = dict(zip(CUBE, np.random.default_rng(0).random(128)))
    total = random["1" * 7] - random["0" * 7]
    assert sum(effects.shapley(random)) == pytest.approx(total)
    assert all(map(math.isnan, effects.shapley({"1111111": 1.0})))


def test_the_two_corners_see_an_interaction_twice_and_not_at_all():
    without, alone = effects.corners({bits: response(bits) for bits in CUBE})
    assert without[:3] == pytest.approx([0.18, 0.08, -0.04])
    assert alone[:3] == pytest.approx([0.1, 0.0, -0.04])


def test_a_collapse_is_a_fall_below_half_of_the_best_before():
    assert effects.collapse([0.1, 0.4, 0.6, 0.31, 0.29, 0.1]) == 5
    assert effects.collapse([0.1, 0.4, 0.6, 0.3]) == 0
    assert effects.collapse([0.2, 0.09, 0.05]) == 2
