"""What no real data set offers: in the embedded world the truth is known at every token of an answer.

So it is known how well any critic could do (`best_values`), up to a small error of counting, and where the first slip
that nobody took back is, which a critic should find (`step_drops`, `auc`).

Shapes: B rows as in rollout.py, T response tokens, N worked steps of all rows together.
"""

import json
import math
from pathlib import Path

import torch

from gae import explained_variance
from table import response_mask, take
from toy import ANSWER, LETTERS, REDO


def trace(step, letter, steps, tokens):
    """What is true before each token of an answer: a list of (phase, on_track, left), one per token.

    phase: "work" (a letter or #### comes next), "right" / "wrong" (a letter stands that is / is not the true next one),
    "redo" (after the mark), "answer" (after ####), "said right" / "said wrong", "odd" (nothing a demonstration does).
    on_track: the last counted letter is the true one; once it is False only a second, lucky slip helps. left: steps
    to go after the last counted letter.
    """
    truth = [letter]
    for _ in range(steps):
        truth.append(step[truth[-1]])
    phase, current, left, written, states = "work", letter, steps, None, []
    for token in tokens:
        states.append((phase, current == truth[steps - left], left))
        if phase in ("work", "redo") and token in LETTERS and left > 0:
            phase, written = ("right" if token == truth[steps - left + 1] else "wrong"), token
        elif phase in ("right", "wrong") and token == str(left - 1):
            phase, current, left = "work", written, left - 1
        elif phase in ("right", "wrong") and token == REDO:
            phase = "redo"
        elif phase == "work" and token == ANSWER:
            phase = "answer"
        elif phase == "answer" and token in LETTERS:
            phase = "said right" if token == truth[steps] else "said wrong"
        else:
            phase = "odd"
    return states


def traces(world_dir, problems, tokenizer, rows):
    """Yields the `trace` of each row."""
    step = json.loads((Path(world_dir) / "world.json").read_text())["map"]
    columns = zip(*(rows[name].tolist() for name in ("problem_B", "token_BL", "prompt_length_B", "length_B")))
    for index, token_L, start, length in columns:
        problem = problems[index]["problem"]
        yield trace(step, problem[0], int(problem[1:]), tokenizer.convert_ids_to_tokens(token_L[start : start + length]))


def best_values(world_dir, problems, tokenizer, fit_rows, rows, pool=1):
    """An estimate of the best possible critic's value_BT for `rows`: P(correct | what is true so far).

    A critic that reads the text perfectly knows the phase, whether the answer is still on track, and the steps left. Given
    these, the rest of the text says little (the policy slips a bit more at some letters than at others), so the mean
    outcome of the answers in `fit_rows` that share them is close to what no critic can beat. States seen seldom are
    drawn towards the mean over all `left`, with the weight of two answers. `pool`: so many numbers of steps left count as one,
    which estimates less noisily from few rows.
    """
    sums, rewards = {}, fit_rows["reward_B"].tolist()
    for row_states, reward in zip(traces(world_dir, problems, tokenizer, fit_rows), rewards):
        for phase, on_track, left in row_states:
            for state in ((phase, on_track, left // pool), (phase, on_track)):
                total, count = sums.get(state, (0.0, 0))
                sums[state] = (total + reward, count + 1)
    overall = sum(rewards) / len(rewards)
    value_BT = torch.zeros(len(rows["length_B"]), int(rows["length_B"].max()))
    for i, row_states in enumerate(traces(world_dir, problems, tokenizer, rows)):
        for t, (phase, on_track, left) in enumerate(row_states):
            total, count = sums.get((phase, on_track), (0.0, 0))
            prior = total / count if count else overall
            total, count = sums.get((phase, on_track, left // pool), (0.0, 0))
            value_BT[i, t] = (total + 2 * prior) / (count + 2)
    return value_BT


def step_drops(world_dir, problems, tokenizer, rows, value_BT):
    """How far V falls over each worked step that starts on track: (drop_N, slip_N), N such steps in all rows.

    drop = V before the step's letter − V after its number, when nobody can take the letter back any more.
    slip, bool: the step left the track, which is the first uncorrected slip of its answer.
    """
    drops, slips = [], []
    for value_T, states in zip(value_BT.tolist(), traces(world_dir, problems, tokenizer, rows)):
        for t in range(len(states) - 2):
            (phase, on_track, left), (next_phase, still, next_left) = states[t], states[t + 2]
            if phase in ("work", "redo") and on_track and next_phase == "work" and next_left == left - 1:
                drops.append(value_T[t] - value_T[t + 2])
                slips.append(not still)
    return torch.tensor(drops), torch.tensor(slips, dtype=torch.bool)


def auc(score_N, positive_N):
    """P(a positive scores higher than a negative) + ½ P(they tie), over all pairs; NaN if there is none of either."""
    positive, negative = score_N[positive_N], score_N[~positive_N].sort().values
    if not len(positive) or not len(negative):
        return math.nan
    below, not_above = torch.searchsorted(negative, positive), torch.searchsorted(negative, positive, right=True)
    return ((below + not_above).double().mean() / (2 * len(negative))).item()


def score_critic(world_dir, problems, tokenizer, rows, value_BT):
    """How much of the truth a critic's value_BT on judged rows has found: a dict of

    slip_auc: how surely the first uncorrected slip is told from a right step by the fall of V (1: always, ½: by chance);
    best_explained_variance: of the best possible critic on the same rows, its counts made on the other half of the answers.
        With a few hundred answers it comes out too low (0.33 for 0.39 with 256 answers of 60 tokens).
    """
    drop_N, slip_N = step_drops(world_dir, problems, tokenizer, rows, value_BT)
    best_BT = torch.zeros_like(value_BT, device="cpu")
    halves = [torch.arange(start, len(best_BT), 2, device=value_BT.device) for start in (0, 1)]
    if len(best_BT) > 1:
        for half, other in (halves, halves[::-1]):
            part_BT = best_values(world_dir, problems, tokenizer, take(rows, other), take(rows, half), pool=8)
            best_BT[half.cpu(), : part_BT.shape[1]] = part_BT
    mask_BT = response_mask(rows).cpu()
    target_BT = rows["reward_B"].cpu()[:, None] * mask_BT
    best = explained_variance(best_BT, target_BT, mask_BT).item()
    return {"slip_auc": auc(drop_N, slip_N), "best_explained_variance": best}
