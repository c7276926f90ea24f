"""verifier.py: a table of texts and verdicts."""

import time

import pytest

from verifier import extract_answer, verify

RIGHT = [
    ("Answer: 34", "34"), ("Answer: 34.", "34"), ("**Answer:** 34", "34"), ("**Answer**: 34", "34"), ("answer : 34", "34"),
    ("Answer: 34<|im_end|>", "34"), ("Answer: \\(34\\)", "34"), ("Answer: $34$.", "34"), ("Answer: **34**", "34"),
    ("so \\boxed{34} it is", "34"), ("\\boxed{1,000}", "1000"), ("\\boxed{1{,}000}", "1000"), ("\\boxed{\\text{34}}", "34"),
    ("Answer: \\boxed{34}.", "34"), ("#### 34", "34"), ("k1z0####z", "z"), ("<answer> 34 </answer>", "34"),
    ("Answer: 3\nno:\nAnswer: 4", "4"), ("Answer: 14.0", "14"), ("Answer: 14", "14.0"), ("Answer: 0.5", "1/2"),
    ("\\boxed{\\frac{1}{2}}", "0.5"), ("\\boxed{\\dfrac12}", "1/2"), ("Answer: 1 1/2", "1.5"), ("Answer: 50%", "1/2"),
    ("Answer: 50\\%", "0.5"), ("Answer: x = 5", "5"), ("Answer: 90^\\circ", "90"), ("Answer: 5 apples", "5"), ("Answer: 60 km/h", "60"),
    ("Answer: $1,234.50", "1234.5"), ("Answer: -\\frac{1}{2}", "-0.5"), ("Answer: \u22125", "-5"), ("Answer: +5", "5"),
    ("\\boxed{\\left( 1, 2 \\right)}", "(1,2)"), ("\\boxed{x^{2}+1}", "x^{2} + 1"),
]  # fmt: skip
WRONG = [
    ("34", "34"), ("the result is 34", "34"), ("Answer:", ""), ("Answer: ", "34"), ("", "34"), ("\\boxed{3", "3"),
    ("\\boxed{34} and so \\boxed{3", "34"), ("<answer>34", "34"), ("Answer: 34\nAnswer: 35", "34"), ("Answer: 34 or 35", "34"),
    ("Answer: 34, 35", "34"), ("Answer: 3 4", "34"), ("Answer: -34", "34"), ("Answer: 5x", "5"), ("Answer: 1/0", "1"),
    ("Answer: 9**9**9**9", "1"), ("Answer: __import__('os')", "0"), ("####a", "b"), ("Answer: A", "a"), ("Answer: 1,00", "100"), ("Answer: (3 4)", "(34)"),
    ("Answer: 3 pi", "3"), ("Answer: 5 million", "5"), ("Answer: 34 is wrong", "34"), ("Answer: 3*1/2", "3.5"), ("\\boxed{\\frac{1}{2}3}", "1/23"),
]  # fmt: skip


@pytest.mark.parametrize("text, answer", RIGHT)
def test_right(text, answer):
    assert verify(text, answer)


@pytest.mark.parametrize("text, answer", WRONG)
def test_wrong(text, answer):
    assert not verify(text, answer)


def test_only_the_end_of_a_long_text_is_read():
    assert verify("Answer: 34" + "\n" * 3_000, "34") and not verify("Answer: 34" + "\n" * 5_000, "34")


def test_what_is_extracted():
    assert extract_answer("first \\boxed{1} then \\boxed{\\frac{1}{2}} .") == "\\frac{1}{2}"
    assert extract_answer("**Answer:** 34 \nthanks") == "** 34"
    assert extract_answer("nothing stated, 34") is None
    assert extract_answer("Answer: **") is None


@pytest.mark.parametrize(
    "text",
    ["\\boxed{" * 20_000, "Answer: " + "9" * 100_000, "Answer:" * 20_000, "<answer>" * 20_000, "{" * 100_000, "Answer: " + "1," * 90,
     "Answer: " + "\\frac{" * 30, "Answer: " + "(" * 190, "answer" + " *" * 50_000, "<|" * 50_000, "Answer: 1" + " a" * 95, "\x00\ud800Answer: \ud800"],
)  # fmt: skip
def test_hostile_texts_are_wrong_and_quick(text):
    started = time.perf_counter()
    assert not verify(text, "1")
    assert time.perf_counter() - started < 0.2  # a few ms when nothing else runs
