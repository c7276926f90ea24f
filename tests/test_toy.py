"""toy.py: the map, the tokenizer, the demonstrations, the problems."""

import json
import math
import random

import pytest

import toy
from system import files, loading


def test_the_map_is_one_cycle_so_no_error_is_ever_erased():
    step = toy.secret_map(toy.World())
    assert [toy.apply_map(step, "a", n) for n in range(1, 27)].index("a") == 25
    assert sorted(step.values()) == sorted(toy.LETTERS)


def test_the_tokenizer_gives_one_token_a_number_and_returns_the_text(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("c17:k16;####z")["input_ids"]) == [
        "c",
        "17",
        ":",
        "k",
        "16",
        ";",
        "####",
        "z",
    ]
    assert tokenizer.decode(tokenizer("c17:k16;####z")["input_ids"]) == "c17:k16;####z"


def test_demonstrations_without_slips_are_right_and_with_them_sometimes(tokenizer):
    step, rng = toy.secret_map(toy.World()), random.Random(0)
    careful = toy.World(slip=0, guess=0)
    assert toy.demonstrate(careful, step, "a", 1, rng) == f"{step['a']}0####{step['a']}"
    texts = [toy.demonstrate(toy.World(), step, "a", 8, rng) for _ in range(500)]
    right = sum(text.endswith(toy.ANSWER + toy.apply_map(step, "a", 8)) for text in texts)
    # 0.7 work, each of 8 steps right with 1 − 0.06 · 0.7: 0.50 plus a few lucky guesses
    assert 0.42 < right / 500 < 0.58 and any(toy.REDO in text for text in texts)


def test_every_slip_is_a_wrong_letter_and_the_mark_takes_it_back():
    step, rng = toy.secret_map(toy.World()), random.Random(0)
    after = step["a"]
    for _ in range(300):
        letter, *rest = toy.demonstrate(toy.World(slip=1, redo=0, guess=0), step, "a", 1, rng)
        assert letter != after and "".join(rest) == f"0####{letter}"  # what is slipped is said
        letter, *rest = toy.demonstrate(toy.World(slip=1, redo=1, guess=0), step, "a", 1, rng)
        assert letter != after and "".join(rest) == f";{after}0####{after}"


def test_steps_are_log_uniform():
    train, _ = toy.draw_problems(toy.World(train_problems=2000, test_problems=1), random.Random(0))
    # the share of 2 to 11 among 2 to 64, by logarithms: 0.54; by numbers it is 10 of 63
    expected = math.log(11.5 / 1.5) / math.log(64.5 / 1.5)
    assert sum(n <= 11 for _, n in train) / 2000 == pytest.approx(expected, abs=0.04)


def test_a_built_world_has_disjoint_problems_and_is_not_built_twice(world):
    train, test = (files.load_problems(world / f"{name}.jsonl") for name in ("train", "test"))
    assert not {p["problem"] for p in train} & {p["problem"] for p in test}
    assert len({p["problem"] for p in test}) == len(test) == 8
    # Other runs may be reading the flags: they stay as they are, or are replaced as a whole.
    paths = [world / "base" / "model.safetensors", *world.glob("*.args")]
    before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in paths]
    settings = json.loads((world / "world.json").read_text())["settings"]
    toy.build(toy.World(**settings, out=str(world)), progress=False)
    assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in paths] == before
    flags = paths[1].read_text()
    paths[1].write_text("--of_an_older=revision\n")
    with paths[1].open() as reading:
        toy.build(toy.World(**settings, out=str(world)), progress=False)
        assert reading.read() == "--of_an_older=revision\n" and paths[1].read_text() == flags


def test_only_the_worlds_own_problems_are_of_it(world):
    """Others may lie beside them."""
    tokenizer = loading.load_tokenizer(str(world / "base"))
    for name, known in (("train", True), ("test", True), ("mine", False)):
        found = toy.world_of(str(world / f"{name}.jsonl"), tokenizer)
        assert found == (world if known else None)
