"""verifier.py, equality.py and math_equality.py: tables of what is right; hostile texts."""

import importlib.util
import random
import time
from fractions import Fraction
from pathlib import Path

import pytest

from system.equality import canonical
from system.math_equality import MathEquality
from system.run import BadInput
from verifier import extract_answer, verify

# Where an answer may stand.
RIGHT = [
    ("Answer: 34", "34"), ("Answer: 34.", "34"), ("**Answer:** 34", "34"), ("**Answer**: 34", "34"),
    ("answer : 34", "34"),
    ("The answer is: 34", "34"), ("Answer:\n34", "34"), ("**Answer:**\n\n$$34$$", "34"),
    ("Answer: 34\n\nI hope this helps!", "34"),
    ("Answer: 34<|im_end|>", "34"), ("Answer: \\(34\\)", "34"), ("Answer: $34$.", "34"),
    ("Answer: **34**", "34"),
    ("so \\boxed{34} it is", "34"), ("\\boxed{1,000}", "1000"), ("\\boxed{1{,}000}", "1000"),
    ("\\boxed{\\text{34}}", "34"),
    ("Answer: \\boxed{34}.", "34"), ("Answer: she has $\\boxed{34}$ left", "34"),
    ("Answer: 34 = \\boxed{34}", "34"), ("\\boxed{\\boxed{\\frac{1}{2}}}", "0.5"),
    ("\\boxed{34} or, again, \\boxed{34.0}", "34"), ("#### 34", "34"), ("k1z0####z", "z"),
    ("#### $1,234", "1234"),
    ("<answer> 34 </answer>", "34"), ("<answer>\n\\boxed{34}\n</answer>", "34"),
    ("Answer: 3\nno:\nAnswer: 4", "4"),
    ("so \\boxed{34}.\n\n#### Why this is so\nAs 30 + 4 = 34.", "34"),
    ("Answer: The final answer is $34$. I hope it is correct.", "34"),
    ("Answer: She has 34 apples left.", "34"), ("Answer: 34. That is 30 + 4.", "34"),
    ("Answer: 25 + 9 = 34", "34"), ("Answer\uff1a34", "34"),
]  # fmt: skip
# What is a number.
RIGHT += [("Answer: " + stated, reference) for stated, reference in [
    ("14.0", "14"), ("14", "14.0"), (".5", "1/2"), ("0.5", "\\frac{1}{2}"), ("\\frac{1}{2}", "0.5"),
    ("\\dfrac12", "1/2"), ("1 1/2", "1.5"),
    ("1\\frac{1}{2}", "3/2"), ("-\\frac{3}{4}", "\\frac{-3}{4}"), ("50%", "1/2"), ("50\\%", "0.5"),
    ("50 percent", "1/2"), ("50%", "50"), ("50", "50\\%"),
    ("x = 5", "5"), ("90^\\circ", "90"), ("90\u00b0", "90"), ("60^\\circ F", "60"),
    ("5 apples", "5"), ("60 km/h", "60"), ("15\\text{ cm}^2", "15"),
    ("15 \\mathrm{~m}", "15"), ("15 square units", "15"), ("$1,234.50", "1234.5"), ("\\$18", "18"),
    ("18 \u20ac", "18"), ("\u22125", "-5"), ("- 5", "-5"), ("+5", "5"),
    ("1.5 \\times 10^3", "1500"), ("2.5\\cdot10^{-3}", "0.0025"), ("10^{10}", "10000000000"),
    ("1,234,567", "1234567"), ("10000", "10,\\!000"), ("10\\,000", "10000"), ("025", "25"),
    ("(B) 34", "34"), ("3/4 of the cake", "0.75"),
]]  # fmt: skip
# What is none.
RIGHT += [(f"\\boxed{{{stated}}}", reference) for stated, reference in [
    ("\\left( 1, 2 \\right)", "(1,2)"),
    ("x^{2}+1", "x^{2} + 1"),
    ("(-\\infty,2)\\cup(3,\\infty)", "(-\\infty, 2) \\cup (3, \\infty)"),
    ("e^{2 x}", "e^{2x}"),
    ("\\text{Evelyn}", "evelyn"), ("\\text{(C)}", "C"),
    ("june 20", "\\text{June 20}"),
]]  # fmt: skip
# What is set equal, rounded, said in a sentence, measured.
RIGHT += [(f"\\boxed{{{stated}}}", reference) for stated, reference in [
    ("9 \\times 2 = 18", "18"), ("f(2)=18", "18"),
    ("\\angle A = 18^\\circ", "18"), ("\\theta = 18", "18"), ("x = \\frac{36}{2} = 18", "18"),
    ("\\frac{540}{7}^\\circ", "540/7"), ("5 m", "5"),
    ("\\text{Answer: } 18", "18"), ("{18}", "18"), ("\\left(\\frac34\\right)", "0.75"),
    ("x=1, y=2", "x = 1, y = 2"), ("No", "no"),
]]  # fmt: skip
RIGHT += [("Answer: " + stated, reference) for stated, reference in [
    ("Janet makes $18 every day at the farmers' market.", "18"),
    ("It took him 160 minutes to download the file.", "160"), ("540, because it is", "540"),
    ("18cm", "18"), ("60 mph", "60"), ("\u201318", "-18"),
]]  # fmt: skip
RIGHT += [
    ("<answer>Answer: 18</answer>", "18"),
    ("<Answer>18</Answer>", "18"),
    ("#### 18 (eggs)", "18"),
    ("__Answer:__ 18", "18"),
]
WRONG = [
    ("34", "34"), ("the result is 34", "34"), ("Answer:", ""), ("Answer: ", "34"), ("", "34"),
    ("\\boxed{3", "3"),
    ("\\boxed{34} and so\n\\boxed{3", "34"), ("<answer>34", "34"), ("<answer>\\boxed{34}", "34"),
    ("Answer: 34\nAnswer: 35", "34"),
    # one line, two answers
    ("Answer: 34 or 35", "34"), ("Answer: 34, 35", "34"), ("\\boxed{34} or \\boxed{35}", "34"),
    ("\\boxed{34} or \\boxed{35}", "35"), ("Answer: 34 Answer: 35", "35"),
    ("Answer: 34 \\boxed{35}", "35"), ("<answer>34</answer><answer>35</answer>", "35"),
    # numbers
    ("Answer: 3 4", "34"), ("Answer: -34", "34"), ("Answer: 5x", "5"), ("Answer: 1/0", "1"),
    ("Answer: 1,00", "100"), ("Answer: 0.50001", "0.5"),
    ("Answer: 9**9**9**9", "1"), ("Answer: __import__('os')", "0"), ("Answer: 25 + 9", "34"),
    ("Answer: 2 \\cdot 17", "34"), ("Answer: 2^5", "32"),
    ("Answer: 3 pi", "3"), ("Answer: 5 million", "5"), ("Answer: 34 is wrong", "34"),
    ("Answer: It is not 34", "34"), ("Answer: more than 34", "34"),
    ("Answer: 3*1/2", "3.5"), ("\\boxed{\\frac{1}{2}3}", "1/23"), ("Answer: 0.5%", "50"),
    ("Answer: 5!", "5"), ("Answer: 1e999", "1"),
    ("Answer: 17 = 18", "18"), ("Answer: 2x = 18", "18"), ("Answer: x+3 = 18", "18"),
    ("Answer: negative 18", "18"), ("Answer: minus 18", "18"), ("Answer: half of 18", "18"),
    ("Answer: square root of 18", "18"), ("Answer: at least 18", "18"),
    ("Answer: 18 (or 19)", "18"), ("Answer: 18. Or 19", "18"), ("Answer: 18. Wait, 19", "18"),
    ("Answer: 18 minus two", "18"), ("Answer: 18 tenths", "18"), ("Answer: ", "None"),
    # what is none
    ("\\boxed{\\frac{5}{3}\\pi}", "\\frac{5}{3\\pi}"), ("\\boxed{\\frac12x}", "\\frac{1}{2x}"),
    ("\\boxed{x=1, y=2}", "x=2, y=1"), ("\\boxed{y=3}", "x=3"),
    ("\\boxed{\\begin{vmatrix}1\\end{vmatrix}}", "\\begin{pmatrix}1\\end{pmatrix}"),
    ("Answer: A) or B", "A"), ("Answer: A. B. C.", "A"), ("\\boxed{\\text{}}", ""),
    ("####a", "b"), ("Answer: A", "a"), ("Answer: (3 4)", "(34)"), ("Answer: (2,1)", "(1,2)"),
    ("Answer: (1,2)", "[1,2]"), ("Answer: x-1", "x+1"),
    ("Answer: b-a", "a-b"), ("Answer: x<3", "x \\le 3"), ("Answer: \\frac{1}{23}", "\\frac{12}{3}"),
    ("Answer: (D) C", "C"), ("Answer: Cat", "C"), ("Answer: \\sqrt{2}", "2"),
]  # fmt: skip


@pytest.mark.parametrize("text, answer", RIGHT)
def test_right(text, answer):
    assert verify(text, answer)


@pytest.mark.parametrize("text, answer", WRONG)
def test_wrong(text, answer):
    assert not verify(text, answer)


def test_what_is_no_text_is_no_answer():
    assert (
        not verify(None, "1")
        and not verify("Answer: none", None)
        and not verify("Answer: 1", 10**5000)
    )
    assert verify("Answer: 14", 14.0) and verify("Answer: 14", 14)


def test_only_the_end_of_a_long_text_is_read():
    assert verify("Answer: 34" + "\n" * 3_000, "34") and not verify(
        "Answer: 34" + "\n" * 5_000, "34"
    )


def test_what_is_extracted():
    assert extract_answer("first \\boxed{1}\nthen \\boxed{\\frac{1}{2}} .") == "\\frac{1}{2}"
    assert extract_answer("**Answer:** 34 \nthanks") == "** 34"


def test_of_equal_statements_on_a_line_the_last_is_taken_and_many_are_none():
    assert extract_answer("\\boxed{1/2}, that is \\boxed{0.5}") == "0.5"
    assert extract_answer("\\boxed{1} " * 5) == "1" and extract_answer("\\boxed{1} " * 6) is None


@pytest.mark.parametrize("text, answer", [
    ("25 + 49 = 74.", "74"), ("It makes 1,074", "1074"), ("so 80-6 gives 74!", "74"),
    ("that is -3", "-3"), ("about 5\nSo: $0.50", "1/2"), ("74\n\nAnswer: 75", "75"),
])  # fmt: skip
def test_a_bare_number_counts_when_asked_for(text, answer):
    assert verify(text, answer, bare_number=True)
    assert verify(text, answer) == ("Answer" in text)


@pytest.mark.parametrize("text, answer", [
    ("74\n\nAnswer: 75", "74"), ("74 and \\boxed{7", "74"), ("v74", "74"), ("80-6", "-6"),
    ("", "0"),
])  # fmt: skip
def test_a_bare_number_does_not_stand_in_for_a_statement(text, answer):
    assert not verify(text, answer, bare_number=True)


def test_votes_for_the_same_answer_are_counted_together():
    assert canonical("$0.50") == canonical("\\frac{1}{2}") == Fraction(1, 2)
    assert canonical("a + b") == canonical("a+b") != canonical("a-b")


@pytest.mark.parametrize(
    "text",
    ["\\boxed{" * 3_000, "Answer: " + "9" * 100_000, "Answer:" * 20_000, "<answer>" * 20_000,
     "{" * 100_000, "Answer: " + "1," * 90, "Answer: " + "\\frac{" * 30, "Answer: " + "(" * 190,
     "answer" + " *" * 50_000, "<|" * 50_000, "Answer: 1" + " a" * 95, "\x00\ud800Answer: \ud800",
     "####1 a" * 20_000, " ".join(["\\boxed{" + "^{" * 96 + "x" + "}" * 96 + "}"] * 8),
     "Answer: " + "1=" * 2_000, "Answer: " + "\\text{" * 50 + "}" * 50,
     "Answer: " + "x^{" * 60 + "}" * 60, "Answer: " + "a" * 280 + "!", "\\boxed{1}" * 10_000],
)  # fmt: skip
def test_hostile_texts_are_wrong_and_quick(text):
    started = time.perf_counter()
    assert not verify(text, "1")
    assert time.perf_counter() - started < 0.2  # a few ms when nothing else runs


def test_random_texts_get_a_verdict():
    """Pieces of statements in any order, cut anywhere: never an exception."""
    pieces = [piece for text, answer in RIGHT + WRONG for piece in (text, answer)]
    pieces += list("{}()[]^_,=+-*/%$\\\n \x00\u2329\u3008\ud800\u0663\u00b2")
    pieces += ["1e9", "10^", "\\frac", "\\sqrt", "9" * 50, "\\text{", "<answer>"]
    rng = random.Random(0)
    for _ in range(3_000):
        text = "".join(rng.choices(pieces, k=rng.choice((1, 3, 10, 100))))
        text = text[: rng.choice((5, 50, 5_000))]
        assert verify(text, rng.choice(pieces), bare_number=rng.random() < 0.5) in (True, False)


needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)


@pytest.fixture(scope="module")
def same():
    same = MathEquality(seconds=3)
    yield same
    same.close()


@needs_math_verify
@pytest.mark.parametrize("stated, reference, right", [
    ("2\\sqrt{2}", "\\sqrt{8}", True), ("\\frac{\\pi}{3}", "\\frac{1}{3}\\pi", True),
    ("(x-1)(x+1)", "x^2-1", True), ("\\sqrt{16}", "4", True), ("34", "34", True),
    ("\\text{Evelyn}", "Evelyn", True), ("\\sqrt{3}", "\\sqrt{8}", False),
    ("(x-1)^2", "x^2-1", False), ("25+49", "74", False), ("{25}+{49}", "74", False),
    ("1 + x^2", "x^{2}+1", True), ("-q + p", "p - q", True),
    ("\\frac{\\sqrt3}2", "\\dfrac{\\sqrt{3}}{2}", True),
    ("\\sqrt{3}/2", "\\frac{\\sqrt{3}}{2}", True), ("3 \\cdot \\sqrt{13}", "3\\sqrt{13}", True),
    ("(3,\\pi/2)", "\\left( 3, \\frac{\\pi}{2} \\right)", True), ("(0.5,3)", "(1/2, 3)", True),
    ("\\{2,1\\}", "\\{1, 2\\}", True), ("x=1 \\text{ or } x=-1", "1, -1", True),
    ("x \\in [-2, 7]", "[-2,7]", True),
    ("\\begin{bmatrix}1\\\\2\\end{bmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", True),
    ("y=3+2x", "y = 2x + 3", True), ("(x,y) = (1,2)", "(1, 2)", True),
    ("(3,+\\infty)", "(3,\\infty)", True), ("(3,5)\\cup(1,2)", "(1,2) \\cup (3,5)", True),
    ("\\frac59x", "\\frac{5x}{9}", True), ("\\frac16\\pi", "\\frac{\\pi}{6}", True),
    ("-\\frac{\\sqrt3}{2}", "\\frac{-\\sqrt{3}}{2}", True), ("x^2/4", "\\frac{x^2}{4}", True),
    ("1\\pm\\sqrt{19}", "1+\\sqrt{19}, 1-\\sqrt{19}", True), ("(x+5)(x-5)", "(x-5)(x+5)", True),
    ("\\ln(2)", "\\ln 2", True),
    ("\\frac{25+49}{1}", "74", False), ("0.3333333", "1/3", False),
])  # fmt: skip
def test_math_verify(same, stated, reference, right):
    assert verify(f"so \\boxed{{{stated}}}", reference, equal=same) == right
    assert not verify(f"so {stated}", reference, equal=same)  # no statement


@needs_math_verify
def test_math_verify_outlives_what_takes_too_long(same):
    started = time.time()
    assert not verify("\\boxed{10^{10^{9}}}", "\\pi", equal=same)
    assert time.time() - started < 60  # 3 s when nothing else runs
    assert same.child is None  # killed
    # and another one answers
    assert verify("\\boxed{2\\sqrt{2}}", "\\sqrt{8}", equal=same)


@needs_math_verify
def test_math_verify_is_bounded_in_memory():
    """A child that may hardly have more memory than it started with says so; it does not call
    every answer wrong in silence."""
    with pytest.raises(BadInput, match="does not work in 1 MB"):
        verify("\\boxed{2\\sqrt{2}}", "\\sqrt{8}", equal=MathEquality(megabytes=1))


@needs_math_verify
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_the_child_has_no_torch(same):
    """CUDA's libraries alone would be more than the memory it may have."""
    same("2\\sqrt{2}", "\\sqrt{8}")
    with open(f"/proc/{same.child.pid}/maps") as maps:
        assert "torch" not in maps.read()
