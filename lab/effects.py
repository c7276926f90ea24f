"""What each of the seven pieces does: effects and interactions, from the cube of `ablate.py`.

A run is a combination of the pieces, bits b_1 … b_7, with a response y: its final accuracy, or the
mean accuracy of its training. The sign of a set W of pieces in a run, x_W = Π_{i in W} (2 b_i − 1),
is 1 or −1. Over all 128 combinations the signs of two sets are orthogonal, so

    effect of W   e_W = mean of y where x_W = 1 − mean of y where x_W = −1

is what least squares finds: y = mean + ½ Σ_W x_W e_W. A set of one piece is its main effect, of two
an interaction (how much more the one does beside the other, halved).

Shapes: N runs, W sets, smallest first (the empty one is none of them).
"""

from itertools import combinations
from math import comb, nan, sqrt

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
    both = [run for run in dict.fromkeys(bits) if {(run, 0), (run, 1)} <= of.keys()]
    d = [of[run, 0] - of[run, 1] for run in both]
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
    ones = [np.equal(block, b) for b in sorted(set(block))]
    x_NW = np.column_stack([signs(bits, sets) / 2, *ones])
    inverse_WN = np.linalg.pinv(x_NW)
    coefficient_W, free = inverse_WN @ y, len(y) - np.linalg.matrix_rank(x_NW)
    residual = np.array(y) - x_NW @ coefficient_W
    sigma = sqrt(residual @ residual / free) if free > 0 else nan
    unit_W = np.sqrt((inverse_WN**2).sum(1))
    return dict(zip(sets, coefficient_W)), dict(zip(sets, unit_W)), (sigma, free)


def half_width(unit, error):
    """Of a 95% interval: t · σ · unit, `unit` being the standard error for σ = 1."""
    from scipy import stats

    sigma, free = error
    return stats.t.ppf(0.975, free) * sigma * unit if free else nan


def shapley(value):
    """Shapley's values: φ_i = Σ_{S without i} |S|! (6 − |S|)! / 7! · (v(S with i) − v(S)). They sum
    to v(all) − v(none). Args: value, {bits: v}. NaN unless all 128 combinations are there."""
    found = []
    for i in range(7):
        pairs = [(bits, bits[:i] + "1" + bits[i + 1 :]) for bits in value if bits[i] == "0"]
        gains = ((value.get(more, nan) - value[bits]) / comb(6, bits.count("1")) / 7
                 for bits, more in pairs)  # fmt: skip
        found.append(sum(gains) if len(value) == 128 else nan)
    return found


def corners(value):
    """([VAPO − VAPO without piece i], [PPO with piece i alone − PPO]); NaN where a run lacks."""

    def bits(i, inside):
        return "".join(inside if j == i else "10"[inside == "1"] for j in range(7))

    at = {run: value.get(run, nan) for run in ["1" * 7, "0" * 7]}
    without = [at["1" * 7] - value.get(bits(i, "0"), nan) for i in range(7)]
    return without, [value.get(bits(i, "1"), nan) - at["0" * 7] for i in range(7)]


def collapse(accuracies):
    """The first rollout, counted from 1, whose accuracy is below half of the best before; or 0."""
    for step, accuracy in enumerate(accuracies, 1):
        if accuracy < 0.5 * max(accuracies[: step - 1], default=0):
            return step
    return 0
