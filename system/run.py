"""One run: a directory to write into, signals that stop it, and one clear line when it fails.

A run directory holds config.json (settings, revision, versions), metrics.jsonl (one line a step),
the same numbers for TensorBoard in tb/, samples.jsonl (a few answers an evaluation), checkpoint/
(to resume from), policy/ and critic/.
"""

import errno
import functools
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers

from system import distributed


class BadInput(ValueError):
    """Something that the user can mend; its message is one line that names cause and fix.

    It is the same on all ranks, so rank 0 alone prints it.
    """


class Stopped(Exception):
    """The run was asked to stop, and has saved itself."""


def require(condition, message):
    """Raises BadInput(message) unless the condition holds."""
    if not condition:
        raise BadInput(message)


USERS_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR,
              errno.EISDIR, errno.EFBIG}  # fmt: skip


def exit_on_bad_input(main):
    """Decorates a script's main: what ends a run ends in one line on standard error.

    BadInput, and a disk that is full or closed: exit code 2. A signal: 128 + its number. Any other
    error keeps its traceback; under torchrun, rank 0 adds which ranks do not answer any more.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except BadInput as error:
            if os.environ.get("RANK", "0") == "0":
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("stopped at once; what was saved before stays", file=sys.stderr)
            raise SystemExit(128 + (STOP[0] if STOP else signal.SIGINT)) from None
        except Stopped as stopped:
            by = STOP[0] if STOP else signal.SIGTERM  # another rank may have been asked
            print(f"stopped by {by.name}: {stopped}", file=sys.stderr)
            raise SystemExit(128 + by) from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno in USERS_DISK:
                said = f"{error.filename or 'writing'}: {error.strerror}"
                print(f"error: {said}: mend that, or give another --out", file=sys.stderr)
                raise SystemExit(2) from None
            distributed.name_missing_ranks(error)
            raise

    return wrapped


STOP = []  # the signal that asked this process to stop, and when


def on_signal(number, frame):
    """Notes that the process is to stop; again, some seconds later, stops it at once."""
    if not STOP:
        STOP.extend([signal.Signals(number), time.time()])
        said = "finishing this step and saving; once more to stop at once"
        print(f"\n{STOP[0].name}: {said}", file=sys.stderr)
    elif time.time() - STOP[1] > 3:  # Ctrl-C under torchrun comes twice at once
        raise KeyboardInterrupt


@contextmanager
def finishing_the_step():
    """While it lasts, SIGTERM and Ctrl-C do not end the process but make `stopping()` true."""
    STOP.clear()
    before = {n: signal.signal(n, on_signal) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopping():
    """Whether any process of the run was asked to stop."""
    return distributed.any_rank(bool(STOP))


def pick_device(name):
    """torch.device for --device. Raises: BadInput."""
    try:
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(name)
    except RuntimeError as error:
        raise BadInput(f"--device {name}: {error}") from None
    available = device.type != "cuda" or torch.cuda.is_available()
    require(available, f"--device {name}: this machine has no CUDA device")
    if device.type == "cuda" and distributed.world() > 1:
        said = "under torchrun each process has its own; leave the number out"
        require(device.index is None, f"--device {name}: {said}")
        here, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        said = f"{here} processes for the {there} GPUs of this machine"
        require(here <= there, f"{said}: torchrun --nproc_per_node {there}")
    return distributed.local_device(device)


def seeded_generator(seed, purpose, device="cpu"):
    """A torch.Generator for one purpose of a run: equal for equal (seed, purpose), else unrelated."""
    drawn = random.Random(f"{purpose} {seed}").getrandbits(63)
    return torch.Generator(device).manual_seed(drawn)


def kernel(function, compile, device):
    """The function, or under --compile (None: on CUDA) what torch.compile makes of it, once."""
    compile = device.type == "cuda" if compile is None else compile
    return compiled(function) if compile else function


@functools.cache
def compiled(function):
    return torch.compile(function, dynamic=True)


@contextmanager
def timed(seconds, name):
    """Adds the seconds that its block takes to `seconds[name]`."""
    started = time.time()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.time() - started


def describe(device):
    """Revision, versions and device, for the record beside the numbers."""
    here = Path(__file__).parent.parent

    def git(*words):
        command = ["git", "-C", str(here), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10)

    try:  # dirty: the code differs; results that ablate.py writes into the tree do not count
        revision = git("describe", "--always", "--abbrev=12").stdout.strip() or "unknown"
        dirty = git("diff", "--quiet", "HEAD", "--", "*.py").returncode == 1
        revision += "-dirty" if dirty else ""
    except (OSError, subprocess.TimeoutExpired):
        revision = "unknown"
    cuda = device.type == "cuda"
    return {
        "revision": revision, "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if cuda
                  else platform.processor() or platform.machine(),
    }  # fmt: skip


def write_json(path, value):
    """Writes beside and renames: the file is the old or the new one, never half. Rank 0 does."""
    path = Path(path)
    if distributed.rank():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=2) + "\n")
    beside.replace(path)


def step_of(line):
    """The step of a line of a .jsonl log; infinite if it was not written whole."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


class Log:
    """metrics.jsonl, TensorBoard and samples.jsonl of one run.

    A run that goes on from step `after` first drops the lines of later steps, so no step is there
    twice; a new run (`after` = -1) drops them all.
    """

    def __init__(self, run_dir, after=-1):
        self.run_dir, self.tensorboard, self.warned = Path(run_dir), None, False
        if distributed.rank():  # rank 0 logs
            return
        from torch.utils.tensorboard import SummaryWriter

        self.run_dir.mkdir(parents=True, exist_ok=True)
        if after < 0:
            shutil.rmtree(self.run_dir / "tb", ignore_errors=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.run_dir / name
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            beside = path.with_name(name + ".tmp")
            beside.write_text("".join(line for line in lines if step_of(line) <= after))
            beside.replace(path)
        purge = after + 1 if after >= 0 else None
        self.tensorboard = SummaryWriter(self.run_dir / "tb", purge_step=purge)

    def metrics(self, step, numbers):
        """One line of numbers; what is not finite becomes null."""
        numbers = {name: float(value) for name, value in numbers.items()}
        finite = {name: v if math.isfinite(v) else None for name, v in numbers.items()}
        self._write("metrics.jsonl", [{"step": step} | finite])
        try:
            for name, value in numbers.items() if self.tensorboard else ():
                self.tensorboard.add_scalar(name, value, step)
            if self.tensorboard:
                self.tensorboard.flush()
        except OSError as error:
            self._warn(error)

    def samples(self, step, samples):
        self._write("samples.jsonl", [{"step": step} | sample for sample in samples])

    def _write(self, name, lines):
        if self.tensorboard is None:
            return
        try:
            with open(self.run_dir / name, "a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            self._warn(error)

    def _warn(self, error):
        """A log that is lost is not a run that is lost: it is said once."""
        if not self.warned:
            said = f"cannot write the log in {self.run_dir} ({error}); the run goes on"
            print(f"warning: {said}", file=sys.stderr)
        self.warned = True

    def close(self):
        try:
            if self.tensorboard:
                self.tensorboard.close()
        except OSError as error:
            self._warn(error)
