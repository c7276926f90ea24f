"""Low-rank adapters on one GPU (LoRA, arXiv 2106.09685), by peft: --lora RANK.

    W x  →  W x + (α / r) B A x,    α = 2 r,    B = 0 at first

A and B, in every linear layer of a trunk, are trained, and a critic's head; W and the rest are
frozen, so they have no gradient and no moments, and where one process computes in bfloat16 they are
held in it. Checkpoints hold what is trained. What leaves a run is merged: an ordinary model.
"""

import torch

from system import distributed


def adapt(network, rank, seed, heads=()):
    """Freezes a network but for new adapters of its trunk, equal for equal seeds, and its `heads`.
    With rank 0 it stays as it is."""
    if not rank:
        return
    from peft import LoraConfig, inject_adapter_in_model

    network.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, network.base_model)
    for head in filter(None, heads):
        head.requires_grad_()
    if distributed.world() == 1:  # FSDP wants one dtype of all weights that it gathers together
        for parameter in network.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(network.compute_dtype)


def trained(network):
    """The parameters that are: all of an ordinary network."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def merged(network):
    """Yields (name, weight) of all parameters that the network has without adapters, in their
    order, with W + (α / r) B A for W: float32, and sharded as they are. Then the saved buffers."""
    saved = network.state_dict()  # first: it shards again what FSDP left whole after a pass
    for name, parameter in network.named_parameters():
        owner, _, key = name.rpartition(".")
        layer = owner.removesuffix(".base_layer")
        if ".lora_" not in name:
            weight = parameter.detach().float()
            if layer != owner and key == "weight":
                weight = weight + network.get_submodule(layer).get_delta_weight("default").detach()
            yield f"{layer}.{key}", weight
    yield from ((name, buffer) for name, buffer in network.named_buffers() if name in saved)


def whole_weights(network):
    """`merged` as a dict of whole tensors, the tied ones once, on rank 0's CPU; on others empty."""
    whole = ((name, distributed.unsharded(weight)) for name, weight in merged(network))
    return {name: weight.cpu() for name, weight in whole if not distributed.rank()}
