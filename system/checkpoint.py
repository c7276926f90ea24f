"""Save and resume, all or nothing; export as Hugging Face directories.

RUN_DIR/checkpoint/step-000010/ holds everything that the next step depends on: the tensors of all
ranks by torch.distributed.checkpoint (which can give them to another number of ranks), the rest in
rest.pt, and, written last, checksums.json with size and checksum of every file. It is written
beside and renamed, so a killed run leaves the ones before as they were; one that is damaged
nevertheless is named, and the one before it is taken.
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
from safetensors import SafetensorError
from tqdm import tqdm

from system import distributed
from system.run import BadInput, require, write_json

KEEP = 2  # checkpoints of a run: the last one, and one to fall back on
MAX_BAD_STEPS = 8  # optimiser steps in a row that were not finite, after which a run stops
UNREADABLE = (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError)


def save(run_dir, learners, generators, progress):
    """Writes the checkpoint of step progress["step"], then removes all but the last KEEP.

    Args: learners, {name: Learner}; generators, {name: torch.Generator}; progress, a dict of what
    else the next step depends on (numbers, strings, lists of them).
    Raises: BadInput if it cannot be written (a full disk, say); the ones before stay as they were.
    """
    directory = Path(run_dir) / "checkpoint" / f"step-{progress['step']:06d}"
    beside = directory.with_name(directory.name + ".tmp")
    rest = {"progress": progress, "generators": {n: g.get_state() for n, g in generators.items()}}
    for name, learner in learners.items():
        state = learner.optimizer.state_dict()
        rest[f"{name}_optimizer"] = {key: value for key, value in state.items() if key != "state"}
        rest[f"{name}_scheduler"] = learner.scheduler.state_dict()
    sums = {}

    def begin():
        if not distributed.rank():
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)

    def write_tensors():
        with in_this_many_processes() as how:
            dcp.save(tensors_of(learners), checkpoint_id=beside, **how)
        own = sorted(beside.glob(f"__{distributed.rank()}_*"))
        sums.update(checksums(own))  # each rank reads what it wrote

    def finish():
        for others in distributed.all_ranks(sums):
            sums.update(others)
        if not distributed.rank():
            write(beside / "rest.pt", rest)
            sums.update(checksums(p for p in sorted(beside.iterdir()) if p.name not in sums))
            write_json(beside / "checksums.json", sums)
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
            said = first_line(failed) if failed else "on another rank"
            raise BadInput(f"cannot write the checkpoint {directory} ({said}): make room, then "
                           f"--resume {run_dir}; the ones before are whole")  # fmt: skip
    if not distributed.rank():
        # Later ones are damaged, or the run would not be here again.
        later = [path for path in saved(run_dir) if path.name > directory.name]
        for old in later + [path for path in saved(run_dir) if path not in later][KEEP:]:
            old.rename(old.with_name(old.name + ".tmp"))  # never a part under its own name
        for old in directory.parent.glob("*.tmp"):
            shutil.rmtree(old, ignore_errors=True)


def resume(run_dir, learners, generators):
    """Gives learners and generators the state of the newest checkpoint that is whole.

    On any number of ranks. Returns: its progress; None where nothing was saved yet.
    Raises: BadInput if all checkpoints are damaged, or are of other models.
    """
    directory = newest(run_dir)
    if directory is None:
        return None
    rest = read(directory / "rest.pt")
    tensors = tensors_of(learners)
    known = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    for name, learner in learners.items():  # a new optimiser has no state yet to be filled
        for i, parameter in enumerate(learner.network.parameters()):
            start = f"{name}_optimizer/{i}/"
            for key in (key for key in known if key.startswith(start)):
                is_step = key == start + "step"
                tensors[key] = torch.zeros(()) if is_step else torch.zeros_like(parameter)
    try:
        with in_this_many_processes() as how:
            dcp.load(tensors, checkpoint_id=directory, **how)
        for name, learner in learners.items():
            state = {}
            for key in (key for key in tensors if key.startswith(f"{name}_optimizer/")):
                _, i, what = key.split("/")
                state.setdefault(int(i), {})[what] = tensors[key]
            learner.optimizer.load_state_dict({"state": state} | rest[f"{name}_optimizer"])
            learner.scheduler.load_state_dict(rest[f"{name}_scheduler"])
    except (ValueError, KeyError, RuntimeError, dcp.api.CheckpointException) as error:
        wrong = cause(error)
        if not isinstance(wrong, (ValueError, KeyError)) and "Missing key" not in str(wrong):
            raise wrong from None
        said = f"the checkpoint {directory} does not fit ({first_line(wrong)})"
        said += ": is --model still the model that the run began with?"
        raise BadInput(said) from None
    for name, generator in generators.items():
        generator.set_state(rest["generators"][name])
    return rest["progress"]


@contextmanager
def in_this_many_processes():
    """What torch.distributed.checkpoint is told in one process, without its warning about that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield {"no_dist": distributed.world() == 1}


def tensors_of(learners):
    """Weights and optimiser states as one flat dict of tensors, each rank's share of them."""
    tensors = {}
    for name, learner in learners.items():
        weights = learner.network.state_dict()
        tensors |= {f"{name}/{key}": tensor for key, tensor in weights.items()}
        for i, state in learner.optimizer.state_dict()["state"].items():
            tensors |= {f"{name}_optimizer/{i}/{key}": tensor for key, tensor in state.items()}
    return tensors


def saved(run_dir):
    """The run's checkpoints, the newest first."""
    return sorted((Path(run_dir) / "checkpoint").glob("step-??????"), reverse=True)


def newest(run_dir):
    """The newest checkpoint that is whole, or None. Raises: BadInput if all are damaged."""
    there = distributed.from_rank_0(saved(run_dir))
    for directory in there:
        if not (wrong := damage(directory)):
            return directory
        print(f"warning: the checkpoint {directory} is damaged ({wrong}): taking the one before")
    said = f"all checkpoints in {run_dir}/checkpoint are damaged: start again with another --out"
    require(not there, said)
    return None


def remove(run_dir):
    """Removes all checkpoints of a run that has ended. Rank 0 does."""
    if not distributed.rank():
        shutil.rmtree(Path(run_dir) / "checkpoint", ignore_errors=True)


def damage(directory):
    """What is wrong with a checkpoint, in words, or None. Each rank looks at a share of it."""
    wrong = None
    try:
        files = json.loads((directory / "checksums.json").read_text())
        for name, (size, expected) in distributed.share(sorted(files.items())):
            if (directory / name).stat().st_size != size:
                wrong = f"{name} has {(directory / name).stat().st_size} bytes of {size}"
            elif checksum(directory / name) != expected:
                wrong = f"{name} has changed"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        wrong = first_line(error)
    return next((said for said in distributed.all_ranks(wrong) if said), None)


def checksum(path):
    """CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            crc = zlib.crc32(block, crc)
    return crc


def checksums(paths):
    """{name: [size, checksum]} of files."""
    return {path.name: [path.stat().st_size, checksum(path)] for path in paths}


def cause(error):
    """What torch.distributed.checkpoint has wrapped, or the error itself.

    Raises: KeyboardInterrupt if it is that.
    """
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        failure = next(iter(error.failures.values()))
        error = failure[0] if isinstance(failure, tuple) else failure
    if isinstance(error, KeyboardInterrupt):
        raise error
    return error


def first_line(error):
    """Of its message; its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def write(path, value):
    """torch.save beside, flushed, and renamed: the file is the old or the new one. Rank 0 does."""
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
        said = f"{path} is damaged ({first_line(error)}): remove it to start again"
        raise BadInput(said) from None


def keep_bad_batch(run_dir, step, number, batch, metrics, in_a_row):
    """Keeps a mini-batch whose loss or gradient is not finite, and whose step was skipped.

    Raises: BadInput after MAX_BAD_STEPS of them in a row.
    """
    path = Path(run_dir) / "bad_batches" / f"step-{step:06d}-{number}.pt"
    write(path, {"batch": batch, "metrics": metrics})
    broken = ", ".join(name for name, value in metrics.items() if not math.isfinite(value))
    said = f"rollout {step}, optimiser step {number} is skipped, {broken} not finite"
    tqdm.write(f"warning: {said}; its batch is in {path}")
    if in_a_row >= MAX_BAD_STEPS:
        said = f"{in_a_row} optimiser steps in a row were not finite ({broken})"
        raise BadInput(f"{said}: look at the batches in {path.parent}; start again with a lower "
                       "--lr, --critic_lr or --max_grad_norm")  # fmt: skip


def export(model, tokenizer, directory):
    """Saves model and tokenizer as a Hugging Face directory, written beside and renamed.

    Rank 0 does. Raises: BadInput if it cannot be written.
    """
    directory, model = Path(directory), distributed.unsharded_network(model)
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
            except (OSError, SafetensorError) as error:
                said = f"cannot write {directory} ({first_line(error)})"
                raise BadInput(f"{said}: mend that, or give another --out") from None
            finally:
                shutil.rmtree(beside, ignore_errors=True)
