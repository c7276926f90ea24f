"""Save and resume, all or nothing; export as Hugging Face directories.

RUN_DIR/checkpoint/step-000010/ holds everything that the next step depends on: the tensors of all ranks by
torch.distributed.checkpoint (which can give them to another number of ranks), the rest in rest.pt, and, written last, whole.json with
size and checksum of every file. It is written beside and renamed, so a killed run leaves the ones before as they were; one
that is damaged nevertheless is named, and the one before it is taken.
"""

import json
import math
import os
import pickle
import shutil
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from tqdm import tqdm

import distributed
from run import BadInput, require, write_json

UNREADABLE = (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError)


def save(run_dir, step, learners, rest, keep=2):
    """Writes the checkpoint of a step, then removes all but the last `keep`.

    Args: learners, {name: network, dict of tensors, optimiser or scheduler}; rest, a dict of what else there is (numbers, lists, generator states).
    Raises: BadInput if it cannot be written (a full disk, say); the checkpoints before are then as they were.
    """
    directory = Path(run_dir) / "checkpoint" / f"step-{step:06d}"
    beside = directory.with_name(directory.name + ".tmp")
    tensors, small = {}, dict(rest)
    for name, learner in learners.items():
        tensors |= tensors_of(name, learner)
        if not isinstance(learner, (torch.nn.Module, dict)):
            small[name] = {key: value for key, value in learner.state_dict().items() if key != "state"}
    sums = {}

    def begin():
        if not distributed.rank():
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)

    def write_tensors():
        with in_this_many_processes() as how:
            dcp.save(tensors, checkpoint_id=beside, **how)
        sums.update(described(sorted(beside.glob(f"__{distributed.rank()}_*"))))  # each rank reads what it wrote

    def finish():
        for others in distributed.all_ranks(sums):
            sums.update(others)
        if not distributed.rank():
            write(beside / "rest.pt", small)
            sums.update(described(path for path in sorted(beside.iterdir()) if path.name not in sums))
            write_json(beside / "whole.json", sums)
            shutil.rmtree(directory, ignore_errors=True)
            beside.rename(directory)

    failed = None
    for work in (begin, write_tensors, finish):  # each needs all ranks
        try:
            work()
        except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
            failed = cause(error)
        if distributed.any_rank(failed is not None):
            if not distributed.rank():
                shutil.rmtree(beside, ignore_errors=True)
            said = f"cannot write the checkpoint {directory} ({first_line(failed) or 'on another rank'})"
            raise BadInput(f"{said}: make room, then --resume {run_dir}; the ones before are whole")
    if not distributed.rank():
        later = [path for path in saved(run_dir) if path.name > directory.name]  # damaged, or the run would not be here again
        for old in later + [path for path in saved(run_dir) if path not in later][keep:]:
            old.rename(old.with_name(old.name + ".tmp"))  # never a checkpoint with a part missing under its own name
        for old in directory.parent.glob("*.tmp"):
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def in_this_many_processes():
    """What torch.distributed.checkpoint must be told in one process, and without its warning that there is only one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield {"no_dist": distributed.world() == 1}


def tensors_of(name, learner):
    """The large part of a learner's state as one flat dict of tensors, each rank's share of them."""
    if isinstance(learner, (torch.nn.Module, dict)):
        weights = learner if isinstance(learner, dict) else learner.state_dict()
        return {f"{name}/{key}": tensor for key, tensor in weights.items()}
    if isinstance(learner, torch.optim.Optimizer):
        states = learner.state_dict()["state"]
        return {f"{name}/{i}/{key}": tensor for i, state in states.items() for key, tensor in state.items()}
    return {}


def saved(run_dir):
    """The run's checkpoints, the newest first."""
    return sorted((Path(run_dir) / "checkpoint").glob("step-??????"), reverse=True)


def load(run_dir):
    """(directory, rest) of the newest checkpoint that is whole, or None where nothing was saved yet.

    Raises: BadInput if there are checkpoints and all are damaged.
    """
    there = distributed.from_rank_0(saved(run_dir))
    for directory in there:
        if not (wrong := damage(directory)):
            return directory, read(directory / "rest.pt")
        print(f"warning: the checkpoint {directory} is damaged ({wrong}): taking the one before")
    require(not there, f"all checkpoints in {run_dir}/checkpoint are damaged: start again with another --out")
    return None


def remove(run_dir):
    """Removes all checkpoints of a run that has ended. Rank 0 does."""
    if not distributed.rank():
        shutil.rmtree(Path(run_dir) / "checkpoint", ignore_errors=True)


def damage(directory):
    """What is wrong with a checkpoint, in words, or None. Every rank looks at its share of the files."""
    wrong = None
    try:
        files = json.loads((directory / "whole.json").read_text())
        for name, (size, expected) in sorted(files.items())[distributed.rank() :: distributed.world()]:
            if (directory / name).stat().st_size != size:
                wrong = f"{name} has {(directory / name).stat().st_size} bytes of {size}"
            elif checksum(directory / name) != expected:
                wrong = f"{name} has changed"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        wrong = first_line(error)
    return next((said for said in distributed.all_ranks(wrong) if said), None)


def restore(directory, rest, learners):
    """Gives networks, optimisers and schedulers the state of a checkpoint, on any number of ranks.

    Raises: BadInput if it is that of other models.
    """
    tensors = {}
    known = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    for name, learner in learners.items():
        if isinstance(learner, torch.optim.Optimizer):  # a new one has no state yet that could be filled
            parameters = [parameter for group in learner.param_groups for parameter in group["params"]]
            for i, parameter in enumerate(parameters):
                for key in (key.rsplit("/", 1)[1] for key in known if key.startswith(f"{name}/{i}/")):
                    tensors[f"{name}/{i}/{key}"] = torch.zeros(()) if key == "step" else torch.zeros_like(parameter)
        else:
            tensors |= tensors_of(name, learner)
    try:
        with in_this_many_processes() as how:
            dcp.load(tensors, checkpoint_id=directory, **how)
        for name, learner in learners.items():
            if isinstance(learner, torch.optim.Optimizer):
                state = {}
                for key in (key for key in tensors if key.startswith(f"{name}/")):
                    _, i, what = key.split("/")
                    state.setdefault(int(i), {})[what] = tensors[key]
                learner.load_state_dict({"state": state} | rest[name])
            elif name in rest:
                learner.load_state_dict(rest[name])
    except (ValueError, KeyError, RuntimeError, dcp.api.CheckpointException) as error:
        wrong = cause(error)
        if not isinstance(wrong, (ValueError, KeyError)) and "Missing key" not in str(wrong):
            raise wrong from None
        said = f"the checkpoint {directory} does not fit ({first_line(wrong)})"
        raise BadInput(f"{said}: is --model still the model that the run began with?") from None


def checksum(path):
    """CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            crc = zlib.crc32(block, crc)
    return crc


def described(paths):
    """{name: [size, checksum]} of files."""
    return {path.name: [path.stat().st_size, checksum(path)] for path in paths}


def cause(error):
    """What torch.distributed.checkpoint has wrapped, or the error itself. Raises: KeyboardInterrupt if it is that."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        failure = next(iter(error.failures.values()))
        error = failure[0] if isinstance(failure, tuple) else failure
    if isinstance(error, KeyboardInterrupt):
        raise error
    return error


def first_line(error):
    """Of its message; its kind where it has none; nothing of None."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0] if error is not None else ""


def write(path, value):
    """torch.save beside, flushed, and renamed: the file is the old one or the new one, never half of it. Rank 0 does."""
    path = Path(path)
    if distributed.rank():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read(path):
    """What `write` wrote, on the CPU. Raises: BadInput if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise BadInput(f"{path} is damaged ({first_line(error)}): remove it to start again") from None


def keep_bad_batch(run_dir, step, number, batch, metrics, in_a_row, limit):
    """A mini-batch whose loss or gradient is not finite: it is skipped, and kept. Raises: BadInput after `limit` in a row."""
    path = Path(run_dir) / "bad_batches" / f"step-{step:06d}-{number}.pt"
    write(path, {"batch": batch, "metrics": metrics})
    broken = ", ".join(name for name, value in metrics.items() if not math.isfinite(value))
    tqdm.write(f"warning: rollout {step}, optimiser step {number} is skipped, {broken} not finite; its batch is in {path}")
    require(
        in_a_row < limit,
        f"{in_a_row} optimiser steps in a row were not finite ({broken}): look at the batches in {path.parent}; start again with a lower "
        f"--lr, --critic_lr or --max_grad_norm, or --resume {run_dir} with a higher --max_bad_steps",
    )


def export(model, tokenizer, directory):
    """Saves a model and its tokenizer as an ordinary Hugging Face directory, written beside and renamed. Rank 0 does."""
    directory, model = Path(directory), distributed.unsharded(model)
    beside, before = (directory.with_name(directory.name + end) for end in (".tmp", ".old.tmp"))
    with distributed.rank_0_first():  # the others may read it afterwards
        if not distributed.rank():
            shutil.rmtree(beside, ignore_errors=True)
            try:
                model.save_pretrained(beside)
                tokenizer.save_pretrained(beside)
                if directory.exists():
                    shutil.rmtree(before, ignore_errors=True)
                    directory.replace(before)
                beside.replace(directory)
                shutil.rmtree(before, ignore_errors=True)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
