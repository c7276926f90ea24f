"""gae.py: advantages by hand, against the definition, and against the mistakes others made."""

import math

import pytest
import torch

from gae import (
    decoupled_gae,
    explained_variance,
    gae,
    length_adaptive_lambda,
    terminal_reward,
)


def mask(*lengths):
    return (torch.arange(max(max(lengths), 1)) < torch.tensor(lengths)[:, None]).float()


def table(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def test_reward_lands_on_the_last_response_token():
    reward_BT = terminal_reward(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 3, 0]), 4)
    assert reward_BT.tolist() == [[1, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    "lam, expected", [(1.0, [0.5, 0.5, 0.5]), (0.5, [0.125, 0.25, 0.5]), (0.0, [0.0, 0.0, 0.5])]
)
def test_a_constant_critic_spreads_its_error_by_powers_of_lambda(lam, expected):
    # δ = (0, 0, 1 − ½): Â_t = λ^(2−t) · ½
    adv_BT = gae(table([0, 0, 1]), table([0.5, 0.5, 0.5]), mask(3), lam)
    assert adv_BT.tolist() == [expected]


def test_value_of_a_token_is_the_value_before_it():
    # V = (0.25, 0.75), R = 1, λ = 0: Â = (V₁ − V₀, R − V₁).
    # A critic read one position late would give (…, R).
    assert gae(table([0, 1]), table([0.25, 0.75]), mask(2), 0.0).tolist() == [[0.5, 0.25]]


def test_gae_equals_its_definition_on_ragged_one_token_and_empty_rows(device):
    torch.manual_seed(0)
    lengths, gamma = (6, 1, 0, 4), 0.9
    mask_BT = mask(*lengths)
    reward_BT, value_BT, lam_B = torch.randn(4, 6), torch.randn(4, 6), torch.rand(4)
    expected = [[0.0] * 6 for _ in lengths]
    for i, length in enumerate(lengths):
        r, v, lam = (
            reward_BT[i].double().tolist(),
            value_BT[i].double().tolist(),
            lam_B[i].double().item(),
        )
        v = v[:length] + [0.0]  # after the last token
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected[i][t] = sum((gamma * lam) ** k * delta[t + k] for k in range(length - t))
    adv_BT = gae(
        reward_BT.to(device), value_BT.to(device), mask_BT.to(device), lam_B.to(device), gamma
    )
    torch.testing.assert_close(adv_BT.cpu(), torch.tensor(expected), rtol=0, atol=1e-5)


def test_the_scan_equals_the_recursion_over_a_thousand_tokens(device):
    torch.manual_seed(0)
    lengths = (1000, 513, 512, 511, 3)
    reward_BT, value_BT, mask_BT, lam_B = (
        torch.randn(5, 1000),
        torch.randn(5, 1000),
        mask(*lengths),
        torch.tensor([1, 0.999, 0.95, 0, 0.5]),
    )
    expected_BT = torch.zeros(5, 1000, dtype=torch.float64)
    for i, length in enumerate(lengths):
        following, next_value = 0.0, 0.0
        for t in reversed(range(length)):
            following = (
                reward_BT[i, t].item()
                + next_value
                - value_BT[i, t].item()
                + lam_B[i].item() * following
            )
            expected_BT[i, t], next_value = following, value_BT[i, t].item()
    adv_BT = gae(*(x.to(device) for x in (reward_BT, value_BT, mask_BT, lam_B)))
    torch.testing.assert_close(adv_BT.cpu(), expected_BT.float(), rtol=1e-5, atol=1e-5)


def test_targets_at_lambda_one_are_the_outcome_whatever_the_critic_says():
    mask_BT = mask(5, 2, 1)
    reward_BT = terminal_reward(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([5, 2, 1]), 5)
    for seed in range(5):
        torch.manual_seed(seed)
        _, target_BT = decoupled_gae(
            reward_BT, 10 * torch.randn(3, 5), mask_BT, lam_policy=0.3, lam_critic=1.0
        )
        torch.testing.assert_close(target_BT, mask_BT * table([1], [0], [1]), rtol=0, atol=1e-5)


def test_each_lambda_moves_only_its_own_side():
    torch.manual_seed(0)
    reward_BT, value_BT, mask_BT = table([0, 0, 1]), torch.randn(1, 3), mask(3)
    adv_BT, target_BT = decoupled_gae(reward_BT, value_BT, mask_BT, 0.5, 1.0)
    other_adv_BT, same_target_BT = decoupled_gae(reward_BT, value_BT, mask_BT, 0.9, 1.0)
    same_adv_BT, other_target_BT = decoupled_gae(reward_BT, value_BT, mask_BT, 0.5, 0.9)
    assert torch.equal(adv_BT, same_adv_BT) and torch.equal(target_BT, same_target_BT)
    assert not torch.allclose(adv_BT, other_adv_BT) and not torch.allclose(
        target_BT, other_target_BT
    )


def test_length_adaptive_lambda_by_hand():
    # α = 1/20: λ = 1 − 20/l, negative below 20 tokens and held at 0 there
    lam_B = length_adaptive_lambda(torch.tensor([0, 1, 10, 20, 100, 400, 20_000]), 0.05)
    torch.testing.assert_close(
        lam_B, torch.tensor([0, 0, 0, 0, 0.8, 0.95, 0.999]), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.5])
def test_outcome_reaches_the_first_token_with_weight_exp_minus_one_over_alpha(alpha):
    length_B = torch.tensor([2_000, 20_000])
    weight_B = length_adaptive_lambda(length_B, alpha).double() ** (length_B - 1)
    assert weight_B.tolist() == pytest.approx([math.exp(-1 / alpha)] * 2, rel=0.12)
    assert (length_adaptive_lambda(torch.tensor([10**9]), alpha) < 1).all()


@pytest.mark.parametrize("nonsense", [1e9, float("nan"), float("inf")])
def test_padding_never_matters(nonsense):
    torch.manual_seed(0)
    mask_BT = mask(5, 2, 0)
    off_BT = mask_BT == 0
    reward_BT, value_BT = torch.randn(3, 5), torch.randn(3, 5)
    results = []
    for filling in (0.0, nonsense):
        reward_BT, value_BT = (
            reward_BT.masked_fill(off_BT, filling),
            value_BT.masked_fill(off_BT, filling),
        )
        adv_BT, target_BT = decoupled_gae(
            reward_BT, value_BT, mask_BT, torch.tensor([0.9, 0.5, 0.1]), 1.0
        )
        results.append((adv_BT, target_BT, explained_variance(value_BT, target_BT, mask_BT)))
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)
    assert (results[0][0][off_BT] == 0).all() and (results[0][1][off_BT] == 0).all()


def test_a_mask_with_a_hole_and_shapes_that_differ_are_refused():
    with pytest.raises(AssertionError, match="^mask must be ones followed by zeros in every row$"):
        gae(table([0, 0, 1]), table([0, 0, 0]), table([1, 0, 1]), 1.0)
    with pytest.raises(
        AssertionError, match=r"^reward, value and mask must have one shape \[B, T\]$"
    ):
        gae(table([0, 0, 1]), table([0, 0]), mask(3), 1.0)


def test_explained_variance_by_hand():
    target_BT, mask_BT = table([0, 1, 0, 1]), mask(4)
    assert explained_variance(target_BT, target_BT, mask_BT) == 1
    assert explained_variance(table([0.3] * 4), target_BT, mask_BT) == pytest.approx(0)
    assert (
        explained_variance(target_BT / 2, target_BT, mask_BT) == 0.75
    )  # errors 0 and ½: a quarter of the variance
    assert explained_variance(1 - target_BT, target_BT, mask_BT) == -3
    assert explained_variance(target_BT, table([1, 1, 1, 1]), mask_BT).isnan()


def test_gamma_discounts_advantages_and_targets():
    # δ = (½ · ½ − ½, 1 − ½) = (−¼, ½); Â₀ = −¼ + ½ λ ½, target₀ = V₀ + Â₀
    reward_BT, value_BT = table([0, 1]), table([0.5, 0.5])
    adv_BT, target_BT = decoupled_gae(reward_BT, value_BT, mask(2), 0.0, 1.0, gamma=0.5)
    assert adv_BT.tolist() == [[-0.25, 0.5]] and target_BT.tolist() == [[0.5, 1]]
    adv_BT, target_BT = decoupled_gae(reward_BT, value_BT, mask(2), 1.0, 0.0, gamma=0.5)
    assert adv_BT.tolist() == [[0, 0.5]] and target_BT.tolist() == [[0.25, 1]]


def test_answers_of_one_token_and_of_none_have_the_lambda_of_one():
    lam_B = length_adaptive_lambda(torch.tensor([0, 1, 2]), 1.5)
    torch.testing.assert_close(lam_B, torch.tensor([1 / 3, 1 / 3, 2 / 3]))


def test_what_cannot_be_is_said():
    with pytest.raises(AssertionError, match="^a row is longer than the table$"):
        terminal_reward(torch.ones(1), torch.tensor([3]), 2)
    with pytest.raises(AssertionError, match="^alpha must be positive$"):
        length_adaptive_lambda(torch.tensor([3]), 0.0)


@pytest.mark.parametrize("given, dtype", [
    (torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)
])  # fmt: skip
def test_advantages_are_computed_in_float32_at_least(given, dtype):
    # 1 − 1/256 is no bfloat16, 1/3 is not one of both
    adv_BT = gae(table([0, 1]).to(given), table([1, 1 / 256]).to(given), mask(2), 1 / 3)
    last = 1 - 1 / 256
    expected = torch.tensor([[1 / 256 - 1 + last / 3, last]], dtype=dtype)
    assert adv_BT.dtype == dtype
    torch.testing.assert_close(
        adv_BT, expected, rtol=0, atol=1e-7 if dtype.itemsize == 4 else 1e-15
    )
