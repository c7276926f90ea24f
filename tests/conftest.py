"""A world and models small enough to train in a second, and the devices there are."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import model
import toy


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=20, help="random moments at which test_faults.py kills a run")


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


@pytest.fixture(params=["llama", "gpt2"])
def policy(request, tokenizer, device):
    """A random two-layer model, with relative positions or with absolute ones (which left padding shifts, if nobody
    minds them); EOS or any of the letters a to f ends its answers, after a few tokens or many."""
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    if request.param == "llama":
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.3, tie_word_embeddings=True, **ends,
        )  # fmt: skip
    else:
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.3, **ends)
    policy = AutoModelForCausalLM.from_config(config).to(device).eval()
    policy.generation_config.eos_token_id = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list("abcdef"))]
    policy.logit_treatment = model.measure_logits(policy)
    policy.arithmetic = model.arithmetic("auto", device)
    return policy


@pytest.fixture
def problems(tokenizer):
    """Three problems whose prompts differ in length."""
    texts = ("a3:", "b12:c4:", "d5:e6:f7:g8:")
    return [{"problem": text, "answer": "a", "prompt": tokenizer(text)["input_ids"]} for text in texts]
