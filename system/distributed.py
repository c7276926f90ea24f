"""More than one process: the same scripts under torchrun, with the same mathematics.

    torchrun --nproc_per_node 8 train_vapo.py --model DIR --train FILE --test FILE
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        train_vapo.py …                                                            # on each node

Every rank samples answers to its share of the problems; the answers are then gathered, so that all
ranks hold the same table of rows, and everything computed from it (advantages, denominators,
whitening, metrics, mini-batches) is what one process computes. Only the models' work is divided:
the micro-batches of a pass are dealt out to the ranks, and FSDP2 (`fully_shard`) holds a share of
weights, gradients and optimiser states on each and adds the gradients up. In one process nothing
here does anything.
"""

import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from types import MethodType

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

# Most minutes that a collective waits for a rank: longer than one can be behind in sampling.
MINUTES = float(os.environ.get("VAPO_RANK_MINUTES", 60))
STATE = {"world": 1, "rank": 0, "control": None, "first": False}  # what torchrun made of this


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
    timeout = timedelta(minutes=MINUTES)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timeout)
    control = dist.new_group(backend="gloo", timeout=timeout)  # for small things, on the CPU
    STATE.update(world=dist.get_world_size(), rank=dist.get_rank(), control=control)
    if rank():
        sys.stdout = open(os.devnull, "w")


def local_device(device):
    """This rank's own device of that type."""
    if world() > 1 and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


@contextmanager
def rank_0_first():
    """Rank 0 does what stands in it, then the others do, and find it done. They may nest."""
    if STATE["first"]:
        yield
        return
    STATE["first"] = True
    try:
        if rank():
            meet("waiting for rank 0")
        yield
        if not rank():
            meet("waiting for rank 0")
    finally:
        STATE["first"] = False


def from_rank_0(value):
    """Rank 0's value, on all ranks."""
    if world() > 1:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=STATE["control"])
        value = box[0]
    return value


def on_rank_0(function):
    """What function() returns on rank 0; None on the others, which wait. Raises what it raises."""
    value, wrong = None, None
    if not rank():
        try:
            value = function()
        except Exception as error:
            wrong = error
    shared = wrong if isinstance(wrong, ValueError) or wrong is None else RuntimeError(
        f"on rank 0: {wrong}")  # fmt: skip
    there = from_rank_0(shared)
    if wrong or there:
        raise wrong or there
    return value


def meet(where, seconds=60 * MINUTES):
    """All ranks wait for each other. Raises: RuntimeError that (on rank 0) names who is missing."""
    if world() > 1:
        try:
            timeout = timedelta(seconds=seconds)
            dist.monitored_barrier(STATE["control"], timeout, wait_all_ranks=True)
        except RuntimeError as error:
            said = str(error).strip().splitlines()[0]
            raise RuntimeError(f"{where}: {said}") from None


def name_missing_ranks(error):
    """After an error: says it, and rank 0 names the ranks that do not answer within 10 seconds."""
    if world() > 1:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"error on rank {rank()}: {said}", file=sys.stderr, flush=True)
        try:
            meet("dead, hanging or ended", seconds=10)
        except RuntimeError as missing:
            if not rank():
                print(f"error on rank 0: {missing}", file=sys.stderr, flush=True)


def any_rank(condition):
    """Whether it holds on any rank."""
    if world() == 1:
        return condition
    meet("after a step")
    holds = torch.tensor(int(condition))
    dist.all_reduce(holds, dist.ReduceOp.MAX, group=STATE["control"])
    return bool(holds)


def share(items, together=1):
    """This rank's share of a list: neighbours stay neighbours, all shares within one item.

    With `together`, so many neighbouring ranks have one share between them.
    """
    return part(items, rank() // together, world() // together)


def part(items, i, count):
    """The i-th of `count` parts of a list."""
    return items[len(items) * i // count : len(items) * (i + 1) // count]


def deal(micro_batches):
    """This rank's micro-batches (index tensors) of a pass; as many on every rank, as each is a
    collective.

    Every `world`-th, so that all have short and long rows alike. Where they do not come out even,
    the largest are halved; where there are too few rows for that, the first two, of the shortest
    rows, become one. Raises: AssertionError where there are fewer rows than ranks.
    """
    if world() == 1:
        return micro_batches
    micro_batches, rows = list(micro_batches), sum(map(len, micro_batches))
    assert rows >= world(), "fewer rows than ranks"
    more = -(-len(micro_batches) // world()) * world()
    while len(micro_batches) < more <= rows:
        at = max(range(len(micro_batches)), key=lambda i: len(micro_batches[i]))
        micro_batches[at : at + 1] = micro_batches[at].tensor_split(2)
    while len(micro_batches) % world():
        micro_batches[:2] = [torch.cat(micro_batches[:2])]
    return micro_batches[rank() :: world()]


def add_up(*tensors):
    """Sums tensors over the ranks, in place. Returns: the first."""
    if world() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
    return tensors[0]


def add_numbers(numbers):
    """A dict of numbers summed over the ranks; of names that end in `_max`, the largest."""
    if world() == 1:
        return numbers
    largest = [name for name in numbers if name.endswith("_max")]
    summed = [name for name in numbers if name not in largest]
    for names, op in ((summed, dist.ReduceOp.SUM), (largest, dist.ReduceOp.MAX)):
        vector = torch.tensor([float(numbers[name]) for name in names], dtype=torch.float64)
        dist.all_reduce(vector, op, group=STATE["control"])
        numbers = numbers | dict(zip(names, vector.tolist()))
    return numbers


def all_ranks(value):
    """A list of all ranks' values, on every rank."""
    meet("gathering")
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value, group=STATE["control"])
    return values


def gather_columns(columns):
    """All ranks' rows, in the ranks' order, on every rank.

    Args: columns, tensors of B rows, [B] or [B, T] with the same T everywhere, or None.
    """
    if world() == 1:
        return columns
    counts, gathered = all_ranks(len(columns[0])), []
    for column in columns:
        if column is None:
            gathered.append(None)
            continue
        kind = column.dtype
        column = column.to(torch.uint8) if kind == torch.bool else column
        missing = column.new_zeros(max(counts) - len(column), *column.shape[1:])
        padded = torch.cat([column, missing])
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded.contiguous())
        rows = [part[:count] for part, count in zip(parts, counts)]
        gathered.append(torch.cat(rows).to(kind))
    return gathered


def shard(network, device, bfloat16=False, cpu_offload=False, head=None):
    """Under torchrun: gives each rank its share of a network's float32 weights, on its device, the
    layers one by one, then the rest. In one process: moves the network to the device.

    Args: network, with its weights on rank 0, of the same shape on the others, where it need have
    no memory (the meta device); bfloat16, whether the gathered weights are (gradients are added up
    in float32); head, a critic's, which stays float32. Returns: the network.
    """
    if world() == 1:
        return network.to(device)
    weights = {} if rank() else network.state_dict()
    buffers = from_rank_0(None if rank() else dict(network.named_buffers()))
    network.to("meta").tie_weights()
    mesh = init_device_mesh(device.type, (world(),))
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    precision = bf16 if bfloat16 else MixedPrecisionPolicy()
    layers = [part for part in network.modules() if isinstance(part, GradientCheckpointingLayer)]
    for part in layers:
        fully_shard(part, mesh=mesh, mp_policy=precision, offload_policy=offload)
    if head is not None:
        fully_shard(head, mesh=mesh, offload_policy=offload)
    fully_shard(network, mesh=mesh, mp_policy=precision, offload_policy=offload)
    for part in network.modules():
        if isinstance(part, FSDPModule):
            # A mini-batch's weights sum to one over all ranks: gradients are summed, not averaged.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    network.to_empty(device="cpu" if cpu_offload else device).tie_weights()
    from_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(network, weights, options=from_0)
    for name, buffer in buffers.items():  # also those that no state dict has
        owner, _, key = name.rpartition(".")
        setattr(network.get_submodule(owner), key, buffer.to(device))
    network.computes_on = device
    network.call_gathered = MethodType(lambda self, f, *args, **how: f(self, *args, **how), network)
    register_fsdp_forward_method(network, "call_gathered")
    return network


def gathers(function):
    """Decorates function(network, …): a sharded network's weights are gathered around the call."""

    @wraps(function)
    def wrapped(network, *args, **kwargs):
        call = getattr(network, "call_gathered", None)
        return call(function, *args, **kwargs) if call else function(network, *args, **kwargs)

    return wrapped


def local(tensor):
    """This rank's share of a tensor; all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def unsharded(tensor):
    """A tensor of all its shards, on every rank (a collective); one that is not sharded, as is."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.to(tensor.device_mesh.device_type).full_tensor()  # by the GPUs' own links


def unsharded_network(network):
    """An ordinary network with a sharded one's weights, on rank 0's CPU (None elsewhere)."""
    if not isinstance(network, FSDPModule):
        return network
    weights = {}
    for name, tensor in network.state_dict().items():
        tensor = unsharded(tensor)
        if rank() == 0:
            weights[name] = tensor.cpu()
    if rank():
        return None
    kinds = type(network).__mro__[1:]
    with torch.device("meta"):
        plain = next(kind for kind in kinds if not issubclass(kind, FSDPModule))(network.config)
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.generation_config = getattr(network, "generation_config", None)
    return plain
