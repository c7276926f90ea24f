"""The architectures that people bring, tiny and with random weights: a policy, a critic, a run."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import model
import rollout
import table
import train_vapo
from system import checkpoint, loading

SIZES = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.2, bos_token_id=None,
    pad_token_id=None,
)  # fmt: skip
WITHOUT_GROUPS = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
# Sliding windows of 4 tokens, far shorter than a row; tied and untied output matrices; with and
# without its own critic class.
HEAD = {"head_dim": 16}
SLIDES = {"sliding_window": 4}
QWEN2_SLIDES = SLIDES | {"use_sliding_window": True, "max_window_layers": 1}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
CONFIGS = {
    "qwen2": lambda **ends: Qwen2Config(**SIZES, **ends, tie_word_embeddings=True),
    "qwen2 sliding": lambda **ends: Qwen2Config(**SIZES, **ends, **QWEN2_SLIDES),
    "qwen3": lambda **ends: Qwen3Config(**SIZES, **ends, **HEAD),
    "llama": lambda **ends: LlamaConfig(**SIZES, **ends),
    "mistral": lambda **ends: MistralConfig(**SIZES, **ends, **SLIDES),
    "gemma2": lambda **ends: Gemma2Config(**SIZES, **ends, **HEAD, **SLIDES),
    "gemma3": lambda **ends: Gemma3TextConfig(**SIZES, **ends, **HEAD, **SLIDES, **LAYERS),
    "olmo2": lambda **ends: Olmo2Config(**SIZES, **ends),
    "gpt_neox": lambda **ends: GPTNeoXConfig(**WITHOUT_GROUPS, **ends),
}
WITHOUT_A_CRITIC_CLASS = ("gemma3", "olmo2")
CPU = torch.device("cpu")


@pytest.fixture(params=CONFIGS)
def directory(request, tokenizer, tmp_path):
    """A model directory with two EOS ids, whose tokenizer has no pad and no BOS."""
    torch.manual_seed(0)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("a")]
    config = CONFIGS[request.param](vocab_size=len(tokenizer), eos_token_id=ends)
    network = AutoModelForCausalLM.from_config(config)
    network.generation_config.eos_token_id = ends
    network.save_pretrained(tmp_path / "base")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def loaded(directory):
    """(policy, tokenizer)"""
    return loading.load_policy(str(directory), CPU), loading.load_tokenizer(str(directory))


def answers(policy, tokenizer, samples=8):
    texts = ("a3:", "b12:c4:", "d5:e6:f7:g8:")
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    problems = [{"problem": t, "answer": "a", "prompt": p} for t, p in zip(texts, prompts)]
    source = torch.Generator().manual_seed(0)
    return rollout.sample(policy, tokenizer, problems, samples, 24, 1.0, source)


def test_training_gives_the_samplers_logprobs(loaded):
    """Left-padded prompts, a cache whose rows leave, sliding windows; against right-padded rows
    read at once."""
    policy, tokenizer = loaded
    rows = answers(policy, tokenizer)
    ended_B = rows["stop_B"]
    assert ended_B.any() and rows["length_B"].max() > 8  # rows leave, and windows slide
    logp_BT, _ = model.policy_logprobs(policy, rows, 1.0)
    logp_BT = logp_BT * table.response_mask(rows)
    torch.testing.assert_close(logp_BT, rows["sampled_logp_BT"], rtol=0, atol=1e-4)
    last_B = table.response_tokens(rows).gather(1, rows["length_B"][:, None] - 1)[:, 0]
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("a")}
    assert set(last_B[ended_B].tolist()) <= ends


def test_a_critic_of_every_architecture_saves_and_loads(loaded, directory, tmp_path, capsys):
    policy, tokenizer = loaded
    critic = loading.load_critic(str(directory), CPU, mean_reward=0.25)
    kind = json.loads((directory / "config.json").read_text())["model_type"].removesuffix("_text")
    assert ("has no" in capsys.readouterr().out) == (kind in WITHOUT_A_CRITIC_CLASS)
    for trained, copied in zip(policy.base_model.parameters(), critic.base_model.parameters()):
        assert torch.equal(trained, copied)  # the policy's trunk, not a random one
    rows = answers(policy, tokenizer)
    value_BT = model.critic_values(critic, rows)
    torch.testing.assert_close(value_BT, torch.full_like(rows["sampled_logp_BT"], 0.25))
    with torch.no_grad():
        loading.value_head(critic).weight.normal_()
    checkpoint.export(critic, tokenizer, tmp_path / "critic")
    again = loading.load_critic(str(tmp_path / "critic"), CPU)
    value_BT = model.critic_values(critic, rows)
    assert torch.equal(model.critic_values(again, rows), value_BT) and value_BT.std() > 0.1
    dropouts = [part for part in critic.modules() if isinstance(part, torch.nn.Dropout)]
    assert not any(part.p for part in dropouts if part.training)


def test_a_critic_reads_how_unlikely_the_tokens_were(loaded, directory, tmp_path):
    rows = answers(*loaded)
    plain, critic = (loading.load_critic(str(directory), CPU, surprise=s) for s in (0, 1))
    with torch.no_grad():
        for network in (plain, critic):
            torch.manual_seed(0)
            loading.value_head(network).weight.normal_()
        value_BT = model.critic_values(critic, rows)
        assert torch.equal(value_BT, model.critic_values(plain, rows))  # new, it changes nothing
        critic.surprise.weight.normal_()
    checkpoint.export(critic, loaded[1], tmp_path / "critic")
    again = loading.load_critic(str(tmp_path / "critic"), CPU)  # it has it, without being asked
    value_BT, told = model.critic_values(again, rows), dict(rows)
    assert torch.equal(value_BT, model.critic_values(critic, rows))
    told["sampled_logp_BT"] = rows["sampled_logp_BT"].clone()
    told["sampled_logp_BT"][:, 1] -= 3.0
    moved_BT = (model.critic_values(again, told) - value_BT).abs() * table.response_mask(rows)
    assert not moved_BT[:, :2].any() and moved_BT[:, 2].any()  # V before a token never knows it


def test_a_run_goes_through(directory, tmp_path):
    path, out = tmp_path / "p.jsonl", tmp_path / "run"
    lines = [json.dumps({"problem": f"{letter}3", "answer": letter}) for letter in "abcdefgh"]
    path.write_text("\n".join(lines))
    small = ["--steps=1", "--prompts=2", "--samples=4", "--mini_batch=4", "--pretrain_answers=16",
             "--pretrain_passes=1", "--eval_samples=2", "--response_length=12",
             "--prompt_length=20", "--prompt_template={problem}:", "--device=cpu"]  # fmt: skip
    files = [f"--model={directory}", f"--train={path}", f"--test={path}", f"--out={out}"]
    train_vapo.main(files + small)
    for name in ("policy", "critic"):
        assert (out / name / "model.safetensors").exists()


def test_bfloat16_samples_from_a_copy_that_follows_the_policy(directory):
    policy = loading.load_policy(str(directory), CPU, "bfloat16")
    tokenizer = loading.load_tokenizer(str(directory))
    sampler = loading.sampling_copy(policy)
    assert {parameter.dtype for parameter in sampler.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    rows = answers(sampler, tokenizer)
    with torch.no_grad():
        logp_BT, _ = model.policy_logprobs(policy, rows, 1.0)
    assert logp_BT.dtype == torch.float32
    gap_BT = (logp_BT - rows["sampled_logp_BT"]).abs() * table.response_mask(rows)
    assert 0 < gap_BT.sum() / rows["length_B"].sum() < 0.1  # rounding, no more
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    loading.update_sampler(sampler, policy)
    for copied, parameter in zip(sampler.parameters(), policy.parameters()):
        assert torch.equal(copied, parameter.to(torch.bfloat16))


def test_float32_samples_from_the_policy_itself(loaded):
    assert loading.sampling_copy(loaded[0]) is loaded[0]


def test_every_end_that_a_chat_model_knows_ends_an_answer(tokenizer):
    """Qwen's <|im_end|> and <|endoftext|>: one is the tokenizer's, one stands in the generation
    config, or only among the tokens."""
    chat = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<eos>")
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    chat.add_special_tokens({"additional_special_tokens": special})
    config = CONFIGS["llama"](vocab_size=len(chat), eos_token_id=chat.eos_token_id)
    network = AutoModelForCausalLM.from_config(config)
    ends = chat.convert_tokens_to_ids(["<eos>", "<|im_end|>", "<|endoftext|>"])
    assert loading.eos_ids(network, chat) == sorted(ends)
    network.generation_config.eos_token_id = 3
    assert loading.eos_ids(network, chat) == sorted([3, *ends])


def test_a_model_with_too_few_positions_is_refused(directory, tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem": "a3", "answer": "a"}\n{"problem": "b3", "answer": "b"}\n')
    files = [f"--model={directory}", f"--train={path}", f"--test={path}"]
    with pytest.raises(SystemExit) as stopped:
        train_vapo.main([*files, "--response_length=4096", f"--out={tmp_path}/run"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "has 256 positions" in said and said.count("\n") == 1


def test_a_name_that_is_neither_directory_nor_on_the_hub_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no minute of retries
    files = ["--train=x.jsonl", "--test=x.jsonl", f"--out={tmp_path / 'run'}"]
    for name in ("no/such-model", "nosuchdir", "a/b/c"):
        with pytest.raises(SystemExit) as stopped:
            train_vapo.main([f"--model={name}", *files])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and name in said and said.count("\n") == 1
