"""More than one process: the same scripts under torchrun, with the same mathematics.

    torchrun --nproc_per_node 8 train_vapo.py --model DIR --train FILE --test FILE
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train_vapo.py ...   # on each node

Every rank samples answers to its share of the problems; the answers are then gathered, so that all ranks hold the same
table of rows, and everything computed from it (advantages, denominators, whitening, metrics, mini-batches) is what one process
computes. Only the models' work is divided: the micro-batches of a pass are dealt out to the ranks, and FSDP2 (`fully_shard`)
holds a share of weights, gradients and optimiser states on each and adds the gradients up. In one process nothing here does
anything.
"""

import atexit
import os
import sys
import threading
import time
from contextlib import contextmanager, suppress
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
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

GRACE = 10.0  # seconds without a sign of life after which a process counts as dead
STATE = {"world": 1, "rank": 0, "control": None, "timeout": None, "first": False}  # what torchrun made of this process


def world():
    """Number of processes."""
    return STATE["world"]


def rank():
    """This process's number, from 0. Rank 0 logs."""
    return STATE["rank"]


def start(minutes):
    """Joins the processes that torchrun started, if it did. Only rank 0 writes to the screen.

    A collective that takes longer than `minutes` ends the process with an error.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or STATE["control"] is not None:
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(minutes=minutes))
    control = dist.new_group(backend="gloo", timeout=timedelta(minutes=minutes))  # for what must be said while a GPU hangs
    STATE.update(world=dist.get_world_size(), rank=dist.get_rank(), control=control, timeout=timedelta(minutes=minutes))
    stop = threading.Event()
    thread = threading.Thread(target=beat, args=(stop,), daemon=True)
    thread.start()
    atexit.register(lambda: (stop.set(), thread.join(5.0), ended()))  # a thread that is inside the store when Python ends aborts it
    if rank():
        sys.stdout = open(os.devnull, "w")
        bar = tqdm.__init__
        tqdm.__init__ = lambda self, *args, **kwargs: bar(self, *args, **kwargs | {"disable": True})


def local_device(device):
    """This rank's own device of that type."""
    if world() > 1 and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


@contextmanager
def rank_0_first():
    """Rank 0 does what stands in it, then the others do, and find it done. One inside another is part of it."""
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
    """What function() returns on rank 0, and None on the others, which wait for it. Raises: on all, what it raises."""
    value, wrong = None, None
    if not rank():
        try:
            value = function()
        except Exception as error:
            wrong = error
    there = from_rank_0(wrong if isinstance(wrong, ValueError) or wrong is None else RuntimeError(f"on rank 0: {wrong}"))
    if wrong or there:
        raise wrong or there
    return value


def meet(where):
    """All ranks wait for each other here. Raises: RuntimeError that names those that did not come in time."""
    if world() > 1:
        try:
            dist.monitored_barrier(STATE["control"], STATE["timeout"], wait_all_ranks=True)
        except RuntimeError as error:
            raise RuntimeError(f"{where}: {str(error).strip().splitlines()[0]}") from None


def beat(stop):
    """Until the event: tells the others that this process lives, and the user when the next one does not: NCCL waits without naming it."""
    store, other = dist.distributed_c10d._get_default_store().clone(), (rank() + 1) % world()
    heard, since = 0, time.time()
    try:
        while not stop.is_set():
            store.add(f"beats/{rank()}", 1)
            now = store.add(f"beats/{other}", 0)
            if now != heard:
                heard, since = now, time.time()
            elif time.time() - since > 2 * GRACE and not store.check([f"ended/{other}"]):
                print(f"warning on rank {rank()}: nothing is heard of rank {other}: it is dead or hangs", file=sys.stderr, flush=True)
                since = float("inf")  # said once
            stop.wait(GRACE / 5)
    except RuntimeError:  # the store is gone, and with it the run
        return


def ended():
    """Tells the others that this process has an end of its own, good or bad."""
    with suppress(RuntimeError):
        dist.distributed_c10d._get_default_store().set(f"ended/{rank()}", "")


def silent_ranks():
    """After an error: the ranks that have not ended with one before, and of which nothing is heard for a few seconds."""
    ended()
    store = dist.distributed_c10d._get_default_store()
    before = [store.add(f"beats/{other}", 0) for other in range(world())]
    time.sleep(GRACE)
    return [other for other in range(world()) if store.add(f"beats/{other}", 0) == before[other] and not store.check([f"ended/{other}"])]


def rank_0_says(line):
    """Whether rank 0 ends with the same last words, so that this rank need not say them too."""
    if world() == 1:  # before `start`, the flags are at fault, and all ranks of a machine have the same
        return "TORCHELASTIC_RUN_ID" in os.environ and os.environ["LOCAL_RANK"] != "0"
    store = dist.distributed_c10d._get_default_store()
    if not rank():
        store.set("last words", line)
        return False
    try:
        store.wait(["last words"], timedelta(seconds=2))
    except RuntimeError:
        return False
    return store.get("last words").decode() == line


def any_rank(condition):
    """Whether it holds on any rank."""
    if world() == 1:
        return condition
    meet("after a step")
    flag = torch.tensor(int(condition))
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=STATE["control"])
    return bool(flag)


def share(items, together=1):
    """This rank's share of a list: neighbours stay neighbours, all shares but for one item of the same size.

    With `together`, so many neighbouring ranks have one share between them.
    """
    return part(items, rank() // together, world() // together)


def part(items, i, count):
    """The i-th of `count` parts of a list."""
    return items[len(items) * i // count : len(items) * (i + 1) // count]


def deal(micro_batches):
    """This rank's micro-batches (index tensors) of a pass, on every rank as many, for each of them is a collective.

    Every `world`-th, so that all have short and long rows alike. Where they do not come out even, the largest are halved; where
    there are too few rows for that, the first two, of the shortest rows, become one. Raises: AssertionError where there are fewer rows than ranks.
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
    """A dict of numbers summed over the ranks; names that end in `_max` are the largest."""
    if world() == 1:
        return numbers
    for names, op in (
        ([n for n in numbers if not n.endswith("_max")], dist.ReduceOp.SUM),
        ([n for n in numbers if n.endswith("_max")], dist.ReduceOp.MAX),
    ):
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
    """All ranks' rows, in the ranks' order, on every rank. columns: tensors of B rows, [B] or [B, T] with equal T everywhere, or None."""
    if world() == 1:
        return columns
    counts, gathered = all_ranks(len(columns[0])), []
    for column in columns:
        if column is None:
            gathered.append(None)
            continue
        kind, column = column.dtype, column.to(torch.uint8) if column.dtype == torch.bool else column
        padded = torch.cat([column, column.new_zeros(max(counts) - len(column), *column.shape[1:])])
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded.contiguous())
        gathered.append(torch.cat([part[:count] for part, count in zip(parts, counts)]).to(kind))
    return gathered


def shard(network, device, bfloat16=False, cpu_offload=False, head=None):
    """Under torchrun: gives each rank its share of a network's float32 weights, on its device; the layers one by one, then the rest.

    network: whole on rank 0, of the same shape on the others, where it need have no memory (the meta device).
    bfloat16: the gathered weights are bfloat16; gradients are added up in float32. `head` (a critic's) stays float32.
    In one process, moves the network to the device. Returns the network.
    """
    if world() == 1:
        return network.to(device)
    weights = {} if rank() else network.state_dict()
    buffers = from_rank_0(None if rank() else dict(network.named_buffers()))
    network.to("meta").tie_weights()
    mesh = init_device_mesh(device.type, (world(),))
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bfloat16 else MixedPrecisionPolicy()
    for layer in [part for part in network.modules() if isinstance(part, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh, mp_policy=precision, offload_policy=offload)
    if head is not None:
        fully_shard(head, mesh=mesh, offload_policy=offload)
    fully_shard(network, mesh=mesh, mp_policy=precision, offload_policy=offload)
    for part in network.modules():
        if isinstance(part, FSDPModule):  # the weights of a mini-batch sum to one over all ranks: gradients are summed, not averaged
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    network.to_empty(device="cpu" if cpu_offload else device).tie_weights()
    set_model_state_dict(network, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for name, buffer in buffers.items():  # also those that no state dict has
        owner, _, key = name.rpartition(".")
        setattr(network.get_submodule(owner), key, buffer.to(device))
    network.computes_on = device
    network.call_gathered = MethodType(lambda self, function, *args, **kwargs: function(self, *args, **kwargs), network)
    register_fsdp_forward_method(network, "call_gathered")
    return network


def gathers(function):
    """Decorates function(network, …): the weights of a sharded network are gathered around the call, as around its forward."""

    @wraps(function)
    def wrapped(network, *args, **kwargs):
        call = getattr(network, "call_gathered", None)
        return call(function, *args, **kwargs) if call else function(network, *args, **kwargs)

    return wrapped


def local(tensor):
    """This rank's share of a tensor; all of it where it is not shared out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor):
    """A tensor of all its shards, on every rank (a collective); as it is where it has none."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.to(tensor.device_mesh.device_type).full_tensor()  # where the shards are the CPU's, by the GPUs' own links


def unsharded(network):
    """An ordinary network on the CPU of rank 0 with the weights of a sharded one (None elsewhere); an unsharded one as it is."""
    if not isinstance(network, FSDPModule):
        return network
    weights = {}
    for name, tensor in network.state_dict().items():
        tensor = whole(tensor)
        if rank() == 0:
            weights[name] = tensor.cpu()
    if rank():
        return None
    kind = next(base for base in type(network).__mro__[1:] if not issubclass(base, FSDPModule))
    with torch.device("meta"):
        plain = kind(network.config)
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.generation_config = getattr(network, "generation_config", None)
    return plain


def clip_gradients(parameters, largest):
    """Scales the gradients to a norm of at most `largest`, the norm over all ranks' shares. Returns: the norm before, a float."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, largest)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
