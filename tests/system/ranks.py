"""What test_distributed.py starts under torchrun: the gradients and columns of one mini-batch on this many processes.

    torchrun --nproc_per_node 2 tests/ranks.py DIRECTORY

DIRECTORY holds tasks.pt (a list of model, rows, settings); rank 0 writes result-N.pt.
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import distributed
import logprobs
import losses
import model
import ppo
import train_vapo

KERNELS = SimpleNamespace(
    logprobs=(logprobs.add_slice, logprobs.slice_gradient), policy_loss=losses.policy_loss, value_loss=losses.value_loss
)


def result(task):
    """Columns, metrics and whole gradients of policy and critic, of one mini-batch with the task's settings."""
    settings = train_vapo.Settings(**task["settings"])
    device = torch.device("cpu")
    torch.manual_seed(0)
    policy, critic = model.load_policy(task["model"], device), model.load_critic(task["model"], device)
    assert not distributed.rank() or {policy.device.type, critic.device.type} == {"meta"}  # rank 0 alone reads the weights
    torch.nn.init.normal_(model.value_head(critic).weight, std=0.1)
    policy, critic = (model.ready(network, device, settings) for network in (policy, critic))
    rows = dict(task["rows"])
    ppo.old_logprobs_and_values(policy, critic, rows, settings, KERNELS)
    rows["old_logp_BT"] = rows["old_logp_BT"] - 0.3 * rows["reward_B"][:, None]  # some ratios are clipped
    ppo.compute_advantages(rows, settings)
    networks, gradients = {"policy": policy, "critic": critic}, {}
    metrics = ppo.backward(policy, critic, ppo.add_weights(dict(rows), settings), settings, KERNELS)
    for name, network in networks.items():
        gradients |= {f"{name}.{key}": distributed.whole(p.grad).clone() for key, p in network.named_parameters()}
        metrics[f"{name}_norm"] = distributed.clip_gradients(network.parameters(), 1.0)
    return {"rows": rows, "metrics": metrics, "gradients": gradients}


if __name__ == "__main__":
    distributed.start(5.0)
    directory = Path(sys.argv[1])
    with distributed.rank_0_first():
        if not (directory / "built").exists():  # as toy.build, which the scripts call so: the others never come here
            with distributed.rank_0_first():
                (directory / "built").write_text(f"by rank {distributed.rank()}")
    answer = [result(task) for task in torch.load(directory / "tasks.pt")]
    if not distributed.rank():
        torch.save(answer, directory / f"result-{distributed.world()}.pt")
    distributed.GRACE = 0.001  # a heart that beats without a pause must not be in the way of a good end
    time.sleep(2.5)
