"""Is a critic right about unfinished answers? V and advantage of two critics by token position.

    python -m lab.bias --before runs/reward/critic --after runs/value/critic \
        --answers runs/reward/answers.pt --out positions.jsonl

The figure of VC-PPO (arXiv 2503.01491 §3): a reward model was fitted at the end of answers, so as a
critic it is wrong before the end, and advantages at λ = 0.95 inherit the error. V at a position
should on average be the mean outcome of the held-out answers that reach it.
"""

from dataclasses import dataclass

import gae
import model
import table
from system import checkpoint, loading, run, settings
from system.settings import flag
from train_value import split_by_problem


# fmt: off
@dataclass(frozen=True)
class Settings(settings.Settings):
    before: str = flag("", "critic or reward model directory")
    after: str = flag("", "critic directory")
    answers: str = flag("", "answers.pt of train_value.py, from the policy that both judge")
    out: str = flag("", "JSONL to write, a line a position: answers, mean outcome, V, advantage")
    lam: float = flag(0.95, "λ of the advantages", settings.SHARE)
    held_out: float = flag(0.1, "share of problems neither was fitted to", settings.INSIDE_SHARE)
    seed: int = flag(0, "seed of that split, as train_value.py had it")
    fewest: int = flag(30, "positions that fewer answers reach are left out", settings.AT_LEAST_1)
    device: str = flag("auto", "auto (cuda if there is one), cpu, cuda or cuda:N")
# fmt: on


@run.exit_on_bad_input
def main(argv=None):
    asked = settings.parse(Settings, argv, __doc__)
    asked.check()
    for name in ("before", "after", "answers", "out"):
        run.require(bool(getattr(asked, name)), f"give --{name}")
    device = run.pick_device(asked.device)
    rows = checkpoint.read(asked.answers)["rows"]
    _, rows = split_by_problem(rows, asked.held_out, asked.seed)
    mask_BT = table.response_mask(rows)
    columns = {"answers": mask_BT, "outcome": rows["reward_B"][:, None] * mask_BT}
    reward_BT = gae.terminal_reward(rows["reward_B"], rows["length_B"], mask_BT.shape[1])
    for name in ("before", "after"):
        critic = loading.load_critic(getattr(asked, name), device)
        value_BT = model.all_values(critic, rows, 16384)
        adv_BT = gae.gae(reward_BT, value_BT, mask_BT, asked.lam)
        columns |= {f"value_{name}": value_BT, f"advantage_{name}": adv_BT}
    count_T, lines = mask_BT.sum(dim=0), []
    for t in (count_T >= asked.fewest).nonzero()[:, 0].tolist():
        sums = {name: column_BT[:, t].sum() for name, column_BT in columns.items()}
        means = {name: total / count_T[t] for name, total in sums.items()} | {"answers": count_T[t]}
        lines.append({"position": t} | {n: float(f"{x.item():.5g}") for n, x in means.items()})
    run.write_lines(asked.out, lines)
    return lines


if __name__ == "__main__":
    main()
