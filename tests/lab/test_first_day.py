"""first_day.py: what fails is said, and the day goes on."""

import json
from types import SimpleNamespace

import pytest
import torch

from lab import first_day


def test_what_fails_is_noted_and_the_next_step_begins(tmp_path, monkeypatch, capsys):
    def commands(asked, device, out, large):
        return {"broken": ("no_such_script", []), "whole": ("platform", [])}

    def no_memory(flags, device):
        raise torch.OutOfMemoryError("8 GB are not there")

    monkeypatch.setattr(first_day, "large_model", lambda *_: [])
    monkeypatch.setattr(first_day, "commands", commands)
    monkeypatch.setattr(first_day, "memory", no_memory)
    out = tmp_path / "day"
    failed = first_day.main(["--device=cpu", "--quick", f"--out={out}"])
    assert failed == ["broken", "memory against the plan", "shares"]  # which had no bench to read
    said = capsys.readouterr().out
    assert said.endswith("failed: broken, memory against the plan, shares\n")
    steps = json.loads((out / "numbers.json").read_text())["steps"]
    assert "failed" not in steps["whole"] and "8 GB" in steps["memory against the plan"]["failed"]
    assert steps["limits"]["bytes"] > 0 and steps["limits"]["operations"] > 0
    page = (out / "README.md").read_text()
    assert "Failed: broken, memory against the plan, shares." in page and "| limits | " in page


def test_the_share_of_the_devices_limit_by_hand(tmp_path, monkeypatch):
    """4 slots, weights of 8,000 bytes, 10 bytes of keys and values a token, prompts of 6, answers
    of 8: 2,000 + 10 · (6 + 4) = 2,100 bytes a token. 6 · (4,000 + 3,000) operations a token."""
    shape = {"policy": 4000, "critic": 3000, "size": 2, "slots": 4, "token": 10}
    monkeypatch.setattr(first_day.plan, "shapes", lambda asked: SimpleNamespace(**shape))
    parts = [{"part": "sampling", "ours": 50.0}, {"part": "update, 1 GB", "ours": 30.0}]
    (tmp_path / "bench.json").write_text(json.dumps({"lines": parts}))
    flags = ["--train=t", "--test=t", "--prompt_length=6", "--response_length=8"]
    limits = {"bytes": 1_050_000.0, "operations": 2_520_000.0}
    for own, update in (([], 0.5), (["--gradient_checkpointing"], 0.5 * 8 / 6)):
        shares = first_day.of_the_limit([*flags, *own], tmp_path / "bench.json", limits)
        assert list(shares.values()) == pytest.approx([0.1, update])
