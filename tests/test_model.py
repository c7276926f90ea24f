"""model.py on the architectures that people bring, tiny and with random weights: a policy, a critic, and a run."""

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

import checkpoint
import model
import rollout
import table
import train_vapo

SIZES = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=256, initializer_range=0.2, bos_token_id=None, pad_token_id=None,
)  # fmt: skip
# Sliding windows of 4 tokens, far shorter than a row; tied and untied output matrices; with and without its own critic class.
CONFIGS = {
    "qwen2": lambda **ends: Qwen2Config(**SIZES, **ends, tie_word_embeddings=True),
    "qwen2 sliding": lambda **ends: Qwen2Config(**SIZES, **ends, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": lambda **ends: Qwen3Config(**SIZES, **ends, head_dim=16),
    "llama": lambda **ends: LlamaConfig(**SIZES, **ends),
    "mistral": lambda **ends: MistralConfig(**SIZES, **ends, sliding_window=4),
    "gemma2": lambda **ends: Gemma2Config(**SIZES, **ends, head_dim=16, sliding_window=4),
    "gemma3": lambda **ends: Gemma3TextConfig(**SIZES, **ends, head_dim=16, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    "olmo2": lambda **ends: Olmo2Config(**SIZES, **ends),
    "gpt_neox": lambda **ends: GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}, **ends),
}  # fmt: skip
WITHOUT_A_CRITIC_CLASS = ("gemma3", "olmo2")


@pytest.fixture(params=CONFIGS)
def directory(request, tokenizer, tmp_path):
    """A model directory with two EOS ids, whose tokenizer has no pad and no BOS."""
    torch.manual_seed(0)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("a")]
    network = AutoModelForCausalLM.from_config(CONFIGS[request.param](vocab_size=len(tokenizer), eos_token_id=ends))
    network.generation_config.eos_token_id = ends
    network.save_pretrained(tmp_path / "base")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def answers(policy, tokenizer, samples=8):
    problems = [{"problem": text, "answer": "a", "prompt": tokenizer(text)["input_ids"]} for text in ("a3:", "b12:c4:", "d5:e6:f7:g8:")]
    generator = torch.Generator().manual_seed(0)
    return rollout.sample(policy, tokenizer, problems, samples, 24, 1.0, generator)


def test_training_gives_the_samplers_logprobs(directory):
    """Left-padded prompts, a cache whose rows leave, sliding windows; against right-padded rows read at once."""
    policy, tokenizer = model.load_policy(str(directory), torch.device("cpu")), model.load_tokenizer(str(directory))
    rows = answers(policy, tokenizer)
    ended_B = rows["stop_B"]
    assert ended_B.any() and rows["length_B"].max() > 8  # rows leave, and windows slide
    logp_BT, _ = model.policy_logprobs(policy, rows, 1.0)
    torch.testing.assert_close(logp_BT * table.response_mask(rows), rows["sampled_logp_BT"], rtol=0, atol=1e-4)
    last_B = model.response_tokens(rows).gather(1, rows["length_B"][:, None] - 1)[:, 0]
    assert set(last_B[ended_B].tolist()) <= {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("a")}


def test_a_critic_of_every_architecture_saves_and_loads(directory, tmp_path, capsys):
    policy, tokenizer = model.load_policy(str(directory), torch.device("cpu")), model.load_tokenizer(str(directory))
    critic = model.load_critic(str(directory), torch.device("cpu"), mean_reward=0.25)
    type_of_model = json.loads((directory / "config.json").read_text())["model_type"].removesuffix("_text")
    assert ("has no" in capsys.readouterr().out) == (type_of_model in WITHOUT_A_CRITIC_CLASS)
    for trained, loaded in zip(policy.base_model.parameters(), critic.base_model.parameters()):
        assert torch.equal(trained, loaded)  # the policy's trunk, not a random one
    rows = answers(policy, tokenizer)
    torch.testing.assert_close(model.critic_values(critic, rows), torch.full_like(rows["sampled_logp_BT"], 0.25))
    with torch.no_grad():
        model.value_head(critic).weight.normal_()
    checkpoint.export(critic, tokenizer, tmp_path / "critic")
    again = model.load_critic(str(tmp_path / "critic"), torch.device("cpu"))
    assert torch.equal(model.critic_values(again, rows), model.critic_values(critic, rows))
    assert model.critic_values(critic, rows).std() > 0.1
    assert not any(module.p for module in critic.modules() if isinstance(module, torch.nn.Dropout) and module.training)


def test_a_run_goes_through(directory, tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"problem": f"{c}3", "answer": c}) + "\n" for c in "abcdefgh"))
    small = [
        "--steps=1",
        "--prompts=2",
        "--samples=4",
        "--mini_batch=4",
        "--pretrain_answers=16",
        "--pretrain_passes=1",
        "--eval_samples=2",
    ]
    lengths = ["--response_length=12", "--prompt_length=20", "--prompt_template={problem}:", "--device=cpu"]
    files = [f"--model={directory}", f"--train={tmp_path / 'p.jsonl'}", f"--test={tmp_path / 'p.jsonl'}", f"--out={tmp_path / 'run'}"]
    train_vapo.main(files + small + lengths)
    for name in ("policy", "critic"):
        assert (tmp_path / "run" / name / "model.safetensors").exists()


def test_bfloat16_samples_from_a_copy_that_follows_the_policy(directory):
    policy, tokenizer = model.load_policy(str(directory), torch.device("cpu"), "bfloat16"), model.load_tokenizer(str(directory))
    sampler = model.sampling_copy(policy)
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
    model.refresh(sampler, policy)
    for copied, parameter in zip(sampler.parameters(), policy.parameters()):
        assert torch.equal(copied, parameter.to(torch.bfloat16))


def test_float32_samples_from_the_policy_itself(directory):
    policy = model.load_policy(str(directory), torch.device("cpu"))
    assert model.sampling_copy(policy) is policy


def test_every_end_that_a_chat_model_knows_ends_an_answer(tokenizer):
    """Qwen's <|im_end|> and <|endoftext|>: one is the tokenizer's, one stands in the generation config, or only among the tokens."""
    chat = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<eos>")
    chat.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]})
    network = AutoModelForCausalLM.from_config(CONFIGS["llama"](vocab_size=len(chat), eos_token_id=chat.eos_token_id))
    ends = chat.convert_tokens_to_ids(["<eos>", "<|im_end|>", "<|endoftext|>"])
    assert rollout.eos_ids(network, chat) == sorted(ends)
    network.generation_config.eos_token_id = 3
    assert rollout.eos_ids(network, chat) == sorted([3, *ends])


def test_a_model_with_too_few_positions_is_refused(directory, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"problem": "a3", "answer": "a"}\n{"problem": "b3", "answer": "b"}\n')
    with pytest.raises(SystemExit) as stopped:
        train_vapo.main(
            [f"--model={directory}", f"--train={tmp_path / 'p.jsonl'}", f"--test={tmp_path / 'p.jsonl'}", "--response_length=4096"]
        )
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "has 256 positions" in said and said.count("\n") == 1


def test_a_name_that_is_neither_directory_nor_on_the_hub_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no minute of retries
    for name in ("no/such-model", "nosuchdir", "a/b/c"):
        with pytest.raises(SystemExit) as stopped:
            train_vapo.main([f"--model={name}", "--train=x.jsonl", "--test=x.jsonl", f"--out={tmp_path / 'run'}"])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and name in said and said.count("\n") == 1
