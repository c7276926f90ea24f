"""One run: a directory to write into, signals that stop it, and one clear line when it fails.

A run directory holds config.json (settings, revision, versions), metrics.jsonl (a line a step; in
tb/ for TensorBoard), samples.jsonl (a few answers an evaluation), checkpoint/, policy/, critic/.
"""

import errno
import functools
import json
import math
import os
import platform
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from system import distributed


class BadInput(ValueError):
    """Something that the user can mend; its message names cause and fix."""


class Stopped(Exception):
    """The run was asked to stop, and has saved itself."""


def require(condition, message):
    """Raises: BadInput(message) unless the condition holds."""
    if not condition:
        raise BadInput(message)


USERS_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR,
              errno.EISDIR, errno.EFBIG}  # fmt: skip


def exit_on_bad_input(main):
    """Decorates a script's main: one line on standard error says why it ends.
    BadInput, and a disk that is full or closed: exit code 2. A signal: 128 + its number. Any other
    error keeps its traceback."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            result = main(argv)
            if distributed.world() > 1:  # at an ordinary exit torch's threads can abort one rank,
                distributed.all_ranks(sys.stdout.flush() or sys.stderr.flush())
                os._exit(0)  # and torchrun then ends the others
            return result
        except BadInput as error:
            rank, code = os.environ.get("RANK", "0"), 2
            who = f" on rank {rank}" if rank != "0" else ""
            if who:  # where rank 0 says the same, torchrun ends this one in its sleep
                time.sleep(5)
            said = f"error{who}: {' '.join(str(error).split())}"
        except KeyboardInterrupt:
            by = STOP[0] if STOP else signal.SIGINT
            said, code = "stopped at once; what was saved before stays", 128 + by
        except Stopped as stopped:
            by = STOP[0] if STOP else signal.SIGTERM  # another rank may have been asked
            said, code = f"stopped by {by.name}: {stopped}", 128 + by
        except OSError as error:
            if error.errno not in USERS_DISK:
                raise
            said, code = f"error: {error.filename or 'writing'}: {error.strerror}", 2
            said += ": mend that, or give another --out"
        print(said, file=sys.stderr, flush=True)
        raise SystemExit(code)

    return wrapped


STOP = []  # the signal that asked this process to stop, and when


def on_signal(number, frame):
    """Notes that the process is to stop; again, some seconds later, stops it at once."""
    if not STOP:
        STOP.extend([signal.Signals(number), time.time()])
        print(f"\n{STOP[0].name}: finishing this step; once more to stop at once", file=sys.stderr)
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
    return any(distributed.all_ranks(bool(STOP)))


def pick_device(name):
    """torch.device for --device. Raises: BadInput."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(auto if name == "auto" else name)
    except RuntimeError as error:
        raise BadInput(f"--device {name}: {error}") from None
    if device.type != "cuda":
        return device
    require(auto == "cuda", f"--device {name}: this machine has no CUDA device")
    if distributed.world() > 1:
        require(device.index is None, "--device: each process has its own; leave the number out")
        here, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        require(here <= there, f"{here} processes for the {there} GPUs: --nproc_per_node {there}")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def seeded_generator(seed, purpose, device="cpu"):
    """A torch.Generator for one purpose: equal for equal (seed, purpose), else unrelated."""
    return torch.Generator(device).manual_seed(random.Random(f"{purpose} {seed}").getrandbits(63))


def kernel(function, compile, device):
    """The function, or under --compile (None: on CUDA) what torch.compile makes of it, once."""
    compile = device.type == "cuda" if compile is None else compile
    return compiled(function) if compile else function


@functools.cache
def compiled(function):
    """torch.compile(function), once; where there is no compiler the function, and one warning."""
    fast = torch.compile(function, dynamic=True)

    def call(*args):
        nonlocal fast
        try:
            return fast(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            why = distributed.first_line(error)
            say_once(f"warning: torch.compile does not work, kernels run without it: {why}")
            fast = function
        return function(*args)

    return call


say_once = functools.cache(tqdm.write)


@contextmanager
def timed(seconds, name):
    """Adds the seconds that its block takes to `seconds[name]`."""
    started = time.time()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.time() - started


def describe(device):
    """Revision, versions and device, for the record beside the numbers."""
    git, revision = ["git", "-C", str(Path(__file__).parent.parent)], "unknown"
    how = {"capture_output": True, "text": True, "timeout": 10}
    # dirty: the code differs; results that ablate.py writes into the tree do not count
    with suppress(OSError, subprocess.TimeoutExpired):
        name = subprocess.run([*git, "describe", "--always", "--abbrev=12"], **how).stdout.strip()
        differs = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], **how).returncode
        revision = name + "-dirty" * (differs == 1) if name else "unknown"
    cuda, processor = device.type == "cuda", platform.processor() or platform.machine()
    return {
        "revision": revision, "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if cuda else processor,
    }  # fmt: skip


@contextmanager
def written_whole(path):
    """Yields a binary file that becomes `path` when the block has ended well: never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path, value):
    """Writes a JSON file, whole or not at all. Rank 0 does."""
    write_lines(path, [value], indent=2)


def write_lines(path, values, **how):
    """Writes a .jsonl file, whole or not at all. Rank 0 does."""
    if not distributed.rank():
        with written_whole(Path(path)) as file:
            file.writelines(json.dumps(value, **how).encode() + b"\n" for value in values)


def step_of(line):
    """The step of a line of a .jsonl log; infinite if it was not written whole."""
    with suppress(ValueError, KeyError, TypeError):
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    return math.inf


class Log:
    """metrics.jsonl, TensorBoard and samples.jsonl of one run. Rank 0 logs. The lines of steps
    later than `after` are dropped first, so that none is there twice."""

    def __init__(self, run_dir, after=-1):
        self.run_dir, self.tensorboard, self.warned = Path(run_dir), None, False
        if distributed.rank():
            return
        from torch.utils.tensorboard import SummaryWriter

        for path in (self.run_dir / "metrics.jsonl", self.run_dir / "samples.jsonl"):
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            with written_whole(path) as file:
                file.writelines(line for line in lines if step_of(line) <= after)
        self.tensorboard = SummaryWriter(self.run_dir / "tb", purge_step=after + 1)

    def metrics(self, step, numbers):
        """One line of numbers; what is not finite becomes null."""
        finite = {name: float(v) if math.isfinite(v) else None for name, v in numbers.items()}
        self.write("metrics.jsonl", [{"step": step} | finite])
        with self.warning():
            for name, value in numbers.items() if self.tensorboard else ():
                self.tensorboard.add_scalar(name, float(value), step)
            if self.tensorboard:
                self.tensorboard.flush()

    def samples(self, step, samples):
        self.write("samples.jsonl", [{"step": step} | sample for sample in samples])

    def write(self, name, lines):
        if self.tensorboard:
            with self.warning(), open(self.run_dir / name, "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)

    @contextmanager
    def warning(self):
        """A log that is lost is not a run that is lost: it is said once."""
        try:
            yield
        except OSError as error:
            if not self.warned:
                print(f"warning: cannot write the log ({error}); the run goes on", file=sys.stderr)
            self.warned = True

    def close(self):
        with self.warning():
            if self.tensorboard:
                self.tensorboard.close()
