"""Flags: a frozen dataclass a script, a field a flag, its range and its line of help beside it.

`HfArgumentParser` makes the flags. `@FILE` reads flags from a file, one a line; of a flag given
twice the last counts. config.json of a run directory holds the settings as a JSON object.
"""

import argparse
import importlib.util
import json
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from os.path import relpath
from pathlib import Path
from typing import Literal

from transformers import HfArgumentParser

from system import distributed, reward
from system.run import BadInput, describe, pick_device, require, write_json

# What a value may be: the words that follow the flag's name in an error, and the test.
POSITIVE = ("must be positive", lambda value: value > 0)
NOT_NEGATIVE = ("must not be negative", lambda value: value >= 0)
AT_LEAST_1 = ("must be at least 1", lambda value: value >= 1)
SHARE = ("must be between 0 and 1", lambda value: 0 <= value <= 1)
ABOVE_0_SHARE = ("must be above 0 and at most 1", lambda value: 0 < value <= 1)
INSIDE_SHARE = ("must be above 0 and below 1", lambda value: 0 < value < 1)

PROBLEMS = ('FILE is missing: say, a JSONL of {"problem": ..., "answer": ...}', bool)

PROMPT = (  # DAPO's wording
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    '{problem}\n\nRemember to put your answer on its own line after "Answer:".'
)


def flag(default, help, allowed=None, may_change=False):
    """A settings field: a flag, its default, its line of help, what its value may be, and whether
    a resumed run may have another one (True; "above 0": one above 0 for another), for it changes no
    number but by rounding (micro_batch_tokens) or the random numbers drawn (tensor_parallel)."""
    metadata = {"help": help.replace("%", "%%"), "allowed": allowed, "may_change": may_change}
    how = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**how, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """What the flags of all scripts have in common."""

    def check(self):
        """Raises: BadInput if a value is out of its range."""
        for known in fields(self):
            words, allows = known.metadata["allowed"] or ("", lambda value: True)
            value = getattr(self, known.name)
            require(value is None or allows(value), f"--{known.name} {words}")


# fmt: off
@dataclass(frozen=True)
class SamplingSettings(Settings):
    """What every script that samples has: the model, its prompt, its answers, the verifier."""

    model: str = flag("", "causal LM: a directory or hub name; empty: the embedded world (toy.py)")
    seed: int = flag(0, "seed of the data order, the sampling and the mini-batches")
    device: str = flag("auto", "auto (cuda if there is one), cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto", "dtype that the models compute in; weights stay float32; auto: bfloat16 on cuda")
    prompt_template: str = flag(PROMPT, "prompt text, {problem} in it; default: DAPO's wording", (
        "must contain {problem}", lambda template: "{problem}" in template))
    chat_template: bool = flag(True, "put prompts into the tokenizer's chat format, if it has one")
    prompt_length: int = flag(1024, "most tokens of a prompt; a longer one is refused", AT_LEAST_1)
    drop_long_prompts: bool = flag(False, "leave problems with longer prompts out, with a warning")
    response_length: int = flag(1024, "most tokens of an answer; a cut one is wrong", AT_LEAST_1)
    temperature: float = flag(1.0, "of sampling, and of the training log-probs alike", POSITIVE)
    verifier: Literal["exact", "math_verify"] = flag(
        "exact", "exact: verifier.py; math_verify: general LaTeX too (pip install math-verify)")
    bare_number: bool = flag(False, "where no answer is stated: the last number (verifier.py)")
    reward: str = flag("", "FILE.py:FUNCTION, your own: docs/models.md")
    reward_seconds: float = flag(600.0, "most time for a call of it", POSITIVE, may_change=True)
    engine: Literal["slots", "hf", "vllm"] = flag(
        "slots", "slots: our fast sampler; hf: transformers' generate; vllm: if it is installed")
    sample_rows: int = flag(256, "answers that are sampled side by side", AT_LEAST_1)
    vllm_memory: float = flag(0.3, "vllm: share of a GPU's memory", ABOVE_0_SHARE, may_change=True)
    tensor_parallel: int = flag(1, "vllm: GPUs that hold one copy", AT_LEAST_1, may_change=True)
    PACKAGES = (("verifier", "math_verify"), ("engine", "vllm"))  # flag, value that needs one

    def check(self):
        super().check()
        parallel, processes = self.tensor_parallel, self.processes()
        require(parallel == 1 or self.engine == "vllm", "--tensor_parallel is for --engine vllm")
        said = f"the number of processes (torchrun), {processes}, is no multiple of it"
        require(processes % parallel == 0, f"--tensor_parallel {parallel}: {said}")
        for name, module in self.PACKAGES:
            there = getattr(self, name) != module or importlib.util.find_spec(module)
            package = module.replace("_", "-")
            require(there, f"--{name} {module} needs the package {package}: pip install {package}")
        if self.reward:
            reward.load(self.reward)
        pick_device(self.device)

    def processes(self):
        """How many share the work."""
        return distributed.world()


@dataclass(frozen=True)
class TrainingSettings(SamplingSettings):
    """What both training scripts have beside that."""

    train: str = flag("", "training problems: a file or OWNER/NAME:CONFIG@SPLIT", PROBLEMS)
    reward_correct: float = flag(1.0, "reward of a correct answer")
    reward_wrong: float = flag(0.0, "reward of a wrong answer")
    critic_surprise: bool = flag(False, "the critic also reads -log π of each token")
    compile: bool = flag(None, "torch.compile the loss and log-prob kernels; default: on cuda")
    micro_batch_tokens: int = flag(16384, "tokens of a pass, padded", AT_LEAST_1, may_change=True)
    lora: int = flag(0, "rank of adapters; all else is frozen (needs peft); 0: none", NOT_NEGATIVE)
    gradient_checkpointing: bool = flag(False, "less memory, but more time", may_change=True)
    # fmt: on

    def check(self):
        super().check()
        own = self.reward and (self.reward_correct, self.reward_wrong) != (1.0, 0.0)
        require(not own, "--reward has no use for --reward_correct and --reward_wrong")
        there = not self.lora or importlib.util.find_spec("peft")
        require(there, "--lora needs the package peft: pip install peft")


def parse(settings_class, argv, description, defaults=None, first=""):
    """Flags → a frozen dataclass; `defaults` in the place of the fields' own. Raises: BadInput.
    `first`, a flag that the first arguments are of where they name none."""
    argv = sys.argv[1:] if argv is None else argv
    argv = [first, *argv] if first and argv and not argv[0].startswith("-") else argv
    module = getattr(sys.modules["__main__"].__spec__, "name", "")
    script = f"-m {module}" if module.startswith("lab.") else "%(prog)s"
    usage = f"python {script} [@FILE with flags] [--flag value] ..."
    look = partial(HelpFormatter, max_help_position=32, width=150)
    how = {"allow_abbrev": False, "add_help": False, "formatter_class": look}
    how |= {"fromfile_prefix_chars": "@", "description": description.partition("\n")[0]}
    parser = Parser(settings_class, usage=usage, **how)
    parser.add_argument("--help", "-h", action="help", help=argparse.SUPPRESS)
    parser.set_defaults(**(defaults or {}))
    return settings_class(**vars(parser.parse_args(argv)))


class Parser(HfArgumentParser):
    def add_argument(self, *names, allowed=None, may_change=None, **options):
        options |= {"help": argparse.SUPPRESS} if names[0].startswith("--no_") else {}
        return super().add_argument(*names, **options)

    def error(self, message):
        raise BadInput(f"{message} (see --help)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):  # a line a flag
    def start_section(self, heading):  # "options:" says nothing
        super().start_section(None)

    def _format_action_invocation(self, action):
        name = action.option_strings[0].removeprefix("--")
        return f"--[no_]{name}" if action.default is True else f"--{name}"

    def _get_help_string(self, action):
        obvious = str(action.default) in ("None", "", "True") or len(str(action.default)) > 60
        return action.help if obvious else super()._get_help_string(action)


def new_run_dir(out, name):
    """--out, or runs/NAME-DATE-TIME. Raises: BadInput if it holds a run."""
    run_dir = Path(out or distributed.from_rank_0(time.strftime(f"runs/{name}-%Y%m%d-%H%M%S")))
    taken = distributed.from_rank_0((run_dir / "config.json").exists())
    require(not taken, f"{run_dir} holds a run: --resume it, or give another --out")
    return run_dir


def save_config(run_dir, settings, device):
    """Writes RUN_DIR/config.json: the settings, and what they ran on; and a copy of --reward."""
    if getattr(settings, "reward", ""):
        reward.keep_source(settings.reward, run_dir)
    write_json(f"{run_dir}/config.json", {"settings": asdict(settings), "on": describe(device)})


def load_config(settings_class, run_dir):
    """The settings of RUN_DIR/config.json. Raises: BadInput."""
    path = Path(run_dir) / "config.json"
    require(path.is_file(), f"--resume {run_dir}: not a run directory (no config.json in it)")
    try:
        return settings_class(**json.loads(path.read_text())["settings"])
    except (ValueError, KeyError, TypeError):
        said = f"{path} was written by another revision: check that out, or give another --out"
        raise BadInput(said) from None


def resumed(settings_class, argv, description, run_dir):
    """The settings of a run that goes on: its own, and of `argv` what may change."""
    saved = asdict(load_config(settings_class, run_dir))
    settings = parse(settings_class, argv, description, saved)
    differ = " and --".join(changed(saved, settings))
    require(not differ, f"--resume goes on with the run's settings: --{differ} cannot change")
    return settings


def changed(saved, settings):
    """Names of the settings that differ from the dict `saved`, but for those that may."""

    def allowed(known):
        before, now, may = saved.get(known.name), getattr(settings, known.name), known.metadata
        return before == now or may["may_change"] is True or (may["may_change"] and before and now)

    return [known.name for known in fields(settings) if not allowed(known)]


def require_same(out, settings, ways):
    """Raises: BadInput if `out` holds work that was stopped, with other settings; `ways`, names of
    files, are compared by their way from --out, which may have moved."""
    if not distributed.from_rank_0((out / "config.json").exists()):
        return
    saved = asdict(load_config(type(settings), out))
    for name in ways:
        before, now = saved[name], getattr(settings, name)
        if before and now and relpath(before, saved["out"]) == relpath(now, settings.out):
            saved[name] = now
    differ = ", ".join(changed(saved, settings))
    require(not differ, f"{out} was stopped, with another {differ}: remove it, or another --out")
