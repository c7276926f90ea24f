"""The embedded world: a serial-reasoning task, its tokenizer and a tiny base model, made in a minute on a CPU.

    python toy.py                                   # writes runs/toy
    python toy.py --out runs/long --max_steps 120   # a longer world

The world. A secret map sends each of 26 letters to another; it is one single cycle, so it is a bijection (an error
is never erased) and every number of steps up to 26 gives another answer. The problem `c17` asks where 17 steps lead
from c. The base model has learned from demonstrations that work aloud, one letter and the number of steps left:

    c3:   k2q1z0####z          two tokens a step, then the answer
    c3:   k2a;q1z0####z        a slip (a), noticed and redone (; cancels the letter before it)
    c3:   k2a1f0####f          a slip that nobody noticed: all that follows is wrong
    c3:   ####m                a guess

so RL can do here what it does to a long chain of thought: take more care, correct more, stop guessing (the answers
grow longer). Numbers of steps are log-uniform, so that answers differ in length by tens of times.

What no real data set offers: the truth is known at every token (truth.py).
"""

import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_linear_schedule_with_warmup

from checkpoint import export
from run import BadInput, exit_on_bad_input, flag, parse_settings, write_json

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ANSWER, REDO, PAD, EOS, UNK = "####", ";", "<pad>", "<eos>", "<unk>"


@dataclass(frozen=True)
class World:
    out: str = flag("runs/toy", "directory to write the world into")
    seed: int = flag(0, "seed of the map, the problems, the demonstrations and the model")
    min_steps: int = flag(2, "fewest steps in a problem")
    max_steps: int = flag(64, "most steps in a problem; steps are log-uniform")
    slip: float = flag(0.06, "share of demonstrated steps that slip to a wrong letter")
    redo: float = flag(0.3, "share of slips that are noticed and redone")
    guess: float = flag(0.3, "share of demonstrations that guess without working")
    train_problems: int = flag(1024, "problems to train on")
    test_problems: int = flag(100, "held-out problems, distinct and not among those")
    layers: int = flag(3, "layers of the base model")
    width: int = flag(64, "hidden size of the base model")
    updates: int = flag(400, "optimiser updates of the base model's training")
    update_rows: int = flag(64, "demonstrations per update")
    lr: float = flag(3e-3, "peak learning rate of the base model's training")

    def check(self):
        if not 1 <= self.min_steps <= self.max_steps:
            raise BadInput("--min_steps must be at least 1 and at most --max_steps")
        for name in ("slip", "redo", "guess"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"--{name} is a share: between 0 and 1")
        if self.width % 32:
            raise BadInput("--width must be a multiple of 32, the width of an attention head")
        if not 1 <= self.test_problems <= len(LETTERS) * (self.max_steps - self.min_steps + 1) // 4:
            raise BadInput("--test_problems must be at least 1 and at most a quarter of the 26 problems per number of steps")
        if self.train_problems < 1 or self.updates < 1 or self.layers < 1:
            raise BadInput("--train_problems, --updates and --layers must be at least 1")


def secret_map(world):
    """The map as a dict letter → letter: one cycle through all letters, drawn from the world's seed."""
    order = random.Random(world.seed).sample(LETTERS, len(LETTERS))
    return dict(zip(order, order[1:] + order[:1]))


def apply_map(step, letter, times):
    for _ in range(times):
        letter = step[letter]
    return letter


def demonstrate(world, step, letter, steps, rng):
    """One demonstration for the problem (letter, steps): its text, as the base model will learn to write it."""
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
    """(train, test): lists of problems (letter, steps) with log-uniform steps. The test problems are distinct, and none
    of them is a training problem; training problems repeat, since there are only 26 for each number of steps."""
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
    """A fast tokenizer with one token per letter, whole number and mark."""
    tokens = [PAD, EOS, UNK, ":", REDO, ANSWER, *LETTERS, *map(str, range(world.max_steps + 1))]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"####|\d+|."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=EOS, unk_token=UNK)


def train_base(world, step, tokenizer, problems, progress=True):
    """Fits a Llama model to fresh demonstrations by next-token cross-entropy on the response."""
    torch.manual_seed(world.seed)
    rng = random.Random(f"demonstrations {world.seed}")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=world.width, intermediate_size=2 * world.width,
        num_hidden_layers=world.layers, num_attention_heads=world.width // 32, num_key_value_heads=world.width // 32,
        max_position_embeddings=8 * world.max_steps + 64, tie_word_embeddings=False,
        initializer_range=0.1,  # HF's 0.02 does not learn a model this narrow in ten times the updates
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=world.lr, weight_decay=0.01)
    scheduler = get_linear_schedule_with_warmup(optimizer, world.updates // 20, world.updates)
    bar = tqdm(range(world.updates), desc="toy: base model", disable=not progress)
    for _ in bar:
        rows = []
        for letter, steps in rng.choices(problems, k=world.update_rows):
            prompt, response = f"{letter}{steps}:", demonstrate(world, step, letter, steps, rng)
            rows.append((len(tokenizer(prompt)["input_ids"]), tokenizer(prompt + response)["input_ids"] + [tokenizer.eos_token_id]))
        rows.sort(key=lambda row: len(row[1]))  # micro-batches of rows of like length: little padding
        tokens = sum(len(row) - prompt_length for prompt_length, row in rows)
        total = 0.0
        for start in range(0, len(rows), 16):
            micro = rows[start : start + 16]
            token_BL = torch.full((len(micro), len(micro[-1][1])), tokenizer.pad_token_id)
            label_BL = torch.full_like(token_BL, -100)
            for i, (prompt_length, row) in enumerate(micro):
                token_BL[i, : len(row)] = torch.tensor(row)
                label_BL[i, prompt_length : len(row)] = torch.tensor(row[prompt_length:])
            loss = model(input_ids=token_BL, labels=label_BL, num_items_in_batch=tokens).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{total:.3f}")
    return model


# What each script is told in this world: `python train_vapo.py` is `python train_vapo.py @runs/toy/train_vapo.args`.
# The learning rates suit a model of 200,000 parameters, α suits answers of tens of tokens.
SETTINGS = {
    "common": {"prompt_template": "{problem}:", "prompt_length": 8, "micro_batch_tokens": 4096},
    "train_value": {"lr": 1e-3, "answers": 4096, "samples": 8},
    "train_vapo": {"lr": 4e-4, "critic_lr": 5e-4, "alpha": 0.5, "pretrain_lr": 1e-3, "pretrain_passes": 8},
}


def build(world, progress=True):
    """Writes the world into `world.out`, unless it is there: base/ (model and tokenizer), train.jsonl, test.jsonl and, last,
    world.json (settings and the map); and the two scripts' .args. Raises: BadInput if another world is there."""
    out = Path(world.out)
    step = secret_map(world)
    record = {"settings": {k: v for k, v in asdict(world).items() if k != "out"}, "map": step}
    if (out / "world.json").exists():
        if json.loads((out / "world.json").read_text()) != record:
            raise BadInput(f"{out} holds a world with other settings: give another --out, or remove it")
    else:
        train, test = draw_problems(world, random.Random(f"problems {world.seed}"))
        tokenizer = make_tokenizer(world)
        export(train_base(world, step, tokenizer, train, progress), tokenizer, out / "base")
        for name, part in (("train", train), ("test", test)):
            lines = [{"problem": f"{letter}{n}", "answer": apply_map(step, letter, n)} for letter, n in part]
            (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_json(out / "world.json", record)
    files = {"model": out / "base", "train": out / "train.jsonl", "world": out, "response_length": 4 * world.max_steps}
    for script in ("train_value", "train_vapo"):
        test_file = {"test": out / "test.jsonl"} if script == "train_vapo" else {}
        flags = files | test_file | SETTINGS["common"] | SETTINGS[script]
        path, text = out / f"{script}.args", "".join(f"--{name}={value}\n" for name, value in flags.items())
        if not path.exists() or path.read_text() != text:  # an older world may have flags that are no more
            path.write_text(text)
    return out


@exit_on_bad_input
def main(argv=None):
    world = parse_settings(World, argv, __doc__)
    world.check()
    print(f"the embedded world is in {build(world)}")


if __name__ == "__main__":
    main()
