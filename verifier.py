"""Which answer a text states, and whether it is right: never an exception, linear time.

A verdict is a reward, so a doubtful text is a wrong one. The answer must be stated in one of four
ways, and the last statement in the last 4,000 characters wins:

    Answer: 34          (also **Answer:** 34)
    \\boxed{34}
    #### 34
    <answer>34</answer>

A statement that is cut off (`\\boxed{3`) is none, and no earlier one stands in for it. A line
that states two different answers states none. A bare last number counts only where that is asked
for, and where nothing else is stated. Whether two answers are equal is decided by
system/equality.py or, with `--verifier math_verify`, by Math-Verify.
"""

import re

from system.equality import LONGEST, equal, normalise, rational

TAIL = 4_000  # characters at the end that must state the answer: this bounds the time
MOST_STATED = 5  # statements in one line; a line with more is wrong

MARKS = r"|\\boxed\s{0,3}\{|\\fbox\s{0,3}\{|####|<answer>"
STATEMENT = re.compile(r"answer(?:\s{1,3}is)?\s{0,3}\**\s{0,3}[:\uff1a]" + MARKS, re.IGNORECASE)
LABEL = r"|(?<=\{)(?:the )?(?:final |correct )?answer(?: is)?:"
SPECIAL_TOKEN = re.compile(r"<\|[^|<>\n]{1,40}\|>|</s>|<eos>|<end_of_turn>" + LABEL, re.IGNORECASE)
SIGN = r"(?:(?<![\w.,)+/*^-])[+-])?"
NUMBER = r"(?<![\w.,/])\d[\d,]{0,40}(?:\.\d{1,40})?(?:/\d{1,40})?%?(?![\w/])"
BARE_NUMBER = re.compile(SIGN + NUMBER, re.ASCII)


def extract_answer(text, bare_number=False):
    """The last answer that a text states, stripped, or None if there is none or it is doubtful.
    bare_number: where nothing is stated, the last number of the text is the answer."""
    text = SPECIAL_TOKEN.sub("", text[-TAIL:])
    marks = list(STATEMENT.finditer(text))[-4 * MOST_STATED :]
    marks = [m for m in marks if m.group() != "####" or not is_heading(line_after(text, m.end()))]
    if not marks:
        *_, number = [None, *BARE_NUMBER.finditer(text)] if bare_number else [None]
        return number and number.group().rstrip(",")
    line = text.rfind("\n", 0, marks[-1].start()) + 1
    marks = [m for m in marks if m.start() >= line]
    stated = [content_of(text, *pair) for pair in zip(marks, [*marks[1:], None])]
    if None in stated or len(stated) > MOST_STATED:
        return None
    stated = [answer for answer in stated if answer.strip("* .$")]
    if not stated or any(len(answer) > LONGEST for answer in stated):
        return None
    *earlier, last = stated
    return last if all(answer == last or equal(answer, last) for answer in earlier) else None


def content_of(text, mark, following):
    """What a statement says, "" if it only introduces `following` on its line, None if cut off."""
    kind, rest = mark.group().lower(), text[mark.end() :]
    if kind == "<answer>" or kind.endswith("{"):
        *stated, _ = re.split("</answer>", rest, maxsplit=1, flags=re.IGNORECASE)
        stated = up_to_closing_brace(rest) if kind.endswith("{") else stated[0] if stated else None
        inside = None not in (stated, following) and following.start() < mark.end() + len(stated)
        return "" if inside else stated and stated.strip()
    if following is None:
        return line_after(text, mark.end())
    # "Answer: $\boxed{34}$", "Answer: she has \boxed{34}"
    before = text[mark.end() : following.start()].strip(" *=:$\n")
    return before if len(before) <= LONGEST and rational(normalise(before)) is not None else ""


def line_after(text, start):
    """The rest of the line, stripped, or, if that is only marks, the next that says something."""
    for line in text[start : start + LONGEST + 10].split("\n")[:4]:
        if line.strip(" *$\t\r") not in ("", "\\[", "\\("):
            return re.split("</answer>", line, flags=re.IGNORECASE)[0].strip()
    return ""


def is_heading(line):
    """Whether what follows #### is the words of a markdown heading."""
    words = re.search(r"[A-Za-z]{3}", re.sub(r"\\[a-z]+", "", line))
    return words is not None and rational(normalise(line.split(" (")[0])) is None


def up_to_closing_brace(text):
    """What stands before the brace that closes an open one, or None if nothing closes it."""
    depth = 1
    for i, character in enumerate(text[: 4 * LONGEST]):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:i]
    return None


def verify(text, answer, bare_number=False, equal=equal):
    """Whether the last answer that `text` states equals `answer` (a text or a number).
    Args: equal, a function (stated, reference) → bool: `equality.equal` or Math-Verify's.
    Never raises, whatever text and answer are."""
    if not isinstance(text, str) or not isinstance(answer, (str, int, float)):
        return False
    if not isinstance(answer, str):
        answer = repr(answer) if abs(answer) < 1e100 else ""
    stated = extract_answer(text, bare_number)
    return stated is not None and 0 < len(answer) <= LONGEST and equal(stated, answer)
