"""distributed.py: several processes compute what one computes; a rank that dies is named."""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from test_vapo import asked, metrics_of, without_clock
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, Qwen2Config

import evaluate
import rollout
import table
import train_value
import train_vapo
from system import checkpoint, distributed, loading
from system.run import BadInput, exit_on_bad_input, pick_device

ROOT = Path(__file__).parent.parent.parent
FLAGS = ["--device=cpu", "--prompts=6", "--samples=4", "--mini_batch=8", "--micro_batch_tokens=64",
         "--eval_samples=2", "--save_every=1", "--eval_every=1", "--pretrain_answers=64",
         "--pretrain_passes=1"]  # fmt: skip
FOREVER = ["--steps=100000", "--save_every=0", "--eval_every=0"]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "VAPO_RANK_MINUTES": "1"}
LINUX = pytest.mark.skipif(not Path("/proc").exists(), reason="looks for the processes in /proc")


def command(processes, *words):
    """A script of the project on that many processes."""
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    return [*start, "--standalone", *map(str, words)]


def torchrun(processes, *words, timeout=300):
    """Runs it to its end, which must be a good one."""
    pipes = {"capture_output": True, "text": True, "timeout": timeout}
    done = subprocess.run(command(processes, *words), cwd=ROOT, env=ONE_THREAD, **pipes)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def vapo_flags(world, out, *flags):
    return ["train_vapo.py", f"@{world}/train_vapo.args", *FLAGS, f"--out={out}", *flags]


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def wait_for_metrics(run_dir, lines):
    """Until a run in another process has logged so many."""
    deadline = time.time() + 120
    path = run_dir / "metrics.jsonl"
    while time.time() < deadline and not (path.exists() and len(metrics_of(run_dir)) >= lines):
        time.sleep(0.2)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_are_those_of_one_process_whatever_the_split(world, tmp_path, processes):
    base = str(world / "base")
    policy = loading.load_policy(base, torch.device("cpu"))
    tokenizer = loading.load_tokenizer(base)
    problems, source = asked(world, tokenizer, 6), torch.Generator().manual_seed(0)
    rows = rollout.sample(policy, tokenizer, problems, 4, 24, 1.0, source)
    rollout.judge(rows, tokenizer, problems)
    ragged = dict(rows)  # only the shortest answer is right: no other rank has a correct one
    ragged["correct_B"] = torch.arange(24) == rows["length_B"].argmin()
    ragged["reward_B"] = ragged["correct_B"].float()
    few = table.take(rows, torch.arange(5))  # a rank has two rows, or micro-batches are halved
    common = {"train": "t", "test": "t", "alpha": 0.5, "mu": 1.0, "prompts": 6, "samples": 4,
              "mini_batch": 8}  # fmt: skip
    other = {"token_level_loss": False, "gradient_checkpointing": True}
    tasks = [(base, rows, {"micro_batch_tokens": 60}), (base, ragged, {"micro_batch_tokens": 100}),
             (base, few, {"micro_batch_tokens": 10_000}),
             (base, rows, {"micro_batch_tokens": 100} | other),
             (base, rows, {"micro_batch_tokens": 100, "lora": 2}),
             (base, rows, {"micro_batch_tokens": 100, "dtype": "bfloat16"})]  # fmt: skip
    torch.manual_seed(0)
    ends = {"vocab_size": policy.config.vocab_size, "bos_token_id": None, "pad_token_id": None,
            "eos_token_id": tokenizer.eos_token_id, "initializer_range": 0.2}  # fmt: skip
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    for config in (  # tied weights; learned positions; soft-capped logits, norms around each block
        Qwen2Config(**small, **ends, tie_word_embeddings=True),
        GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, **ends),
        Gemma2Config(**small, **ends, head_dim=16),
    ):
        directory = str(tmp_path / config.model_type)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        tasks.append((directory, rows, {"micro_batch_tokens": 100}))
    tasks = [{"model": m, "rows": r, "settings": common | own} for m, r, own in tasks]
    torch.save(tasks, tmp_path / "tasks.pt")
    torchrun(processes, ROOT / "tests" / "system" / "ranks.py", tmp_path)
    assert (tmp_path / "built").read_text() == "by rank 0"
    for task, got in zip(tasks, torch.load(tmp_path / f"result-{processes}.pt")):
        expected = ranks.result(task)
        assert got["merged"].keys() == expected["merged"].keys()
        for name, weight in expected["merged"].items():
            torch.testing.assert_close(got["merged"][name], weight)
        if task["settings"].get("dtype") == "bfloat16":  # rounded otherwise: the same direction
            both = [
                torch.cat([g.flatten() for g in x["gradients"].values()]) for x in (got, expected)
            ]
            assert torch.cosine_similarity(*both, dim=0) > 0.999
            continue
        for name in ("old_logp_BT", "old_value_BT", "adv_BT", "target_BT"):
            pair = got["rows"][name], expected["rows"][name]
            torch.testing.assert_close(*pair, rtol=0, atol=1e-5)
        assert expected["metrics"]["clip_high"] + expected["metrics"]["clip_low"] > 0
        for name, number in expected["metrics"].items():
            near = pytest.approx(number, rel=1e-4, abs=1e-5)
            assert name == "padding" or got["metrics"][name] == near, name
        assert got["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            near = {"rtol": 0, "atol": 2e-6 * max(1, gradient.abs().max().item())}
            torch.testing.assert_close(got["gradients"][name], gradient, **near)


@pytest.mark.parametrize("last", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_on_two_processes_goes_on_on_one_and_on_three(world, tmp_path, capsys, last):
    """With --all: on three, a step further."""
    out = tmp_path / "run"
    assert torchrun(2, *vapo_flags(world, out, "--steps=2")).stdout.count("test problems") == 1
    if last == 3:
        train_vapo.main([f"--resume={out}", "--steps=3"])
    # Of the last checkpoint a file that rank 0 does not look at has changed: that step is done
    # again.
    step = len(metrics_of(out)) - 1
    path = sorted((out / "checkpoint" / f"step-{step:06d}").iterdir())[1]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    capsys.readouterr()
    flags = [f"--resume={out}", f"--steps={step + 1}"]
    if last == 1:
        train_vapo.main(flags)
        said = capsys.readouterr().out
    else:
        said = torchrun(last, "train_vapo.py", *flags).stdout
    assert said.count("test problems") == 1  # rank 0 speaks
    assert said.count(f"step-{step:06d} is damaged ({path.name} has changed)") == 1
    lines = metrics_of(out)
    assert [line["step"] for line in lines] == list(range(step + 2))
    # every rank samples from the policy of now
    assert all(line["sampler_gap"] < 1e-5 for line in lines[1:])
    assert lines[1]["ratio_max"] > 1 and lines[-1]["gradient_steps"] == 3 * (step + 1)
    state = AutoModelForCausalLM.from_pretrained(out / "policy").state_dict()
    base = AutoModelForCausalLM.from_pretrained(world / "base").state_dict()
    assert state.keys() == base.keys()
    assert not torch.equal(state["lm_head.weight"], base["lm_head.weight"])
    config = json.loads((out / "policy" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.slow
def test_evaluation_by_all_ranks_is_that_of_one(world, tmp_path):
    """Greedy answers are the same."""
    flags = [f"@{world}/evaluate.args", "--samples=2", "--device=cpu"]
    torchrun(2, "evaluate.py", *flags, f"--out={tmp_path}/two")
    one = evaluate.main([*flags, f"--out={tmp_path}/one"])
    two = metrics_of(tmp_path / "two")[0]
    assert one["greedy_accuracy"] == two["test_greedy_accuracy"]


@pytest.mark.slow
def test_on_as_many_processes_a_resumed_run_is_the_same_bit_for_bit(world, tmp_path):
    out = tmp_path / "run"

    def remains():
        weights = [out / name / "model.safetensors" for name in ("policy", "critic")]
        return [path.read_bytes() for path in weights], without_clock(metrics_of(out))

    torchrun(2, *vapo_flags(world, out, "--steps=3"))
    undisturbed = remains()
    for name in ("checkpoint/step-000003", "policy", "critic"):
        shutil.rmtree(out / name)
    torchrun(2, "train_vapo.py", f"--resume={out}")
    assert remains() == undisturbed


@pytest.mark.parametrize(
    "flag, said",
    [
        ("--prompts=1", "1 --prompts for 2 processes"),
        pytest.param("--prompts=x", "argument --prompts", marks=pytest.mark.slow),
    ],
)
def test_what_is_wrong_is_said_once(world, tmp_path, flag, said):
    words, pipes = vapo_flags(world, tmp_path / "run", flag), {"capture_output": True, "text": True}
    done = subprocess.run(command(2, *words), cwd=ROOT, env=ONE_THREAD, **pipes)
    assert said in done.stderr and not (tmp_path / "run").exists()
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    assert "error on rank" not in done.stderr


def test_what_is_wrong_on_another_rank_only_is_said_with_its_number(monkeypatch, capsys):
    @exit_on_bad_input
    def main(argv=None):
        raise BadInput("no space\nhere: make some")

    slept = []
    monkeypatch.setattr("time.sleep", slept.append)  # rank 0 says nothing in that time
    for rank, said in (("0", "error: "), ("3", "error on rank 3: ")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"{said}no space here: make some\n"
    assert slept == [5]


def test_value_pretraining_with_fewer_answers_than_processes_is_one_line(monkeypatch):
    monkeypatch.setattr(distributed, "STATE", {"world": 9, "rank": 0})
    settings = {"train": "t", "device": "cpu", "answers": 144, "samples": 16}
    train_value.Settings(**settings, batch=9).check()
    with pytest.raises(BadInput, match="--batch is 8 for 9 processes"):
        train_value.Settings(**settings, batch=8).check()
    rows = {"problem_B": torch.arange(32) // 16}
    rows |= dict.fromkeys(("length_B", "prompt_length_B"), torch.ones(32, dtype=torch.long))
    with pytest.raises(BadInput, match="8 answers .* in half a pass for 9 processes"):
        train_value.split_by_problem(rows, 0.1, 0)


def test_a_critic_is_started_on_more_processes_than_a_batch_has_answers(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "STATE", {"world": 100, "rank": 0})
    monkeypatch.setattr(distributed, "from_rank_0", lambda value: value)
    batches = []
    monkeypatch.setattr(train_value, "pretrain", lambda own, _: batches.append(own.batch))
    train_value.starting_critic(train_vapo.Settings(train="t", test="t"), tmp_path, None)
    assert batches == [100]


def test_processes_that_would_share_a_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "STATE", {"world": 4, "rank": 0})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(BadInput, match="each process has its own; leave the number out"):
        pick_device("cuda:1")
    with pytest.raises(BadInput, match="4 processes for the 2 GPUs"):
        pick_device("cuda")


@pytest.mark.slow
def test_dynamic_sampling_draws_the_same_groups_for_all(world, tmp_path):
    one = (world / "test.jsonl").read_text().splitlines()[0]
    (tmp_path / "one.jsonl").write_text(one + "\n")  # fewer test problems than processes
    flags = ["--preset=dapo", "--dynamic_sampling=50", "--steps=2", f"--test={tmp_path}/one.jsonl"]
    torchrun(2, *vapo_flags(world, tmp_path / "run", *flags))
    lines = metrics_of(tmp_path / "run")[1:]
    assert max(line["generations"] for line in lines) > 1
    assert all(line["sampler_gap"] < 1e-5 for line in lines)


def test_torchrun_that_is_told_to_stop_saves_the_run(world, tmp_path):
    out = tmp_path / "run"
    words = command(2, *vapo_flags(world, out, *FOREVER))
    pipes = {"stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, cwd=ROOT, env=ONE_THREAD, **pipes)
    try:
        wait_for_metrics(out, 3)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "stopped by SIGTERM: rollout " in error
    assert checkpoint.saved(out)[0].name == f"step-{metrics_of(out)[-1]['step']:06d}"


def test_shares_and_deals_cover_everything_once(monkeypatch):
    # uneven, row by row, all in one
    for world, cuts in itertools.product((1, 2, 3, 5), ([2, 3, 11], list(range(1, 17)), [])):
        shares, dealt = [], []
        for rank in range(world):
            monkeypatch.setattr(distributed, "STATE", {"world": world, "rank": rank})
            shares.append(distributed.share(list(range(7))))
            dealt.append(distributed.deal(torch.arange(17).tensor_split(cuts)))
        assert sum(shares, []) == list(range(7))
        assert {len(part) for part in shares} <= {7 // world, 7 // world + 1}
        assert len({len(part) for part in dealt}) == 1  # each pass is a collective
        if len(cuts) == 16:  # a row fills a micro-batch: two in one is the most that must be
            assert max(len(index) for part in dealt for index in part) <= 2
        index_N = torch.cat([index for part in dealt for index in part])
        assert index_N.sort().values.tolist() == list(range(17))
    with pytest.raises(AssertionError, match="fewer rows than ranks"):
        distributed.deal(torch.arange(3).tensor_split(1))
