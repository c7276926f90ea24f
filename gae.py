"""Advantages: terminal reward, GAE, length-adaptive and decoupled GAE, explained variance.

Shapes: B rows, T response tokens; row i has `length_B[i]` tokens, then padding. `mask_BT` is 1 on
the tokens of the response and 0 on the padding after them. γ is 1 in the papers.
"""

import torch


def terminal_reward(reward_B, length_B, width):
    """Puts the outcome of each answer on its last token.

    r_t = R if t = |o| − 1 else 0                                          (arXiv 2504.05118 §2.1)

    Args: reward_B, the outcomes R; length_B, response tokens |o|; width, the number of columns T.
    Returns: reward_BT float32. A row of length 0 gets no reward.
    """
    assert int(length_B.max()) <= width, "a row is longer than the table"
    t_T = torch.arange(width, device=reward_B.device)
    return torch.where(t_T == length_B[:, None] - 1, reward_B[:, None].float(), 0.0)


def gae(reward_BT, value_BT, mask_BT, lam, gamma=1.0):
    """Generalised advantage estimation (arXiv 1506.02438 eq. 16).

    δ_t = r_t + γ V(s_{t+1}) − V(s_t),    V after the last token = 0 (also if cut at the limit)
    Â_t = Σ_l (γλ)^l δ_{t+l} = δ_t + γλ Â_{t+1}

    Args: reward_BT, value_BT and mask_BT as above, V_t being the value of the state before token t;
        lam, a float or a [B] tensor (one λ a row).
    Returns: adv_BT, 0 on padding even if that holds NaN; float32, or float64 for float64 values.
    Raises: AssertionError if the shapes differ, or if a row's mask is not ones followed by zeros.
    """
    shapes = {reward_BT.shape, value_BT.shape, mask_BT.shape}
    assert len(shapes) == 1, "reward, value and mask must have one shape [B, T]"
    on_BT = mask_BT.bool()
    assert (on_BT[:, 1:] <= on_BT[:, :-1]).all(), "mask must be ones followed by zeros in every row"
    dtype = torch.promote_types(value_BT.dtype, torch.float32)
    reward_BT, value_BT = reward_BT.to(dtype), value_BT.to(dtype)
    lam_B = torch.as_tensor(lam, dtype=dtype, device=value_BT.device).expand(len(value_BT))
    delta_BT = reward_BT - value_BT
    delta_BT[:, :-1] += gamma * torch.where(on_BT[:, 1:], value_BT[:, 1:], 0)
    return discounted_sums(torch.where(on_BT, delta_BT, 0), gamma * lam_B)


def discounted_sums(delta_BT, decay_B):
    """Σ_l decay^l δ_{t+l} at every t, one decay a row, in log₂ T passes instead of T steps.

    S_{2s}(t) = S_s(t) + decay^s S_s(t + s),    s = 1, 2, 4, …

    Column t holds S_s(t), the sum over s columns from t on.
    """
    sum_BT, decay_B1, span = delta_BT.clone(), decay_B[:, None], 1
    while span < delta_BT.shape[1]:
        sum_BT[:, :-span] += decay_B1 * sum_BT[:, span:]
        decay_B1, span = decay_B1**2, 2 * span
    return sum_BT


def length_adaptive_lambda(length_B, alpha):
    """One λ per answer: the sum of its weights grows with the answer (arXiv 2504.05118 §4.2).

    Σ_t λ^t ≈ 1/(1 − λ) = α l    ⇒    λ = 1 − 1/(α l)

    The outcome reaches the first token with weight ≈ exp(−1/α), whatever the length. Below
    l = 1/α the formula is negative: clamped to 0. Clamped below 1 too, which only a rounding error
    could reach.

    Args: length_B, response tokens l of each row; alpha > 0 (0.05 in the paper).
    Returns: lam_B float32 in [0, 1).
    """
    assert alpha > 0, "alpha must be positive"
    lam_B = 1.0 - 1.0 / (alpha * length_B.float().clamp(min=1))
    return lam_B.clamp(0.0, 1.0 - 2**-24)


def decoupled_gae(reward_BT, value_BT, mask_BT, lam_policy, lam_critic, gamma=1.0):
    """Advantages with λ_policy, value targets with λ_critic (arXiv 2503.01491; 2504.05118 §4.1).

    Â_t = Σ_l (γ λ_policy)^l δ_{t+l},    target_t = V(s_t) + Σ_l (γ λ_critic)^l δ_{t+l}

    With λ_critic = 1 and γ = 1 the target is the outcome itself at every token: no bias from V.

    Args: as in `gae`; each λ a float or a [B] tensor.
    Returns: (adv_BT, target_BT), both 0 on padding.
    """
    adv_BT = gae(reward_BT, value_BT, mask_BT, lam_policy, gamma)
    critic_adv_BT = gae(reward_BT, value_BT, mask_BT, lam_critic, gamma)
    return adv_BT, torch.where(mask_BT.bool(), critic_adv_BT + value_BT, 0.0)


def explained_variance(value_BT, target_BT, mask_BT):
    """How much of the targets' variance the critic predicts (arXiv 2503.01491).

    EV = 1 − Var[target − V] / Var[target], over the tokens of the mask

    Returns: a scalar tensor: 1 is a perfect critic, 0 a constant one. NaN where the targets do not
        vary (every answer right, or every answer wrong).
    """
    on_BT = mask_BT.bool()
    target_N, value_N = target_BT[on_BT].double(), value_BT[on_BT].double()
    variance = target_N.var(correction=0) if target_N.numel() else 0.0
    if variance == 0:
        return torch.tensor(float("nan"), dtype=torch.float64)
    return 1.0 - (target_N - value_N).var(correction=0) / variance
