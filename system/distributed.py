"""More than one process: the same scripts under torchrun, with the same mathematics.

    torchrun --nproc_per_node 8 train_vapo.py --model DIR --train FILE --test FILE

Every rank samples answers to its share of the problems. They are gathered, so that all ranks hold
the same table of rows and compute from it what one process would. Only the models' work is divided:
the micro-batches of a pass are dealt out, and FSDP2 (`fully_shard`) holds a share of weights,
gradients and optimiser states on each rank. In one process nothing here does anything.
"""

import os
import sys
from datetime import timedelta
from functools import wraps

import torch
import torch.distributed as dist
from torch.distributed import fsdp
from torch.distributed.checkpoint import state_dict
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

# How long a collective waits for a rank: longer than one can be behind in sampling.
TIMEOUT = timedelta(minutes=float(os.environ.get("VAPO_RANK_MINUTES", 60)))
STATE = {"world": 1, "rank": 0, "control": None}  # what torchrun made of this


def world():
    """Number of processes."""
    return STATE["world"]


def rank():
    """This process's number, from 0. Rank 0 logs."""
    return STATE["rank"]


def start():
    """Joins the processes that torchrun started, if it did. Only rank 0 writes to the screen."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or STATE["control"] is not None:
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    control = dist.new_group(backend="gloo", timeout=TIMEOUT)  # for small things, on the CPU
    STATE.update(world=dist.get_world_size(), rank=dist.get_rank(), control=control)
    if rank():
        sys.stdout = open(os.devnull, "w")


def from_rank_0(value):
    """Rank 0's value, on all ranks."""
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box, src=0, group=STATE["control"])
    return box[0]


def on_rank_0(function):
    """What function() returns on rank 0; None on the others, which wait. Raises what it raises.
    In it rank 0 is alone, as in one process: what it calls may do the same."""
    processes, value, wrong = world(), None, None
    STATE["world"] = 1
    try:
        value = None if rank() else function()
    except Exception as error:
        wrong = error
    finally:
        STATE["world"] = processes
    travels = wrong is None or isinstance(wrong, (ValueError, OSError))
    told = from_rank_0(wrong if travels else RuntimeError(f"on rank 0: {wrong}"))
    if told:
        raise wrong or told
    return value


def first_line(error):
    """Of its message; its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def all_ranks(value):
    """A list of all ranks' values, on every rank."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value, group=STATE["control"])
    return values


def share(items, together=1):
    """This rank's share of a list, all shares within one item; `together` ranks have one share."""
    return part(items, rank() // together, world() // together)


def part(items, i, count):
    """The i-th of `count` parts of a list."""
    return items[len(items) * i // count : len(items) * (i + 1) // count]


def deal(micro_batches):
    """This rank's micro-batches (index tensors) of a pass: as many on every rank, as each pass is a
    collective; every `world`-th, so that all ranks have short and long rows alike. To come out even
    the largest are halved or, for want of rows, the shortest become one, two by two.
    Raises: AssertionError for fewer rows than ranks."""
    micro_batches, rows = list(micro_batches), sum(map(len, micro_batches))
    assert rows >= world(), "fewer rows than ranks"
    more = -(-len(micro_batches) // world()) * world()
    while len(micro_batches) < more <= rows:
        at = max(range(len(micro_batches)), key=lambda i: len(micro_batches[i]))
        micro_batches[at : at + 1] = micro_batches[at].tensor_split(2)
    while len(micro_batches) % world():
        micro_batches = [*micro_batches[2:], torch.cat(micro_batches[:2])]
    return micro_batches[rank() :: world()]


def add_up(*tensors):
    """Sums tensors over the ranks, in place. Returns: the first."""
    for tensor in tensors if world() > 1 else ():
        dist.all_reduce(tensor)
    return tensors[0]


def add_numbers(numbers):
    """A dict of numbers summed over the ranks; of names that end in `_max`, the largest."""
    everyone = all_ranks(numbers)
    rule = {name: max if name.endswith("_max") else sum for name in numbers}
    return {name: rule[name](own[name] for own in everyone) for name in numbers}


def gather_columns(columns):
    """All ranks' rows, on every rank: tensors [B] or [B, T], the same T everywhere, or None."""
    if world() == 1:
        return columns
    return [None if own[0] is None else torch.cat(own) for own in zip(*all_ranks(columns))]


def shard(network, device, bfloat16=False, head=None):
    """The network, sharded layer by layer from rank 0's float32 weights; others need only shapes.
    Args: bfloat16, whether the gathered weights are (gradients are added up in float32); head, a
    critic's, which stays float32. In one process it is only moved to the device."""
    if world() == 1:
        return network.to(device)
    weights = {} if rank() else network.state_dict()
    buffers = from_rank_0(None if rank() else dict(network.named_buffers()))
    network.to("meta").tie_weights()
    mesh, low = dist.init_device_mesh(device.type, (world(),)), (torch.bfloat16, torch.float32)
    layers = [part for part in network.modules() if isinstance(part, GradientCheckpointingLayer)]
    for part in filter(None, (head, *layers, network)):
        precision = fsdp.MixedPrecisionPolicy(*low if bfloat16 and part is not head else ())
        fsdp.fully_shard(part, mesh=mesh, mp_policy=precision)
        # A mini-batch's weights sum to one over all ranks: gradients are summed, not averaged.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    network.to_empty(device=device).tie_weights()
    from_0 = state_dict.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state_dict.set_model_state_dict(network, weights, options=from_0)
    for name, buffer in buffers.items():  # also those that no state dict has
        owner, _, key = name.rpartition(".")
        setattr(network.get_submodule(owner), key, buffer.to(device))
    network.call_gathered = lambda function, *args, **how: function(network, *args, **how)
    fsdp.register_fsdp_forward_method(network, "call_gathered")
    return network


def gathers(function):
    """Decorates function(network, …): a sharded network's weights are gathered around the call."""

    @wraps(function)
    def wrapped(network, *args, **kwargs):
        call = getattr(network, "call_gathered", None)
        return call(function, *args, **kwargs) if call else function(network, *args, **kwargs)

    return wrapped


def unsharded(tensor):
    """A tensor of all its shards, on every rank (a collective); one that is not sharded, as is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
