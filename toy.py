"""The embedded world: a task of serial reasoning, its tokenizer, a tiny base model, and its truth.

    python toy.py                                   # writes runs/toy
    python toy.py --out runs/long --max_steps 120   # a longer world

A secret map sends each of 26 letters to another; it is one single cycle, so it is a bijection (an
error is never erased) and every number of steps up to 26 gives another answer. The problem `c17`
asks where 17 steps lead from c. The base model has learned from demonstrations that work aloud, one
letter and the number of steps left:

    c3:   k2q1z0####z          two tokens a step, then the answer
    c3:   k2a;q1z0####z        a slip (a), noticed and redone (; cancels the letter before it)
    c3:   k2a1f0####f          a slip that nobody noticed: all that follows is wrong
    c3:   ####m                a guess

so RL can do here what it does to a long chain of thought: take more care, correct more, stop
guessing (the answers grow longer). Numbers of steps are log-uniform, so that answers differ in
length by tens of times.

What no real data set offers: the truth is known at every token. So it is known how well any critic
could do (`best_values`), up to a small error of counting, and where the first slip that nobody took
back is, which a critic should find (`step_drops`, `auc`).

Shapes: B rows as in table.py, T response tokens, N worked steps of all rows together.
"""

import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from gae import explained_variance
from system import base_model, distributed, settings
from system.checkpoint import export
from system.run import exit_on_bad_input, require, write_json
from system.settings import AT_LEAST_1, POSITIVE, SHARE, flag
from table import response_mask, take

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ANSWER, REDO = "####", ";"


# fmt: off
@dataclass(frozen=True)
class World(settings.Settings):
    out: str = flag("runs/toy", "directory to write the world into")
    seed: int = flag(0, "seed of the map, the problems, the demonstrations and the model")
    min_steps: int = flag(2, "fewest steps in a problem", AT_LEAST_1)
    max_steps: int = flag(64, "most steps in a problem; steps are log-uniform", AT_LEAST_1)
    slip: float = flag(0.06, "share of demonstrated steps that slip to a wrong letter", SHARE)
    redo: float = flag(0.3, "share of slips that are noticed and redone", SHARE)
    guess: float = flag(0.3, "share of demonstrations that guess without working", SHARE)
    train_problems: int = flag(1024, "problems to train on", AT_LEAST_1)
    test_problems: int = flag(100, "held-out problems, distinct and not among those", AT_LEAST_1)
    layers: int = flag(3, "layers of the base model", AT_LEAST_1)
    width: int = flag(64, "hidden size of the base model", (
        "must be a multiple of 32, a head's width", lambda n: n > 0 and n % 32 == 0))
    updates: int = flag(400, "optimiser updates of the base model's training", AT_LEAST_1)
    update_rows: int = flag(64, "demonstrations per update", AT_LEAST_1)
    lr: float = flag(3e-3, "peak learning rate of the base model's training", POSITIVE)

    def check(self):
        super().check()
        require(self.min_steps <= self.max_steps, "--min_steps must be at most --max_steps")
        quarter = len(LETTERS) * (self.max_steps - self.min_steps + 1) // 4
        said = f"--test_problems must be at most a quarter of all problems, {quarter}"
        require(self.test_problems <= quarter, said)
# fmt: on


def secret_map(world):
    """The map as a dict letter → letter: one cycle through all letters, drawn from the seed."""
    order = random.Random(world.seed).sample(LETTERS, len(LETTERS))
    return dict(zip(order, order[1:] + order[:1]))


def apply_map(step, letter, times):
    for _ in range(times):
        letter = step[letter]
    return letter


def demonstrate(world, step, letter, steps, rng):
    """One demonstration for the problem (letter, steps): the text that the base model learns."""
    if rng.random() < world.guess:
        return ANSWER + rng.choice(LETTERS)
    text = ""
    for left in reversed(range(steps)):
        right, letter = step[letter], step[letter]
        if rng.random() < world.slip:
            letter = rng.choice([c for c in LETTERS if c != right])
            if rng.random() < world.redo:
                text, letter = text + letter + REDO, right
        text += f"{letter}{left}"
    return text + ANSWER + letter


def draw_problems(world, rng):
    """(train, test): lists of problems (letter, steps) with log-uniform steps.

    The test problems are distinct, and none is a training problem; those repeat, since there are
    only 26 for each number of steps.
    """
    steps = range(world.min_steps, world.max_steps + 1)
    weights = [math.log((n + 0.5) / (n - 0.5)) for n in steps]

    def draw():
        return rng.choice(LETTERS), rng.choices(steps, weights)[0]

    test, train = {}, []
    while len(test) < world.test_problems:
        test[draw()] = True
    while len(train) < world.train_problems:
        if (problem := draw()) not in test:
            train.append(problem)
    return train, list(test)


def make_tokenizer(world):
    """One token per letter, whole number and mark."""
    words = [":", REDO, ANSWER, *LETTERS, *map(str, range(world.max_steps + 1))]
    return base_model.word_tokenizer(words, r"####|\d+|.")


def train_base(world, step, tokenizer, problems, progress=True):
    """The base model: it has learned to demonstrate."""
    rng = random.Random(f"demonstrations {world.seed}")

    def draw():
        asked = rng.choices(problems, k=world.update_rows)
        return [(f"{letter}{steps}:", demonstrate(world, step, letter, steps, rng))
                for letter, steps in asked]  # fmt: skip

    return base_model.train(
        tokenizer, draw, world.seed, world.layers, world.width, 8 * world.max_steps + 64,
        world.updates, world.lr, progress,
    )  # fmt: skip


# What each script is told here: `python train_vapo.py` is `… @runs/toy/train_vapo.args`. The
# learning rates suit a model of 200,000 parameters, α suits answers of tens of tokens.
SETTINGS = {
    "train_value": {"lr": 1e-3, "answers": 4096, "samples": 8, "micro_batch_tokens": 4096},
    "train_vapo": {"lr": 4e-4, "critic_lr": 5e-4, "alpha": 0.5, "pretrain_lr": 1e-3,
                   "pretrain_passes": 8, "micro_batch_tokens": 4096},
    "evaluate": {},
}  # fmt: skip


def build(world, progress=True):
    """Writes the world into `world.out`, unless it is there, and each script's flags, SCRIPT.args:
    base/ (model and tokenizer), train.jsonl, test.jsonl and, last, world.json (settings and map).

    Returns: the directory. Raises: BadInput if another world is there.
    """
    out = Path(world.out)
    step = secret_map(world)
    record = {"settings": {k: v for k, v in asdict(world).items() if k != "out"}, "map": step}
    if (out / "world.json").exists():
        same = json.loads((out / "world.json").read_text()) == record
        said = f"{out} holds a world with other settings: give another --out, or remove it"
        require(same, said)
    else:
        train, test = draw_problems(world, random.Random(f"problems {world.seed}"))
        tokenizer = make_tokenizer(world)
        export(train_base(world, step, tokenizer, train, progress), tokenizer, out / "base")
        for name, part in (("train", train), ("test", test)):
            lines = [{"problem": f"{letter}{n}", "answer": apply_map(step, letter, n)}
                     for letter, n in part]  # fmt: skip
            (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_json(out / "world.json", record)
    for script in SETTINGS:
        path, flags = out / f"{script}.args", flags_of(script, out, world)
        text = "".join(f"--{name}={value}\n" for name, value in flags.items())
        if not path.exists() or path.read_text() != text:  # an older world may have other flags
            path.write_text(text)
    return out


def flags_of(script, out, world):
    """{flag: value} of a script in the world that is in `out`."""
    files = {"train_value": ("train",), "train_vapo": ("train", "test"), "evaluate": ("test",)}
    flags = {"model": str(out / "base"), "response_length": 4 * world.max_steps}
    flags |= {name: str(out / f"{name}.jsonl") for name in files[script]}
    return flags | {"prompt_template": "{problem}:", "prompt_length": 8} | SETTINGS[script]


def defaults(script, model):
    """What a script is told where no --model is given: to be in the world, built if need be."""
    if model:
        return {}
    world = World()
    with distributed.rank_0_first():
        return flags_of(script, build(world), world)


def world_of(path, tokenizer):
    """The directory of the world whose problems `path` holds, or None: is the truth known there?"""
    directory = Path(path).parent
    known = (directory / "world.json").is_file() and ANSWER in tokenizer.get_vocab()
    return directory if known else None


def trace(step, letter, steps, tokens):
    """What is true before each token of an answer: a list of (phase, on_track, left).

    phase: "work" (a letter or #### comes next), "right" / "wrong" (a letter stands that is / is not
    the true next one), "redo" (after the mark), "answer" (after ####), "said right" / "said wrong",
    "odd" (nothing a demonstration does). on_track: the last counted letter is the true one; once it
    is not, only a second, lucky slip helps. left: steps to go after the last counted letter.
    """
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

    A critic that reads the text perfectly knows the phase, whether the answer is still on track,
    and the steps left. Given these, the rest of the text says little (the policy slips a bit more
    at some letters than at others), so the mean outcome of the answers in `fit_rows` that share
    them is close to what no critic can beat. States seen seldom are drawn towards the mean over all
    `left`, with the weight of two answers. `pool`: so many numbers of steps left count as one,
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
    """How far V falls over each worked step that starts on track: (drop_N, slip_N).

    drop = V before the step's letter − V after its number, when the letter cannot be taken back.
    slip, bool: the step left the track, which is the first uncorrected slip of its answer.
    """
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


def score_critic(world_dir, problems, tokenizer, rows, value_BT):
    """How much of the truth a critic's value_BT on judged rows has found: a dict of

    slip_auc: how surely the fall of V tells the first uncorrected slip from a right step (1:
        always, ½: by chance);
    best_explained_variance: of the best possible critic on the same rows, its counts made on the
        other half of the answers. With a few hundred answers it comes out too low (0.33 for 0.39
        with 256 answers of 60 tokens).
    """
    drop_N, slip_N = step_drops(world_dir, problems, tokenizer, rows, value_BT)
    best_BT = torch.zeros_like(value_BT, device="cpu")
    index_B = torch.arange(len(best_BT), device=value_BT.device)
    halves = [index_B[start::2] for start in (0, 1)]
    if len(best_BT) > 1:
        for half, other in (halves, halves[::-1]):
            parts = (take(rows, other), take(rows, half))
            part_BT = best_values(world_dir, problems, tokenizer, *parts, pool=8)
            best_BT[half.cpu(), : part_BT.shape[1]] = part_BT
    mask_BT = response_mask(rows).cpu()
    target_BT = rows["reward_B"].cpu()[:, None] * mask_BT
    best = explained_variance(best_BT, target_BT, mask_BT).item()
    return {"slip_auc": auc(drop_N, slip_N), "best_explained_variance": best}


@exit_on_bad_input
def main(argv=None):
    world = settings.parse(World, argv, __doc__)
    world.check()
    print(f"the embedded world is in {build(world)}")


if __name__ == "__main__":
    main()
