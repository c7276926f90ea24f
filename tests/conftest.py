"""A world and models small enough to train in a second, and the devices there are.

    python -m pytest            # a few minutes
    python -m pytest --all      # the tests marked slow too: more kills, cases, processes

Every test runs on one core: models this small are slower on two.
"""

import gc
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; scripts have it too

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

# The tests import each other by name. After the root, whose `system` and `lab` are packages.
sys.path.append(str(Path(__file__).parent.parent))
sys.path.append(str(Path(__file__).parent / "system"))

import toy
from system import loading


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="the tests marked slow too")
    said = "random moments at which test_faults.py kills a run (default: 3, with --all 20)"
    parser.addoption("--kills", type=int, help=said)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a long repetition; only with --all")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if item not in slow]
        config.hook.pytest_deselected(items=slow)


def pytest_collection_finish():
    gc.freeze()  # what is imported stays: the scripts' own gc.collect need not look at it


DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A built world with a base model that is right now and then; a directory."""
    out = tmp_path_factory.mktemp("world") / "toy"
    size = {"min_steps": 1, "max_steps": 6, "test_problems": 8}
    base = {"layers": 1, "width": 32, "updates": 200, "update_rows": 32}
    return toy.build(toy.World(out=str(out), **size, **base), progress=False)


@pytest.fixture
def pair(world, device):
    """(policy, critic, tokenizer): the world's base model and a critic with a random head."""
    base = str(world / "base")
    critic = loading.load_critic(base, device)
    torch.manual_seed(0)
    torch.nn.init.normal_(critic.score.weight, std=0.1)
    return loading.load_policy(base, device), critic, loading.load_tokenizer(base)


@pytest.fixture
def tokenizer():
    return toy.make_tokenizer(toy.World(max_steps=20))


@pytest.fixture(params=["llama", "gpt2"])
def policy(request, tokenizer, device):
    """A random two-layer model, with relative positions or with absolute ones (which left padding
    shifts, if nobody minds them); EOS or any of the letters a to f ends its answers, after a few
    tokens or many."""
    torch.manual_seed(0)
    eos = tokenizer.eos_token_id
    common = {"vocab_size": len(tokenizer), "initializer_range": 0.3,
              "bos_token_id": None, "eos_token_id": eos, "pad_token_id": None}  # fmt: skip
    if request.param == "llama":
        config = LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=True, **common,
        )  # fmt: skip
    else:
        config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, **common)
    policy = AutoModelForCausalLM.from_config(config).to(device).eval()
    letters = tokenizer.convert_tokens_to_ids(list("abcdef"))
    policy.generation_config.eos_token_id = [eos, *letters]
    policy.logit_transform = loading.measure_logits(policy)
    policy.compute_dtype = loading.compute_dtype("auto", device)
    return policy


@pytest.fixture
def problems(tokenizer):
    """Three problems whose prompts differ in length."""
    texts = ("a3:", "b12:c4:", "d5:e6:f7:g8:")
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    return [{"problem": t, "answer": "a", "prompt": p} for t, p in zip(texts, prompts)]
