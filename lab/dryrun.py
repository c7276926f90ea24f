"""What a model's forward and backward pass holds in memory, without the memory: its own code run on torch's fake tensors.

A fake tensor has a shape, a dtype and a life, and no numbers. So parameters are counted and activations found for any
architecture and any size, from config.json alone; on real tensors `Live` counts the same (tests/test_plan.py).
"""

import weakref
from functools import cache

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import model

FAKE = FakeTensorMode()


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors made under it that are still alive: `now`, and the most so far, `peak`."""

    def __init__(self, known=()):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.count(storage.nbytes())
                weakref.finalize(storage, self.count, -storage.nbytes())
        return made

    def count(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


@cache
def imagined(path, weights, arithmetic, checkpointing=False):
    """The causal LM of the config in `path`, of fake tensors; weights, arithmetic: dtypes as the layers see and use them.

    Raises: BadInput if there is no config, or no causal LM for it, or --gradient_checkpointing is none of its arts.
    """
    config = model.loaded(AutoConfig.from_pretrained, path, trust_remote_code=False)
    with FAKE:
        network = model.loaded(lambda _: AutoModelForCausalLM.from_config(config, dtype=weights), path).eval()
    if network.config._attn_implementation == "sdpa":  # a row needs no mask; but transformers makes one where it sees no numbers
        AttentionInterface.register("unmasked", sdpa_attention_forward)
        network.set_attn_implementation("unmasked")
    for part in model.checkpoint_gradients(network, checkpointing).modules():
        part.training = getattr(part, "gradient_checkpointing", False)  # see model.response_hidden
    network.arithmetic = arithmetic
    return network


@cache
def activations(network, rows, length, backward=True):
    """(kept, peak): bytes alive after the trunk's forward pass over `rows` rows of `length` tokens, and the most at any time.

    Neither parameters nor their gradients count, but gradients on their way do: that of an output matrix which is the embeddings
    too waits for the embeddings' own, until the end.
    """
    trunk, matrix_VD = network.base_model, network.get_output_embeddings().weight
    drop = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in network.parameters()]
    live = Live([*network.parameters(), *network.buffers()])
    with FAKE, live, torch.set_grad_enabled(backward):
        with model.autocast(network):
            hidden_BLD = trunk(input_ids=torch.zeros(rows, length, dtype=torch.long), use_cache=False).last_hidden_state
        kept = live.now
        if backward:
            (hidden_BLD.sum() + (matrix_VD * 1).sum()).backward()
    for handle in drop:
        handle.remove()
    return kept, live.peak


@cache
def token_bytes(network):
    """Bytes of one token's keys and values: those that the model makes, 2 · layers · key-value heads · width of a head · size."""
    read = DynamicCache()
    with FAKE, torch.no_grad(), model.autocast(network):
        network.base_model(input_ids=torch.zeros(1, 8, dtype=torch.long), past_key_values=read, use_cache=True)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in read.layers) // 8
