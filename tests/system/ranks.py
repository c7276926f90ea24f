"""What test_distributed.py starts under torchrun: the gradients and columns of a mini-batch.

    torchrun --nproc_per_node 2 tests/system/ranks.py DIRECTORY

DIRECTORY holds tasks.pt (a list of model, rows, settings); rank 0 writes result-N.pt.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import train_value
import train_vapo
from system import distributed, learner, loading, lora, metrics as step_metrics


def result(task):
    """Columns, metrics and whole gradients of policy and critic, of one mini-batch."""
    settings, device = train_vapo.Settings(**task["settings"]), torch.device("cpu")
    torch.manual_seed(0)
    policy = loading.load_policy(task["model"], device, settings.dtype)
    critic = loading.load_critic(task["model"], device, dtype=settings.dtype)
    if distributed.rank():  # rank 0 alone reads the weights
        assert {policy.device.type, critic.device.type} == {"meta"}
    torch.nn.init.normal_(loading.value_head(critic).weight, std=0.1)
    networks = {"policy": policy, "critic": critic}
    networks = {name: loading.shard(n, device, settings) for name, n in networks.items()}
    for name, parameter in [pair for n in networks.values() for pair in n.named_parameters()]:
        if ".lora_B." in name:
            parameter.data.fill_(0.05)
    policy, critic = networks.values()
    rows = dict(task["rows"])
    train_vapo.score(policy, critic, rows, settings)
    # some ratios are clipped
    rows["old_logp_BT"] = rows["old_logp_BT"] - 0.3 * rows["reward_B"][:, None]
    train_vapo.advantages(rows, settings)
    batch = dict(rows)
    train_vapo.weights(batch, settings)
    sums = {"value_loss": train_value.value_gradients(critic, batch, settings)}
    sums |= train_vapo.policy_gradients(policy, batch, settings)
    metrics, gradients = step_metrics.of_mini_batch(distributed.add_numbers(sums), batch), {}
    for name, network in networks.items():
        for key, parameter in network.named_parameters():
            if parameter.requires_grad:
                gradients[f"{name}.{key}"] = distributed.unsharded(parameter.grad).clone()
        clipped = SimpleNamespace(network=network, max_grad_norm=1.0)
        metrics[f"{name}_norm"] = learner.clip_gradients(clipped)
    train_vapo.score(policy, critic, dict(task["rows"]), settings)  # FSDP leaves some weights whole
    merged = lora.whole_weights(policy)
    return {"rows": rows, "metrics": metrics, "gradients": gradients, "merged": merged}


if __name__ == "__main__":
    distributed.start()
    directory = Path(sys.argv[1])
    built = directory / "built"

    def build():  # as toy.build, which the scripts call so: what is called on rank 0 may nest
        distributed.on_rank_0(lambda: built.write_text(f"by rank {distributed.rank()}"))

    distributed.on_rank_0(build)
    answer = [result(task) for task in torch.load(directory / "tasks.pt")]
    if not distributed.rank():
        torch.save(answer, directory / f"result-{distributed.world()}.pt")
