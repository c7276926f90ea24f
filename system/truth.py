"""What is true in the embedded world (toy.py) at every token of an answer; only bookkeeping.

Shapes: B rows as in table.py, T response tokens, N worked steps of all rows together.
"""

import json
import math
from pathlib import Path

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ANSWER, REDO = "####", ";"


def trace(step, letter, steps, tokens):
    """What is true before each token of an answer: a list of (phase, on_track, left).
    phase: "work" (a letter or #### comes next), "right" / "wrong" (after a letter that is / is not
    the true one), "redo" (after the mark), "answer" (after ####), "said right" / "said wrong",
    "odd" (nothing a demonstration does). on_track: the last counted letter is the true one. left:
    steps to go after it."""
    truth = [letter]
    for _ in range(steps):
        truth.append(step[truth[-1]])
    phase, current, left, written, states = "work", letter, steps, None, []
    for token in tokens:
        states.append((phase, current == truth[steps - left], left))
        if phase in ("work", "redo") and token in LETTERS and left > 0:
            phase = "right" if token == truth[steps - left + 1] else "wrong"
            written = token
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
    names = ("problem_B", "token_BL", "prompt_length_B", "length_B")
    for index, token_L, start, length in zip(*(rows[name].tolist() for name in names)):
        problem = problems[index]["problem"]
        tokens = tokenizer.convert_ids_to_tokens(token_L[start : start + length])
        yield trace(step, problem[0], int(problem[1:]), tokens)


def best_values(world_dir, problems, tokenizer, fit_rows, rows, pool=1):
    """An estimate of the best possible critic's value_BT for `rows`: P(correct | what is true).
    A critic that reads the text perfectly knows phase, track, and steps left. Given these, the rest
    of the text says little (the policy slips a bit more at some letters than at others), so the
    mean outcome of the answers in `fit_rows` that share them is close to what no critic can beat.
    States seen seldom are drawn towards the mean over all `left`, with the weight of two answers.
    `pool`: so many numbers of steps left count as one, which is less noisy with few rows."""
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
    """How far V falls over each worked step that starts on track: (drop_N, slip_N).
    drop = V before the step's letter − V after its number, when the letter cannot be taken back.
    slip, bool: the step left the track, which is the first uncorrected slip of its answer."""
    drops, slips = [], []
    for value_T, states in zip(value_BT.tolist(), traces(world_dir, problems, tokenizer, rows)):
        for t in range(len(states) - 2):
            (phase, on_track, left), (next_phase, still, next_left) = states[t], states[t + 2]
            stepped = next_phase == "work" and next_left == left - 1
            if phase in ("work", "redo") and on_track and stepped:
                drops.append(value_T[t] - value_T[t + 2])
                slips.append(not still)
    return torch.tensor(drops), torch.tensor(slips, dtype=torch.bool)


def auc(score_N, positive_N):
    """P(a positive scores higher than a negative) + ½ P(they tie), over all pairs, or NaN."""
    positive, negative = score_N[positive_N], score_N[~positive_N].sort().values
    if not len(positive) or not len(negative):
        return math.nan
    below = torch.searchsorted(negative, positive)
    not_above = torch.searchsorted(negative, positive, right=True)
    return ((below + not_above).double().mean() / (2 * len(negative))).item()
