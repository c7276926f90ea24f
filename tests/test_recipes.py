"""recipes/*.sh: each says what it needs, its flags are known, and what a CPU can run is run."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from test_vapo import SMALL

import ablate
import train_vapo
from lab import bench, view
from system import settings

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.sh"))
KINDS = {"train_vapo.py": train_vapo.Settings, "ablate.py": ablate.Settings,
         "lab.bench": bench.Settings, "lab.view": view.Settings}  # fmt: skip
# In the place of python and torchrun: notes its arguments, and that the program it is given parses.
STUB = f"""#!{sys.executable}
import json, sys
name, *argv = sys.argv
if "-c" in argv:
    print(2)
elif argv[:1] == ["-"]:
    compile(sys.stdin.read(), "program", "exec")
else:
    with open("NOTES", "a") as notes:
        notes.write(json.dumps(argv) + chr(10))
"""


def recipe(name, *argv, path=""):
    """Runs it; what it prints."""
    environment = os.environ | {"PATH": f"{path}{os.environ['PATH']}"}
    how = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 600}
    done = subprocess.run(["bash", ROOT / "recipes" / name, *map(str, argv)], **how)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def flags_of(words):
    """(script, its flags) of a command of python or torchrun."""
    at = next(i for i, word in enumerate(words) if word in KINDS or word == "pytest")
    return words[at], words[at + 1 :]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_says_what_it_needs_and_its_flags_are_known(path, tmp_path, monkeypatch):
    head = path.read_text().partition("\nset -")[0]
    assert all(f"{word}: " in head for word in ("Machine", "Minutes", "Expected")), head
    assert path.stat().st_mode & stat.S_IXUSR
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(STUB.replace("NOTES", str(tmp_path / "notes")))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    argv = ["cuda", tmp_path / "day"] if path.name == "first_day.sh" else ["--seed=7"]
    argv = [] if path.name == "figures.sh" else argv
    recipe(path.name, *argv, path=f"{tmp_path}:")
    commands = [flags_of(json.loads(line)) for line in (tmp_path / "notes").open()]
    monkeypatch.chdir(tmp_path)  # @FILE of a world that may not be there
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    (tmp_path / "runs" / "toy" / "train_vapo.args").touch()
    for script, flags in commands:
        if script in KINDS:
            flags = [f"--run={flag}" if script == "lab.view" else flag for flag in flags]
            settings.parse(KINDS[script], flags, "")
    assert len(commands) == {"first_day.sh": 13, "figures.sh": 3}.get(path.name, 1)
    assert argv[:1] != ["--seed=7"] or "--seed=7" in commands[0][1]


def test_the_default_recipe_runs(world, tmp_path):
    small = [f"@{world}/train_vapo.args", *SMALL, "--steps=1", "--device=cpu"]
    said = recipe("default.sh", *small, f"--out={tmp_path / 'run'}")
    assert "test problems" in said and (tmp_path / "run" / "policy").is_dir()


def test_a_step_that_fails_is_noted_and_the_day_goes_on(tmp_path):
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(
            '#!/bin/bash\n[[ "$*" != *"--preset grpo"* ]] || { echo no; exit 1; }\n'
        )
        (tmp_path / name).chmod(0o755)
    said = recipe("first_day.sh", "cuda", tmp_path / "day", path=f"{tmp_path}:")
    assert said.endswith("failed: grpo\n") and "dapo ..." in said
    page = (tmp_path / "day" / "README.md").read_text()
    assert "| grpo | **failed**, see grpo.log | 0 |\n| dapo | ok |" in page
    assert "\nFailed: grpo.\n" in page and (tmp_path / "day" / "grpo.log").read_text() == "no\n"
