"""Your own reward, `--reward FILE.py:FUNCTION`: loaded, asked once with all answers, and checked.

    def FUNCTION(prompts, completions, **columns):
        return [0.2, (1, True), …]

Arguments are lists with an entry an answer: the problem's text, the answer's, `truncated` (was it
cut?), and each column of the problem's file. Of each answer it returns a number, the reward, or a
number and a bool: is it correct? Without a bool the verifier says that.
"""

import functools
import inspect
import os
import runpy
import signal
from numbers import Real
from pathlib import Path
from traceback import walk_stack, walk_tb

from system import distributed
from system.run import BadInput, require, say_once, written_whole


@functools.cache
def load(name):
    """(function, its file's text) of FILE.py:FUNCTION, read once a process. Raises: BadInput."""
    file, _, wanted = name.partition(":")
    try:
        source, names = Path(file).read_text(), runpy.run_path(file)
    except (Exception, SystemExit) as error:
        raise BadInput(f"--reward {name}: {type(error).__name__}: {error}") from None
    require(inspect.isfunction(names.get(wanted)), f"--reward {name}: {file} has no such function")
    return names[wanted], source


def keep_source(name, run_dir):
    """Copies the function's file to RUN_DIR/reward.py. Raises: BadInput if another is there."""
    copy, source = Path(run_dir) / "reward.py", load(name)[1]
    said = f"--reward {name}: the file is not what it was, {copy}: put that back, or remove it"
    require(not copy.exists() or copy.read_text() == source, f"{said} to go on with the new one")
    if not distributed.rank():
        with written_whole(copy) as file:
            file.write(source.encode())


def ask(settings, answers):
    """[(reward or None, correct or None)] of this rank's answers, [(problem, text, ended)].
    Raises: BadInput on all ranks if it fails on one; what takes too long ends the process."""
    found, wrong = [(None, None)] * len(answers), None
    try:
        if answers and settings and settings.reward:
            found = checked(load(settings.reward)[0], settings.reward_seconds, answers)
    except BadInput as error:
        wrong = f"--reward {settings.reward}: {error}"
    for said in filter(None, distributed.all_ranks(wrong)):
        raise BadInput(said)
    return found


def checked(function, seconds, answers):
    """What the function returns of the answers, asked once. Raises: BadInput."""
    asked = f"asked about {len(answers)} answers, the first to {answers[0][0]['where']}"

    def end(number, frame):  # no exception: the function could catch it, or wait for its threads
        who = f" on rank {distributed.rank()}" if distributed.rank() else ""
        said = f"{place(function, [*walk_stack(frame)][::-1])} took longer than --reward_seconds"
        os.write(2, f"\nerror{who}: {wrong or f'{said} {seconds:g}'}, {asked}\n".encode())
        os._exit(2)

    wrong, before = None, signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        (values, wrong), part = called(function, answers), answers
        while wrong and len(part) > 1:  # by which answer? a half brings the same about
            halves = part[: len(part) // 2], part[len(part) // 2 :]
            part = next((half for half in halves if called(function, half)[1] == wrong), ())
        where = f"asked about {part[0][0]['where']}" if part else asked
        require(not wrong, f"{wrong}, {where}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    said, found = f"{place(function)} returned", []
    count = len(values) if isinstance(values, (list, tuple)) else None
    require(count is not None, f"{said} no list but {values!r:.60}, {asked}")
    require(count == len(answers), f"{said} a list of {count}, {asked}")
    for value, (problem, *_) in zip(values, answers):
        pair = isinstance(value, (list, tuple)) and len(value) == 2
        number, correct = value if pair else (value, None)
        good = isinstance(number, Real) and type(number) is not bool and abs(number) < 1e30
        good &= type(correct) is bool or (correct is None and problem["answer"] != "")
        told = f"{said} {value!r:.60}, asked about {problem['where']}"
        wants = "a finite number, or that and a bool: is it correct?"
        require(good, f"{told}: wants {wants} (a must where there is no answer)")
        found.append((float(number), correct))
        by = "the verifier" if correct is None else "the function's bool"
        say_once(f"--reward: whether an answer is correct, {by} says")
    return found


def called(function, answers):
    """(what it returns, None) or, if it raises something, (None, "FILE:LINE: what")."""
    problems, texts, ended = zip(*answers)
    rows = [problem["columns"] for problem in problems]
    names = dict.fromkeys(name for row in rows for name in row if name)
    columns = {name: [row.get(name) for row in rows] for name in names}
    columns |= {"completions": list(texts), "truncated": [not whole for whole in ended]}
    try:
        return function(**columns | {"prompts": [p["problem"] for p in problems]}), None
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {distributed.first_line(error)}"
        return None, f"{place(function, walk_tb(error.__traceback__))}: {said}"


def place(function, frames=()):
    """FILE:LINE of the innermost of the frames that is in the function's file, or its first."""
    code = inspect.unwrap(function).__code__
    lines = [line for frame, line in frames if frame.f_code.co_filename == code.co_filename]
    return f"{code.co_filename}:{[code.co_firstlineno, *lines][-1]}"
