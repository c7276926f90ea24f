"""Is a critic right about unfinished answers? V and the mean advantage by token position, before and after pretraining.

    python bias.py --before runs/reward/critic --after runs/value/critic --answers runs/reward/answers.pt --out positions.jsonl

The figure of VC-PPO (arXiv 2503.01491 §3): a reward model was fitted at the end of answers, so as a critic it is wrong
before the end, and advantages at λ = 0.95 inherit the error. The mean outcome of the answers that reach a position is
what V should be there on average. Reads the stored answers of train_value.py, uses the held-out ones, writes one line a position.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import checkpoint
import gae
import model
import table
from run import exit_on_bad_input, flag, parse_settings, pick_device, require
from train_value import split_by_problem


@dataclass(frozen=True)
class Settings:
    before: str = flag("", "critic or reward model directory")
    after: str = flag("", "critic directory")
    answers: str = flag("", "answers.pt of train_value.py, from the policy that both are to judge")
    out: str = flag("", "JSONL to write: position, answers there, mean outcome, V and advantage of both")
    lam: float = flag(0.95, "λ of the advantages")
    held_out: float = flag(0.1, "share of the problems that both critics were not fitted to")
    seed: int = flag(0, "seed of that split, as it was given to train_value.py")
    fewest: int = flag(30, "positions that fewer answers reach are left out")
    device: str = flag("auto", "auto (cuda if there is one), cpu, cuda or cuda:N")


def by_position(rows, value_BT, lam):
    """Means over the rows that reach each position: (value_T, adv_T)."""
    mask_BT = table.response_mask(rows)
    reward_BT = gae.terminal_reward(rows["reward_B"], rows["length_B"], mask_BT.shape[1])
    adv_BT = gae.gae(reward_BT, value_BT, mask_BT, lam)
    count_T = mask_BT.sum(dim=0)
    return (value_BT * mask_BT).sum(dim=0) / count_T, adv_BT.sum(dim=0) / count_T


@exit_on_bad_input
def main(argv=None):
    """Runs the script; returns the lines it wrote."""
    settings = parse_settings(Settings, argv, __doc__)
    for name in ("before", "after", "answers", "out"):
        require(bool(getattr(settings, name)), f"give --{name}")
    device = pick_device(settings.device)
    rows = {name: column.to(device) for name, column in checkpoint.read(settings.answers)["rows"].items()}
    _, rows = split_by_problem(rows, settings.held_out, settings.seed)
    mask_BT = table.response_mask(rows)
    count_T = mask_BT.sum(dim=0)
    columns = {"answers": count_T, "outcome": (rows["reward_B"][:, None] * mask_BT).sum(dim=0) / count_T}
    for name in ("before", "after"):
        critic = model.load_critic(getattr(settings, name), device)
        value_T, adv_T = by_position(rows, table.values(critic, rows, 64), settings.lam)
        columns |= {f"value_{name}": value_T, f"advantage_{name}": adv_T}
    lines = [
        {"position": t} | {name: float(f"{column[t].item():.5g}") for name, column in columns.items()}
        for t in range(len(count_T)) if count_T[t] >= settings.fewest
    ]  # fmt: skip
    Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
    beside = Path(settings.out + ".tmp")
    beside.write_text("".join(json.dumps(line) + "\n" for line in lines))
    beside.replace(settings.out)
    return lines


if __name__ == "__main__":
    main()
