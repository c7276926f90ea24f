"""bench.py: both sides of a comparison do the same work, and the table says what was measured."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import fails_with

import train_vapo
from lab import bench, plan
from system import settings
from system.run import seeded_generator


def test_the_line_has_medians_and_the_spread_of_the_turns_ratios(monkeypatch, capsys):
    # Ours takes 1, 2 and 4 seconds, the other 3, 3 and 4: ratios 3, 1.5 and 1 for 12 tokens each.
    taken, rows = iter([1, 3, 2, 3, 4, 4]), {"length_B": torch.tensor([5, 7])}
    monkeypatch.setattr(bench, "seconds", lambda function: (next(taken), function()))
    line = bench.side_by_side("part", "other", lambda: rows, lambda: rows, 3)
    assert (line["ratio"], line["lowest"], line["highest"]) == (1.5, 1, 3)
    assert (line["ours"], line["theirs"]) == (6, 4)
    text = capsys.readouterr().out
    assert "6.0 tok/s" in text and "1.50x (1.00 to 3.00)" in text


def test_it_runs_and_writes_what_it_printed(tmp_path, capsys):
    flags = ["--parts", "gae", "--repeats=1", "--device=cpu", f"--json={tmp_path}/b.json"]
    lines = bench.main(flags)
    stored = json.loads((tmp_path / "b.json").read_text())
    titles = [line["part"] for line in lines]
    assert stored["lines"] == lines and titles == ["GAE, 512 x 4096"]
    printed = capsys.readouterr().out
    assert all(f"{line['ours']:,.1f} times/s" in printed for line in lines)


def test_sampling_and_update_in_a_small_world(world):
    flags = [f"@{world}/train_vapo.args", "--prompts=4", "--samples=4", "--response_length=24",
             "--mini_batch=8", "--device=cpu", "--repeats=1"]  # fmt: skip
    sampling, update = bench.main([*flags, "--parts", "sampling", "update"])
    assert sampling["against"] == "--engine hf" and update["against"] == "16 rows, whole logits"
    assert all(line["unit"] == "tok/s" and line["ratio"] > 0 for line in (sampling, update))


def test_the_share_of_the_devices_limit_by_hand(monkeypatch):
    """4 slots, weights of 8,000 bytes, 10 bytes of keys and values a token, prompts of 6, answers
    of 8: 2,000 + 10 · (6 + 4) = 2,100 bytes a token, and 6 · (4,000 + 3,000) operations. A copy of
    1024² numbers of 4 bytes, 8 MiB in and out, takes 8 s: 1 MiB a second; the product of 2 · 1024³
    operations too: 2^28 a second."""
    shape = {"policy": 4000, "critic": 3000, "size": 2, "slots": 4, "token": 10}
    monkeypatch.setattr(bench.plan, "shapes", lambda asked: SimpleNamespace(**shape))
    monkeypatch.setattr(bench, "seconds", lambda function: (8.0, None))
    own = {"prompt_length": 6, "response_length": 8}
    for more, factor in (({}, 6), ({"gradient_checkpointing": True}, 8)):
        how = (bench.Settings(**own, **more), {"sampling": 50.0, "update": 30.0})
        shares = bench.of_the_limit(*how, torch.device("cpu"))
        expected = [50 * 2100 / 2**20, 30 * factor * 7000 / 2**28]
        assert list(shares.values()) == pytest.approx(expected)


def test_both_sides_of_the_update_make_the_same_gradients(world, monkeypatch):
    flags = [f"@{world}/train_vapo.args", "--prompts=6", "--samples=4", "--response_length=24"]
    asked = settings.parse(train_vapo.Settings, [*flags, "--device=cpu"], "")
    policy, critic, rows, _ = bench.scored(asked, seeded_generator(0, "test"))
    shape = plan.shapes(settings.parse(plan.Settings, [*flags, "--device=cpu"], ""))
    assert critic.num_parameters() == shape.critic
    found = []
    for network in (policy, critic):  # `update` throws the gradients away by zero_grad
        monkeypatch.setattr(network, "zero_grad", lambda network=network: found.append(
            [p.grad.clone() for p in network.parameters() if p.grad is not None]))  # fmt: skip
    for plain in (False, True):
        bench.update(policy, critic, rows, asked, plain=plain)
        for network in (policy, critic):
            type(network).zero_grad(network)
    for ours, theirs in zip(found[:2], found[2:]):
        assert len(ours) == len(theirs) > 0
        for one, other in zip(ours, theirs):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "flags, fragment",
    [
        (["--parts", "gea"], "--parts must be of gae, "),
        (["--parts", "sampling", "--model=7B"], "7B"),
        (["--repeats=0"], "--repeats must be at least 1"),
    ],
)
def test_bad_flags_end_with_one_line(flags, fragment, capsys, monkeypatch):
    monkeypatch.setattr("toy.defaults", lambda script, model: {})
    fails_with(capsys, bench.main, flags, fragment)
