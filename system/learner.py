"""One optimiser step, of policy and critic alike: AdamW, its schedule, clipping, step or skip."""

import math

import torch
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LinearLR

from system import lora


class Learner:
    """A network that learns: with AdamW (no weight decay) and a schedule of its learning rate.
    Args: max_grad_norm, over the whole model; schedule, a function optimiser → scheduler."""

    def __init__(self, network, lr, max_grad_norm, schedule):
        self.network, self.max_grad_norm = network, max_grad_norm
        parameters = lora.trained(network)
        self.optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.0, fused=True)
        self.scheduler = schedule(self.optimizer)
        for weight in parameters:  # as its first step would: a checkpoint is read into them
            moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
            step = torch.zeros((), device=weight.device)
            self.optimizer.state[weight] = {"step": step} | moments


def warmup(steps):
    """The schedule lr · min(1, (s + 1) / steps) of step s = 0, 1, 2, …: a line, then constant."""
    steps = max(1, steps)
    return lambda optimizer: LinearLR(optimizer, start_factor=1 / steps, total_iters=steps - 1)


def step_or_skip(learners, metrics):
    """One optimiser step of all learners or, where a loss or gradient is not finite, of none.
    Args: {name: Learner} with gradients, which are used up; metrics, to which NAME_grad_norm, the
    norm before clipping, is added. Returns: whether the step was made."""
    metrics |= {f"{name}_grad_norm": clip_gradients(own) for name, own in learners.items()}
    finite = all(map(math.isfinite, metrics.values()))
    for learner in learners.values():
        if finite:
            learner.optimizer.step()
            learner.scheduler.step()
        learner.optimizer.zero_grad()
    return finite


def clip_gradients(learner):
    """Scales the gradients g by min(1, max_grad_norm / ‖g‖), all ranks' together. Returns: ‖g‖."""
    norm = torch.nn.utils.clip_grad_norm_(learner.network.parameters(), learner.max_grad_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
