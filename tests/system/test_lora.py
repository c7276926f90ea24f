"""lora.py: adapters change nothing at first, they alone learn, and what leaves a run is merged."""

import sys

import pytest
import torch
from safetensors.torch import load_file
from test_model import answers, directory  # noqa: F401  a fixture
from test_vapo import metrics_of, saved_network, two_rollouts, vapo_run

import model
import train_vapo
from system import checkpoint, loading, lora

pytest.importorskip("peft")
HEADS = ("score.", "classifier.", "surprise.")
SETTINGS = train_vapo.Settings(lora=2, seed=3, device="cpu")


def with_adapters(path, dtype="float32", settings=SETTINGS):
    """(policy, critic) of the model, whose adapters and heads do something: B is drawn, not 0."""
    policy = loading.load_policy(path, torch.device("cpu"), dtype)
    critic = loading.load_critic(path, torch.device("cpu"), dtype, surprise=True)
    for network in (policy, critic):
        loading.shard(network, network.device, settings)
        torch.manual_seed(1)
        for name, parameter in network.named_parameters():
            if ".lora_B." in name or name.startswith(HEADS):
                torch.nn.init.normal_(parameter, std=0.1)
    return policy, critic


def test_the_weights_by_hand():
    """W = ((1, 0), (0, 1)), A = (1, 2), B = (3, 5)ᵀ, α / r = 2: W + 2 B A = ((7, 12), (10, 21))."""

    class Trunk(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Linear(2, 2)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.head = Trunk(), torch.nn.Linear(2, 1)
            self.base_model, self.compute_dtype = self.trunk, torch.float32

    from peft import LoraConfig, inject_adapter_in_model

    network = Network()
    config = LoraConfig(r=1, lora_alpha=2, target_modules=["one"])
    inject_adapter_in_model(config, network.trunk)
    one = network.trunk.one
    one.base_layer.weight.data = torch.eye(2)
    one.lora_A["default"].weight.data = torch.tensor([[1.0, 2.0]])
    one.lora_B["default"].weight.data = torch.tensor([[3.0], [5.0]])
    weights = dict(lora.merged(network))
    assert list(weights) == ["trunk.one.weight", "trunk.one.bias", "head.weight", "head.bias"]
    assert weights["trunk.one.weight"].tolist() == [[7.0, 12.0], [10.0, 21.0]]


def test_rank_0_changes_nothing(world):
    policy = loading.load_policy(str(world / "base"), torch.device("cpu"))
    names = [name for name, _ in policy.named_parameters()]
    lora.adapt(policy, 0, 0)
    assert [name for name, _ in policy.named_parameters()] == names
    assert lora.trained(policy) == list(policy.parameters())
    assert lora.whole_weights(policy).keys() == policy.state_dict().keys()


def test_at_first_the_model_is_what_it_was_and_equal_seeds_are_equal_adapters(world):
    cpu, drawn = torch.device("cpu"), []
    token_BL = torch.arange(12).view(2, 6)
    with torch.no_grad():
        before = loading.load_policy(str(world / "base"), cpu)(token_BL).logits
        for settings in (SETTINGS, SETTINGS, train_vapo.Settings(lora=2, seed=4)):
            torch.rand(1)  # what was drawn before does not matter
            policy = loading.shard(loading.load_policy(str(world / "base"), cpu), cpu, settings)
            assert torch.equal(policy(token_BL).logits, before)
            scales = [getattr(module, "scaling", None) for module in policy.modules()]
            assert [s["default"] for s in scales if isinstance(s, dict)] == 7 * [2.0]  # α / r
            drawn.append(torch.cat([w.flatten() for w in lora.trained(policy)]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_merged_and_unmerged_agree_and_adapters_and_heads_learn(directory, tmp_path):  # noqa: F811
    policy, critic = with_adapters(directory)
    tokenizer = loading.load_tokenizer(directory)
    rows = answers(policy, tokenizer)
    sides = []
    for network, name in ((policy, "policy"), (critic, "critic")):
        checkpoint.export(network, tokenizer, tmp_path / name)
    again = (loading.load_policy(str(tmp_path / "policy"), policy.device),
             loading.load_critic(str(tmp_path / "critic"), policy.device))  # fmt: skip
    for own in ((policy, critic), again):
        logp_BT, _ = model.policy_logprobs(own[0], rows, 1.0)
        sides.append([logp_BT, model.critic_values(own[1], rows)])
    for unmerged, merged in zip(*sides):
        torch.testing.assert_close(merged, unmerged, rtol=0, atol=1e-4)
    (sides[0][0].sum() + sides[0][1].sum()).backward()
    for network, heads in ((policy, ()), (critic, HEADS)):
        for name, parameter in network.named_parameters():
            assert (parameter.grad is not None) == (".lora_" in name or name.startswith(heads)), (
                name
            )


def test_the_sampling_copy_is_merged_and_in_bfloat16_there_is_none(world):
    policy, _ = with_adapters(str(world / "base"), "bfloat16")
    assert loading.sampling_copy(policy) is policy
    dtypes = {".lora_" in n: p.dtype for n, p in policy.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    policy, _ = with_adapters(str(world / "base"))
    policy.compute_dtype = torch.bfloat16  # as in several processes, which keep float32
    sampler = loading.sampling_copy(policy)
    for (name, own), copied in zip(lora.merged(policy), sampler.parameters(), strict=True):
        assert torch.equal(own.bfloat16(), copied), name


def test_a_run_resumes_exactly_with_adapters_alone_in_its_checkpoint(world, tmp_path):
    two_rollouts(world, tmp_path, "--lora=4", "--critic_surprise")
    for name, heads in {"policy": (), "critic": HEADS}.items():
        kept = saved_network(tmp_path / "whole", name)
        assert kept and all(".lora_" in key or key.startswith(heads) for key in kept)
        both = [load_file(tmp_path / out / name / "model.safetensors") for out in ("whole", "part")]
        assert all(torch.equal(weight, both[1][key]) for key, weight in both[0].items())
    before = load_file(world / "base" / "model.safetensors")
    after = load_file(tmp_path / "whole" / "policy" / "model.safetensors")
    differ = {key.split(".")[-2] for key in before if not torch.equal(before[key], after[key])}
    assert before.keys() == after.keys()
    assert differ == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}


def test_a_run_in_bfloat16_leaves_float32(world, tmp_path):
    vapo_run(world, tmp_path, "--lora=4", "--dtype=bfloat16", "--steps=1")
    for name in ("policy", "critic"):
        weights = load_file(tmp_path / name / "model.safetensors").values()
        assert {weight.dtype for weight in weights} == {torch.float32}
    assert metrics_of(tmp_path)[1]["sampler_gap"] < 0.05


def test_without_peft_it_is_one_line(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit) as error:
        vapo_run(world, tmp_path, "--lora=4")
    assert error.value.code == 2 and "pip install peft" in capsys.readouterr().err
