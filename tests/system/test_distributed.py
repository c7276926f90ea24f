"""distributed.py: several processes compute what one computes; a rank that dies or hangs is named by the others."""

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
from test_vapo import without_clock
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, Qwen2Config

import checkpoint
import distributed
import model
import problems as problem_files
import rollout
import table
from run import BadInput, pick_device

ROOT = Path(__file__).parent.parent
FLAGS = ["--device=cpu", "--prompts=6", "--samples=4", "--mini_batch=8", "--micro_batch_tokens=64", "--eval_samples=2", "--save_every=1",
         "--eval_every=1", "--pretrain_answers=64", "--pretrain_passes=1", "--rank_timeout=1"]  # fmt: skip
LINUX = pytest.mark.skipif(not Path("/proc").exists(), reason="looks for the processes in /proc")


def torchrun(processes, *command, timeout=300):
    """Runs a script of the project on that many processes."""
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*start, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def metrics_of(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def wait_for_metrics(run_dir, lines):
    """Until a run in another process has logged so many."""
    deadline = time.time() + 120
    while time.time() < deadline and not ((run_dir / "metrics.jsonl").exists() and len(metrics_of(run_dir)) >= lines):
        time.sleep(0.2)


@pytest.mark.parametrize("processes", [2, 4])
def test_gradients_are_those_of_one_process_whatever_the_split(world, tmp_path, processes):
    base = str(world / "base")
    policy, tokenizer = model.load_policy(base, torch.device("cpu")), model.load_tokenizer(base)
    problems = problem_files.load_problems(world / "train.jsonl")[:6]
    problem_files.encode_prompts(problems, tokenizer, "{problem}:", 8)
    rows = rollout.sample(policy, tokenizer, problems, 4, 24, 1.0, torch.Generator().manual_seed(0))
    rollout.judge(rows, tokenizer, problems)
    ragged = dict(rows)  # only the shortest answer is right: no other rank has a correct one
    ragged["correct_B"] = torch.arange(24) == rows["length_B"].argmin()
    ragged["reward_B"] = ragged["correct_B"].float()
    few = table.take(rows, torch.arange(5))  # one rank has two rows, or the micro-batches are halved
    common = {"train": "t", "test": "t", "alpha": 0.5, "mu": 1.0, "prompts": 6, "samples": 4, "mini_batch": 8}
    tasks = [
        {"model": base, "rows": these, "settings": common | own}
        for these, own in (
            (rows, {"micro_batch_tokens": 60}), (ragged, {"micro_batch_tokens": 100}), (few, {"micro_batch_tokens": 10_000}),
            (rows, {"micro_batch_tokens": 100, "whiten": True, "token_level_loss": False, "gradient_checkpointing": True}),
        )
    ]  # fmt: skip
    torch.manual_seed(0)
    ends = {"vocab_size": policy.config.vocab_size, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    for config in (  # tied weights; positions that are learned; soft-capped logits, norms around each block
        Qwen2Config(**small, **ends, tie_word_embeddings=True, initializer_range=0.2),
        GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.2, **ends),
        Gemma2Config(**small, **ends, head_dim=16, initializer_range=0.2),
    ):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / config.model_type)
        tasks.append({"model": str(tmp_path / config.model_type), "rows": rows, "settings": common | {"micro_batch_tokens": 100}})
    torch.save(tasks, tmp_path / "tasks.pt")
    done = torchrun(processes, ROOT / "tests" / "ranks.py", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "built").read_text() == "by rank 0"
    for task, got in zip(tasks, torch.load(tmp_path / f"result-{processes}.pt")):
        expected = ranks.result(task)
        for name in ("old_logp_BT", "old_value_BT", "adv_BT", "target_BT"):
            torch.testing.assert_close(got["rows"][name], expected["rows"][name], rtol=0, atol=1e-5)
        assert expected["metrics"]["clip_high"] + expected["metrics"]["clip_low"] > 0
        for name, number in expected["metrics"].items():
            assert name == "padding" or got["metrics"][name] == pytest.approx(number, rel=1e-4, abs=1e-5), name
        for name, gradient in expected["gradients"].items():
            torch.testing.assert_close(got["gradients"][name], gradient, rtol=0, atol=2e-6 * max(1, gradient.abs().max().item()))


def test_a_run_on_two_processes_goes_on_on_one_and_on_three(world, tmp_path):
    argv = [ROOT / "train_vapo.py", f"@{world}/train_vapo.args", *FLAGS, f"--out={tmp_path}/run"]
    for processes, flags in ((2, [*argv, "--steps=2"]), (1, [argv[0], f"--resume={tmp_path}/run", "--steps=3"]),
                             (3, [argv[0], f"--resume={tmp_path}/run", "--steps=4"])):  # fmt: skip
        if processes == 3:  # of the last checkpoint a file that rank 0 does not look at has changed: step 3 is done again
            path = sorted((tmp_path / "run" / "checkpoint" / "step-000003").iterdir())[1]
            path.write_bytes(path.read_bytes()[:-1] + b"!")
        done = torchrun(processes, *flags)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("test problems") == 1  # rank 0 speaks
    assert done.stdout.count(f"step-000003 is damaged ({path.name} has changed)") == 1
    lines = metrics_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert all(line["sampler_gap"] < 1e-5 for line in lines[1:])  # every rank samples from the policy of now
    assert lines[1]["ratio_max"] > 1 and lines[4]["gradient_steps"] == 12
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy").state_dict()
    base = AutoModelForCausalLM.from_pretrained(world / "base").state_dict()
    assert state.keys() == base.keys() and not torch.equal(state["lm_head.weight"], base["lm_head.weight"])
    assert json.loads((tmp_path / "run" / "policy" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    # evaluation by all ranks is that of one: greedy answers are the same
    for processes in (1, 2):
        flags = ["--eval_only", f"--model={tmp_path}/run/policy", "--samples=2", f"--out={tmp_path}/eval{processes}"]
        done = torchrun(processes, ROOT / "train_vapo.py", f"@{world}/train_vapo.args", "--device=cpu", *flags)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (metrics_of(tmp_path / f"eval{processes}")[0] for processes in (1, 2))
    assert one["test_greedy_accuracy"] == two["test_greedy_accuracy"]


def test_on_as_many_processes_a_resumed_run_is_the_same_bit_for_bit(world, tmp_path):
    def remains():
        weights = [(tmp_path / "run" / name / "model.safetensors").read_bytes() for name in ("policy", "critic")]
        return weights, without_clock(metrics_of(tmp_path / "run"))

    script = ROOT / "train_vapo.py"
    done = torchrun(2, script, f"@{world}/train_vapo.args", *FLAGS, "--steps=3", "--keep=3", f"--out={tmp_path}/run")
    assert done.returncode == 0, done.stderr[-3000:]
    undisturbed = remains()
    for name in ("checkpoint/step-000003", "checkpoint/step-000002", "policy", "critic"):
        shutil.rmtree(tmp_path / "run" / name)
    done = torchrun(2, script, f"--resume={tmp_path}/run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert remains() == undisturbed


@pytest.mark.parametrize("flag, said", [("--prompts=1", "1 --prompts for 2 processes"), ("--prompts=x", "argument --prompts")])
def test_what_is_wrong_is_said_once(world, tmp_path, flag, said):
    done = torchrun(2, ROOT / "train_vapo.py", f"@{world}/train_vapo.args", *FLAGS, flag, f"--out={tmp_path}/run")
    assert said in done.stderr and not (tmp_path / "run").exists()
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1


def test_processes_that_would_share_a_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "STATE", {"world": 4, "rank": 0})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(BadInput, match="each process has its own; leave the number out"):
        pick_device("cuda:1")
    with pytest.raises(BadInput, match="4 processes for the 2 GPUs"):
        pick_device("cuda")


def test_dynamic_sampling_draws_the_same_groups_for_all(world, tmp_path):
    one = (world / "test.jsonl").read_text().splitlines()[0]
    (tmp_path / "one.jsonl").write_text(one + "\n")  # fewer test problems than processes
    flags = ["--preset=dapo", "--generations=50", "--steps=2", f"--test={tmp_path}/one.jsonl", f"--out={tmp_path}/run"]
    done = torchrun(2, ROOT / "train_vapo.py", f"@{world}/train_vapo.args", *FLAGS, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = metrics_of(tmp_path / "run")[1:]
    assert max(line["generations"] for line in lines) > 1 and all(line["sampler_gap"] < 1e-5 for line in lines)


def test_torchrun_that_is_told_to_stop_saves_the_run(world, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train_vapo.py",
               f"@{world}/train_vapo.args", *FLAGS, "--steps=100000", "--save_every=0", "--eval_every=0", f"--out={tmp_path}/run"]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    try:
        wait_for_metrics(tmp_path / "run", 3)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "stopped by SIGTERM: rollout " in error
    assert checkpoint.saved(tmp_path / "run")[0].name == f"step-{metrics_of(tmp_path / 'run')[-1]['step']:06d}"


@LINUX
@pytest.mark.parametrize("how, minutes", [(signal.SIGKILL, 0.2), (signal.SIGSTOP, 0.6)])
def test_a_rank_that_dies_or_hangs_is_named_and_the_others_end(world, tmp_path, how, minutes):
    command = [sys.executable, "train_vapo.py", f"@{world}/train_vapo.args", *FLAGS, "--steps=100000", "--save_every=0", "--eval_every=0",
               f"--rank_timeout={minutes}", f"--out={tmp_path}/run"]  # fmt: skip
    port, processes = free_port(), []
    store = torch.distributed.TCPStore("localhost", port, is_master=True, wait_for_workers=False)  # torchrun's, which outlives them all
    for rank in range(3):  # as torchrun would, which kills the others itself when one dies
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3, "MASTER_ADDR": "localhost", "MASTER_PORT": port,
                       "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": True, "OMP_NUM_THREADS": 1}  # fmt: skip
        environment = os.environ | {name: str(value) for name, value in environment.items()}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    try:
        wait_for_metrics(tmp_path / "run", 3)
        processes[1].send_signal(how)
        for rank in (0, 2):
            _, error = processes[rank].communicate(timeout=90)
            assert processes[rank].returncode != 0
            assert f"error on rank {rank}" in error and "dead or hanging: rank 1\n" in error, error[-2000:]
            if how == signal.SIGSTOP:  # before the others give up, its neighbour has said so
                assert error.count("nothing is heard of rank 1: it is dead or hangs") == (rank == 0)
    finally:
        for process in processes:
            process.kill()
        del store


def test_shares_and_deals_cover_everything_once(monkeypatch):
    for world, cuts in itertools.product((1, 2, 3, 5), ([2, 3, 11], list(range(1, 17)), [])):  # uneven, row by row, all in one
        shares, dealt = [], []
        for rank in range(world):
            monkeypatch.setattr(distributed, "STATE", {"world": world, "rank": rank})
            shares.append(distributed.share(list(range(7))))
            dealt.append(distributed.deal(torch.arange(17).tensor_split(cuts)))
        assert sum(shares, []) == list(range(7)) and {len(part) for part in shares} <= {7 // world, 7 // world + 1}
        assert len({len(part) for part in dealt}) == 1  # each pass is a collective
        assert torch.cat([index for part in dealt for index in part]).sort().values.tolist() == list(range(17))
    with pytest.raises(AssertionError, match="fewer rows than ranks"):
        distributed.deal(torch.arange(3).tensor_split(1))
