"""The rooms of the house: who may import whom, and how large they are."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"root": sorted(ROOT.glob("*.py")), "system": sorted((ROOT / "system").glob("*.py")),
         "lab": sorted((ROOT / "lab").glob("*.py"))}  # fmt: skip
SOURCE = sum(ROOMS.values(), [])
TESTS = sorted((ROOT / "tests").rglob("*.py"))
EQUATIONS = ("gae.py", "losses.py", "logprobs.py", "dapo.py")


def imported(path):
    """The first words of all names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.partition(".")[0])
    return names


def lines(paths):
    return sum(len(path.read_text().splitlines()) for path in paths)


@pytest.mark.parametrize("path", SOURCE, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_from_lab_to_root_to_system(path):
    root = {other.stem for other in ROOMS["root"]}
    forbidden = {"root": {"lab", "tests"}, "system": {"lab", "tests"} | root, "lab": {"tests"}}
    room = "root" if path.parent == ROOT else path.parent.name
    assert imported(path) & forbidden[room] == set()


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_equations_import_torch_and_nothing_else(name):
    assert imported(ROOT / name) - set(sys.stdlib_module_names) == {"torch"}


@pytest.mark.parametrize("path", SOURCE, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", SOURCE + TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_is_longer_than_a_hundred_characters(path):
    long = [i for i, line in enumerate(path.read_text().split("\n"), 1) if len(line) > 100]
    assert long == []


def test_the_root_is_small():
    assert len(ROOMS["root"]) <= 14
    assert lines(ROOMS["root"]) <= 2_300


def test_the_house_is_small():
    assert lines(SOURCE) <= 5_736  # 5,600 before view, effects, reward, lora, health (429)


def test_the_readme_is_a_front_door():
    assert len((ROOT / "README.md").read_bytes()) <= 14_000


def test_the_readme_counts_the_lines_of_the_seven_functions():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"`(\w+)\.(?:\w+\.)?(\w+)`, (\d+)", text)
    assert len(named) == 7
    for module, name, count in named:
        nodes = ast.walk(ast.parse((ROOT / f"{module}.py").read_text()))
        own = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name]
        assert [node.end_lineno - node.lineno + 1 for node in own] == [int(count)], name


def test_system_names_all_its_files():
    text = (ROOT / "system" / "__init__.py").read_text()
    named = {line.split()[0] for line in text.splitlines() if line.split(" ")[0].endswith(".py")}
    assert named == {path.name for path in ROOMS["system"]} - {"__init__.py"}


@pytest.mark.slow
@pytest.mark.parametrize("command", (["check"], ["format", "--check"]), ids=" ".join)
def test_ruff_has_nothing_to_say(command):
    pytest.importorskip("ruff")
    done = subprocess.run([sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True)
    assert done.returncode == 0, done.stdout.decode()
