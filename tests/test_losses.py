"""losses.py: the clipped loss by its sign table, and weights that no split can change."""

import math

import pytest
import torch

from losses import (
    importance_weight,
    nll_loss,
    policy_loss,
    ratio,
    ratio_metrics,
    token_weights,
    value_loss,
)


def mask(*lengths, width=None):
    return (torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]).float()


def loss_and_slope(ratio, adv, eps_low, eps_high):
    """The loss of one token, and its derivative by the log-prob."""
    logp_BT = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss_BT = policy_loss(
        logp_BT,
        torch.zeros_like(logp_BT),
        torch.tensor([[adv]], dtype=torch.float64),
        eps_low,
        eps_high,
    )
    loss_BT.sum().backward()
    return loss_BT.item(), logp_BT.grad.item()


@pytest.mark.parametrize(
    "ratio, adv, loss, slope",
    [
        (1.50, +1, -1.28, 0.0),  # risen beyond 1 + ε_high, and good: no further
        (1.25, +1, -1.25, -1.25),  # risen, good, within: this is what clip-higher allows
        (1.50, -1, 1.50, 1.50),  # risen and bad: always pulled back
        (0.50, +1, -0.50, -0.50),  # fallen and good: always pulled back
        (0.50, -1, 0.80, 0.0),  # fallen below 1 − ε_low, and bad: no further
        (0.90, -1, 0.90, 0.90),  # fallen, bad, within
    ],
)
def test_sign_table_of_the_clipped_loss(ratio, adv, loss, slope):
    assert loss_and_slope(ratio, adv, 0.2, 0.28) == pytest.approx((loss, slope))


def test_equal_clip_ranges_are_ppo():
    # At 0.2 / 0.2 the ratio 1.25 is clipped, where clip-higher lets it pass.
    assert loss_and_slope(1.25, 1, 0.2, 0.2) == pytest.approx((-1.2, 0.0))
    torch.manual_seed(0)
    logp_BT, adv_BT = torch.randn(20, 20) * 0.3, torch.randn(20, 20)
    ratio_BT = logp_BT.exp()
    ppo_BT = -torch.where(adv_BT > 0, ratio_BT.clamp(max=1.2), ratio_BT.clamp(min=0.8)) * adv_BT
    torch.testing.assert_close(policy_loss(logp_BT, torch.zeros(20, 20), adv_BT, 0.2, 0.2), ppo_BT)


def test_at_ratio_one_the_gradient_is_that_of_reinforce():
    torch.manual_seed(0)
    logp_BT, adv_BT, weight_BT = (
        -torch.rand(3, 4),
        torch.randn(3, 4),
        token_weights(mask(4, 2, 1), "token"),
    )
    gradients = []
    for loss in (lambda x: policy_loss(x, logp_BT, adv_BT, 0.2, 0.28), lambda x: -x * adv_BT):
        x = logp_BT.clone().requires_grad_()
        (loss(x) * weight_BT).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_weights_on_answers_of_one_and_three_tokens():
    assert token_weights(mask(1, 3), "token").tolist() == [[1 / 4, 0, 0], [1 / 4, 1 / 4, 1 / 4]]
    expected = torch.tensor([[1 / 2, 0, 0], [1 / 6, 1 / 6, 1 / 6]])
    torch.testing.assert_close(token_weights(mask(1, 3), "sample"), expected)
    with pytest.raises(ValueError, match="token"):
        token_weights(mask(1), "answer")


@pytest.mark.parametrize("how", ["token", "sample"])
def test_weights_sum_to_one_and_empty_rows_count_for_nothing(how):
    weight_BT = token_weights(mask(5, 0, 2), how)
    assert weight_BT.sum().item() == pytest.approx(1)
    torch.testing.assert_close(weight_BT[[0, 2]], token_weights(mask(5, 2), how))
    assert token_weights(torch.zeros(2, 3), how).sum() == 0
    assert token_weights(mask(2), how).tolist() == [[1 / 2, 1 / 2]]


def test_nll_without_a_correct_answer_is_zero_and_not_nan():
    logp_BT = torch.full((2, 3), -1.5, requires_grad=True)
    correct_B = torch.tensor([False, False])
    loss = (nll_loss(logp_BT) * token_weights(mask(3, 2) * correct_B[:, None], "token")).sum()
    loss.backward()
    assert loss.item() == 0 and (logp_BT.grad == 0).all()


def test_nll_is_the_mean_over_the_tokens_of_correct_answers():
    logp_BT = torch.tensor([[-1.0, -2.0, -9.0], [-3.0, -9.0, -9.0], [-4.0, -4.0, -4.0]])
    weight_BT = token_weights(mask(2, 1, 3) * torch.tensor([[True], [True], [False]]), "token")
    assert (nll_loss(logp_BT) * weight_BT).sum().item() == pytest.approx((1 + 2 + 3) / 3)


def test_nonsense_on_padding_stays_finite_and_weightless():
    logp_BT = torch.tensor([[-1.0, 1e6], [-1.0, -1e6]], requires_grad=True)
    adv_BT = torch.tensor([[1.0, 1e6], [1.0, -1e6]])
    loss = (
        policy_loss(logp_BT, torch.full((2, 2), -1.0), adv_BT, 0.2, 0.28)
        * token_weights(mask(1, 1, width=2), "token")
    ).sum()
    loss.backward()
    assert loss.item() == -1 and logp_BT.grad.tolist() == [[-0.5, 0], [-0.5, 0]]


def test_the_ratio_is_never_further_from_one_than_e_to_the_twenty():
    logp_BT = torch.tensor([[-1e6, -1.0, 0.0, 1.0, 1e6]])
    log_BT = ratio(logp_BT, torch.zeros(1, 5)).log()
    torch.testing.assert_close(log_BT, torch.tensor([[-20.0, -1.0, 0.0, 1.0, 20.0]]))


def test_value_loss_by_hand():
    value_BT, target_BT = torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0, 1.0]])
    assert value_loss(value_BT, target_BT).tolist() == [[0.5, 2.0]]


def test_importance_weights_by_hand():
    # twice as likely in training as the sampler thought; half; four times: cut at 2; padding: 1
    old_BT, sampled_BT = (
        torch.tensor([[0.5, 0.2, 0.8, 1.0]]).log(),
        torch.tensor([[0.25, 0.4, 0.2, 1.0]]).log(),
    )
    torch.testing.assert_close(
        importance_weight(old_BT, sampled_BT, cap=2.0), torch.tensor([[2.0, 0.5, 2.0, 1.0]])
    )
    assert importance_weight(old_BT, sampled_BT).tolist() == [[1, 1, 1, 1]]


def test_ratio_metrics_by_hand():
    ratio_BT = torch.tensor([[1.5, 0.5, 1.5, 99.0]])
    adv_BT = torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    metrics = ratio_metrics(
        ratio_BT.log(), torch.zeros(1, 4), adv_BT, mask(3).new_tensor([[1, 1, 1, 0]]), 0.2, 0.28
    )
    assert (
        metrics["clip_high"] == 1
        and metrics["clip_low"] == 1
        and metrics["ratio_max"] == pytest.approx(1.5)
    )
    k3 = 2 * (0.5 - math.log(1.5)) + (-0.5 - math.log(0.5))
    assert metrics["approx_kl"].item() == pytest.approx(k3, rel=1e-5)


def test_what_the_clip_removes_is_counted_at_its_own_side():
    # 1.25 is within 1 + ε_high and 0.75 is below 1 − ε_low: ε is 0.28 above and 0.2 below.
    logp_BT, adv_BT = torch.tensor([[1.25, 0.75]]).log(), torch.tensor([[1.0, -1.0]])
    metrics = ratio_metrics(logp_BT, torch.zeros(1, 2), adv_BT, mask(2), 0.2, 0.28)
    assert metrics["clip_high"] == 0 and metrics["clip_low"] == 1
    metrics = ratio_metrics(logp_BT, torch.zeros(1, 2), adv_BT, mask(2), 0.28, 0.2)
    assert metrics["clip_high"] == 1 and metrics["clip_low"] == 0
