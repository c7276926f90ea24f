"""vllm_engine.py, where vLLM is installed; on a CPU that is an environment of its own."""

import importlib.util
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from test_bad_input import fails_with
from test_distributed import torchrun, vapo_flags
from test_rollout import deviation
from test_vapo import FAST, asked, metrics_of, vapo_run
from transformers import AutoConfig, AutoModelForCausalLM

import model
import rollout
import table
import train_vapo
from system import distributed, loading, vllm_engine

is_there = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not is_there, reason="vLLM is not installed")
LENGTH = {"prompt_length": 300, "response_length": 24}
FLAGS = ["--engine=vllm", "--sample_rows=256", "--dtype=float32",
         *(f"--{name}={value}" for name, value in LENGTH.items())]  # fmt: skip


@pytest.fixture(scope="session")
def base(world, tmp_path_factory):
    """The world's base model, with room for prompts that fill a block of vLLM's prefix cache; a
    directory."""
    base = shutil.copytree(world / "base", tmp_path_factory.mktemp("vllm") / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return str(base)


@pytest.fixture
def sampler(base):
    """(engine, the policy that it samples from, tokenizer); a process has one engine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = loading.load_policy(base, device, "float32")
    own = {"model": base, "sample_rows": 256, "seed": 0, "vllm_memory": 0.2, "tensor_parallel": 1}
    settings = SimpleNamespace(**own, **LENGTH)
    return vllm_engine.engine(settings, policy), policy, loading.load_tokenizer(base)


@needs_vllm
def test_vllm_draws_from_the_distribution_of_the_model(world, sampler):
    engine, policy, tokenizer = sampler
    problems, source = asked(world, tokenizer, 1), torch.Generator(policy.device).manual_seed(0)
    rows = rollout.sample(engine, tokenizer, problems, 3_000, 2, 1.0, source, engine="vllm")
    assert deviation(rows, policy, tokenizer, problems[0]["prompt"]) < 5


@needs_vllm
def test_vllm_is_reproducible_and_has_the_weights_and_log_probs_of_training_after_every_update(
    world, sampler
):
    engine, policy, tokenizer = sampler
    for temperature in (1.0, 0.6):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        loading.update_sampler(engine, policy)
        problems = asked(world, tokenizer, 12)
        # fills a block of the prefix cache, or two
        problems[0]["prompt"] = problems[0]["prompt"][:3] * 95
        common = (engine, tokenizer, problems, 4, 24, temperature)
        sources = [torch.Generator(policy.device).manual_seed(1) for _ in range(2)]
        rows, again = (rollout.sample(*common, source, engine="vllm") for source in sources)
        assert torch.equal(rows["token_BL"], again["token_BL"])
        assert len(rows["length_B"].unique()) > 3
        logp_BT, _ = model.all_logprobs(policy, rows, temperature, 10_000)
        on_BT = table.response_mask(rows).bool()
        pair = logp_BT[on_BT], rows["sampled_logp_BT"][on_BT]
        torch.testing.assert_close(*pair, rtol=0, atol=1e-4)


@needs_vllm
def test_a_run_samples_with_vllm_and_corrects_for_it(world, base, tmp_path):
    vapo_run(world, tmp_path, "--steps=3", f"--model={base}", *FLAGS)
    lines = metrics_of(tmp_path)[1:]
    assert len(lines) == 3
    for line in lines:
        assert line["sampler_gap"] < 1e-5 and abs(line["importance"] - 1) < 1e-5
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["engine"] == "vllm"


@needs_vllm
@pytest.mark.parametrize("together", [1, 2])
def test_several_processes_sample_with_vllm_each_or_as_one(world, base, tmp_path, together):
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}  # one for each process
    config = AutoConfig.from_pretrained(base, hidden_size=64, initializer_range=0.3, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    loading.load_tokenizer(base).save_pretrained(tmp_path / "base")
    # the policy moves, and vLLM must follow
    learns = [*FAST, "--steps=3", "--reward_wrong=1", "--reward_correct=2", "--lr=1e-2"]
    flags = [*learns, *FLAGS, f"--model={tmp_path}/base", f"--tensor_parallel={together}"]
    torchrun(2, *vapo_flags(world, tmp_path / "run", *flags))
    lines = metrics_of(tmp_path / "run")[1:]
    assert len(lines) == 3
    for line in lines:
        assert line["sampler_gap"] < 1e-5 and line["ratio_max"] > 1.1
        assert line["length_max"] > line["length"] > 1


def test_a_rank_without_prompts_compares_its_answers_too(monkeypatch):
    """The comparison is a collective; no vLLM is needed to see that."""
    answer = SimpleNamespace(
        index=0, token_ids=[5, 0], finish_reason="stop", logprobs=SimpleNamespace(logprobs=[-1, -2])
    )
    engine = object.__new__(vllm_engine.Engine)
    engine.device, engine.tensor_parallel, engine.params = torch.device("cpu"), 1, dict
    engine.generation_config = SimpleNamespace(eos_token_id=0)
    engine.llm = SimpleNamespace(generate=lambda *_, **__: [SimpleNamespace(outputs=[answer])])
    tokenizer = SimpleNamespace(eos_token_id=0, added_tokens_decoder={})
    compared, whole = [], [torch.tensor([[5, 0]]), torch.zeros(1, 2), *torch.tensor([[2], [1]])]

    def gathered(columns):
        assert len(columns[0]) == distributed.rank()  # rank 1 has the only problem
        return whole

    monkeypatch.setattr(distributed, "gather_columns", gathered)
    for rank in range(2):
        monkeypatch.setattr(distributed, "STATE", {"world": 2, "rank": rank})
        monkeypatch.setattr(
            distributed, "all_ranks", lambda value: compared.append(value) or [0, 0]
        )
        source = torch.Generator().manual_seed(0)
        rows = rollout.sample(
            engine, tokenizer, [{"prompt": [3]}], 1, 2, 1.0, source, engine="vllm"
        )
        assert len(compared) == rank + 1 and rows["length_B"].tolist() == [2]


def test_its_own_all_reduce_is_off_for_it_cannot_share_expandable_segments(monkeypatch):
    """With them, which loading.py turns on, it ends the process while graphs are captured."""
    asked = {}
    fake = SimpleNamespace(LLM=lambda model, **how: asked.update(how), SamplingParams=dict)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setattr(vllm_engine, "ENVIRONMENT", {})
    policy = SimpleNamespace(device=torch.device("cpu"), generation_config=None)
    policy.compute_dtype, policy.parameters = torch.float32, list
    own = {"model": "", "sample_rows": 1, "seed": 0, "vllm_memory": 0.2, "tensor_parallel": 2}
    vllm_engine.Engine(SimpleNamespace(**own), policy, 8)
    assert asked["disable_custom_all_reduce"] and asked["tensor_parallel_size"] == 2


@pytest.mark.skipif(is_there, reason="vLLM is installed")
def test_without_vllm_one_line_says_what_to_install(world, tmp_path, capsys):
    small = ["--engine=vllm", f"--out={tmp_path}/run", "--pretrain_answers=16"]
    argv = [f"@{world}/train_vapo.args", *small]
    fails_with(capsys, train_vapo.main, argv, "--engine vllm needs the package vllm")
