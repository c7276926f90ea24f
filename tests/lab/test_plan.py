"""What plan.py says before a run, against what small runs then take.

PYTHONPATH=tests:tests/lab python -m tests.lab.test_plan     # prints the table of docs/gpus.md
"""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import fails_with
from live import Live
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

import logprobs
import model
import rollout
import train_vapo
from lab import plan
from lab.plan import Settings
from system import loading, lora, slots
from train_value import value_gradients

SHAPES = {  # hidden, layers, heads, key-value heads, intermediate, words, tied
    "32B": (5120, 64, 40, 8, 27648, 152064, False),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "20M": (384, 5, 6, 2, 1024, 16000, False),
    "26M": (512, 4, 8, 8, 1408, 26000, True),
}


def config_only(name, folder):
    """A directory with the config.json of a Qwen2 model of that shape, and nothing else."""
    hidden, layers, heads, key_value_heads, intermediate, words, tied = SHAPES[name]
    config = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads, "intermediate_size": intermediate,
        "vocab_size": words, "tie_word_embeddings": tied, "max_position_embeddings": 32768,
        "bos_token_id": None, "pad_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The directory of a model of 32 billion parameters."""
    return config_only("32B", tmp_path_factory.mktemp("32B"))


def small_run(name, folder, dtype="float32", **own):
    """Settings of a run on one device whose updates are one micro-batch of 4 × 144 tokens."""
    numbers = {"prompts": 2, "samples": 4, "mini_batch": 4, "prompt_length": 64,
               "response_length": 80, "micro_batch_tokens": 576,
               "gpu_memory": 640 * logprobs.SLICE / 1e9}  # slices as on this CPU  # fmt: skip
    return Settings(model=config_only(name, folder), dtype=dtype, **(numbers | own))


def built(asked):
    """(policy, critic) with random weights, as train_vapo.main has them."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(asked.model)
    policy = AutoModelForCausalLM.from_config(config).eval()
    policy.logit_transform = loading.measure_logits(policy)
    config.num_labels, config.classifier_dropout = 1, 0.0
    critic = loading.critic_class(config).from_config(config).eval()
    for network in (policy, critic):
        network.compute_dtype = loading.compute_dtype(asked.dtype, network.device)
        loading.shard(network, network.device, asked)
    return policy, critic


def batch_of(asked):
    """The answers of one micro-batch, all at the limit."""
    rows, length = asked.mini_batch, asked.response_length
    batch = {
        "token_BL": torch.randint(0, 1000, (rows, asked.prompt_length + length)),
        "length_B": torch.full((rows,), length),
        "prompt_length_B": torch.full((rows,), asked.prompt_length),
        "correct_B": torch.arange(rows) % 2 == 0,
    }
    for name in ("sampled_logp", "old_logp", "old_value", "target", "adv", "importance"):
        batch[f"{name}_BT"] = torch.randn(rows, length)
    train_vapo.weights(batch, asked)
    return batch


def size(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def measured_update(asked):
    """Bytes of a real update, by the parts of `plan.memory`: of the tensors at hand, of those that
    autograd keeps for the backward pass, and of all that live at once in a second pass, which finds
    gradients in place."""
    policy, critic = built(asked)
    batch, both = batch_of(asked), [*policy.parameters(), *critic.parameters()]
    learns = [*lora.trained(policy), *lora.trained(critic)]
    optimizer = torch.optim.AdamW(learns, fused=True)

    def gradients():
        value_gradients(critic, batch, asked)
        train_vapo.policy_gradients(policy, batch, asked)

    gradients()
    optimizer.step()
    states = [state.items() for state in optimizer.state.values()]
    parts = {
        "weights": size(both),
        "gradients": size(p.grad for p in learns),
        "AdamW's moments": size(x for items in states for name, x in items if name != "step"),
    }
    kept, known = {}, {p.untyped_storage().data_ptr() for p in both}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with loading.autocast(policy):
            hidden_BTD = model.response_hidden(policy.base_model, batch)
    del hidden_BTD
    parts["activations"] = sum(kept.values())
    with Live([*both, *(p.grad for p in learns), *batch.values()]) as live:
        gradients()
    return parts | {"most": live.peak}


def planned_update(asked):
    parts = {name: numbers[1] for name, numbers in plan.memory(asked).items()}
    return parts | {"most": parts["activations"] + parts["logits, temporaries"]}


def of_both(name, dtype, checkpointing, slow=True, rank=0):
    marks = [pytest.mark.slow] * slow
    return pytest.param(name, dtype, checkpointing, rank, marks=marks)


@pytest.mark.parametrize(
    "name, dtype, checkpointing, rank",
    [
        of_both("20M", "bfloat16", False, slow=False, rank=8),
        of_both("26M", "float32", True, rank=4),
        of_both("20M", "float32", False, slow=False),
        of_both("26M", "bfloat16", True, slow=False),
        of_both("20M", "float32", True),
        of_both("26M", "float32", False),
        of_both("26M", "float32", True),
        of_both("26M", "bfloat16", False),
    ],
)
def test_memory_of_a_real_update_is_what_was_planned(name, dtype, checkpointing, rank, tmp_path):
    asked = small_run(name, tmp_path, dtype, gradient_checkpointing=checkpointing, lora=rank)
    planned, measured = planned_update(asked), measured_update(asked)
    for part in ("weights", "gradients", "AdamW's moments"):
        assert planned[part] == measured[part]
    for part in ("activations", "most"):
        close = pytest.approx(measured[part], rel=0.15)
        assert planned[part] == close, (part, planned, measured)


def measured_sampling(asked, monkeypatch):
    """(bytes of the sampler's table, most bytes alive) of answers that all run to the limit."""
    tables = []

    class Watched(slots.Slots):
        def mask(self):
            tables.append(size(x for layer in self.layers for x in (layer.keys, layer.values)))
            return super().mask()

    monkeypatch.setattr(slots, "Slots", Watched)
    policy, _ = built(asked)
    policy.generation_config.eos_token_id = None
    problems = [{"prompt": [1] * asked.prompt_length}] * asked.prompts
    tokenizer = SimpleNamespace(eos_token_id=-1, added_tokens_decoder={})  # no answer ends before
    how = (asked.samples, asked.response_length, 1.0, torch.Generator(), asked.sample_rows)
    with Live(policy.parameters()) as live:
        rollout.sample(policy, tokenizer, problems, *how)
    return max(tables), live.peak


def planned_sampling(asked):
    """(bytes of the table alone, most bytes) by plan.py."""
    s, parts = plan.shapes(asked), plan.memory(asked)
    lengths = asked.prompt_length, asked.response_length
    columns = plan.table_columns(*lengths, s.answers > s.slots)
    most = parts["keys and values"][0] + parts["logits, temporaries"][0]
    return columns * s.slots * s.token, most


# All answers at once, or two waves.
@pytest.mark.parametrize("sample_rows", [pytest.param(256, marks=pytest.mark.slow), 4])
def test_memory_of_real_sampling_is_what_was_planned(sample_rows, tmp_path, monkeypatch):
    asked = small_run("20M", tmp_path, sample_rows=sample_rows)
    planned, measured = planned_sampling(asked), measured_sampling(asked, monkeypatch)
    assert planned[0] == measured[0]
    assert planned[1] == pytest.approx(measured[1], rel=0.15)


def test_parameters_are_those_of_the_models_that_train(tmp_path):
    counts = {}
    for name in ("32B", "7B", "0.5B"):
        (tmp_path / name).mkdir()
        s = plan.shapes(Settings(model=config_only(name, tmp_path / name)))
        counts[name] = s.policy
    assert counts == {"32B": 32_763_876_352, "7B": 7_615_616_512, "0.5B": 494_032_768}
    with torch.device("meta"):  # the last: 0.5B's critic
        config = AutoConfig.from_pretrained(tmp_path / "0.5B", num_labels=1)
        critic = loading.critic_class(config).from_config(config)
    parameters = sum(p.numel() for p in critic.parameters())
    assert s.critic == parameters == 494_032_768 + 896 + 1


def test_keys_and_values_of_one_token(large):
    s = plan.shapes(Settings(model=large, gpus=64))
    # Two, layers, key-value heads, width of one, bfloat16.
    assert s.token == 2 * 64 * 8 * 128 * 2


def test_activations_are_those_that_a_reader_counts(tmp_path):
    """What autograd keeps of a Qwen2 layer in float32, in numbers a token: width D, heads' width D,
    key-value width E, MLP width F.

    Two norms: of each x, 1 / √(mean x² + ε), their product, and that times the weight; 6 D + 2
    attention: q, k and v after rotation, the output, a log-sum-exp of each head; 2 D + 2 E + heads
    MLP: gate, silu(gate), up, their product; 4 F
    """
    asked = small_run("20M", tmp_path)
    width, _, heads, key_value_heads, mlp, *_ = SHAPES["20M"]
    keys = width * key_value_heads // heads
    layer = 6 * width + 2 + 2 * width + 2 * keys + heads + 4 * mlp
    assert plan.layer_bytes(plan.shapes(asked), held=4, size=4) == 4 * layer
    # In bfloat16: 2 bytes each, but for the 4 of x in float32 and of what stands beside a head or
    # token; by autocast x and what the norm makes of it have 4, and its product is cast to 2.
    rest = 2 * (2 * width + 2 * keys + 4 * mlp) + 4 * heads + 8
    assert plan.layer_bytes(plan.shapes(asked), held=2, size=2) == 2 * (4 + 2 + 2) * width + rest
    assert plan.layer_bytes(plan.shapes(asked), held=4, size=2) == 2 * (4 + 4 + 5) * width + rest


def test_columns_of_the_samplers_table():
    assert plan.table_columns(prompt=8, response=16, several_waves=False) == 71  # 8 − 1 + 64
    assert plan.table_columns(prompt=8, response=64, several_waves=False) == 71
    assert plan.table_columns(prompt=8, response=65, several_waves=False) == 142
    assert plan.table_columns(prompt=8, response=64, several_waves=True) == 142  # ¾ · 71 < 71
    assert plan.table_columns(prompt=1024, response=20480, several_waves=True) == 34784


@pytest.mark.parametrize(
    "tokens, length, answers, rows",
    [
        (16, 4, 99, (4, 4)),
        (16, 5, 99, (4, 4)),
        (16, 20, 99, (1, 20)),
        (16, 12, 99, (2, 8)),
        (16, 4, 3, (3, 4)),
    ],
)
def test_the_fullest_micro_batch(tokens, length, answers, rows):
    assert plan.rows_of(tokens, length, answers) == rows


LONG = ["--mini_batch=512", "--response_length=20480"]


def test_a_plan_needs_a_config_and_nothing_else(tmp_path, capsys):
    flags = [f"--model={config_only('7B', tmp_path)}", "--prompts=512", *LONG]
    found = plan.main([*flags, "--gpus=8"])
    said = capsys.readouterr().out
    assert not found["fits"] and "policy 7,615,616,512 parameters" in said
    assert "does not fit" in said and "less memory: --gradient" in said
    fitting = ["--gpus=8", "--gradient_checkpointing", "--sample_rows=16"]
    assert plan.main([*flags, *fitting])["fits"]
    assert "less memory" not in capsys.readouterr().out
    assert plan.main([*flags, "--gpus=16"])["gigabytes"][1] < found["gigabytes"][1]
    critic_free = plan.main([*flags, "--gpus=8", "--preset=grpo"])
    assert "critic 0;" in capsys.readouterr().out
    assert critic_free["gigabytes"][1] < found["gigabytes"][1]


def test_a_model_whose_config_has_other_names_has_a_plan(tmp_path):
    """GPT-2's gives no width of the MLP, which is then four times the model's."""
    own = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 99, "eos_token_id": 1}
    GPT2Config(**own, bos_token_id=None).save_pretrained(tmp_path)
    asked = Settings(model=str(tmp_path), prompt_length=32, response_length=64)
    s = plan.shapes(asked)
    assert (s.width, s.mlp, s.heads, s.keys) == (64, 256, 2, 64)
    assert plan.report(asked)["fits"]


def test_a_plan_says_what_it_said_before(large, capsys):
    """The plan of docs/gpus.md, digit for digit. Weights: 4 · 64.75e9 / 64."""
    plan.main([f"--model={large}", "--gpus=64", "--prompts=512", *LONG])
    said = capsys.readouterr().out
    for line in (
        "policy 32,763,876,352 parameters, critic 31,985,313,793; answers of 20,480 tokens",
        "one GPU: 8 prompts, 128 answers, 128 side by side; 16 updates of 8 answers, 1 x 21,504",
        "weights                                       4.0            4.0",
        "AdamW's moments                               8.1            8.1",
        "gradients                                     0.0            4.0",
        "together                                   1248.7          550.2",
        "assumed: prompts of 1,024 tokens; no fragments of memory",
    ):
        assert line in said


def test_adapters_are_what_docs_gpus_says_they_save(tmp_path, capsys):
    """7B on one GPU. Frozen: 2 bytes a weight of policy and critic, 2 · (7.62e9 + 7.07e9) = 29.4e9.
    Adapters of rank 16, 16 · (inputs + outputs) of seven matrices in each of 28 layers, 40.4e6 in
    each network: 4 bytes a weight, 8 a weight of moments."""
    inputs_and_outputs = 2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944)
    adapters = 16 * 28 * inputs_and_outputs
    flags = [f"--model={config_only('7B', tmp_path)}", "--prompts=64", "--samples=16",
             "--mini_batch=128", "--prompt_length=512", "--response_length=1024",
             "--gradient_checkpointing", "--sample_rows=128",
             "--micro_batch_tokens=8192"]  # fmt: skip
    shape = plan.shapes(plan.settings.parse(Settings, [*flags, "--lora=16"], ""))
    assert shape.learns == 2 * adapters + 3584 + 1
    whole, frozen = plan.main(flags), plan.main([*flags, "--lora=16"])
    assert whole["gigabytes"] == pytest.approx((209, 260), abs=0.6) and not whole["fits"]
    assert frozen["gigabytes"] == pytest.approx((48, 37), abs=0.6) and frozen["fits"]


@pytest.mark.slow
def test_a_large_policy_samples_over_several_gpus(large, capsys):
    """vLLM need not be installed for that."""
    flags = [f"--model={large}", "--prompts=512", "--gpus=64", *LONG]
    alone = plan.main(flags)
    assert not alone["fits"] and "--engine vllm --tensor_parallel N" in capsys.readouterr().out
    vllm = ["--engine=vllm", "--tensor_parallel=8", "--gradient_checkpointing"]
    assert plan.main([*flags, *vllm])["fits"]
    assert "22 side by side on 8 GPUs" in capsys.readouterr().out
    how = {"prompts": 512, "gpus": 64, "engine": "vllm", "tensor_parallel": 8}
    parts = plan.memory(Settings(model=large, **how))
    assert parts["copy that samples"] == (32_763_876_352 * 2 / 8,) * 2  # bfloat16
    pairs = zip(parts["copy that samples"], parts["keys and values"])
    assert [sum(pair) for pair in pairs] == [0.3 * 80e9] * 2
    assert not plan.main([*flags, "--engine=vllm"])["fits"]
    assert "no room beside its weights for one answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, fragment",
    [
        (["--model="], "give --model"),
        (["--gpus=0"], "--gpus must be at least 1"),
        (["--gpus=two"], "--gpus"),
        (["--gpus=64"], "32 --prompts for 64 processes"),
        (["--gpus=8", "--engine=vllm", "--tensor_parallel=3"], "8, is no multiple of it"),
        (["--gpus=8", "--tensor_parallel=2"], "--tensor_parallel is for --engine vllm"),
        (["--gpu_memory=0"], "--gpu_memory must be positive"),
        (["--response_length=32768"], "has 32768 positions"),
        (["--model=nowhere"], "no model directory at nowhere"),
    ],
)  # fmt: skip
def test_bad_plans(flags, fragment, tmp_path, capsys):
    fails_with(capsys, plan.main, [f"--model={config_only('0.5B', tmp_path)}", *flags], fragment)


def main():
    """The table of the README: planned and measured, one line a run of 4 × 256 tokens."""
    parts = ("weights", "gradients", "AdamW's moments", "activations", "most")
    print(f"| MB, planned / measured | {' | '.join(parts)} |\n|---|{'---|' * len(parts)}")
    for name, dtype, checkpointing in (
        (name, dtype, checkpointing)
        for name in ("20M", "26M")
        for dtype in ("float32", "bfloat16")
        for checkpointing in (False, True)
    ):
        with tempfile.TemporaryDirectory() as folder:
            own = {"gradient_checkpointing": checkpointing, "response_length": 192}
            asked = small_run(name, Path(folder), dtype, micro_batch_tokens=1024, **own)
            planned, measured = planned_update(asked), measured_update(asked)
        title = f"{name}, {dtype}{', checkpointing' * checkpointing}"
        cells = (f"{planned[part] / 1e6:.1f} / {measured[part] / 1e6:.1f}" for part in parts)
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
