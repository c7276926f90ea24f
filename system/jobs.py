"""Scripts of this project run side by side, one core each, and what is kept of them."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from system.run import BadInput, write_lines

ROOT = Path(__file__).parent.parent


def call(script, argv, log):
    """Runs a script ("toy.py"; "lab.plot" for -m) on one core, said in `log`. Raises: BadInput."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    path, one_core = ROOT / script, {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *([path] if path.is_file() else ["-m", script]), *map(str, argv)]
    with open(log, "a") as file:  # a resumed run goes on in the log of its first part
        how = {"stdout": file, "stderr": subprocess.STDOUT, "env": os.environ | one_core}
        code = subprocess.run(command, **how).returncode
    if code:
        last = Path(log).read_text().replace("\r", "\n").strip().split("\n")[-1]
        raise BadInput(f"{script} ended with exit code {code}, see {log}: {last}")


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def side_by_side(jobs, workers):
    """Runs functions without arguments, `workers` at a time.
    Args: {name: function}. Yields: (name, what it returned, BadInput or None), as they end."""
    pool = ThreadPoolExecutor(workers)
    names = {pool.submit(job): name for name, job in jobs.items()}
    try:
        for done in tqdm(as_completed(names), total=len(names), desc="runs"):
            error = done.exception()
            if error and not isinstance(error, BadInput):
                raise error
            yield names[done], None if error else done.result(), error
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits for the runs, which it reaches too


def time_left(waiting, runs, raw, workers):
    """In words: what is missing, (row, seed) each, and its hours, by the runs made in `runs` or, if
    there are none, those that other machines left in `raw`, of the same length of answer or run."""
    spent, kept = {}, {path.stem: path for path in sorted(raw.glob("*.jsonl"))}
    for name in [name for name in kept if (runs / name).is_dir()] or kept:
        told = (line.items() for line in lines_of(kept[name])[1:])
        seconds = sum(y for items in told for key, y in items if "seconds_" in key)
        spent.setdefault(kind(name), []).append(seconds)
    known = [fmean(spent[kind(row)]) for row, _ in waiting if kind(row) in spent]
    more = f", and {len(waiting) - len(known)} of a kind that has not been run yet"
    hours = f"{sum(known) / workers / 3600:.1f} h, {workers} side by side"
    return f"{len(waiting)} runs are missing: {hours}{more * (len(known) < len(waiting))}"


def kind(row):
    return row.partition("_")[0] if row.startswith(("30_", "300_", "long_")) else ""


def lines_of(path, **how):
    """The lines of a .jsonl file."""
    return [json.loads(line, **how) for line in path.read_text().splitlines()]


def keep(run_dir, path):
    """Copies a run's metrics.jsonl to `path`, five digits a number, after its config.json."""
    config = {"config": json.loads((run_dir / "config.json").read_text())}
    short = {"parse_float": lambda digits: float(f"{float(digits):.5g}")}
    write_lines(path, [config, *lines_of(run_dir / "metrics.jsonl", **short)])
