"""Faults of one line, put in one at a time: does a test notice?

    python -m tests.mutants                 # all of them
    python -m tests.mutants --quick         # without those that need a training run: for CI
    python -m tests.mutants --only losses   # those whose row in the table has this text

A mutant is (file, old text, new text, the tests that should notice). The old text stands exactly
once in the file; if it does not, the mutant is stale, which is said, with exit code 2. A mutant is
caught if one of its tests fails, and only then: a test that cannot be collected or does not end is
an error too. Survivors are listed, with exit code 1.

Each is tried in a copy of the tree, in a process forked from this one, which has imported torch and
transformers already.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import pytest
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.utils.tensorboard
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification  # noqa: F401
from transformers.models.gpt2 import modeling_gpt2  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

ROOT = Path(__file__).parent.parent
LIMIT = 300  # seconds that a mutant's tests may take

QUICK = []
SLOW = []


def copy_of_the_tree(directory):
    """Copies the files that git knows or would add, to be changed."""
    listed = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, text=True).split("\0"):
        if name and (ROOT / name).is_file() and not name.startswith("results/"):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, directory / name)
    return directory


def forked(copy, tests, log):
    """Starts pytest on tests of a copy of the tree. Returns: the process id."""
    if pid := os.fork():
        return pid
    os.setsid()  # what the tests start ends with them
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(copy)
    sys.path[:] = [str(copy), *(p for p in sys.path if Path(p).resolve() != ROOT)]
    sys.dont_write_bytecode = True  # two mutants of one size and second would share it
    code = pytest.main(["-x", "-q", "--tb=short", "-p", "no:cacheprovider", *tests])
    sys.stdout.flush()
    os._exit(code)


def exit_codes(jobs, copies, label):
    """Yields (job, pytest's exit code or None if it did not end, log) of each job, as they end.
    Args: jobs, (file, old, new, tests), file None for the tree as it is."""
    waiting, running, free = list(jobs), {}, list(copies)
    bar = tqdm(total=len(waiting), desc=label, unit="mutant", leave=False)
    while waiting or running:
        while waiting and free:
            job, copy = waiting.pop(0), free.pop()
            file, old, new, tests = job
            if file:
                text = (ROOT / file).read_text()
                (copy / file).write_text(text.replace(old, new))
            log = copy.with_suffix(".log")
            log.write_text("")
            pid = forked(copy, [f"tests/{test}" for test in tests.split()], log)
            running[pid] = job, copy, log, time.monotonic() + LIMIT
        for pid, (job, copy, log, until) in list(running.items()):
            late = time.monotonic() > until
            if late:
                os.killpg(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, 0 if late else os.WNOHANG)
            if ended:
                del running[pid]
                if job[0]:
                    shutil.copyfile(ROOT / job[0], copy / job[0])
                free.append(copy)
                bar.update()
                yield job, None if late else os.waitstatus_to_exitcode(status), log.read_text()
        time.sleep(0.02)
    bar.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="without those of a training run")
    parser.add_argument("--only", default="", help="those whose row has this text")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, help="mutants side by side")
    parser.add_argument("--verbose", action="store_true", help="say what noticed each mutant")
    asked = parser.parse_args()
    mutants = QUICK + ([] if asked.quick else SLOW)
    mutants = [mutant for mutant in mutants if any(asked.only in text for text in mutant)]

    stale = [m for m in mutants if (ROOT / m[0]).read_text().count(m[1]) != 1]
    for file, old, *_ in stale:
        print(f"stale: {file} has {(ROOT / file).read_text().count(old)} times {old!r}")
    if stale:
        return 2
    tqdm.monitor_interval = 0  # no thread: this process forks
    broken, survived, started = [], [], time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        copies = [copy_of_the_tree(Path(directory) / str(i)) for i in range(max(1, asked.jobs))]
        # What notices a mutant must pass without it.
        by_file = {}
        for *_, tests in mutants:
            for test in tests.split():
                by_file.setdefault(test.partition("::")[0], {})[test] = None
        whole = [(None, "", "", " ".join(tests)) for tests in by_file.values()]
        for (*_, tests), code, log in exit_codes(whole, copies, "as it is"):
            if code:
                print(f"{log}\nthe tests fail without any mutant: {tests}")
                broken.append(tests)
        for mutant, code, log in exit_codes(mutants if not broken else [], copies, "mutants"):
            file, old, new, tests = mutant
            said = f"{file}: {old!r} → {new!r} ({tests})"
            if code == 0:
                survived.append(said)
                tqdm.write(f"survived: {said}")
            elif code != 1:
                broken.append(said)
                tqdm.write(f"{log}\npytest ended with {code}: {said}")
            elif asked.verbose:
                noticed = [line for line in log.splitlines() if line.startswith("FAILED")]
                tqdm.write(f"caught: {said}\n        {' '.join(noticed)[:200]}")
    print(f"{time.monotonic() - started:.0f} seconds")
    print(f"{len(mutants)} mutants, {len(survived)} survived")
    return 2 if broken else 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
