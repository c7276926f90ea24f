"""Is this answer right? Extraction and exact equality: no eval, no sympy, linear time, never an exception.

A verdict is a reward, so a doubtful text is a wrong one. The answer must be stated in one of four ways, and the last
statement in the last 4,000 characters wins:

    Answer: 34          (also **Answer:** 34)
    \\boxed{34}
    #### 34
    <answer>34</answer>

A statement that is cut off (`\\boxed{3`) is none, and no earlier one stands in for it; a line that states two different
answers states none. A bare last number counts only where that is asked for, and where nothing else is stated.
What is written as a rational number is compared exactly, as a fraction: 1,000 = 1000, 0.5 = 1/2 = \\frac{1}{2} = 50%.
Sums and products are not worked out: to "What is 25 + 49?" the answer "25 + 49" is none. Everything else is compared as
a string in which what has no meaning is gone: spaces, \\left, dollar signs, the order of a sum's terms or of a set.
For more of LaTeX (\\sqrt{8} = 2\\sqrt{2}) there is `--verifier math_verify`: math_verifier.py.
"""

import re
from fractions import Fraction

TAIL = 4_000  # characters at the end of the text in which the answer must be stated: this bounds the time
LONGEST = 300  # characters of a stated answer; a longer one is wrong
MOST_STATED = 8  # statements in one line; a line with more is wrong

STATEMENT = re.compile(r"answer(?:\s{1,3}is)?\s{0,3}\**\s{0,3}[:\uff1a]|\\boxed\s{0,3}\{|\\fbox\s{0,3}\{|####|<answer>", re.IGNORECASE)
SPECIAL_TOKEN = re.compile(r"<\|[^|<>\n]{1,40}\|>|</s>|<eos>|<end_of_turn>")
LEAD_IN = re.compile(
    r"^(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final |correct )?answer is:? |\.? I hope it is correct\.?$", re.IGNORECASE
)
WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname|boxed|fbox|mbox)\s?\{([^{}]*)\}")
NOISE = re.compile(r"(?<!\\)\\(?:left(?![a-z])|right(?![a-z])|[,;:! ()\[\]]|q?quad(?![a-z])|displaystyle|(?=[%$#&]))|\*\*|[$`~£€]")
NO_UNIT = "is|or|and|but|not|to|pi|percent|dozen|hundred|thousand|[mb]illion|trillion|factorial|squared|cubed|times|modulo|mod|base|[ap]m"
UNIT = re.compile(
    rf"(?<=\d)\s*(?:(?:\^?\{{?\\circ\}}?|°)\s?[CF]?|(?: (?!(?:{NO_UNIT})\b)[A-Za-z]{{2,}}(?:/[A-Za-z]+)?){{1,3}}(?:\s?(?:\^\s?\{{?\d\}}?|²|³))?)$",
    re.IGNORECASE,
)
TEXT_UNIT = re.compile(
    rf"(?<=[\d)}}i])(?:\s|\\[,; ]|~)*\\(?:text|mathrm|mbox)\s?\{{[\s~]*(?!(?:{NO_UNIT})\b)[A-Za-z][A-Za-z ./]*\}}(?:\^\s?\{{?\d\}}?)?$"
)
THOUSANDS = re.compile(r"(?<![\d.])[+-]?\d{1,3}(?:,\d{3})+(?!\d)")
LATEX_FRACTION = re.compile(r"\\frac\s?(?:\{([^{}]+)\}|(\d))\s?(?:\{([^{}]+)\}|(\d))")
NUMBER = re.compile(
    r"([+-]?)(?:(\d{1,100})\s+)?([+-]?(?:\d{1,100}(?:\.\d{0,100})?|\.\d{1,100}))(?:/([+-]?\d{1,100}(?:\.\d{1,100})?))?(%?)"
    r"(?:(?:\*|×|\\times|\\cdot)10\^(?:\{([+-]?\d{1,3})\}|([+-]?\d{1,3}))|e([+-]?\d{1,3}))?",
    re.ASCII,
)
SENTENCE = re.compile(
    r"(?!.*\b(?:not|no|never|isn't|than|between|about|approximately|wrong|if)\b)[A-Za-z][A-Za-z', ]*?:?\s([+-]?[\d.,/%]+)", re.IGNORECASE
)
BARE_NUMBER = re.compile(r"(?:(?<![\w.,)+/*^-])[+-])?(?<![\w.,/])\d[\d,]{0,40}(?:\.\d{1,40})?(?:/\d{1,40})?%?(?![\w/])", re.ASCII)


def extract_answer(text, bare_number=False):
    """The last answer stated in a model's text, stripped, or None where none is stated or the last one is doubtful.

    bare_number: where nothing is stated, the last number of the text is the answer.
    """
    text = SPECIAL_TOKEN.sub("", text[-TAIL:])
    marks = list(STATEMENT.finditer(text))[-4 * MOST_STATED :]
    marks = [mark for mark in marks if mark.group() != "####" or not is_heading(line_after(text, mark.end()))]
    if not marks:
        *_, number = [None, *BARE_NUMBER.finditer(text)] if bare_number else [None]
        return number and number.group().rstrip(",")
    line = text.rfind("\n", 0, marks[-1].start()) + 1
    marks = [mark for mark in marks if mark.start() >= line]
    if len(marks) > MOST_STATED:
        return None
    stated = []
    for mark, following in zip(marks, [*marks[1:], None]):
        content = content_of(text, mark, following)
        if content is None:
            return None
        stated += [content] if content.strip("* .$") else []
    if not stated or any(len(answer) > LONGEST for answer in stated):
        return None
    return stated[-1] if all(equal(answer, stated[-1]) for answer in stated[:-1]) else None


def content_of(text, mark, following):
    """What one statement says, "" if it only introduces the `following` one on its line, None if it is cut off."""
    kind, rest = mark.group().lower(), text[mark.end() :]
    if kind == "<answer>" or kind.endswith("{"):
        stated = up_to_closing_brace(rest) if kind.endswith("{") else rest.partition("</answer>")[0] if "</answer>" in rest else None
        inside = stated is not None and following is not None and following.start() < mark.end() + len(stated)
        return "" if inside else stated and stated.strip()
    stated = line_after(text, mark.end())
    if following is None:
        return stated
    before = text[mark.end() : following.start()].strip(" *=:$\n")  # "Answer: $\boxed{34}$", "Answer: she has \boxed{34}"
    return before if rational(normalise(before)) is not None else ""


def line_after(text, start):
    """The rest of the line, stripped, or, where nothing but marks stands there, the next line that says something."""
    for line in text[start : start + LONGEST + 10].split("\n")[:4]:
        if line.strip(" *$\t\r") not in ("", "\\[", "\\("):
            return line.strip()
    return ""


def is_heading(line):
    """Whether what follows #### is the words of a markdown heading."""
    return re.search(r"[A-Za-z]{3}", re.sub(r"\\[a-z]+", "", line)) is not None and rational(normalise(line)) is None


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
    answer = TEXT_UNIT.sub("", answer.strip().rstrip(".$ "))
    answer = re.sub(r"(?<=\d)\\[,;](?=\d{3})|\\!", "", answer)  # 10\,000 and 10,\!000
    answer = re.sub(r"\\[dtc]frac", r"\\frac", answer.replace("{,}", ",").replace("\u2212", "-"))
    for _ in range(3):  # wrappers nest: \boxed{\text{…}}
        answer = WRAPPER.sub(r" \1", answer)
    answer = LEAD_IN.sub("", " ".join(NOISE.sub(" ", answer).split()))
    answer = re.sub(r" ?\b(?:percent|per cent)\b", "%", answer)
    return answer.strip("*").rstrip("., ").strip()


def rational(answer):
    """The number that a normalised answer is written as, as a Fraction, or None.

    Integers, decimals, a/b, \\frac{a}{b}, mixed numbers, percentages, thousands separators, a·10^n, `x = 5`, `2 + 3 = 5`, units.
    """
    name, equals, value = answer.rpartition("=")
    if equals and re.fullmatch(r"\s*(?:[A-Za-z]\w{0,9}(?:\([A-Za-z]\))?|[A-Za-z][A-Za-z ]{0,60}|[\d\s+*/().,^=×÷-]*)\s*", name):
        answer = value.strip()
    answer = re.sub(r"^([+-]?)10\s?\^", r"\g<1>1*10^", answer)
    answer = THOUSANDS.sub(lambda number: number.group().replace(",", ""), UNIT.sub("", answer))
    answer = LATEX_FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]} ", answer).strip()
    answer = re.sub(r"^([+-])\s+", r"\1", re.sub(r"\s*([/%*×^]|\\times|\\cdot)\s*", r"\1", answer))
    match = NUMBER.fullmatch(answer[1:-1] if answer[:1] + answer[-1:] == "()" else answer)
    if match is None:
        return None
    sign, whole, numerator, denominator, percent, *powers = match.groups()
    if whole and (denominator is None or numerator[0] in "+-"):  # "3 4" is two numbers, not one
        return None
    if denominator and Fraction(denominator) == 0:
        return None
    value = Fraction(numerator) / Fraction(denominator or 1) + Fraction(whole or 0)
    value *= Fraction(10) ** int(next(filter(None, powers), 0))
    return (-value if sign == "-" else value) / (100 if percent else 1)


def equal(stated, reference):
    """Whether two stated answers are the same number or, where neither is one, the same expression.

    A percentage equals its fraction and, as the answer to "how many percent", the number before the sign.
    """
    stated, reference = normalise(stated), normalise(reference)
    number, reference_number = rational(stated), rational(reference)
    if reference_number is None:
        return number is None and same_choice(expression(stated), expression(reference))
    if number is None:
        number = number_said(stated)
    return number == reference_number or (
        number is not None and stated.endswith("%") != reference.endswith("%")
        and number * (100 if stated.endswith("%") else Fraction(1, 100)) == reference_number
    )  # fmt: skip


def number_said(answer):
    """The number of "34. This is because …", "34 (thirty-four)", "(B) 34" or "She has 34 apples", as a Fraction, or None."""
    first = re.split(r"[.;,] (?=[A-Z])| \(", re.sub(r"^\(?[A-E]\)\s?", "", answer))[0]
    if (number := rational(first)) is not None:
        return number
    sentence = SENTENCE.fullmatch(UNIT.sub("", first))
    return rational(sentence[1]) if sentence else None


def same_choice(stated, reference):
    """Whether two expressions are equal; of a multiple choice the letter is enough: (C) = C = "C) 34"."""
    if re.fullmatch(r"\(?[A-J]\)?", reference):
        letter = re.match(r"\(?([A-J])(?:\)|[.:]|$)", stated)
        return letter is not None and letter[1] == reference.strip("()")
    return stated == reference


SPELLINGS = tuple(
    (re.compile(pattern, re.IGNORECASE), to)
    for pattern, to in (
        (r"\\(?:leq?|leqslant)(?![a-z])", "≤"), (r"\\(?:geq?|geqslant)(?![a-z])", "≥"), (r"\\neq?(?![a-z])", "≠"),
        (r"\\?infty(?![a-z])|\binfinity\b", "∞"), (r"\\pi(?![a-z])|(?<![a-z])pi(?![a-z])", "π"), (r"\\cup(?![a-z])", "∪"),
        (r"\\(?:cdot|times)(?![a-z])", "*"), (r"\\pm(?![a-z])", "±"), (r"\\(?:emptyset|varnothing)(?![a-z])", "∅"),
        (r"\\\{|\\lbrace", "⟨"), (r"\\\}|\\rbrace", "⟩"), (r"\\[bv]?circ(?![a-z])", "°"), (r"\^\{?°\}?", "°"),
        (r"(begin|end)\{[bv]matrix\}", r"\1{pmatrix}"), (r"\\?sqrt(?![a-z])", "√"), (r",? (?:or|and) ", ","),
        (r"\\frac\s?(\w)\s?(\w)", r"\\frac{\1}{\2}"), (r"\\frac\s?(\w)\s?\{", r"\\frac{\1}{"), (r"([\^_√])\s?(\d+|\w)", r"\1{\2}"),
    )
)  # fmt: skip
SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")  # one between two digits separates two numbers
NAME = re.compile(r"\s*(?:[A-Za-z](?:_\{?\w\}?)?(?:\([A-Za-z]\))?|\((?:\s*[A-Za-z]\s*,?){2,4}\))\s*(?:=|\\in(?![a-z]))\s*")


def expression(answer):
    """What is no number, as the one string of all that mean it. The items of a list are read as answers of their own;
    a list and a set have no order, a tuple and an interval have."""
    for pattern, to in SPELLINGS:
        answer = pattern.sub(to, answer)
    if re.fullmatch(r"(?=.*[A-Za-z]{3})[A-Za-z0-9' .:-]*", answer):
        return " ".join(answer.casefold().split())  # words
    answer, before = SPACE.sub("", NAME.sub("", answer, count=1) if NAME.match(answer) else answer), None
    while answer != before:  # from the innermost braces outwards; each round removes one
        before = answer
        answer = re.sub(r"\\frac\{([^{}]*)\}(?:\{([^{}]*)\}|(\w))", lambda m: f"({m[1]})/({m[2] or m[3]})", answer)
        answer = re.sub(r"([\^√_])\{([^{}]*)\}", r"\1(\2)", answer)
    answer = re.sub(r"(?<=/)\((\w+|√\([^()]*\))\)|(?<![\w)√^_])\(([\wπ]*(?:√\([^()]*\))?)\)(?=/)", lambda m: m[1] or m[2] or "", answer)
    answer = re.sub(r"(?<=\w)\*(?=[^\d])", "", answer)
    if len(items := split_outside(answer, ",")) > 1:
        return "⟨" + ",".join(sorted(item_of(item) for item in items)) + "⟩"
    if answer[:1] in ("(", "[", "⟨") and answer[-1:] in (")", "]", "⟩") and closes_last(answer):
        items = [item_of(item) for item in split_outside(answer[1:-1], ",")]
        return answer[0] + ",".join(sorted(items) if answer[0] == "⟨" else items) + answer[-1]
    return "".join(sum_of(side) for side in re.split(r"([=<>≤≥≠])", answer))


def item_of(text):
    """One item of a list: its number or its expression."""
    text = NAME.sub("", text, count=1) if NAME.match(text) else text
    number = rational(text)
    return sum_of(text) if number is None else str(number)


def sum_of(text):
    """A sum with its terms in order: b + a → +a+b."""
    terms = split_outside(re.sub(r"(?<=[^\s+(\[,^*/±-])([+-])", "\0\\1", text), "\0")
    return text if len(terms) == 1 else "".join(sorted(term if term[0] in "+-" else "+" + term for term in terms if term))


def split_outside(text, separator):
    """Parts of the text between separators that stand in no brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([{⟨") - (character in ")]}⟩")
        if character == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def closes_last(text):
    """Whether the bracket that opens the text is closed by its last character."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "([⟨") - (character in ")]⟩")
        if depth == 0:
            return i == len(text) - 1
    return False


def canonical(stated):
    """What a stated answer means, as something to count votes with: a Fraction or a string."""
    normal = normalise(stated)
    number = rational(normal)
    return expression(normal) if number is None else number


def verify(text, answer, bare_number=False):
    """True if the last answer that `text` states equals `answer` (a text or a number). Never raises, whatever the text."""
    stated, reference = extract_answer(text, bare_number), str(answer)
    return stated is not None and len(reference) <= LONGEST and equal(stated, reference)
