"""What each of the seven pieces does: effects and interactions, from the cube of `ablate.py`.

A run is a combination of the pieces, bits b_1 … b_7, with a response y: its final accuracy, or the
mean accuracy of its training. The sign of a set W of pieces in a run, x_W = Π_{i in W} (2 b_i − 1),
is 1 or −1. Over all 128 combinations the signs of two sets are orthogonal, so

    effect of W   e_W = mean of y where x_W = 1 − mean of y where x_W = −1

is what least squares finds: y = mean + ½ Σ_W x_W e_W. A set of one piece is its main effect, of two
an interaction (how much more the one does beside the other, halved).

Shapes: N runs, W sets, smallest first (the empty one is none of them).
"""

from collections import defaultdict
from itertools import accumulate, combinations
from math import comb, hypot, nan, sqrt

import numpy as np

SETS = [set_ for size in range(1, 8) for set_ in combinations(range(7), size)]


def signs(bits, sets):
    """x_NW of runs, strings like "1111111"."""
    sign_N7 = np.array([[2 * int(bit) - 1 for bit in run] for run in bits])
    return np.stack([sign_N7[:, list(set_)].prod(1) for set_ in sets], 1)


def error_of_replicates(bits, block, y):
    """(σ, degrees of freedom) of one run, from the combinations that were run in two blocks.
    d = y in one block − y in the other; σ² = Σ (d − mean of d)² / (2 (n − 1))."""
    of = dict(zip(zip(bits, block), y))
    d = [y_0 - of[run, 1] for (run, b), y_0 in of.items() if b == 0 and (run, 1) in of]
    n = len(d)
    return (sqrt(np.var(d, ddof=1) / 2), n - 1) if n > 1 else (nan, 0)


def error_of_high_orders(bits, y):
    """(σ, degrees of freedom) of one run of a whole cube, if the 64 effects of four and more pieces
    are noise only: each has the variance 4 σ² / 128."""
    if len(set(bits)) < 128 or len(bits) > 128:
        return nan, 0
    high = [set_ for set_ in SETS if len(set_) >= 4]
    effect_W = signs(bits, high).T @ np.array(y) / 64
    return sqrt(np.mean(effect_W**2) * 128 / 4), len(high)


def effects(bits, block, y):
    """Main effects and, from 64 runs on, interactions of two, by least squares on the runs there.
    Args: block, 0 or 1 a run: its replicate, whose mean is a term of its own.
    Returns: ({set: effect}, {set: its standard error for σ = 1}, (σ, degrees of freedom) of the
    residual). In a fraction of the cube interactions that it cannot tell apart share their sum."""
    sets = [set_ for set_ in SETS if len(set_) <= (2 if len(bits) >= 64 else 1)]
    x_NW = np.column_stack([signs(bits, sets) / 2, *(np.equal(block, b) for b in set(block))])
    inverse_WN = np.linalg.pinv(x_NW)
    coefficient_W, free = inverse_WN @ y, len(y) - np.linalg.matrix_rank(x_NW)
    residual = np.array(y) - x_NW @ coefficient_W
    sigma = sqrt(residual @ residual / free) if free > 0 else nan
    unit_W = np.sqrt((inverse_WN**2).sum(1))
    return dict(zip(sets, coefficient_W)), dict(zip(sets, unit_W)), (sigma, free)


def between_blocks(bits, block, y):
    """By how much the seven main effects of block 1 exceed those of block 0, a fit each.
    Returns: [(difference, its standard error for σ = 1)]; NaN with fewer than 16 runs in one."""
    parts = [[run for run in zip(bits, block, y) if run[1] == b] for b in (0, 1)]
    if min(map(len, parts)) < 16:
        return [(nan, nan)] * 7
    (one, unit_one, _), (two, unit_two, _) = (effects(*zip(*part)) for part in parts)
    return [(two[i,] - one[i,], hypot(unit_one[i,], unit_two[i,])) for i in range(7)]


def half_width(unit, error):
    """Of a 95% interval: t · σ · unit, `unit` being the standard error for σ = 1."""
    from scipy import stats

    sigma, free = error
    return stats.t.ppf(0.975, free) * sigma * unit if free else nan


def shapley(value):
    """Shapley's values: φ_i = Σ_{S without i} |S|! (6 − |S|)! / 7! · (v(S with i) − v(S)). They sum
    to v(all) − v(none). Args: value, {bits: v}. NaN unless all 128 combinations are there."""
    if len(value) < 128:
        return [nan] * 7
    return [sum((value[bits[:i] + "1" + bits[i + 1 :]] - v) / comb(6, bits.count("1")) / 7
                for bits, v in value.items() if bits[i] == "0")
            for i in range(7)]  # fmt: skip


def corners(value):
    """([VAPO − VAPO without piece i], [PPO with piece i alone − PPO]); NaN where a run lacks."""
    at = defaultdict(lambda: nan, value)
    without = [at["1" * 7] - at["1" * i + "0" + "1" * (6 - i)] for i in range(7)]
    return without, [at["0" * i + "1" + "0" * (6 - i)] - at["0" * 7] for i in range(7)]


def collapse(accuracies):
    """The first rollout, counted from 1, whose accuracy is below half of the best before; or 0."""
    best = enumerate(zip(accuracies, accumulate(accuracies, max)), 1)
    return next((step for step, (accuracy, so_far) in best if accuracy < 0.5 * so_far), 0)
