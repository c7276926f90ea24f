"""Is this answer right? Extraction and exact equality: no eval, no sympy, linear time, never an exception.

A verdict is a reward, so a doubtful text is a wrong one. The answer must be stated in one of four ways, and the last
statement in the last 4,000 characters wins:

    Answer: 34          (also **Answer:** 34)
    \\boxed{34}
    #### 34
    <answer>34</answer>

A bare last number is not a statement, and a statement that is cut off (`\\boxed{3`) is none: no earlier one stands in
for it. What reduces to a rational number is compared exactly, as a fraction: 1,000 = 1000, 0.5 = 1/2 = \\frac{1}{2},
50% = 1/2. Everything else is compared as a string without spaces, dollar signs, markdown and the like.
"""

import re
from fractions import Fraction

TAIL = 4_000  # characters at the end of the text in which the answer must be stated: this bounds the time
LONGEST = 200  # characters of a stated answer that are looked at; a longer one is wrong

STATEMENT = re.compile(r"answer\s{0,3}\**\s{0,3}:|\\boxed\s{0,3}\{|####|<answer>", re.IGNORECASE)
SPECIAL_TOKEN = re.compile(r"<\|[^|<>\n]{1,40}\|>|</s>|<eos>")
WRAPPER = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|boxed|mbox)\s?\{([^{}]*)\}")
NOISE = re.compile(r"\\left|\\right|\\[,;:! ]|\\quad|\\(?=[%$#&])|\*\*|[$`~]|\\\(|\\\)|\\\[|\\\]")
NO_UNIT = "is|or|and|but|not|to|pi|percent|dozen|hundred|thousand|[mb]illion|trillion|factorial|squared|cubed|times|modulo|mod|base"
UNIT = re.compile(rf"(?<=\d)\s*(?:\^?\{{?\\circ\}}?|°|(?: (?!(?:{NO_UNIT})\b)[A-Za-z]{{2,}}(?:/[A-Za-z]+)?){{1,2}})$", re.IGNORECASE)
THOUSANDS = re.compile(r"(?<![\d.])[+-]?\d{1,3}(?:,\d{3})+(?!\d)")
LATEX_FRACTION = re.compile(r"\\[dtc]?frac\s?(?:\{([^{}]+)\}|(\d))\s?(?:\{([^{}]+)\}|(\d))")
SPACE = re.compile(r"(?<!\d) | (?!\d)")  # one between two digits separates two numbers
NUMBER = re.compile(r"([+-]?)(?:(\d{1,100})\s+)?(\d{1,100}(?:\.\d{0,100})?|\.\d{1,100})(?:/(\d{1,100}(?:\.\d{1,100})?))?(%?)")


def extract_answer(text):
    """The last answer stated in a model's text, stripped, or None where none is stated or the last one is cut off."""
    text = SPECIAL_TOKEN.sub("", text[-TAIL:])
    *_, found = [None, *STATEMENT.finditer(text)]
    if found is None:
        return None
    rest = text[found.end() :]
    kind = found.group().lower()
    if kind.startswith("\\boxed"):
        stated = up_to_closing_brace(rest)
    elif kind == "<answer>":
        stated, closed, _ = rest.partition("</answer>")
        stated = stated if closed else None
    else:
        stated = rest.partition("\n")[0]
    stated = stated.strip() if stated else None
    return stated if stated and len(stated) <= LONGEST and stated.strip("* .") else None


def up_to_closing_brace(text):
    """What stands before the brace that closes an already open one, or None if nothing closes it."""
    depth = 1
    for i, character in enumerate(text[: 4 * LONGEST]):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:i]
    return None


def normalise(answer):
    """A stated answer without what does not change its meaning: markdown, dollars, spacing, wrappers, a last period."""
    answer = answer.replace("{,}", ",").replace("\u2212", "-").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    for _ in range(3):  # wrappers nest: \boxed{\text{…}}
        answer = WRAPPER.sub(r" \1", answer)
    answer = " ".join(NOISE.sub(" ", answer).split())
    return answer.strip("*").rstrip(". ").strip()


def rational(answer):
    """The number that a normalised answer states, as a Fraction, or None.

    Integers, decimals, a/b, \\frac{a}{b}, mixed numbers, percentages, thousands separators, `x = 5`, units.
    """
    name, equals, value = answer.partition("=")
    if equals and re.fullmatch(r"\s*[A-Za-z]\w{0,9}\s*", name):
        answer = value.strip()
    answer = THOUSANDS.sub(lambda number: number.group().replace(",", ""), UNIT.sub("", answer))
    answer = LATEX_FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]} ", answer).strip()
    answer = re.sub(r"^([+-])\s+", r"\1", re.sub(r"\s*([/%])\s*", r"\1", answer))
    match = NUMBER.fullmatch(answer)
    if match is None:
        return None
    sign, whole, numerator, denominator, percent = match.groups()
    if whole and denominator is None:  # "3 4" is two numbers, not one
        return None
    if denominator and Fraction(denominator) == 0:
        return None
    value = Fraction(numerator) / Fraction(denominator or 1) + Fraction(whole or 0)
    return (-value if sign == "-" else value) / (100 if percent else 1)


def equal(stated, reference):
    """Whether two stated answers are the same number or, where neither is a number, the same string but for spaces."""
    stated, reference = normalise(stated), normalise(reference)
    number, reference_number = rational(stated), rational(reference)
    if number is not None or reference_number is not None:
        return number == reference_number
    return SPACE.sub("", stated) == SPACE.sub("", reference)


def verify(text, answer):
    """True if the last answer that `text` states equals `answer` (a text or a number). Never raises, whatever the text."""
    stated, reference = extract_answer(text), str(answer)
    return stated is not None and len(reference) <= LONGEST and equal(stated, reference)
