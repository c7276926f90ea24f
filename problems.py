"""Problems: read from a file or the hub, put into the prompt, turned into token ids.

A row of a file is one problem. These pairs of fields are understood, the first that a row has both of:

    problem, answer         as it is
    question, answer        GSM8K: the answer is what follows the last ####
    input, target           MAWPS: a number such as 14.0
    prompt, reward_model    DAPO-Math-17k: a list of chat messages, and ground_truth in reward_model

Chat messages are a whole prompt already, with their own wording: --prompt_template does not touch them.
"""

import csv
import json
import math
import re
from pathlib import Path

from run import BadInput

FIELDS = (("problem", "answer"), ("question", "answer"), ("input", "target"), ("prompt", "reward_model"))
KINDS = (".jsonl", ".json", ".csv", ".parquet")
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:@(\w+))?")  # OWNER/NAME:CONFIG@SPLIT


def prompted_problems(path, tokenizer, settings):
    """`load_problems` and `encode_prompts` as the settings of a run say."""
    problems = load_problems(path)
    return encode_prompts(
        problems, tokenizer, settings.prompt_template, settings.prompt_length, settings.chat_template, settings.drop_long_prompts
    )


def load_problems(path):
    """Problems from a .jsonl, .json, .csv or .parquet file, or from the hub: OWNER/NAME, OWNER/NAME:CONFIG, …@SPLIT (default: train).

    Returns: a list of {"problem": str, "answer": str}, with "messages" where the prompt is a list of chat messages.
    Raises: BadInput that names the file, and the line or row where one is wrong. No row is skipped but blank lines.
    """
    problems = [{"where": where} | problem_of(row, where) for where, row in rows_of(str(path))]
    if not problems:
        raise BadInput(f"{path} holds no problems")
    return problems


def rows_of(path):
    """Yields (where it stands, row) of a file or a hub data set."""
    kind, is_file, name = Path(path).suffix, Path(path).is_file(), HUB_NAME.fullmatch(path)
    if not is_file and (kind in KINDS or not name):
        raise BadInput(
            f"cannot read the problems {path}: no such file" + ("" if kind in KINDS else ", and no hub name (OWNER/NAME:CONFIG@SPLIT)")
        )
    if is_file and kind not in (".csv", ".json", ".parquet"):
        yield from rows_of_jsonl(path, text_of(path))
    elif kind == ".csv":
        reader = csv.DictReader(text_of(path).splitlines(keepends=True), strict=True)
        try:
            yield from ((f"{path}, line {reader.line_num}", row) for row in reader)
        except csv.Error as error:
            raise BadInput(f"{path}, line {reader.line_num}: not CSV ({error})") from None
    else:
        rows = rows_of_json(path, text_of(path)) if kind == ".json" else rows_by_datasets(path, is_file, name)
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def text_of(path):
    """A text file. Raises: BadInput."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the problems {path}: {getattr(error, 'strerror', None) or error}") from None


def rows_of_jsonl(path, text):
    """Yields (where, row) of its lines that are not blank. Raises: BadInput."""
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: it cuts at U+2028 and others too
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{path}, line {number}: not JSON ({error})") from None


def rows_of_json(path, text):
    """The list that a JSON file holds. Raises: BadInput."""
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON ({error})") from None
    if not isinstance(rows, list):
        raise BadInput(f"{path}: wants a list of problems")
    return rows


def rows_by_datasets(path, is_file, name):
    """The rows of a parquet file or, by its matched `name`, of a hub data set. Raises: BadInput."""
    datasets = need_datasets(path)
    try:
        if is_file:
            return datasets.Dataset.from_parquet(path)
        return datasets.load_dataset(name[1], name[2], split=name[3] or "train")
    except Exception as error:  # no network, no such name, no such split, no parquet: the libraries' own types are many
        where = "" if is_file else ", which is no file, from the hub"
        raise BadInput(f"cannot read the problems {path}{where}: {error}") from None


def need_datasets(path):
    """The package `datasets`, which only some sources need. Raises: BadInput that says how to install it."""
    try:
        import datasets
    except ImportError:
        what = "is read" if Path(path).is_file() else "is no file; if it is a name on the hub, it is read"
        raise BadInput(f"{path} {what} by the package datasets: pip install datasets") from None
    return datasets


def problem_of(row, where):
    """One row of a file → {"problem", "answer"} and, where it is a list of chat messages, "messages". Raises: BadInput."""
    pairs = [pair for pair in FIELDS if isinstance(row, dict) and row.keys() >= set(pair)]
    if not pairs:
        has = f"has {', '.join(map(str, row))}" if isinstance(row, dict) else "is no object"
        raise BadInput(f"{where}: wants the fields {', or '.join(' and '.join(pair) for pair in FIELDS)}; {has}"[:400])
    name, answer_name = pairs[0]
    text, answer, messages = row[name], row[answer_name], None
    if answer_name == "reward_model":
        answer_name = "reward_model.ground_truth"
        answer = answer.get("ground_truth") if isinstance(answer, dict) else None
        messages = text
        good = isinstance(messages, list) and all(
            isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
            for message in messages
        )
        if not good or not messages:
            raise BadInput(f'{where}: "prompt" must be a list of chat messages, each with role and content')
        text = "\n\n".join(message["content"] for message in messages)
    if not isinstance(text, str) or not text.strip():
        raise BadInput(f'{where}: "{name}" must be a text, and not empty')
    if name == "question" and isinstance(answer, str):
        answer = answer.rpartition("####")[2].strip()
    usable = isinstance(answer, (str, int, float)) and not isinstance(answer, bool) and str(answer).strip()
    if not usable or (isinstance(answer, float) and not math.isfinite(answer)):
        raise BadInput(f'{where}: "{answer_name}" must be a text or a number, and not empty')
    problem = {"problem": text, "answer": str(answer)}
    return problem | {"messages": [{n: m[n] for n in ("role", "content")} for m in messages]} if messages else problem


def encode_prompts(problems, tokenizer, template, prompt_length, chat_template=True, drop_long=False):
    """Adds "prompt" (token ids) to each problem; returns the list, without those that are too long if `drop_long`.

    The prompt is the template filled in, or the problem's own chat messages. Where `chat_template` and the tokenizer has
    one, it is said by the user in the model's chat format, up to where the assistant answers.
    Raises: BadInput if prompts are longer than `prompt_length` tokens: how many, and which is the first.
    """
    for problem in problems:
        messages = problem.get("messages")
        text = problem["problem"] if messages else template.replace("{problem}", problem["problem"])
        if chat_template and tokenizer.chat_template:
            messages = messages or [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            problem["prompt"] = tokenizer(text, add_special_tokens=False)["input_ids"]  # the format writes its own BOS
        else:
            problem["prompt"] = tokenizer(text)["input_ids"]
    bad = [problem for problem in problems if not 0 < len(problem["prompt"]) <= prompt_length]
    if bad and not drop_long:
        raise BadInput(
            f"{len(bad)} of {len(problems)} prompts are longer than --prompt_length {prompt_length} (or empty); the first, of "
            f"{len(bad[0]['prompt'])} tokens: {bad[0].get('where', 'problem')} ({bad[0]['problem'][:40]!r}); raise it, or --drop_long_prompts"
        )
    if len(bad) == len(problems):
        first = bad[0].get("where", "problem")
        raise BadInput(f"all {len(bad)} prompts, from {first} on, are longer than --prompt_length {prompt_length}: raise it")
    if bad:
        print(f"warning: dropped {len(bad)} of {len(problems)} problems: their prompts are longer than --prompt_length {prompt_length}")
    return [problem for problem in problems if 0 < len(problem["prompt"]) <= prompt_length]


def repeated(problems, others):
    """How many of `problems` stand, but for spaces, also among `others`."""
    known = {" ".join(other["problem"].split()) for other in others}
    return sum(" ".join(problem["problem"].split()) in known for problem in problems)
