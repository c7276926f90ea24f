"""Are these two answers the same? Exact: no eval, sympy or rounding; bounded time, no exceptions.

What is written as a rational number is compared as a fraction: 1,000 = 1000, 0.5 = 1/2 =
\\frac{1}{2} = 50%. Sums and products are not worked out: to "What is 25 + 49?" the answer "25 + 49"
is none. All else is compared as a string in which what has no meaning is gone: spaces, \\left,
dollars, the order of a list. 1 + x = x + 1 is for Math-Verify: `math_equality.py`.
"""

import re
from fractions import Fraction

LONGEST = 300  # characters of a stated answer; a longer one is wrong

# fmt: off
LEAD_IN = re.compile(
    r"^(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final |correct )?answer is:? |"
    r"\.? I hope it is correct\.?$", re.IGNORECASE)
WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|operatorname|boxed|[fm]box)\s?\{([^{}]*)\}")
NOISE = re.compile(
    r"(?<!\\)\\(?:left(?![a-z])|right(?![a-z])|[,;:! ()\[\]]|(?:q?quad|displaystyle|large|Large|bf|"
    r"rm|checkmark|square|blacksquare)(?![a-z])|(?=[%$#&]))|\*\*|__|[$`~£€₹¥\x22“”✅✓✔]")
NO_UNIT = (  # a word after a number that changes what it means
    r"is|or|and|but|not|to|pi|percent|dozen|hundred|thousand|[mb]illion|trillion|factorial|squared|"
    r"cubed|modulo|mod|base|[ap]m|k|bn|lakh|halves|thirds|(?:four|fif|six|seven|eigh|nin|ten)ths|"
    r"plus|minus|divided|below|in binary")
UNIT = re.compile(
    r"(?<=[\d)}])\s*(?:(?:\^?\{?\\circ\}?|°)\s?[CF]?|"
    r"(?:(?-i: [mgsLh](?:/[sh])?|[ckm]m|k?m/h|m/s|kg|mL|mph|ft|hours)|"
    rf"(?: (?!(?:{NO_UNIT})\b)[A-Za-z]{{2,}}(?:/[A-Za-z]+)?){{1,3}})"
    r"(?:\s?(?:\^\s?\{?\d\}?|²|³))?)$", re.IGNORECASE)
TEXT_UNIT = re.compile(
    r"(?<=[\d)}i])(?:(?:\s|\\[,; ]|~|/)*\\(?:text|mathrm|mbox|textrm)\s?"
    rf"\{{[\s~]*(?!(?:{NO_UNIT})\b)[A-Za-z][A-Za-z ./'’]*\}}(?:\^\s?\{{?-?\d\}}?)?){{1,3}}$")
THOUSANDS = re.compile(r"(?<![\d.(])[+-]?\d{1,3}(?:,\d{3})+(?!\d)")
LATEX_FRACTION = re.compile(r"\\frac\s?(?:\{([^{}]+)\}|(\d))\s?(?:\{([^{}]+)\}|(\d))")
NUMBER = re.compile(  # sign, whole, numerator, denominator, percent, and a power of ten
    r"([+-]?)(?:(\d{1,100})\s+)?([+-]?(?:\d{1,100}(?:\.\d{0,100})?|\.\d{1,100}))"
    r"(?:/([+-]?\d{1,100}(?:\.\d{1,100})?))?(%?)"
    r"(?:(?:\*|×|\\times|\\cdot)10\^(?:\{([+-]?\d{1,3})\}|([+-]?\d{1,3}))|e([+-]?\d{1,3}))?",
    re.ASCII)
SENTENCE = re.compile(
    r"(?!.*\b(?:not|no|never|isn't|wrong|if|or|but|maybe|negative|minus|root|half|twice|double|log|"
    r"(?:than|between|about|around|approximately|over|under|up to|"
    r"least|most|times|plus|less)(?=\s\d))\b)(?:[A-Za-z][A-Za-z'’, ]*?:?\s)?([+-]?[\d.,/%]+)"
    rf"(?: (?!(?:{NO_UNIT})\b)[A-Za-z'’-]+(?: [A-Za-z'’-]+){{0,10}})?", re.IGNORECASE)
SYMBOL = (  # what may be set equal: x, x_1, f(2), f^{-1}(x), AB, |z|, \frac{m}{n}, \angle A, \cos A
    r"(?:(?:\\(?:angle|triangle|cos|sin|tan)|m(?=\s?\\angle))\s?)*"
    r"(?:\|[A-Za-z]\||\\frac\{[A-Za-z]\}\{[A-Za-z]\}|"
    r"(?:[A-Za-z]{1,12}|\\(?:theta|alpha|beta|gamma|phi|lambda|mu|sigma|omega|Delta))'?"
    r"(?:_(?:[{(]\w{1,9}[)}]|\w)|\^[{(]-1[)}])?(?:\([^()]{1,20}(?:\([^()]{1,20}\))?\)){0,2})")
LEFT = re.compile(  # what may stand to the left of an equals sign
    r"(?!.*\b(?:not|or|and|if)\b)(?:[A-Za-z][A-Za-z ]{0,60}|"
    rf"{SYMBOL}(?:\s?[+-]\s?{SYMBOL}){{0,4}}|"
    r"(?:[\d\s+*/().,^×÷{}-]|(?<=\d) ?x ?(?=\d)|\\(?:times|cdot|div|frac)(?![a-z]))*)")
ASSIGNED = re.compile(r"(?:^|, ?| (?:or|and) )([A-Za-z])\s?=")
# fmt: on


def normalise(answer):
    """An answer without what has no meaning: markdown, dollars, spaces, wrappers, last dot."""
    answer = TEXT_UNIT.sub("", answer.strip().rstrip(".$ \\;"))
    answer = re.sub(r"(?<=\d)\\[,;](?=\d{3})|\\!", "", answer)  # 10\,000 and 10,\!000
    answer = re.sub("[\u2212\u2013]", "-", answer.replace("{,}", ","))
    answer = re.sub(r"\\[dtc](frac|binom)", r"\\\1", answer)
    answer = re.sub(r"\\\\\[[\w.]{1,8}\]", r"\\\\", answer)  # a matrix's \\[4pt]
    answer = re.sub(r"(?<![\w}\]^_ ])\{([\d.]{1,20})\}", r"\1", answer)  # {18}
    for _ in range(3):  # wrappers nest: \boxed{\text{…}}
        answer = WRAPPER.sub(r" \1", answer)
    answer = LEAD_IN.sub("", " ".join(NOISE.sub(" ", answer).split()))
    answer = re.sub(r" ?\b(?:percent|per cent)\b", "%", answer)
    return answer.strip("*").rstrip("., ").strip()


def rational(answer):
    """The number that a normalised answer is written as, a Fraction, or None: decimals, fractions,
    mixed numbers, percentages, 1,000, a·10^n, `x = 5`, `2+3 = 5`, units."""
    *names, answer = split_outside(answer, "=")
    if len(names) > 8 or not all(LEFT.fullmatch(name.strip()) for name in names):
        return None
    answer = answer.strip()
    answer = re.sub(r"^([+-]?)10\s?\^", r"\g<1>1*10^", answer)
    answer = THOUSANDS.sub(lambda number: number.group().replace(",", ""), UNIT.sub("", answer))
    answer = LATEX_FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]} ", answer).strip()
    answer = re.sub(r"^([+-])\s+", r"\1", re.sub(r"\s*([/%*×^]|\\times|\\cdot)\s*", r"\1", answer))
    match = NUMBER.fullmatch(answer[1:-1].strip() if answer[:1] + answer[-1:] == "()" else answer)
    if match is None:
        return None
    sign, whole, numerator, denominator, percent, *powers = match.groups()
    if whole and (denominator is None or numerator[0] in "+-"):  # "3 4" is two numbers, not one
        return None
    if denominator and Fraction(denominator) == 0:
        return None
    value = Fraction(numerator) / Fraction(denominator or 1) + Fraction(whole or 0)
    value *= Fraction(10) ** int(next(filter(None, powers), 0))
    value = (-value if sign == "-" else value) / (100 if percent else 1)
    agrees = all(rational(name) in (None, value) for name in names)  # not "17 = 18"
    return value if agrees else None


def equal(stated, reference):
    """Whether two stated answers are the same number or, where neither is one, expression. A
    percentage equals its fraction and, where it is asked for, the number before "%"."""
    stated, reference = normalise(stated), normalise(reference)
    reference_number = rational(reference)
    exact, about, rounded = stated.replace("\\approx", "≈").partition("≈")
    if about:  # √51 ≈ 7.14 is √51 and, where a number is asked for, 7.14
        asked_for = reference_number is not None and rational(exact.strip()) is None
        stated = (rounded if asked_for or not exact.strip() else exact).strip()
    number = rational(stated)
    names, reference_names = set(ASSIGNED.findall(stated)), set(ASSIGNED.findall(reference))
    if names and reference_names and names != reference_names:
        return False  # x = 3 is not y = 3
    if reference_number is None:
        if re.fullmatch(r"\(?[A-J]\)?", reference):
            return chosen(stated) == reference.strip("()")
        return number is None and expression(stated) == expression(reference)
    number = number_said(stated) if number is None else number
    percent = stated.endswith("%") - reference.endswith("%")
    return number is not None and reference_number in (number, number * Fraction(100) ** percent)


def number_said(answer):
    """The number of "34. That is …", "34 (thirty)", "(B) 34" or "She has 34 apples", or None."""
    answer = re.sub(r"^\(?[A-E]\)\s?", "", answer)
    first = re.split(r"[.;,] (?=[A-Z])|,? (?:because|since) | - (?=[A-Za-z]{2} ?)| \(", answer)[0]
    second = r"\W*(?:or|and|not|no|wait|actually|maybe|perhaps)\b"
    if re.match(second, answer[len(first) :], re.IGNORECASE):
        return None
    values = {rational(value) for value in re.split(r",? or ", first)}  # "3/4 or 0.75"
    if len(values) == 1 and None not in values:
        return values.pop()
    sentence = SENTENCE.fullmatch(UNIT.sub("", first))
    return rational(sentence[1]) if sentence else None


def chosen(answer):
    """The letter of (C), C, "C) 34", "Option C", "C because …", or None if another is named too."""
    first = r"(?:(?:option|choice) )?\(?((?-i:[A-J]))(?:\)|[.:]|$|,? (?:because|since|-) )"
    second = r"\bor\b|(?<![A-Za-z])[A-J](?:\)|[.:]|$)"
    letter = re.match(first, answer, re.IGNORECASE)
    return letter[1] if letter and not re.search(second, answer[letter.end() :]) else None


SPELLINGS = tuple((re.compile(pattern), to) for pattern, to in (
    (r"\\(?:leq?|leqslant)(?![a-z])", "≤"), (r"\\(?:geq?|geqslant)(?![a-z])", "≥"),
    (r"\\neq?(?![a-z])", "≠"), (r"\\?infty(?![a-z])|\b[Ii]nfinity\b", "∞"),
    (r"\\pi(?![a-z])|(?<![A-Za-z])pi(?![a-z])", "π"), (r"\\cup(?![a-z])", "∪"),
    (r"\\(?:cdot|times)(?![a-z])", "*"), (r"\\pm(?![a-z])", "±"), (r"\\?sqrt(?![a-z])", "√"),
    (r"\\(?:emptyset|varnothing)(?![a-z])", "∅"), (r",? (?:or|and) ", ","),
    (r"\\frac\s?(\w)\s?(\w)", r"\\frac{\1}{\2}"), (r"([\^_√])\s?(\d+|\w)", r"\1{\2}"),
))  # fmt: skip
SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")  # one between two digits separates two numbers


def expression(answer):
    """What is no number, as the one string of all spellings of it: a list in any order."""
    for pattern, to in SPELLINGS:
        answer = pattern.sub(to, answer)
    if re.fullmatch(r"(?=(?i:no)$|.*[A-Za-z]{3})[A-Za-z0-9' .:-]*", answer):
        return " ".join(answer.casefold().split())  # words
    answer = re.sub(rf"^{SYMBOL}\s*=\s*", "", SPACE.sub("", answer))
    return ",".join(sorted(split_outside(answer, ",")))


def split_outside(text, separator):
    """Parts of the text between separators that stand in no brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([{⟨") - (character in ")]}⟩")
        if character == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def canonical(stated):
    """What a stated answer means, as something to count votes with: a Fraction or a string."""
    number = rational(normal := normalise(stated))
    return expression(normal) if number is None else number
