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
    folder = Path(run_dir) / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / "state.pt.tmp"
    with open(beside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(folder / "state.pt")


def load(run_dir):
    """The state that `save` wrote, on the CPU. Raises: BadInput if there is none, or it cannot be read."""
    path = Path(run_dir) / "checkpoint" / "state.pt"
    if not path.is_file():
        raise BadInput(f"no checkpoint in {run_dir} (looked for {path}): start the run again without --resume")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise BadInput(f"the checkpoint {path} is damaged: {str(error).splitlines()[0]}") from None


def export(model, tokenizer, directory):
    """Saves a model and its tokenizer as an ordinary Hugging Face directory, written beside and renamed."""
    directory = Path(directory)
    beside = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    shutil.rmtree(directory, ignore_errors=True)
    beside.replace(directory)
