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
    failed = None
    try:
        if not distributed.rank():
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
    except OSError as error:
        failed = error
    if not distributed.any_rank(failed is not None):  # what follows needs all ranks
        try:
            with in_this_many_processes() as how:
                dcp.save(tensors, checkpoint_id=beside, **how)
            if not distributed.rank():
                write(beside / "rest.pt", small)
                files = sorted(beside.iterdir())
                write_json(beside / "whole.json", {path.name: [path.stat().st_size, checksum(path)] for path in files})
                shutil.rmtree(directory, ignore_errors=True)
                beside.rename(directory)
        except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
            failed = error
    if distributed.any_rank(failed is not None):
        if not distributed.rank():
            shutil.rmtree(beside, ignore_errors=True)
        raise BadInput(
            f"cannot write the checkpoint {directory} ({reason(failed)}): make room, then --resume {run_dir}; the ones before are whole"
        )
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
    found = None
    if not distributed.rank():
        for directory in saved(run_dir):
            if not (wrong := damage(directory)):
                found = directory
                break
            print(f"warning: the checkpoint {directory} is damaged ({wrong}): taking the one before")
        if found is None and saved(run_dir):
            found = BadInput(f"all checkpoints in {run_dir}/checkpoint are damaged: start again with another --out")
    found = distributed.from_rank_0(found)
    if isinstance(found, BadInput):
        raise found
    return found and (found, read(found / "rest.pt"))


def remove(run_dir):
    """Removes all checkpoints of a run that has ended. Rank 0 does."""
    if not distributed.rank():
        shutil.rmtree(Path(run_dir) / "checkpoint", ignore_errors=True)


def damage(directory):
    """What is wrong with a checkpoint, in words, or None."""
    try:
        files = json.loads((directory / "whole.json").read_text())
        for name, (size, expected) in files.items():
            if (directory / name).stat().st_size != size:
                return f"{name} has {(directory / name).stat().st_size} bytes of {size}"
            if checksum(directory / name) != expected:
                return f"{name} has changed"
    except (OSError, ValueError, TypeError) as error:
        return str(error).splitlines()[0]
    return None


def restore(directory, rest, learners):
    """Gives networks, optimisers and schedulers the state of a checkpoint, on any number of ranks."""
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


def checksum(path):
    """CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            crc = zlib.crc32(block, crc)
    return crc


def reason(error):
    """The first line of what went wrong, the cause itself where torch.distributed.checkpoint has wrapped it."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        failure = next(iter(error.failures.values()))
        error = failure[0] if isinstance(failure, tuple) else failure
    return str(error).strip().splitlines()[0] if error is not None and str(error).strip() else "on another rank"


def write(path, value):
    """torch.save beside, flushed, and renamed: the file is the old one or the new one, never half of it. Rank 0 does."""
    path = Path(path)
    if distributed.rank():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def read(path):
    """What `write` wrote, on the CPU. Raises: BadInput if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise BadInput(f"{path} is damaged ({str(error).splitlines()[0]}): remove it to start again") from None


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
    beside = directory.with_name(directory.name + ".tmp")
    with distributed.rank_0_first():  # the others may read it afterwards
        if not distributed.rank():
            shutil.rmtree(beside, ignore_errors=True)
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
            shutil.rmtree(directory, ignore_errors=True)
            beside.replace(directory)
