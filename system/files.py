"""Problems from .jsonl, .json, .csv and .parquet files, and from data sets of the hub.

A row of a file is one problem. These pairs of fields are understood, the first that a row has:

    problem, answer         as it is
    question, answer        GSM8K: the answer is what follows the last ####
    input, target           MAWPS: a number such as 14.0
    prompt, reward_model    DAPO-Math-17k: chat messages, which --prompt_template does not touch,
                            and ground_truth in reward_model
"""

import csv
import json
import math
import re
from pathlib import Path

from system.run import BadInput, require

KINDS = (".jsonl", ".json", ".csv", ".parquet")
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:@(\w+))?")  # OWNER/NAME:CONFIG@SPLIT
FIELDS = (("problem", "answer"), ("question", "answer"), ("input", "target"),
          ("prompt", "reward_model"))  # fmt: skip


def load_problems(path, answers=True):
    """A list of {"problem": str, "answer": str, "where": str, "columns": the row}, with "messages"
    where the prompt is a list of chat messages; with answers=False one without an answer is
    good, and has "". Raises: BadInput that names the file, and the bad row."""
    rows = rows_of(str(path))
    problems = [{"where": w, "columns": row} | problem_of(row, w, answers) for w, row in rows]
    require(problems, f"{path} holds no problems")
    return problems


def problem_of(row, where, answers=True):
    """One row of a file → {"problem", "answer"}, maybe "messages". Raises: BadInput."""
    fields = [pair[: 1 + answers] for pair in FIELDS]
    pairs = [pair for pair in fields if isinstance(row, dict) and row.keys() >= set(pair)]
    if not pairs:
        has = f"has {', '.join(map(str, row))}" if isinstance(row, dict) else "is no object"
        wanted = ", or ".join(" and ".join(pair) for pair in fields)
        raise BadInput(f"{where}: wants the fields {wanted}; {has}"[:400])
    name, key = next(pair for pair in FIELDS if pair[0] == pairs[0][0])
    text, answer, messages = row[name], row.get(key), {}
    if name == "prompt":
        listed = isinstance(text, list) and all(isinstance(message, dict) for message in text)
        chat = listed and {type(m.get(n)) for m in text for n in ("role", "content")} == {str}
        require(chat, f'{where}: "prompt" must be a list of chat messages (role and content)')
        messages["messages"] = [{n: message[n] for n in ("role", "content")} for message in text]
        text = "\n\n".join(message["content"] for message in text)
        key = "reward_model.ground_truth"
        answer = answer.get("ground_truth") if isinstance(answer, dict) else None
    require(isinstance(text, str) and text.strip(), f'{where}: "{name}" must be a text, not empty')
    if name == "question" and isinstance(answer, str):
        answer = answer.rpartition("####")[2].strip()
    answer = "" if answer is None and not answers else answer
    usable = type(answer) in (str, int) or (type(answer) is float and math.isfinite(answer))
    usable = usable and (str(answer).strip() or not answers)
    require(usable, f'{where}: "{key}" must be a text or number, not empty')
    return {"problem": text, "answer": str(answer)} | messages


def rows_of(path):
    """Yields (where it stands, row); no row is skipped but blank lines. Raises: BadInput."""
    kind, is_file, name = Path(path).suffix, Path(path).is_file(), HUB_NAME.fullmatch(path)
    nor = "" if kind in KINDS else ", and no hub name (OWNER/NAME:CONFIG@SPLIT)"
    require(is_file or (name and nor), f"cannot read the problems {path}: no such file{nor}")
    if is_file and kind not in (".csv", ".json", ".parquet"):
        lines = text_of(path).split("\n")  # not splitlines: it cuts at U+2028 and others too
        numbered = ((f"{path}, line {n}", line) for n, line in enumerate(lines, start=1))
        yield from ((where, parsed(line, where)) for where, line in numbered if line.strip())
    elif kind == ".csv":
        reader = csv.DictReader(text_of(path).splitlines(keepends=True), strict=True)
        try:
            yield from ((f"{path}, line {reader.line_num}", row) for row in reader)
        except csv.Error as error:
            raise BadInput(f"{path}, line {reader.line_num}: not CSV ({error})") from None
    else:
        rows = parsed(text_of(path), path) if kind == ".json" else by_datasets(path, is_file, name)
        require(kind != ".json" or isinstance(rows, list), f"{path}: wants a list of problems")
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def text_of(path):
    """A text file. Raises: BadInput."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the problems {path}: {error}") from None


def parsed(text, where):
    """The JSON in a text. Raises: BadInput."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON ({error})") from None


def by_datasets(path, is_file, name):
    """The rows of a parquet file or, by its matched `name`, of a hub data set."""
    try:
        import datasets
    except ImportError:
        what = "is read" if is_file else "is no file; if it is a name on the hub, it is read"
        raise BadInput(f"{path} {what} by the package datasets: pip install datasets") from None
    try:
        if is_file:
            return datasets.Dataset.from_parquet(path)
        return datasets.load_dataset(name[1], name[2], split=name[3] or "train")
    except Exception as error:  # no network, no such name or split, no parquet: the types are many
        where = "" if is_file else ", which is no file, from the hub"
        raise BadInput(f"cannot read the problems {path}{where}: {error}") from None
