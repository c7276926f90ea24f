"""learner.py: one optimiser step, its schedule, and the one that is skipped."""

import math

import pytest
import torch

from system.learner import Learner, clip_gradients, step_or_skip, warmup


def learner_of(*weights, lr=0.1, max_grad_norm=1.0, steps=0):
    """A network of one row of weights, whose gradients are set by hand."""
    network = torch.nn.Linear(len(weights), 1, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([weights]))
    return Learner(network, lr, max_grad_norm, warmup(steps))


def set_gradient(learner, *numbers):
    learner.network.weight.grad = torch.tensor([numbers])


def test_the_learning_rate_rises_in_a_line_and_stays():
    rates, learner = [], learner_of(1.0, lr=0.8, steps=4)
    for _ in range(6):
        rates.append(learner.optimizer.param_groups[0]["lr"])
        set_gradient(learner, 1.0)
        assert step_or_skip({"policy": learner}, {})
    assert (
        rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8]) and learner.scheduler.last_epoch == 6
    )
    assert learner_of(1.0, lr=0.8, steps=0).optimizer.param_groups[0]["lr"] == 0.8


@pytest.mark.parametrize("most, factor", [(10.0, 1), (2.5, 0.5)])
def test_gradients_are_clipped_by_their_norm(most, factor):
    learner = learner_of(0.0, 0.0, max_grad_norm=most)
    set_gradient(learner, 3.0, 4.0)
    assert clip_gradients(learner) == pytest.approx(5)
    assert learner.network.weight.grad[0].tolist() == pytest.approx([3 * factor, 4 * factor])


def test_the_first_step_of_adamw_by_hand_without_weight_decay():
    learner, metrics = learner_of(2.0, -2.0), {"loss": 1.0}
    set_gradient(learner, 0.3, -0.2)
    assert step_or_skip({"policy": learner}, metrics)
    # the moments, corrected for their start, are g and g²: w − lr · sign(g)
    assert learner.network.weight[0].tolist() == pytest.approx([1.9, -1.9])
    assert metrics["policy_grad_norm"] == pytest.approx(math.hypot(0.3, 0.2))
    assert learner.network.weight.grad is None


@pytest.mark.parametrize("bad", [{"loss": math.nan}, {"loss": math.inf}, {}])
def test_what_is_not_finite_on_one_side_moves_neither(bad):
    learners = {"policy": learner_of(1.0), "critic": learner_of(2.0)}
    set_gradient(learners["policy"], 1.0)
    set_gradient(learners["critic"], 1.0 if bad else math.nan)
    assert not step_or_skip(learners, bad)
    for name, weight in (("policy", 1.0), ("critic", 2.0)):
        assert learners[name].network.weight.item() == weight
        assert learners[name].scheduler.last_epoch == 0
        assert learners[name].network.weight.grad is None
    set_gradient(learners["policy"], 1.0)
    set_gradient(learners["critic"], 1.0)
    assert step_or_skip(learners, {"loss": 0.0})
    assert learners["policy"].network.weight.item() == pytest.approx(0.9)
