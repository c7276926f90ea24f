"""Save and resume, all or nothing; export as Hugging Face directories.

A checkpoint is one file with everything that the next step depends on. It is written beside and renamed, so that a
killed run leaves the last whole one.
"""

import os
import pickle
import shutil
from pathlib import Path

import torch

from run import BadInput


def save(run_dir, state):
    """Writes RUN_DIR/checkpoint/state.pt, replacing the one before only when the new one is whole on disk."""
    write(Path(run_dir) / "checkpoint" / "state.pt", state)


def load(run_dir):
    """The state that `save` wrote, or None where nothing was saved yet. Raises: BadInput if it is damaged."""
    path = Path(run_dir) / "checkpoint" / "state.pt"
    return read(path) if path.is_file() else None


def write(path, value):
    """torch.save beside, flushed, and renamed: the file is the old one or the new one, never half of it."""
    path = Path(path)
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
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise BadInput(f"{path} is damaged ({str(error).splitlines()[0]}): remove it to start again") from None


def export(model, tokenizer, directory):
    """Saves a model and its tokenizer as an ordinary Hugging Face directory, written beside and renamed."""
    directory = Path(directory)
    beside = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    shutil.rmtree(directory, ignore_errors=True)
    beside.replace(directory)
