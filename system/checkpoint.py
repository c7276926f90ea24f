"""Save and resume, all or nothing; export as Hugging Face directories.

RUN_DIR/checkpoint/step-000010/ holds everything that the next step depends on: the tensors of all
ranks by torch.distributed.checkpoint (which can give them to another number of ranks), the rest in
rest.pt, and, written last, checksums.json of all files. It is written beside and renamed: a killed
run leaves those before as they were. One that is damaged is named, and the one before it taken.
"""

import json
import math
import shutil
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from tqdm import tqdm

from system import distributed, lora
from system.run import BadInput, require, write_json, written_whole

KEEP = 2  # checkpoints of a run: the last one, and one to fall back on
MAX_BAD_STEPS = 8  # optimiser steps in a row that were not finite, after which a run stops
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # in one process


def save(run_dir, learners, generators, progress):
    """Writes the checkpoint of step progress["step"], then removes all but the last KEEP.
    Args: {name: Learner}, {name: torch.Generator}, a dict of what else the next step depends on.
    Raises: BadInput if it cannot be written (a full disk, say); the ones before stay whole."""
    directory = Path(run_dir) / "checkpoint" / f"step-{progress['step']:06d}"
    beside = directory.with_name(directory.name + ".tmp")
    rest = {"progress": progress, "generators": {n: g.get_state() for n, g in generators.items()}}
    first = not distributed.rank()
    with or_bad_input(directory):
        if first:
            shutil.rmtree(beside, ignore_errors=True)
        dcp.save(state_of(learners), checkpoint_id=beside, no_dist=distributed.world() == 1)
        written = sorted(beside.glob(f"__{distributed.rank()}_*"))
        own = {path.name: checksum(path) for path in written}  # each rank reads what it wrote
    with or_bad_input(directory):
        sums = {name: crc for each in distributed.all_ranks(own) for name, crc in each.items()}
        if first:
            write(beside / "rest.pt", rest)
            others = [path for path in sorted(beside.iterdir()) if path.name not in sums]
            sums |= {path.name: checksum(path) for path in others}
            write_json(beside / "checksums.json", sums)
            shutil.rmtree(directory, ignore_errors=True)
            beside.rename(directory)
    if first:
        there = saved(run_dir)  # later ones are damaged, or the run would not be here again
        kept = [path for path in there if path.name <= directory.name][:KEEP]
        for old in set(there) - set(kept):
            old.rename(old.with_name(old.name + ".tmp"))  # never a part under its own name
        for old in directory.parent.glob("*.tmp"):
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def or_bad_input(directory):
    """What fails in it on one rank is BadInput on all, and nothing half-written stays."""
    failed = None
    try:
        yield
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        failed = distributed.first_line(cause(error))
    if said := next(filter(None, distributed.all_ranks(failed)), None):
        if not distributed.rank():
            shutil.rmtree(directory.with_name(directory.name + ".tmp"), ignore_errors=True)
        raise BadInput(f"cannot write the checkpoint {directory} ({said}): make room, --resume")


def resume(run_dir, learners, generators):
    """Gives learners and generators the state of the newest checkpoint that is whole. Returns: its
    progress, or None. Raises: BadInput if all checkpoints are damaged, or of other models."""
    directory = newest(run_dir)
    if directory is None:
        return None
    rest, state = read(directory / "rest.pt"), state_of(learners)
    try:
        dcp.load(state, checkpoint_id=directory, no_dist=distributed.world() == 1)
        for name, learner in learners.items():
            learner.optimizer.load_state_dict(state[f"{name}_optimizer"])
            learner.scheduler.load_state_dict(state[f"{name}_scheduler"])
    except (ValueError, KeyError, RuntimeError, dcp.api.CheckpointException) as error:
        wrong = cause(error)
        if not isinstance(wrong, (ValueError, KeyError)) and "Missing key" not in str(wrong):
            raise wrong from None
        said = f"the checkpoint {directory} does not fit ({distributed.first_line(wrong)})"
        raise BadInput(f"{said}: are --model and revision those of its start?") from None
    for name, generator in generators.items():
        state, own = rest["generators"][name], generator.get_state()
        require(state.shape == own.shape, "the run began on another kind of device: see --device")
        generator.set_state(state)
    return rest["progress"]


def state_of(learners):
    """Trained weights, optimisers, schedules: each rank's own, for dcp.load to read into."""
    state = {}
    for name, learner in learners.items():
        weights = learner.network.state_dict(keep_vars=True).items()
        state[name] = {key: weight.detach() for key, weight in weights if weight.requires_grad}
        state[f"{name}_optimizer"] = learner.optimizer.state_dict()
        state[f"{name}_scheduler"] = learner.scheduler.state_dict()
    return state


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
    require(not there, f"all checkpoints of {run_dir} are damaged: start again in another --out")


def remove(run_dir):
    """Removes all checkpoints of a run that has ended. Rank 0 does."""
    if not distributed.rank():
        shutil.rmtree(Path(run_dir) / "checkpoint", ignore_errors=True)


def damage(directory):
    """What is wrong with a checkpoint, in words, or None. Each rank looks at a share of it."""
    wrong = None
    try:
        files = json.loads((directory / "checksums.json").read_text())
        for name, expected in distributed.share(sorted(files.items())):
            if checksum(directory / name) != expected:
                wrong = f"{name} has changed"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        wrong = distributed.first_line(error)
    return next(filter(None, distributed.all_ranks(wrong)), None)


def checksum(path):
    """CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            crc = zlib.crc32(block, crc)
    return crc


def cause(error):
    """What torch.distributed.checkpoint wrapped, or the error. Raises: a KeyboardInterrupt."""
    if isinstance(error, dcp.api.CheckpointException):
        error, _ = next(iter(error.failures.values()))
    if isinstance(error, KeyboardInterrupt):
        raise error
    return error


def write(path, value):
    """Saves a value as a file, whole or not at all. Rank 0 does."""
    if not distributed.rank():
        with written_whole(Path(path)) as file:
            try:
                torch.save(value, file)
            except RuntimeError as error:  # of a full disk it says nothing
                raise (error.__context__ or error) from None


def read(path):
    """What `write` wrote, on the CPU. Raises: BadInput if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds
        raise BadInput(f"{path} is damaged ({distributed.first_line(error)}): remove it") from None


def keep_bad_batch(run_dir, step, number, batch, metrics, in_a_row):
    """Keeps a mini-batch whose step was skipped. Raises: BadInput after MAX_BAD_STEPS in a row."""
    path = Path(run_dir) / "bad_batches" / f"step-{step:06d}-{number}.pt"
    write(path, {"batch": batch, "metrics": metrics})
    broken = ", ".join(name for name, value in metrics.items() if not math.isfinite(value))
    tqdm.write(f"warning: rollout {step}: a step is skipped, {broken} not finite; see {path}")
    said = f"{in_a_row} optimiser steps in a row were not finite ({broken}): see {path.parent}"
    require(in_a_row < MAX_BAD_STEPS, f"{said}; lower --lr, --critic_lr or --max_grad_norm")


def export(model, tokenizer, directory):
    """Rank 0 saves model and tokenizer as a directory, all or nothing. Raises: BadInput."""
    directory, weights = Path(directory), lora.whole_weights(model)
    beside = directory.with_name(directory.name + ".tmp")  # the new one and, in the end, the old

    def write_whole():
        shutil.rmtree(beside, ignore_errors=True)
        try:
            model.save_pretrained(beside / "new", state_dict=weights)
            tokenizer.save_pretrained(beside / "new")
            if directory.exists():
                directory.replace(beside / "old")
            (beside / "new").replace(directory)
        except (OSError, SafetensorError) as error:
            said = f"cannot write {directory} ({distributed.first_line(error)})"
            raise BadInput(f"{said}: mend that, or give another --out") from None
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    distributed.on_rank_0(write_whole)  # the others may read it afterwards
