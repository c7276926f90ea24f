"""One optimiser step worked out by hand, through the loops that are shipped.

The world has two words, A and B. The policy is a coin: log π = log softmax(θ / T) whatever came
before, θ = (3, 3), so π = ½ each. The critic says V = v = ½ before every token, and v + 1 after it.
A rollout is two answers to one problem:

    answer   verdict   R   δ          λ = 1 − 1/l   Â          π_old / π_sampler
    A        right     1   ½          0             ½          ½ / ¼ = 2, held at 1.5
    B B      wrong     0   0, −½      ½             −¼, −½     1

By θ_A the gradient of log π(A) is ½ and that of log π(B) is −½; by θ_B it is the opposite. So one
number, g, is the policy's whole gradient: (−g, g), of norm g √2.
"""

import math
from dataclasses import replace

import pytest
import torch
from test_vapo import metrics_of
from torch.nn import Parameter

import evaluate
import model
import rollout
import table
import train_value
import train_vapo
from system import checkpoint, loading

# No number is a default, so a flag that is ignored shows.
SETTINGS = train_vapo.Settings(
    train="t", test="t", steps=2, prompts=1, samples=2, mini_batch=2, micro_batch_tokens=1,
    lr=0.01, critic_lr=0.02, warmup=2, max_grad_norm=0.1, alpha=1.0, mu=0.2, is_clip=1.5,
    compile=False, device="cpu",
)  # fmt: skip
A, B = 0, 1


class Coin(torch.nn.Module):
    """The policy, with θ, and the critic, with v: what the loops ask of a network."""

    device, compute_dtype = torch.device("cpu"), torch.float32

    def __init__(self, *weights):
        super().__init__()
        self.weight = Parameter(torch.tensor(weights))


def rows_of(*answers):
    """Rows of judged answers, each as its words; right if it begins with A. The prompt is one."""
    length_B = torch.tensor(list(map(len, answers)))
    width = int(length_B.max())
    token_BL = torch.tensor([[B, *words, *[A] * (width - len(words))] for words in answers])
    correct_B = torch.tensor([words[0] == A for words in answers])
    rows = {"token_BL": token_BL, "length_B": length_B, "correct_B": correct_B,
            "prompt_length_B": torch.ones_like(length_B), "problem_B": torch.zeros_like(length_B),
            "stop_B": torch.ones_like(correct_B), "reward_B": correct_B.float()}  # fmt: skip
    chance_BT = torch.where(table.response_tokens(rows) == A, 0.25, 0.5)  # the sampler's
    return rows | {"sampled_logp_BT": chance_BT.log() * table.response_mask(rows)}


@pytest.fixture
def coins(monkeypatch):
    """(policy, critic, given): given[network] is what AdamW was given in each of its steps, as
    (learning rate, gradient)."""
    policy, critic = Coin(3.0, 3.0), Coin(0.5)
    given, step = {policy: [], critic: []}, torch.optim.AdamW.step

    def logprobs(policy, rows, temperature, compile=False):
        word_BT = table.response_tokens(rows)
        logp_BT = (policy.weight / temperature).log_softmax(0)[word_BT]
        return logp_BT, torch.full_like(logp_BT, math.log(2))

    def values(critic, rows, shift=0):
        return critic.weight.expand(table.response_mask(rows).shape) + shift

    def spy(optimizer, *rest):
        (group,) = optimizer.param_groups
        network = policy if group["params"][0] is policy.weight else critic
        given[network].append((group["lr"], network.weight.grad.tolist()))
        return step(optimizer, *rest)

    monkeypatch.setattr(model, "policy_logprobs", logprobs)
    monkeypatch.setattr(model, "critic_values", values)
    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    return policy, critic, given


@pytest.fixture
def train(coins, monkeypatch, tmp_path):
    """train(answers, settings): the shipped loop, in which every rollout is those answers.
    Returns: the logged numbers, a dict a rollout; the first is of before."""
    policy, critic, _ = coins

    def train(answers, settings):
        drawn = {"accuracy": 0.5, "answers": len(answers), "generations": 1}
        monkeypatch.setattr(rollout, "collect", lambda *_: (rows_of(*answers), drawn))
        monkeypatch.setattr(evaluate, "evaluate_in_run", lambda *_: ({}, {}))
        own = None if settings.critic_free else critic
        train_vapo.train(settings, tmp_path, policy, own, None, [], [])
        return metrics_of(tmp_path)

    return train


def near(*numbers):
    return pytest.approx(numbers, rel=1e-3)


def test_two_steps_by_hand(coins, train):
    policy, critic, given = coins
    _, numbers, _ = train([[A], [B, B]], SETTINGS)
    # Token-level: every token weighs ⅓. −⅓ (1.5 · ½ − ¼ − ½) = 0, and its slope by θ_A is
    # −⅓ (1.5 · ½ · ½ + ¼ · ½ + ½ · ½) = −¼.
    assert numbers["policy_loss"] == pytest.approx(0, abs=1e-6)
    # The NLL of the right answer is log 2, its slope −½, and μ = 0.2: g = ¼ + 0.1.
    assert numbers["nll_loss"] == pytest.approx(math.log(2))
    assert numbers["policy_grad_norm"] == pytest.approx(0.35 * math.sqrt(2))
    # The critic: targets 1, 0, 0. ⅓ · 3 · ½ (½)², slope ⅓ (−½ + ½ + ½).
    assert numbers["value_loss"] == pytest.approx(1 / 8)
    assert numbers["critic_grad_norm"] == pytest.approx(1 / 6)
    # Both are clipped to a norm of 0.1, and warm up in two steps.
    g = 0.1 / math.sqrt(2)
    assert given[policy] == [(0.005, near(-g, g)), (0.01, near(-g, g))]
    assert given[critic] == [(0.01, near(0.1)), (0.02, near(0.1))]
    # For equal gradients AdamW moves by lr · sign(g); a decay of 0.01 would add 0.03 · lr to that.
    step = policy.weight.detach() - 3
    assert step.tolist() == near(0.015, -0.015)
    assert critic.weight.item() - 0.5 == pytest.approx(-0.03, rel=1e-3)
    assert numbers["gradient_steps"] == 1 and numbers["bad_steps"] == 0


@pytest.mark.parametrize("changed, policy_gradient, critic_gradient", [
    ({}, 1 / 4 + 0.1, 1 / 6),
    ({"mu": 0.5}, 1 / 4 + 0.25, 1 / 6),
    ({"positive_nll": False}, 1 / 4, 1 / 6),
    # importance 1 and 2 in the place of 1.5
    ({"is_clip": 0.0}, (1 / 4 + 1 / 8 + 1 / 4) / 3 + 0.1, 1 / 6),
    ({"is_clip": 9.0}, (1 / 2 + 1 / 8 + 1 / 4) / 3 + 0.1, 1 / 6),
    ({"is_clip": None}, (1 / 2 + 1 / 8 + 1 / 4) / 3 + 0.1, 1 / 6),  # needed: capped at 2
    # weights ½, ¼, ¼; the critic's stay ⅓
    ({"token_level_loss": False}, 3 / 16 + 1 / 32 + 1 / 16 + 0.1, 1 / 6),
    # Â = ½, −½, −½
    ({"length_adaptive_gae": False, "lam_policy": 1.0}, (3 / 8 + 1 / 2) / 3 + 0.1, 1 / 6),
    ({"alpha": 1e9}, (3 / 8 + 1 / 2) / 3 + 0.1, 1 / 6),
    # targets 1, Â + V = ¼, 0: by the policy's λ = ½, or by λ_critic = ½
    ({"decoupled_gae": False}, 1 / 4 + 0.1, 1 / 12),
    ({"lam_critic": 0.5}, 1 / 4 + 0.1, 1 / 12),
    # log π = log softmax(θ / 2): half the slope
    ({"temperature": 2.0}, (1 / 4 + 0.1) / 2, 1 / 6),
    # GRPO: Â = (R − ½) / ½ = 1, −1, −1
    ({"critic_free": True}, (3 / 4 + 1 / 2 + 1 / 2) / 3 + 0.1, None),
], ids=str)  # fmt: skip
def test_the_gradient_by_hand_with_each_flag(train, changed, policy_gradient, critic_gradient):
    _, numbers = train([[A], [B, B]], replace(SETTINGS, steps=1, **changed))
    assert numbers["policy_grad_norm"] == pytest.approx(policy_gradient * math.sqrt(2))
    assert numbers.get("critic_grad_norm") == pytest.approx(critic_gradient)


@pytest.mark.parametrize("changed, policy_gradient, critic_gradient", [
    ({}, 0, -0.2),  # the ratio is clipped; V = 0.8 is 0.2 below its target
    ({"eps_high": 0.8}, -1.7616 * 0.5 * 0.1192, -0.2),  # −r Â ∂ log π(A)
    ({"eps_low": 0.8, "clip_higher": False}, -1.7616 * 0.5 * 0.1192, -0.2),
], ids=str)  # fmt: skip
def test_the_second_step_of_a_rollout_by_hand(
    coins, train, changed, policy_gradient, critic_gradient
):
    """Two equal answers, one a step: Â = ½, and after the first step θ = (4, 2), V = 0.8. Then
    π(A) = 1 / (1 + e^−2) = 0.8808, the ratio is 1.7616, and the slope of log π(A) is 0.1192."""
    policy, critic, given = coins
    own = {"mini_batch": 1, "steps": 1, "lr": 1.0, "critic_lr": 0.3, "warmup": 0, "is_clip": 0.0}
    own |= {"max_grad_norm": 10.0, "positive_nll": False}
    _, numbers = train([[A], [A]], replace(SETTINGS, **own | changed))
    slopes = [gradient[0] for _, gradient in given[policy]]
    assert slopes == pytest.approx([-0.25, policy_gradient], rel=1e-3)
    slopes = [gradient[0] for _, gradient in given[critic]]
    assert slopes == pytest.approx([-0.5, critic_gradient], rel=1e-3)
    assert numbers["ratio_max"] == pytest.approx(1.7616, rel=1e-4)
    assert numbers["clip_high"] == (0 if policy_gradient else 0.5)  # of two steps of one token


def test_two_steps_of_value_pretraining_by_hand(coins, monkeypatch, tmp_path):
    """Answers of one token (R = 1) and of three (R = 0), each a micro-batch: every token weighs ¼,
    ¼ (−½ + ½ + ½ + ½) = ¼. Weighed by answers, or in each micro-batch alone, it would be 0."""
    _, critic, given = coins
    monkeypatch.setattr(checkpoint, "export", lambda *_: None)
    settings = train_value.Settings(
        lr=0.01, batch=2, passes=2, max_grad_norm=0.1, micro_batch_tokens=1, compile=False
    )
    rows, held_out = rows_of([A], [B, B, B]), rows_of([A], [A])
    train_value.fit(settings, tmp_path, critic, None, rows, held_out, lambda value_BT: {})
    before, first, second = metrics_of(tmp_path)
    assert before["value_loss"] == pytest.approx(1 / 8)  # ½ (½)² at every token
    assert first["train_value_loss"] == pytest.approx(1 / 8)
    assert first["value_grad_norm"] == pytest.approx(1 / 4)
    # clipped, and on the way to lr in ten steps
    assert given[critic] == [(pytest.approx(0.001), near(0.1)), (pytest.approx(0.002), near(0.1))]
    assert critic.weight.item() - 0.5 == pytest.approx(-0.003, rel=1e-3)
    # After the first step V = 0.499. The answers held out are right ones only.
    assert first["value_loss"] == pytest.approx(0.501**2 / 2, rel=1e-6)


def test_a_reward_model_is_fitted_after_the_last_token_by_hand(coins, monkeypatch, tmp_path):
    """V is 1.5 there: ½ ((1.5 − 1) + (1.5 − 0)) = 1, whatever the lengths."""
    _, critic, given = coins
    monkeypatch.setattr(checkpoint, "export", lambda *_: None)
    settings = train_value.Settings(
        objective="reward", batch=2, passes=1, max_grad_norm=9.0, compile=False
    )
    rows = rows_of([A], [B, B, B])
    train_value.fit(settings, tmp_path, critic, None, rows, rows, lambda value_BT: {})
    assert given[critic] == [(pytest.approx(2e-7), near(1.0))]
    before, after = metrics_of(tmp_path)
    assert before["value_loss"] == pytest.approx((0.5**2 + 1.5**2) / 2 / 2)
    # variances of R − V = −½, −1½ and of R are equal: a constant explains nothing
    assert before["explained_variance"] == 0
    assert before["value_first"] == before["value_last"] == 0.5  # before the tokens, all the same


def test_a_pass_of_value_pretraining_takes_every_row_once_in_a_new_order(
    coins, monkeypatch, tmp_path
):
    batches, value_gradients = [], train_value.value_gradients

    def spy(critic, batch, *rest, **options):
        batches.append(batch["problem_B"].tolist())
        return value_gradients(critic, batch, *rest, **options)

    monkeypatch.setattr(train_value, "value_gradients", spy)
    monkeypatch.setattr(checkpoint, "export", lambda *_: None)
    settings = train_value.Settings(batch=3, passes=2, compile=False)
    rows = rows_of(*[[A]] * 8) | {"problem_B": torch.arange(8)}
    train_value.fit(settings, tmp_path, coins[1], None, rows, rows, lambda value_BT: {})
    assert list(map(len, batches)) == [3, 3, 2] * 2
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second and list(range(8)) not in (first, second)


def test_columns_of_all_rows_stand_where_the_rows_do(coins):
    policy, _, _ = coins
    policy.weight.data = torch.tensor([math.log(3), 0.0])  # π = ¾, ¼
    rows = rows_of([B, B, B], [A], [B, A])
    for tokens in (1, 100):
        logp_BT, _ = model.all_logprobs(policy, rows, 1.0, tokens)
        expected = [[1 / 4, 1 / 4, 1 / 4], [3 / 4, 1, 1], [1 / 4, 3 / 4, 1]]
        torch.testing.assert_close(logp_BT.exp(), torch.tensor(expected))


def test_the_first_ratio_is_one_at_the_temperature_of_the_sampler(coins):
    policy, critic, _ = coins
    policy.weight.data = torch.tensor([math.log(9), 0.0])  # π = 9 : 1, at T = 2 3 : 1
    rows = rows_of([A, B])
    train_vapo.score(policy, critic, rows, replace(SETTINGS, temperature=2.0))
    assert rows["old_logp_BT"].exp().tolist() == [near(3 / 4, 1 / 4)]
    assert rows["old_value_BT"].tolist() == [[0.5, 0.5]]


def test_the_nll_is_over_the_tokens_of_all_right_answers(train):
    """Both are right, so GRPO's advantages are 0. Three tokens, A, A and B, each in ⅓ of the mean,
    whatever micro-batch they are in: ⅓ (½ + ½ − ½) = 1/6, times μ = 0.2."""
    _, numbers = train([[A], [A, B]], replace(SETTINGS, steps=1, critic_free=True))
    assert numbers["nll_loss"] == pytest.approx(math.log(2))
    assert numbers["policy_grad_norm"] == pytest.approx(0.2 / 6 * math.sqrt(2))


def test_lambda_follows_the_length_of_the_answer_and_not_that_of_the_table():
    rows = rows_of([A, B], [B, B, B, B])
    mask_BT = table.response_mask(rows)
    rows |= {"old_logp_BT": math.log(0.5) * mask_BT, "old_value_BT": 0.5 * mask_BT}
    train_vapo.advantages(rows, SETTINGS)
    assert rows["lam_B"].tolist() == [1 / 2, 3 / 4]  # 1 − 1/l
    # δ is ±½ at the last token, and 0 before
    expected = [[1 / 4, 1 / 2, 0, 0], [-27 / 128, -9 / 32, -3 / 8, -1 / 2]]
    torch.testing.assert_close(rows["adv_BT"], torch.tensor(expected))
    assert rows["target_BT"].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]


def test_the_sampler_gets_the_policy_of_every_rollouts_last_step(coins, train, monkeypatch):
    given = []
    follow = lambda sampler, policy: given.append(policy.weight[0].item())  # noqa: E731
    monkeypatch.setattr(loading, "update_sampler", follow)
    train([[A], [B, B]], SETTINGS)
    assert given == near(3.005, 3.015)


def test_every_purpose_has_random_numbers_of_its_own_from_the_seed(train, monkeypatch):
    made, seeded_generator = [], train_vapo.seeded_generator

    def spy(*arguments):
        generator = seeded_generator(*arguments)
        made.append(generator.initial_seed())
        return generator

    monkeypatch.setattr(train_vapo, "seeded_generator", spy)
    for seed in (1, 2):
        train([[A], [B, B]], replace(SETTINGS, steps=0, seed=seed))
    assert len(set(made)) == 6  # order, sampling and mini-batches of two seeds


def test_advantages_of_groups_and_importance_by_hand():
    """GRPO: Â = (R − mean) / std in the group of two: ±1, or 0. With π_old = 0.45 the importance
    is 0.45 / 0.25 for A and 0.45 / 0.5 for B; where the two differ by rounding it is not used."""
    rows = rows_of([A], [B, B], [A], [A])
    own = {"prompts": 2, "samples": 2, "mini_batch": 4, "is_clip": None, "critic_free": True}
    exact = rows["sampled_logp_BT"] + 1e-5
    other = math.log(0.45) * table.response_mask(rows)
    for rows["old_logp_BT"], weights in ((exact, [1, 1]), (other, [1.8, 0.9])):
        train_vapo.advantages(rows, replace(SETTINGS, **own))
        assert rows["adv_BT"].tolist() == [[1, 0], [-1, -1], [0, 0], [0, 0]]
        a, b = weights
        expected = torch.tensor([[a, 0], [b, b], [a, 0], [a, 0]])
        near = {"rtol": 0 if a == 1 else 1e-6, "atol": 0, "check_dtype": False}
        torch.testing.assert_close(rows["importance_BT"], expected, **near)
