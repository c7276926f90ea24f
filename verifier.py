"""Is this answer right? Which answer a text states, and whether it is the expected one: never an exception, linear time.

A verdict is a reward, so a doubtful text is a wrong one. The answer must be stated in one of four ways, and the last
statement in the last 4,000 characters wins:

    Answer: 34          (also **Answer:** 34)
    \\boxed{34}
    #### 34
    <answer>34</answer>

A statement that is cut off (`\\boxed{3`) is none, and no earlier one stands in for it; a line that states two different
answers states none. A bare last number counts only where that is asked for, and where nothing else is stated. When two
answers are equal is equality.py's to say or, with `--verifier math_verify`, math_verifier.py's.
"""

import re

from equality import LONGEST, equal, normalise, rational

TAIL = 4_000  # characters at the end of the text in which the answer must be stated: this bounds the time
MOST_STATED = 5  # statements in one line; a line with more is wrong

STATEMENT = re.compile(r"answer(?:\s{1,3}is)?\s{0,3}\**\s{0,3}[:\uff1a]|\\boxed\s{0,3}\{|\\fbox\s{0,3}\{|####|<answer>", re.IGNORECASE)
SPECIAL_TOKEN = re.compile(
    r"<\|[^|<>\n]{1,40}\|>|</s>|<eos>|<end_of_turn>|(?<=\{)(?:the )?(?:final |correct )?answer(?: is)?:", re.IGNORECASE
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
    return stated[-1] if all(answer == stated[-1] or equal(answer, stated[-1]) for answer in stated[:-1]) else None


def content_of(text, mark, following):
    """What one statement says, "" if it only introduces the `following` one on its line, None if it is cut off."""
    kind, rest = mark.group().lower(), text[mark.end() :]
    if kind == "<answer>" or kind.endswith("{"):
        *stated, _ = re.split("</answer>", rest, maxsplit=1, flags=re.IGNORECASE)
        stated = up_to_closing_brace(rest) if kind.endswith("{") else stated[0] if stated else None
        inside = stated is not None and following is not None and following.start() < mark.end() + len(stated)
        return "" if inside else stated and stated.strip()
    stated = line_after(text, mark.end())
    if following is None:
        return stated
    before = text[mark.end() : following.start()].strip(" *=:$\n")  # "Answer: $\boxed{34}$", "Answer: she has \boxed{34}"
    return before if len(before) <= LONGEST and rational(normalise(before)) is not None else ""


def line_after(text, start):
    """The rest of the line, stripped, or, where nothing but marks stands there, the next line that says something."""
    for line in text[start : start + LONGEST + 10].split("\n")[:4]:
        if line.strip(" *$\t\r") not in ("", "\\[", "\\("):
            return re.split("</answer>", line, flags=re.IGNORECASE)[0].strip()
    return ""


def is_heading(line):
    """Whether what follows #### is the words of a markdown heading."""
    return re.search(r"[A-Za-z]{3}", re.sub(r"\\[a-z]+", "", line)) is not None and rational(normalise(line.split(" (")[0])) is None


def up_to_closing_brace(text):
    """What stands before the brace that closes an already open one, or None if nothing closes it."""
    depth = 1
    for i, character in enumerate(text[: 4 * LONGEST]):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:i]
    return None


def verify(text, answer, bare_number=False):
    """True if the last answer that `text` states equals `answer` (a text or a number). Never raises, whatever they are."""
    if not isinstance(text, str) or not isinstance(answer, (str, int, float)):
        return False
    reference = answer if isinstance(answer, str) else repr(answer) if abs(answer) < 1e100 else ""
    stated = extract_answer(text, bare_number)
    return stated is not None and 0 < len(reference) <= LONGEST and equal(stated, reference)
