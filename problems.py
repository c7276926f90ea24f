"""Problems: read from a file, put into the prompt template, turned into token ids."""

import json
from pathlib import Path

from run import BadInput


def load_problems(path):
    """Problems from a JSONL file: one {"problem": text, "answer": text or number} a line.

    Returns: a list of {"problem": str, "answer": str}. Other fields are kept out; blank lines are skipped.
    Raises: BadInput that names the file, and the line where one is wrong.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # not splitlines: it cuts at U+2028 and others too
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the problems {path}: {getattr(error, 'strerror', None) or error}") from None
    problems = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict) or not isinstance(row.get("problem"), str) or not row["problem"].strip():
            raise BadInput(f'{path}, line {number}: wants {{"problem": text, "answer": text or number}}, has no problem text')
        answer = row.get("answer")
        if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
            raise BadInput(f'{path}, line {number}: "answer" must be a text or a number')
        problems.append({"problem": row["problem"], "answer": str(answer)})
    if not problems:
        raise BadInput(f"{path} holds no problems")
    return problems


def encode_prompts(problems, tokenizer, template, prompt_length):
    """Adds "prompt" (token ids of the template filled in) to each problem; returns the same list.

    Raises: BadInput if a prompt is longer than `prompt_length` tokens.
    """
    for number, problem in enumerate(problems, start=1):
        problem["prompt"] = tokenizer(template.replace("{problem}", problem["problem"]))["input_ids"]
        if not 0 < len(problem["prompt"]) <= prompt_length:
            raise BadInput(
                f"problem {number} ({problem['problem'][:40]!r}) makes a prompt of {len(problem['prompt'])} tokens: "
                f"the limit is --prompt_length {prompt_length}, raise it or drop the problem"
            )
    return problems
