"""settings.py: what a person who asks for help is shown, and where a setting comes from."""

import contextlib
import io
from dataclasses import dataclass, fields

import pytest

import ablate
import evaluate
import toy
import train_value
import train_vapo
from system import settings
from system.run import BadInput

SCRIPTS = {"train_vapo": train_vapo.main, "train_value": train_value.main, "toy": toy.main,
           "evaluate": evaluate.main, "ablate": ablate.main}  # fmt: skip
SETTINGS = {"train_vapo": train_vapo.Settings, "train_value": train_value.Settings,
            "toy": toy.World, "evaluate": evaluate.Settings, "ablate": ablate.Settings}  # fmt: skip


def help_of(main):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    return said.getvalue().splitlines()


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_has_one_line_for_every_flag(name):
    lines = help_of(SCRIPTS[name])
    shown = {}
    for line in lines:
        if line.startswith("  --"):
            flag, _, said = line.strip().partition("  ")
            flag = flag.removeprefix("--").removeprefix("[no_]").removeprefix("no_")
            assert flag not in shown and said.strip(), line
            shown[flag] = said
    assert shown.keys() == {known.name for known in fields(SETTINGS[name])}
    for known in fields(SETTINGS[name]):  # the whole help stands in its line
        assert known.metadata["help"].replace("%%", "%") in shown[known.name]


def test_help_tells_the_default_of_every_number():
    lines = help_of(train_vapo.main)
    for known in fields(train_vapo.Settings):
        if type(known.default) in (int, float):
            (line,) = (line for line in lines if line.startswith(f"  --{known.name} "))
            assert f"(default: {known.default})" in line


def test_help_fits_on_a_screen():
    lines = help_of(train_vapo.main)
    assert len(lines) <= 70 and max(map(len, lines)) <= 150
    assert lines[0].startswith("usage: python ")


@pytest.mark.parametrize("name", SCRIPTS)
def test_defaults_are_within_their_ranges(name):
    files = {"train": "t", "test": "t"} if name == "train_vapo" else {}
    files = files or {"train_value": {"train": "t"}, "evaluate": {"test": "t"}}.get(name, {})
    settings.Settings.check(SETTINGS[name](**files))


@dataclass(frozen=True)
class Example(settings.Settings):
    size: int = settings.flag(3, "how many", settings.AT_LEAST_1)
    share: float = settings.flag(None, "how much", settings.SHARE)
    fast: bool = settings.flag(True, "in haste")
    words: list[str] = settings.flag(["a"], "which")
    out: str = settings.flag("", "where", may_change=True)
    most: int = settings.flag(0, "how many at most", may_change="above 0")


def test_what_is_given_last_counts_more_than_files_and_these_more_than_defaults(tmp_path):
    (tmp_path / "args").write_text("--size=4\n--fast=False\n")
    parse = settings.parse
    assert parse(Example, [], "") == Example()
    assert parse(Example, [], "", {"size": 9}) == Example(size=9)
    told = parse(Example, [f"@{tmp_path}/args", "--size=5"], "", {"size": 9, "share": 0.5})
    assert told == Example(size=5, share=0.5, fast=False)
    assert parse(Example, ["--no_fast", "--words", "b", "c"], "").words == ["b", "c"]
    with pytest.raises(BadInput, match=r"--sizes=4 \(see --help\)"):
        parse(Example, ["--sizes=4"], "")


def test_a_range_is_checked_and_none_is_no_number():
    Example().check()
    with pytest.raises(BadInput, match="^--size must be at least 1$"):
        Example(size=0).check()
    with pytest.raises(BadInput, match="^--share must be between 0 and 1$"):
        Example(share=2.0).check()


def test_a_resumed_run_has_its_own_settings_and_of_the_flags_what_may_change(tmp_path):
    import torch

    settings.save_config(tmp_path, Example(size=7), torch.device("cpu"))

    def resumed(*flags):
        return settings.resumed(Example, list(flags), "", tmp_path)

    assert resumed() == resumed("--size=7") == Example(size=7)
    assert resumed("--out=x") == Example(size=7, out="x")
    with pytest.raises(BadInput, match="--size and --fast cannot change"):
        resumed("--size=8", "--no_fast", "--out=x")


def test_a_limit_may_change_on_resume_but_not_be_taken_away_or_set(tmp_path):
    import torch

    def resumed(before, now):
        settings.save_config(tmp_path, Example(most=before), torch.device("cpu"))
        return settings.resumed(Example, [f"--most={now}"], "", tmp_path).most

    assert (resumed(3, 9), resumed(9, 3), resumed(0, 0)) == (9, 3, 0)
    for pair in ((0, 3), (3, 0)):
        with pytest.raises(BadInput, match="--most cannot change"):
            resumed(*pair)


def test_every_setting_that_may_change_changes_no_number():
    known = {known.name: known.metadata["may_change"] for known in fields(train_vapo.Settings)}
    assert {name for name, may in known.items() if may == "above 0"} == {"dynamic_sampling"}
    assert {name for name, may in known.items() if may is True} == {
        "resume", "steps", "eval_every", "save_every", "micro_batch_tokens", "vllm_memory",
        "gradient_checkpointing", "tensor_parallel", "reward_seconds",
    }  # fmt: skip
