"""What a model's passes hold in memory, without the memory: a part of plan.py.

The model's own code runs on torch's fake tensors, which have a shape, a dtype and a life, and no
numbers: any architecture, any size, from config.json alone. On real tensors `Live` counts the same.
"""

import weakref
from functools import cache

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from system import lora
from system.loading import autocast, checkpoint_gradients, loaded
from system.slots import CACHE

FAKE = FakeTensorMode(allow_non_fake_inputs=True)


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors made under it: `now`, those alive, and `peak`, the most."""

    def __init__(self, known=()):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tensors = (leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor))
        for storage in map(torch.Tensor.untyped_storage, tensors):
            if storage not in self.seen:
                self.seen.add(storage)
                self.count(storage.nbytes())
                weakref.finalize(storage, self.count, -storage.nbytes())
        return made

    def count(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


@cache
def imagined(path, weights, compute_dtype, checkpointing=False, rank=0):
    """The causal LM of the config in `path`, of fake tensors; weights: the dtype that layers see;
    rank: of its adapters.
    Raises: BadInput without a config, a causal LM for it, or the checkpointing asked for."""
    config, make = loaded(AutoConfig.from_pretrained, path), AutoModelForCausalLM.from_config
    with torch.device("meta"):
        network = loaded(lambda _, **how: make(config, dtype=weights), path).eval()
        network.compute_dtype = compute_dtype
        lora.adapt(network, rank, 0)
    with FAKE:
        network.to_empty(device="cpu").tie_weights()
    if network.config._attn_implementation == "sdpa":
        # A row needs no mask, but transformers makes one where it sees no numbers.
        AttentionInterface.register("unmasked", sdpa_attention_forward)
        network.set_attn_implementation("unmasked")
    for part in checkpoint_gradients(network, checkpointing).modules():
        part.training = getattr(part, "gradient_checkpointing", False)  # see model.response_hidden
    for parameter in lora.trained(network):  # a gradient is dropped where the optimiser has its own
        parameter.register_post_accumulate_grad_hook(lambda own: setattr(own, "grad", None))
    return network


@cache
def activations(network, rows, length, backward=True):
    """(bytes alive after the trunk's forward pass over `rows` rows of `length` tokens, the most).
    Parameters and their gradients do not count, but gradients on their way do: that of an output
    matrix which is the embeddings too waits for the embeddings' own, until the end."""
    live = Live([*network.parameters(), *network.buffers()])
    with FAKE, live, torch.set_grad_enabled(backward):
        with autocast(network):
            token_BL = torch.zeros(rows, length, dtype=torch.long)
            hidden_BLD = network.base_model(token_BL, use_cache=False).last_hidden_state
        kept = live.now
        if backward:
            head_VD = network.get_output_embeddings().weight
            (hidden_BLD.sum() + (head_VD.requires_grad and (head_VD * 1).sum())).backward()
    return kept, live.peak


@cache
def token_bytes(network):
    """Of keys and values: 2 · layers · key-value heads · width of a head · bytes of a number."""
    read = DynamicCache()
    with FAKE, torch.no_grad(), autocast(network):
        token_BL = torch.zeros(1, 8, dtype=torch.long)
        network.base_model(token_BL, use_cache=True, **{CACHE: read})
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in read.layers) // 8
