"""The embedded world: a task of serial reasoning, its tokenizer, a tiny base model, and its truth.

    python toy.py --out runs/long --max_steps 120   # runs/toy: python toy.py

A secret map sends each of 26 letters to another; it is one single cycle, so it is a bijection (an
error is never erased) and every number of steps up to 26 gives another answer. The problem `c17`
asks where 17 steps lead from c. The base model has learned from demonstrations that work aloud, one
letter and the number of steps left:

    c3:   k2q1z0####z          two tokens a step, then the answer
    c3:   k2a;q1z0####z        a slip (a), noticed and redone (; cancels the letter before it)
    c3:   k2a1f0####f          a slip that nobody noticed: all that follows is wrong
    c3:   ####m                a guess

so RL can take more care, correct more, stop guessing (the answers grow longer). Steps are
log-uniform: lengths differ by tens of times. The truth is known at every token, and so are how well
any critic could do (`best_values`), up to a small error of counting, and where the first slip that
nobody took back is, which a critic should find (`step_drops`, `auc`).
"""

import json
import math
import random
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from gae import explained_variance
from system import base_model, distributed, settings
from system.checkpoint import export
from system.run import exit_on_bad_input, require, write_json, write_lines, written_whole
from system.settings import AT_LEAST_1, POSITIVE, SHARE, flag
from system.truth import ANSWER, LETTERS, REDO, auc, best_values, step_drops
from table import response_mask, take


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
        most = len(LETTERS) * (self.max_steps - self.min_steps + 1) // 4
        require(self.test_problems <= most, f"--test_problems: at most a quarter of all, {most}")
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
    """(train, test): lists of problems (letter, steps) with log-uniform steps. Test problems are
    distinct, and none is a training problem; those repeat (there are 26 for a number of steps)."""
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
        return [(f"{letter}{steps}:", demonstrate(world, step, letter, steps, rng))
                for letter, steps in rng.choices(problems, k=world.update_rows)]  # fmt: skip

    how = world.seed, world.layers, world.width, 8 * world.max_steps + 64, world.updates, world.lr
    return base_model.train(tokenizer, draw, *how, progress)


# What each script is told here: `python train_vapo.py` is `… @runs/toy/train_vapo.args`. The
# learning rates suit a model of 200,000 parameters, α suits answers of tens of tokens.
SETTINGS = {
    "train_value": {"lr": 1e-3, "answers": 4096, "samples": 8, "micro_batch_tokens": 1024},
    "train_vapo": {"lr": 4e-4, "critic_lr": 5e-4, "alpha": 0.5, "pretrain_lr": 1e-3,
                   "pretrain_answers": 2048, "pretrain_passes": 6, "micro_batch_tokens": 1024,
                   "eval_every": 10},
    "evaluate": {},
}  # fmt: skip


def build(world, progress=True):
    """Writes the world into `world.out`, unless it is there, and each script's flags, SCRIPT.args:
    base/ (model and tokenizer), train.jsonl, test.jsonl and, last, world.json (settings and map).
    Returns: the directory. Raises: BadInput if another world is there."""
    out, step = Path(world.out), secret_map(world)
    record = {"settings": {k: v for k, v in asdict(world).items() if k != "out"}, "map": step}
    if (out / "world.json").exists():
        same = json.loads((out / "world.json").read_text()) == record
        require(same, f"{out} holds a world with other settings: give another --out")
    else:
        train, test = draw_problems(world, random.Random(f"problems {world.seed}"))
        tokenizer = make_tokenizer(world)
        export(train_base(world, step, tokenizer, train, progress), tokenizer, out / "base")
        for name, part in (("train", train), ("test", test)):
            lines = [{"problem": f"{letter}{n}", "answer": apply_map(step, letter, n)}
                     for letter, n in part]  # fmt: skip
            write_lines(out / f"{name}.jsonl", lines)
        write_json(out / "world.json", record)
    for script in SETTINGS:
        path, flags = out / f"{script}.args", flags_of(script, out, world)
        text = "".join(f"--{name}={value}\n" for name, value in flags.items())
        if not path.exists() or path.read_text() != text:  # other runs may be reading it
            with written_whole(path) as file:
                file.write(text.encode())
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
    distributed.on_rank_0(partial(build, world))
    return flags_of(script, Path(world.out), world)


def world_of(path, tokenizer):
    """The directory of the world whose problems `path` holds, or None: is the truth known there?"""
    directory, name = Path(path).parent, Path(path).name
    known = (directory / "world.json").is_file() and name in ("train.jsonl", "test.jsonl")
    return directory if known and ANSWER in tokenizer.get_vocab() else None


def perfect_values(world_dir, problems, tokenizer, before, rows):
    """value_BT of a critic that knows what is true (`best_values`), counted on the rows `before`;
    with None, of each half of the rows on the other: no answer's own outcome is in its values."""
    where = (world_dir, problems, tokenizer)
    if before:
        return best_values(*where, before, rows, pool=8)
    value_BT = torch.zeros(response_mask(rows).shape)
    halves = [slice(0, None, 2), slice(1, None, 2)]
    for half, other in (halves, halves[::-1]) if len(value_BT) > 1 else ():
        part_BT = best_values(*where, take(rows, other), take(rows, half), pool=8)
        value_BT[half, : part_BT.shape[1]] = part_BT
    return value_BT


def score_critic(world_dir, problems, tokenizer, rows, value_BT):
    """How much of the truth a critic's value_BT on judged rows has found: {
    slip_auc: how surely V's fall tells the first uncorrected slip from a right step (½: by chance);
    best_explained_variance: the best possible critic's, counted on the other half of the answers;
        too low with a few hundred of them (0.33 for 0.39 with 256 of 60 tokens)}."""
    where = (world_dir, problems, tokenizer)
    best_BT, mask_BT = perfect_values(*where, None, rows), response_mask(rows)
    best = explained_variance(best_BT, rows["reward_B"][:, None] * mask_BT, mask_BT)
    found = auc(*step_drops(*where, rows, value_BT))
    return {"slip_auc": found, "best_explained_variance": best.item()}


@exit_on_bad_input
def main(argv=None):
    world = settings.parse(World, argv, __doc__)
    world.check()
    print(f"the embedded world is in {build(world)}")


if __name__ == "__main__":
    main()
