"""The countdown game: make the target out of the numbers with + - * /, each number used once.

    python -m recipes.countdown     # writes train.jsonl and test.jsonl into runs/countdown
    python train_vapo.py --model DIR --train runs/countdown/train.jsonl \
        --test runs/countdown/test.jsonl --reward recipes/countdown.py:reward

A problem has no answer: many expressions are right. Its columns `numbers` and `target` reach the
reward, which works the stated expression out on its syntax tree, in fractions, without `eval`.
"""

import ast
import json
import operator
import random
from fractions import Fraction
from pathlib import Path

from verifier import extract_answer

SIGNS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
         ast.Div: operator.truediv}  # fmt: skip


def worked_out(text):
    """(value, sorted numbers in it) of an expression of whole numbers, + - * / and brackets.
    Raises: ValueError (SyntaxError is no such), ZeroDivisionError."""
    numbers = []

    def value(node):
        if isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
            return SIGNS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            numbers.append(node.value)
            return Fraction(node.value)
        raise ValueError(f"no countdown expression: {text}")

    if len(text) > 100:  # bounds the depth of the tree, and the numbers
        raise ValueError("too long")
    stated = text.partition("=")[0].strip(" .$")
    return value(ast.parse(stated, mode="eval").body), sorted(numbers)


def reward(prompts, completions, numbers, target, truncated, **columns):
    """1 for the target, 0.1 for another value of the right numbers, else 0; only 1 is correct."""
    values = []
    for text, given, wanted, cut in zip(completions, numbers, target, truncated):
        try:
            value, used = worked_out(extract_answer(text) or "")
        except (ValueError, SyntaxError, ZeroDivisionError):
            value, used = None, None
        fair = used == sorted(given) and not cut
        right = fair and value == wanted
        values.append((1.0 if right else 0.1 if fair else 0.0, right))
    return values


def draw_problem(rng):
    """Three or four numbers, and a target that they make."""
    numbers = [rng.randint(1, 50) for _ in range(rng.choice((3, 4)))]
    target = 0
    while not 0 < target < 1000:
        target = numbers[0]
        for number in numbers[1:]:
            target = rng.choice((operator.add, operator.sub, operator.mul))(target, number)
    shuffled = rng.sample(numbers, len(numbers))
    said = f"Use each of the numbers {', '.join(map(str, shuffled))} exactly once, with + - * / and"
    said += f" brackets, to make {target}. The answer is the expression, such as (1 + 2) * 3."
    return {"problem": said, "numbers": shuffled, "target": target}


if __name__ == "__main__":
    rng, directory = random.Random(0), Path("runs/countdown")
    directory.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 4000), ("test", 100)):
        lines = [json.dumps(draw_problem(rng)) + "\n" for _ in range(count)]
        (directory / f"{name}.jsonl").write_text("".join(lines))
        print(f"{directory}/{name}.jsonl: {count} problems")
