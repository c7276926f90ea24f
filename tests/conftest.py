"""A world and models small enough to train in a second, and the devices there are."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import toy

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A built world with a base model that is right now and then; a directory."""
    out = tmp_path_factory.mktemp("world") / "toy"
    return toy.build(
        toy.World(out=str(out), min_steps=1, max_steps=6, layers=1, width=32, updates=200, update_rows=32, test_problems=8),
        progress=False,
    )


@pytest.fixture
def tokenizer():
    return toy.make_tokenizer(toy.World(max_steps=20))


@pytest.fixture
def policy(tokenizer, device):
    """A random two-layer model; EOS or any of the letters a to f ends its answers, after a few tokens or many."""
    import model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.3, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    policy = LlamaForCausalLM(config).to(device).eval()
    policy.generation_config.eos_token_id = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list("abcdef"))]
    policy.logit_scale, policy.logit_softcap = model.measure_logits(policy)
    return policy


@pytest.fixture
def problems(tokenizer):
    """Three problems whose prompts differ in length."""
    texts = ("a3:", "b12:c4:", "d5:e6:f7:g8:")
    return [{"problem": text, "answer": "a", "prompt": tokenizer(text)["input_ids"]} for text in texts]
