"""Losses (policy, value, positive-example NLL) and the weights that turn them into one number.

Every loss here is unreduced, [B, T]. A loss becomes a number only as `(loss_BT * weight_BT).sum()`.
The weights are computed once over the whole optimiser mini-batch and then cut into micro-batches
like any other column. So no denominator can depend on the split. The negative signs are inside:
all losses are to be minimised.

Shapes: B rows, T response tokens.
"""

import torch

LOG_RATIO_LIMIT = 20.0  # e^20: far beyond any clip, and still finite where padding holds nonsense


def ratio(logp_BT, old_logp_BT):
    """r_t = π(a_t|s_t) / π_old(a_t|s_t) from log-probs; log r is limited to ±20, so r is finite."""
    return (logp_BT - old_logp_BT).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def policy_loss(logp_BT, old_logp_BT, adv_BT, eps_low, eps_high):
    """Clip-higher: PPO's surrogate with two clip ranges (arXiv 2504.05118 §4.3; 2503.14476 §3.1).

    loss_t = −min(r_t Â_t, clip(r_t, 1 − ε_low, 1 + ε_high) Â_t)

    ε_low = ε_high is PPO (arXiv 1707.06347 eq. 7). The paper: 0.2 and 0.28.

    Returns: loss_BT. Its gradient is 0 where r > 1 + ε_high, Â > 0 and where r < 1 − ε_low, Â < 0.
    """
    ratio_BT = ratio(logp_BT, old_logp_BT)
    return -torch.minimum(ratio_BT * adv_BT, ratio_BT.clamp(1 - eps_low, 1 + eps_high) * adv_BT)


def importance_weight(old_logp_BT, sampled_logp_BT, cap=None):
    """Truncated importance weight of a sampled token (IMPALA, arXiv 1802.01561 §4.1).

    w_t = min(π_old(a_t|s_t) / π_sampler(a_t|s_t), C)

    The sampler's distribution differs slightly from training's (another kernel, another precision).
    The weight multiplies the policy loss of the token; without a cap all weights are 1.
    """
    if cap is None:
        return torch.ones_like(old_logp_BT)
    return ratio(old_logp_BT, sampled_logp_BT).clamp(max=cap)


def value_loss(value_BT, target_BT):
    """loss_BT = ½ (V_t − target_t)²; the papers give no form, this one is ours."""
    return 0.5 * (value_BT - target_BT) ** 2


def nll_loss(logp_BT):
    """−log π(a_t|s_t), imitation loss of positive examples (arXiv 2504.05118 §4.3), as loss_BT.

    L_NLL = −(1/Σ_{o∈T} |o|) Σ_{o∈T} Σ_t log π(a_t|s_t),   T = the correct answers
    L = L_PPO + μ L_NLL

    The sum over T and its denominator are `token_weights(mask_BT * correct_B[:, None], "token")`.
    """
    return -logp_BT


def token_weights(mask_BT, how):
    """Weights that sum to one over the optimiser mini-batch: call it on all of that, then slice.

    how = "token":  w = 1 / Σ_i |o_i|                     every token counts the same
    how = "sample": w = 1 / (number of answers · |o_i|)   every answer counts the same

    "token" is the paper's (arXiv 2504.05118 §4.2), "sample" GRPO's and PPO's usual mean.
    Returns: weight_BT float32, 0 off the mask; all 0 where the mask is empty (no correct answer:
    NLL is 0, not NaN). Empty rows do not count as answers. Raises: ValueError for another `how`.
    """
    mask_BT = mask_BT.float()
    length_B1 = mask_BT.sum(dim=1, keepdim=True)
    if how == "token":
        return mask_BT / length_B1.sum().clamp(min=1)
    if how == "sample":
        return mask_BT / length_B1.clamp(min=1) / (length_B1 > 0).sum().clamp(min=1)
    raise ValueError(f'how must be "token" or "sample", not {how!r}')


@torch.no_grad()
def ratio_metrics(logp_BT, old_logp_BT, adv_BT, mask_BT, eps_low, eps_high):
    """What the ratio did, as sums over tokens (and one maximum), so that micro-batches add up.

    clip_high: tokens whose gradient the upper clip removed (Â > 0, r > 1 + ε_high);
    clip_low: likewise below;
    approx_kl: Σ (r − 1 − log r), the k3 estimate of KL(π_old ‖ π), in nats.

    Returns: dict of scalar tensors: clip_high, clip_low, approx_kl (sums) and ratio_max.
    """
    on_BT = mask_BT.bool()
    ratio_BT = torch.where(on_BT, ratio(logp_BT, old_logp_BT), 1.0)
    return {
        "clip_high": (on_BT & (adv_BT > 0) & (ratio_BT > 1 + eps_high)).sum(),
        "clip_low": (on_BT & (adv_BT < 0) & (ratio_BT < 1 - eps_low)).sum(),
        "approx_kl": (ratio_BT - 1 - ratio_BT.log()).sum(),
        "ratio_max": ratio_BT.max(),
    }
