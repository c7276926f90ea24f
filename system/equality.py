"""Are these two answers the same? Exact: no eval, sympy or rounding; bounded time, no exceptions.

What is written as a rational number is compared as a fraction: 1,000 = 1000, 0.5 = 1/2 =
\\frac{1}{2} = 50%. Sums and products are not worked out: to "What is 25 + 49?" the answer "25 + 49"
is none. All else is compared as it is spelt, but for spaces, dollars, \\left and the case of words.
What LaTeX means (x + 1 = 1 + x, lists, sets) is for Math-Verify: `math_equality.py`.
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
    r"(?<!\\)\\(?:left(?![a-z])|right(?![a-z])|[,;:! ()\[\]]|(?:q?quad|displaystyle)(?![a-z])|"
    r"(?=[%$#&]))|\*\*|__|[$`~£€₹¥\x22“”]")
NO_UNIT = (  # a word after a number that changes what it means
    r"is|or|and|but|not|to|pi|percent|dozen|hundred|thousand|[mb]illion|trillion|factorial|squared|"
    r"cubed|modulo|mod|base|[ap]m|k|bn|lakh|halves|thirds|(?:four|fif|six|seven|eigh|nin|ten)ths|"
    r"plus|minus|divided|below|in binary")
UNIT = re.compile(
    r"(?<=[\d)}])\s*(?:(?:\^?\{?\\circ\}?|°)\s?[CF]?|"
    r"(?:(?-i: [mgsLh](?:/[sh])?|[ckm]m|k?m/h|m/s|kg|mL|mph|ft|hours)|"
    rf"(?: (?!(?:{NO_UNIT})\b)[A-Za-z]{{2,}}(?:/[A-Za-z]+)?){{1,3}})"
    r"(?:\s?(?:\^\s?\{?\d\}?|²|³))?)$", re.IGNORECASE)
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
LEFT = re.compile(  # what may stand to the left of an equals sign: a name, or numbers
    r"(?!.*\b(?:not|or|and|if)\b)(?:\\?[A-Za-z][A-Za-z ]{0,60}(?:\([^()]{1,20}\))?|"
    r"(?:[\d\s+*/().,^×÷{}-]|(?<=\d) ?x ?(?=\d)|\\(?:times|cdot|div|frac)(?![a-z]))*)")
# fmt: on


def normalise(answer):
    """An answer without what has no meaning: markdown, dollars, spaces, wrappers, last dot."""
    answer = re.sub(r"(?<=\d)\\[,;](?=\d{3})|\\!", "", answer.strip().rstrip(".$ \\;"))  # 10\,000
    answer = re.sub("[\u2212\u2013]", "-", answer.replace("{,}", ","))
    answer = re.sub(r"\\[dtc](frac|binom)", r"\\\1", answer)
    answer = re.sub(r"(?<![\w}\]^_ ])\{([\d.]{1,20})\}", r"\1", answer)  # {18}
    for _ in range(3):  # wrappers nest: \boxed{\text{…}}
        answer = WRAPPER.sub(r" \1", answer)
    answer = LEAD_IN.sub("", " ".join(NOISE.sub(" ", answer).split()))
    answer = re.sub(r" ?\b(?:percent|per cent)\b", "%", answer)
    return answer.strip("*").rstrip("., ").strip()


def rational(answer):
    """The number that a normalised answer is written as, a Fraction, or None: decimals, fractions,
    mixed numbers, percentages, 1,000, a·10^n, `x = 5`, `2+3 = 5`, units."""
    *names, answer = answer.split("=")
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
    """Whether two stated answers are the same number or, where neither is one, the same text. A
    percentage equals its fraction and, where it is asked for, the number before "%"."""
    stated, reference = normalise(stated), normalise(reference)
    number, reference_number = rational(stated), rational(reference)
    names = {text.partition("=")[0].strip() for text in (stated, reference) if "=" in text}
    if len(names) > 1 and all(map(str.isalpha, names)):  # x = 3 is not y = 3
        return False
    if reference_number is None:
        return number is None and spelling(stated) == spelling(reference)
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
    sentence = SENTENCE.fullmatch(UNIT.sub("", first))
    return rational(first) if sentence is None else rational(sentence[1])


def spelling(answer):
    """What is no number, without spaces and, where it is words, in lower case; (C) is C."""
    answer = re.sub(r"^\(([A-Z])\)$", r"\1", answer)
    if re.fullmatch(r"(?=(?i:no)$|.*[A-Za-z]{3})[A-Za-z0-9' .:-]*", answer):
        return " ".join(answer.casefold().split())
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", answer)  # one between two digits separates numbers


def canonical(stated):
    """What a stated answer means, as something to count votes with: a Fraction or a string."""
    number = rational(normal := normalise(stated))
    return spelling(normal) if number is None else number
