"""One rollout to gradients: old log-probs and values, advantages and targets, weights, and the three losses backward.

Which of VAPO's pieces (arXiv 2504.05118) take part is the settings' word; the equations are in gae.py, losses.py and dapo.py.
The order is that of a batch's way: `old_logprobs_and_values`, `compute_advantages`, then `add_weights` and `backward` for each
optimiser mini-batch. Shapes: B rows as in rollout.py, T response tokens. `settings`: those of train_vapo.py.
"""

import torch

import dapo
import distributed
import gae
import losses
import model
import table


@torch.no_grad()
def old_logprobs_and_values(policy, critic, rows, settings, kernels):
    """Adds old_logp_BT, entropy_BT and, with a critic, old_value_BT, from the same code as training: the first ratio is 1."""
    for name in ("old_logp_BT", "entropy_BT"):
        rows[name] = torch.zeros_like(rows["sampled_logp_BT"])
    for index in distributed.deal(table.micro_batches(rows, 4 * settings.micro_batch_tokens)):
        part = table.take(rows, index)
        width = int(part["length_B"].max())
        logp_BT, entropy_BT = model.policy_logprobs(policy, part, settings.temperature, kernels.logprobs)
        rows["old_logp_BT"][index, :width], rows["entropy_BT"][index, :width] = logp_BT, entropy_BT
    distributed.add_up(rows["old_logp_BT"], rows["entropy_BT"])
    if critic:
        rows["old_value_BT"] = table.values(critic, rows, 4 * settings.micro_batch_tokens)
    return rows


def compute_advantages(rows, settings):
    """Adds importance_BT, adv_BT and, where there is a critic, reward_BT, lam_B and target_BT to rows; returns the rows.

    Decoupled and length-adaptive GAE: VAPO §4.1, §4.2. Without a critic: the group-relative advantage of arXiv 2402.03300 §4.1.
    """
    mask_BT = table.response_mask(rows)
    cap = settings.is_clip if settings.is_clip is not None else 2.0 * (settings.engine == "vllm")
    rows["importance_BT"] = losses.importance_weight(rows["old_logp_BT"], rows["sampled_logp_BT"], cap or None) * mask_BT
    if settings.critic_free:
        rows["adv_BT"] = dapo.group_advantage(rows["reward_B"], settings.samples)[:, None] * mask_BT
        return rows
    rows["reward_BT"] = gae.terminal_reward(rows["reward_B"], rows["length_B"], mask_BT.shape[1])
    if settings.length_adaptive_gae:  # piece 3
        lam_B = gae.length_adaptive_lambda(rows["length_B"], settings.alpha)
    else:
        lam_B = torch.full_like(rows["reward_B"], settings.lam_policy)
    lam_critic = settings.lam_critic if settings.decoupled_gae else lam_B  # piece 2
    rows["lam_B"] = lam_B
    rows["adv_BT"], rows["target_BT"] = gae.decoupled_gae(
        rows["reward_BT"], rows["old_value_BT"], mask_BT, lam_policy=lam_B, lam_critic=lam_critic
    )
    if settings.whiten:
        rows["adv_BT"] = gae.whiten(rows["adv_BT"], mask_BT)
    return rows


def add_weights(batch, settings):
    """Adds the weights of the three losses to the rows of one optimiser mini-batch; returns the batch.

    policy_weight_BT, critic_weight_BT, nll_weight_BT (VAPO §4.2, §4.3): each sums to one over the whole mini-batch, so they must be made before it is split into micro-batches.
    """
    mask_BT = table.response_mask(batch)
    batch["policy_weight_BT"] = losses.token_weights(mask_BT, "token" if settings.token_level_loss else "sample")  # piece 4
    batch["critic_weight_BT"] = losses.token_weights(mask_BT, "token")
    batch["nll_weight_BT"] = losses.token_weights(mask_BT * batch["correct_B"][:, None], "token")  # piece 6
    return batch


def backward(policy, critic, batch, settings, kernels):
    """Accumulates the models' gradients over one mini-batch with weights; returns its metrics (sums over the split)."""
    eps_high = settings.eps_high if settings.clip_higher else settings.eps_low  # piece 5
    mu = settings.mu if settings.positive_nll else 0.0  # piece 6
    sums = {"policy_loss": 0.0, "nll_loss": 0.0} | ({"value_loss": 0.0} if critic else {})
    sums |= {"clip_low": 0.0, "clip_high": 0.0, "approx_kl": 0.0, "whole": 0, "ratio_max": 0.0}
    for index in distributed.deal(table.micro_batches(batch, settings.micro_batch_tokens)):
        micro = table.take(batch, index)
        mask_BT = table.response_mask(micro)
        sums["whole"] += micro["token_BL"].numel()

        if critic:
            value_BT = model.critic_values(critic, micro)
            value_clip = settings.value_clip or None
            value_loss_BT = kernels.value_loss(value_BT, micro["target_BT"], micro["old_value_BT"], value_clip)
            value_loss = (value_loss_BT * micro["critic_weight_BT"]).sum()
            value_loss.backward()
            sums["value_loss"] += value_loss.item()

        logp_BT, _ = model.policy_logprobs(policy, micro, settings.temperature, kernels.logprobs)
        policy_loss_BT = kernels.policy_loss(logp_BT, micro["old_logp_BT"], micro["adv_BT"], settings.eps_low, eps_high)
        policy_loss = (policy_loss_BT * micro["policy_weight_BT"] * micro["importance_BT"]).sum()
        nll_loss = (losses.nll_loss(logp_BT) * micro["nll_weight_BT"]).sum()
        (policy_loss + mu * nll_loss).backward()

        sums["policy_loss"] += policy_loss.item()
        sums["nll_loss"] += nll_loss.item()
        ratios = losses.ratio_metrics(logp_BT, micro["old_logp_BT"], micro["adv_BT"], mask_BT, settings.eps_low, eps_high)
        sums["ratio_max"] = max(sums["ratio_max"], ratios.pop("ratio_max").item())
        for name, total in ratios.items():
            sums[name] += total.item()
    sums, tokens = distributed.add_numbers(sums), int(batch["length_B"].sum())
    sums["padding"] = 1 - (tokens + int(batch["prompt_length_B"].sum())) / sums.pop("whole")
    return sums | {name: sums[name] / tokens for name in ("clip_low", "clip_high", "approx_kl")}
