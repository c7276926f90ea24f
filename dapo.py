"""The critic-free GRPO and DAPO: group advantage, dynamic sampling, soft overlong punishment.

These are VAPO's rivals. They need no critic: an answer is compared with the other answers to its
problem (arXiv 2402.03300, 2503.14476). The rest of DAPO is VAPO's own: clip-higher and the
token-level loss (losses.py), group sampling (rollout.py).

Shapes: P prompts with G samples each, B = P·G rows, the samples of one prompt side by side.
"""

import torch


def group_advantage(reward_B, samples):
    """How much better an answer is than its group (arXiv 2402.03300 §4.1; 2503.14476 eq. 9).

    Â_i = (R_i − mean(R_1 … R_G)) / std(R_1 … R_G),    std² = mean((R − mean)²)

    Args: reward_B; samples, G.
    Returns: adv_B float32, one for all tokens of an answer; 0 in a group whose rewards are all
        equal, from which nothing can be learned.
    Raises: AssertionError if the rows are no whole groups.
    """
    assert len(reward_B) % samples == 0, f"{len(reward_B)} rows are no groups of {samples}"
    reward_PG = reward_B.float().view(-1, samples)
    centred_PG = reward_PG - reward_PG.mean(dim=1, keepdim=True)
    std_P1 = reward_PG.std(dim=1, keepdim=True, correction=0)
    return torch.where(std_P1 > 1e-6, centred_PG / std_P1.clamp(min=1e-6), 0.0).flatten()


def mixed_groups(correct_B, samples):
    """Dynamic sampling keeps groups with 0 < correct answers < G (arXiv 2503.14476 §3.2, eq. 11).

    By the verdict, never by a reward: a punished length makes rewards differ where verdicts do not.

    Args: correct_B, bool; samples, G.    Returns: keep_B, bool, the same for all rows of a group.
    """
    right_P = correct_B.view(-1, samples).sum(dim=1)
    return ((right_P > 0) & (right_P < samples)).repeat_interleave(samples)


def overlong_punishment(length_B, longest, cache):
    """Soft overlong punishment, added to the reward (arXiv 2503.14476 §3.4, eq. 13).

    0                                   if |y| ≤ L_max − L_cache
    ((L_max − L_cache) − |y|) / L_cache  if L_max − L_cache < |y| ≤ L_max
    −1                                  if L_max < |y|

    Args: length_B, response tokens |y|; longest, L_max; cache, L_cache, both in tokens,
        0 < L_cache ≤ L_max.
    """
    assert 0 < cache <= longest, "the cache is a part of the longest answer"
    return ((longest - cache - length_B.float()) / cache).clamp(-1.0, 0.0)
