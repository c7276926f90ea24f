"""One run: settings in, a directory out, and one clear line when the input is bad.

A run directory holds config.json (settings, revision, versions), metrics.jsonl (one line a step), the same numbers for
TensorBoard in tb/, samples.jsonl (a few answers an evaluation), checkpoint/ (to resume from), policy/ and critic/.
"""

import argparse
import errno
import functools
import importlib.util
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import transformers
from transformers import HfArgumentParser

import distributed


class BadInput(ValueError):
    """Something that the user can mend; its message is one line that names the cause and the fix."""


class Stopped(Exception):
    """The run was asked to stop, and has saved itself."""


def exit_on_bad_input(main):
    """Decorates a script's main: BadInput becomes one line on standard error and exit code 2; a signal to stop, a line and
    128 + its number. Under torchrun, another error is followed by a line that names the processes that do not answer."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except BadInput as error:
            line = f"error: {' '.join(str(error).split())}"
            if not distributed.rank_0_says(line):
                print(line, file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("stopped at once; what was saved before stays", file=sys.stderr)
            raise SystemExit(128 + (STOP[0] if STOP else signal.SIGINT)) from None
        except Stopped as stopped:
            by = STOP[0] if STOP else signal.SIGTERM  # of several processes, another may have been asked
            print(f"stopped by {by.name}: {stopped}", file=sys.stderr)
            raise SystemExit(128 + by) from None
        except Exception as error:
            if disk := users_disk(error):
                print(
                    f"error: {disk.filename or 'writing'}: {disk.strerror}: mend that, or give another --out", file=sys.stderr, flush=True
                )
                raise SystemExit(2) from None
            if distributed.world() > 1:
                try:
                    silent = ", ".join(f"rank {rank}" for rank in distributed.silent_ranks()) or "none"
                except RuntimeError:  # what they would be asked through is gone
                    silent = "unknown"
                print(f"error on rank {distributed.rank()}: {error}; dead or hanging: {silent}", file=sys.stderr, flush=True)
            raise

    return wrapped


USERS_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EFBIG}


def users_disk(error):
    """The OSError that an error is, if the user can mend it: a full disk, no permission. (Of safetensors', it is in the words.)"""
    if said := re.search(r"\(os error (\d+)\)", str(error)):
        error = OSError(int(said[1]), os.strerror(int(said[1])))
    return error if isinstance(error, OSError) and error.errno in USERS_DISK else None


STOP = []  # the signal that asked this process to stop, and when


def on_signal(number, frame):
    """Notes that the process is to stop; again, some seconds later, stops it. (Ctrl-C under torchrun comes twice at once.)"""
    if not STOP:
        STOP.extend([signal.Signals(number), time.time()])
        print(f"\n{STOP[0].name}: finishing this step and saving; once more to stop at once", file=sys.stderr)
    elif time.time() - STOP[1] > 3:
        raise KeyboardInterrupt


@contextmanager
def finishing_the_step():
    """While it lasts, SIGTERM and Ctrl-C do not end the process but make `stopping()` true."""
    STOP.clear()
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopping():
    """Whether any process of the run was asked to stop."""
    return distributed.any_rank(bool(STOP))


def flag(default, help, **metadata):
    """A settings field: one flag, its default and its line of help."""
    return field(default=default, metadata={"help": help.replace("%", "%%"), **metadata})


@dataclass(frozen=True)
class RunSettings:
    """What every run on problems has: the model, the data, where it runs, how it samples."""

    model: str = flag(
        "", "causal language model: a directory or hub name that AutoModelForCausalLM loads; empty: the embedded world (toy.py)"
    )
    train: str = flag(
        "", "training problems: a .jsonl, .json, .csv or .parquet file, or OWNER/NAME:CONFIG@SPLIT of the hub (see problems.py)"
    )
    world: str = flag("", "directory of the embedded world that model and problems come from; its truth is then reported")
    trust_remote_code: bool = flag(
        False, "run the Python code that a model directory or hub name brings with it; weights are safetensors in any case"
    )
    seed: int = flag(0, "seed of the data order, the sampling and the mini-batches")
    device: str = flag("auto", "auto (cuda if there is one), cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "dtype of the arithmetic; weights stay float32; auto: bfloat16 on cuda")
    compile: bool = flag(None, "torch.compile the loss and log-probability kernels; default: only on cuda")
    prompt_template: str = flag(
        "Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\n"
        'Remember to put your answer on its own line after "Answer:".',
        "prompt text; {problem} stands for the problem (default: DAPO's wording)",
    )
    chat_template: bool = flag(True, "put prompts into the model's own chat format, where its tokenizer has one")
    prompt_length: int = flag(1024, "most tokens of a prompt; a longer one is refused")
    drop_long_prompts: bool = flag(False, "leave out problems whose prompt is too long, with a warning, instead")
    response_length: int = flag(1024, "most tokens of an answer; a longer one is cut there, and wrong")
    temperature: float = flag(1.0, "sampling temperature, in the sampler and in the training log-probs alike")
    verifier: Literal["exact", "math_verify"] = flag(
        "exact", "exact: verifier.py; math_verify: general LaTeX too (pip install math-verify)"
    )
    bare_number: bool = flag(False, "an answer that states none in the forms of verifier.py is its last number")
    reward_correct: float = flag(1.0, "reward of a correct answer")
    reward_wrong: float = flag(0.0, "reward of a wrong answer")
    compile_decode: bool = flag(False, "--engine slots: torch.compile the step of the sampler, as CUDA graphs there (slower on a CPU)")
    sample_rows: int = flag(256, "answers that are sampled side by side")
    engine: Literal["slots", "hf", "vllm"] = flag(
        "slots", "slots: the fast sampler of rollout.py; hf: transformers' generate, the plain reference; vllm: vLLM, where it is installed"
    )
    vllm_memory: float = flag(0.3, "--engine vllm: share of the GPU's memory for its weights and cache")
    tensor_parallel: int = flag(1, "--engine vllm under torchrun: so many neighbouring GPUs hold one copy of its weights between them")
    micro_batch_tokens: int = flag(
        16384, "tokens of a forward and backward pass, padding included; changes memory and speed, never a gradient"
    )

    cpu_offload: bool = flag(False, "torchrun: weights, gradients and optimiser states stay in the CPU's memory")
    rank_timeout: float = flag(60.0, "torchrun: minutes that the processes wait for one of them")
    gradient_checkpointing: bool = flag(False, "make the layers' activations again in the backward pass: less memory, a third more time")

    def check(self, needs_train=True, planned=0):
        """Checks ranges, and that there is what no default can stand for; planned: GPUs of a run on paper. Raises: BadInput."""
        for name in ("prompt_length", "response_length", "sample_rows", "micro_batch_tokens"):
            require(getattr(self, name) >= 1, f"--{name} must be at least 1")
        require(self.engine == "slots" or not self.compile_decode, "--compile_decode is for --engine slots")
        require(self.tensor_parallel >= 1, "--tensor_parallel must be at least 1")
        require(self.tensor_parallel == 1 or self.engine == "vllm", "--tensor_parallel is for --engine vllm")
        processes = planned or distributed.world()
        said = f"--tensor_parallel {self.tensor_parallel}: the number of processes (torchrun), {processes}, is no multiple of it"
        require(processes % self.tensor_parallel == 0, said)
        require(self.rank_timeout > 0, "--rank_timeout must be positive")
        require(0 < self.vllm_memory <= 1, "--vllm_memory is a share: above 0, at most 1")
        for flags, wanted, package in (
            ("--verifier math_verify", self.verifier == "math_verify", "math-verify"), ("--engine vllm", self.engine == "vllm", "vllm"),
        ):  # fmt: skip
            installed = planned or not wanted or importlib.util.find_spec(package.replace("-", "_"))
            require(bool(installed), f"{flags} needs the package {package}: pip install {package}")
        require(self.temperature > 0, "--temperature must be positive")
        require("{problem}" in self.prompt_template, "--prompt_template must contain {problem}")
        require(bool(self.train) or not needs_train, 'give --train FILE: say, a JSONL of {"problem": ..., "answer": ...}')
        pick_device(self.device)


def require(condition, message):
    """Raises BadInput(message) unless the condition holds."""
    if not condition:
        raise BadInput(message)


def parse_settings(settings_class, argv, description):
    """Flags → a frozen dataclass, by `HfArgumentParser`. `@FILE` reads flags from a file, one a line.

    A flag given twice counts as given last. Unknown flags and values of a wrong type end with one line and exit code 2.
    """
    parser = Parser(
        settings_class, description=description, fromfile_prefix_chars="@", allow_abbrev=False,
        formatter_class=HelpFormatter, usage="python %(prog)s [@FILE with flags] [--flag value] ...",
    )  # fmt: skip
    return settings_class(**vars(parser.parse_args(argv)))


class Parser(HfArgumentParser):
    def error(self, message):
        raise BadInput(f"{message} (see --help)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the description's lines; one line a flag, `--[no_]flag` for what is on by default."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=28, width=150)

    def _fill_text(self, text, width, indent):
        return text

    def _format_action(self, action):
        return "" if action.option_strings[0].startswith("--no_") else super()._format_action(action)

    def _format_action_invocation(self, action):
        name = action.option_strings[0].removeprefix("--")
        if action.default is True:
            return f"--[no_]{name}"
        return f"--{name}" if action.option_strings[0].startswith("--") else "-h, --help"

    def _get_help_string(self, action):
        obvious = action.default in (None, "", argparse.SUPPRESS) or action.default is True or len(str(action.default)) > 60
        return action.help if obvious else super()._get_help_string(action)


def to_argv(settings):
    """The flags that give these settings: what a script is called with by another, and what a resumed run is."""
    return [f"--{name}={value}" for name, value in asdict(settings).items() if value is not None]


def pick_device(name):
    """torch.device for --device. Raises: BadInput."""
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)
    except RuntimeError as error:
        raise BadInput(f"--device {name}: {error}") from None
    require(device.type != "cuda" or torch.cuda.is_available(), f"--device {name}: this machine has no CUDA device")
    if device.type == "cuda" and distributed.world() > 1:
        require(device.index is None, f"--device {name}: under torchrun each process has its own; leave the number out")
        here, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        require(here <= there, f"{here} processes for the {there} GPUs of this machine: torchrun --nproc_per_node {there}")
    return distributed.local_device(device)


def seeded_generator(seed, purpose, device="cpu"):
    """A torch.Generator for one purpose of a run: equal for equal (seed, purpose), unrelated between purposes."""
    return torch.Generator(device).manual_seed(random.Random(f"{purpose} {seed}").getrandbits(63))


def compiler(settings, device):
    """kernel → compiled kernel under --compile (by default on CUDA), the kernel itself otherwise."""
    wanted = settings.compile if settings.compile is not None else device.type == "cuda"
    return (lambda kernel: torch.compile(kernel, dynamic=True)) if wanted else (lambda kernel: kernel)


def describe(device):
    """Revision, versions and device, for the record beside the numbers."""
    here = Path(__file__).parent

    def git(*words):
        return subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10)

    try:  # dirty: the code differs; results that ablate.py writes into the tree do not count
        revision = git("describe", "--always", "--abbrev=12").stdout.strip() or "unknown"
        revision += "-dirty" if git("diff", "--quiet", "HEAD", "--", "*.py").returncode == 1 else ""
    except (OSError, subprocess.TimeoutExpired):
        revision = "unknown"
    return {
        "revision": revision, "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
    }  # fmt: skip


def write_json(path, value):
    """Writes beside and renames: the file is the old one or the new one, never half of it. Rank 0 does."""
    path = Path(path)
    if distributed.rank():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=2) + "\n")
    beside.replace(path)


def step_of(line):
    """The step of a line of metrics.jsonl or samples.jsonl; infinite if it was not written whole."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


class Log:
    """metrics.jsonl, TensorBoard and samples.jsonl of one run.

    A run that goes on from step `after` first drops the lines of later steps, so no step is there twice; a new run
    (`after` = -1) drops them all.
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
        self.tensorboard = SummaryWriter(self.run_dir / "tb", purge_step=after + 1 if after >= 0 else None)

    def metrics(self, step, numbers):
        """One line of numbers; what is not finite becomes null."""
        numbers = {name: float(value) for name, value in numbers.items()}
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._write("metrics.jsonl", [line])
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
            print(f"warning: cannot write the log in {self.run_dir} ({error}); the run goes on", file=sys.stderr)
        self.warned = True

    def close(self):
        try:
            if self.tensorboard:
                self.tensorboard.close()
        except OSError as error:
            self._warn(error)
