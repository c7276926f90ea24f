"""toy.py: the world's own truth, by hand."""

import json
import random

import pytest
import torch

import problems
import toy

RING = dict(zip("abcd", "bcda"))  # a → b → c → d → a


def phases(text, tokenizer, letter="a", steps=2):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    return toy.trace(RING, letter, steps, [*tokens, "<eos>"])


def test_the_map_is_one_cycle_so_no_error_is_ever_erased():
    step = toy.secret_map(toy.World())
    assert [toy.apply_map(step, "a", n) for n in range(1, 27)].index("a") == 25
    assert sorted(step.values()) == sorted(toy.LETTERS)


def test_the_tokenizer_gives_one_token_a_number_and_returns_the_text(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("c17:k16;####z")["input_ids"]) == ["c", "17", ":", "k", "16", ";", "####", "z"]
    assert tokenizer.decode(tokenizer("c17:k16;####z")["input_ids"]) == "c17:k16;####z"


def test_trace_of_a_right_answer(tokenizer):
    expected = [("work", True, 2), ("right", True, 2), ("work", True, 1), ("right", True, 1), ("work", True, 0), ("answer", True, 0)]
    assert phases("b1c0####c", tokenizer) == [*expected, ("said right", True, 0)]


def test_trace_of_a_slip_with_and_without_the_mark(tokenizer):
    lost = phases("d1a0####a", tokenizer)
    assert [state[:2] for state in lost] == [
        ("work", True), ("wrong", True), ("work", False), ("wrong", False), ("work", False), ("answer", False), ("said wrong", False),
    ]  # fmt: skip
    redone = phases("d;b1c0####c", tokenizer)
    assert [state[:2] for state in redone[:4]] == [("work", True), ("wrong", True), ("redo", True), ("right", True)]
    assert redone[-1] == ("said right", True, 0)


def test_trace_of_a_guess_and_of_nonsense(tokenizer):
    assert phases("####c", tokenizer) == [("work", True, 2), ("answer", True, 2), ("said right", True, 2)]
    assert phases("b7", tokenizer)[-1][0] == "odd"


def test_demonstrations_without_slips_are_right_and_with_them_sometimes(tokenizer):
    step, rng = toy.secret_map(toy.World()), random.Random(0)
    careful = toy.World(slip=0, guess=0)
    assert toy.demonstrate(careful, step, "a", 1, rng) == f"{step['a']}0####{step['a']}"
    texts = [toy.demonstrate(toy.World(), step, "a", 8, rng) for _ in range(500)]
    right = sum(text.endswith(toy.ANSWER + toy.apply_map(step, "a", 8)) for text in texts)
    # 0.7 work, each of 8 steps right with 1 − 0.06 · 0.7: 0.50 plus a few lucky guesses
    assert 0.42 < right / 500 < 0.58 and any(toy.REDO in text for text in texts)


def test_best_values_are_the_mean_outcomes_of_what_is_true(world, tokenizer):
    world_file = json.loads((world / "world.json").read_text())
    after = world_file["map"]["a"]
    wrong = next(c for c in "bcd" if c != after)
    rows = {name: [] for name in ("token", "start", "length", "reward")}
    for text, reward in ((f"{after}0####{after}", 1.0), (f"{wrong}0####{wrong}", 0.0)) * 20:
        ids = tokenizer("a1:")["input_ids"] + tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        for name, value in (("token", ids), ("start", 3), ("length", 5), ("reward", reward)):
            rows[name].append(value)
    rows = {
        "token_BL": torch.tensor(rows["token"]), "prompt_length_B": torch.tensor(rows["start"]),
        "length_B": torch.tensor(rows["length"]), "reward_B": torch.tensor(rows["reward"]), "problem_B": torch.zeros(40, dtype=torch.long),
    }  # fmt: skip
    value_BT = toy.best_values(world, [{"problem": "a1", "answer": after}], tokenizer, rows, rows)
    # Both start from ("work", on track): 20 of 40 are right with 1 step left, 20 of 20 with none, ⅔ over both, which
    # weighs as two answers more. After the letter the two part, and all that follows is certain but for that weight.
    start, after_step = (20 + 2 * 2 / 3) / 42, (20 + 2 * 2 / 3) / 22
    assert value_BT[0].tolist() == pytest.approx([start, 1, after_step, 1, 1])
    assert value_BT[1].tolist() == pytest.approx([start, 0, 0, 0, 0])


def test_a_built_world_has_disjoint_problems_and_is_not_built_twice(world):
    train, test = (problems.load_problems(world / f"{name}.jsonl") for name in ("train", "test"))
    assert not {p["problem"] for p in train} & {p["problem"] for p in test}
    assert len({p["problem"] for p in test}) == len(test) == 8
    before = (world / "base" / "model.safetensors").stat().st_mtime_ns
    settings = json.loads((world / "world.json").read_text())["settings"]
    toy.build(toy.World(**settings, out=str(world)), progress=False)
    assert (world / "base" / "model.safetensors").stat().st_mtime_ns == before
