"""Seeing the critic think: the answers of a run's evaluations, token by token, as one HTML file.

    python -m lab.view runs/NAME                                  # writes runs/NAME/view.html

Every token is coloured by V, by ΔV (how far it moved V) or by its advantage; in an embedded world
the same stands below it for the V that is true. The page without its data is view.html.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

import gae
from system import run, settings
from system.jobs import lines_of
from system.settings import flag

LIMIT = 2_000_000  # bytes of a page


@dataclass(frozen=True)
class Settings(settings.Settings):
    run: str = flag("", "run directory; as the first argument it needs no --run")


def advantages(value_T, reward, config):
    """Â of an answer's tokens, of the V given, by the run's λ_policy."""
    value_BT, length_B = torch.tensor([value_T]), torch.tensor([len(value_T)])
    lam = gae.length_adaptive_lambda(length_B, config["alpha"])
    lam = lam if config["length_adaptive_gae"] else config["lam_policy"]
    reward_BT = gae.terminal_reward(torch.tensor([reward]), length_B, len(value_T))
    adv_BT = gae.gae(reward_BT, value_BT, torch.ones_like(value_BT), lam)
    return [round(adv, 4) for adv in adv_BT[0].tolist()]


def shown(sample, config):
    """A line of samples.jsonl as the page has it: with [V, Â] of the critic and, if known, of the
    truth, the reward that is to be expected."""
    both = {"critic": sample["values"], "truth": sample["true"]}
    both = {name: [V, advantages(V, sample["reward"], config)] for name, V in both.items() if V}
    names = ("step", "problem", "answer", "tokens", "correct", "reward", "finish")
    return {name: sample[name] for name in names} | both


def page(name, config, answers):
    """The page with its data. Every second evaluation is left out until it is small enough."""
    rewards = [config["reward_wrong"], config["reward_correct"]]
    rewards = [answer["reward"] for answer in answers] if config["reward"] else rewards
    kept = {"preset": config["preset"], "steps": config["steps"]}
    kept |= {"lowest": min(rewards), "highest": max(rewards)}
    text = json.dumps({"run": name, "answers": answers} | kept, allow_nan=False)
    text = text.replace("<", "\\u003c")  # a model's text opens and closes no tag
    whole = Path(__file__).with_suffix(".html").read_text().replace("{{DATA}}", text)
    steps = sorted({line["step"] for line in answers})
    if len(whole.encode()) > LIMIT:
        run.require(len(steps) > 1, f"one evaluation alone makes more than {LIMIT:,} bytes")
        return page(name, config, [line for line in answers if line["step"] in steps[::-2]])
    return whole


@run.exit_on_bad_input
def main(argv=None):
    asked = settings.parse(Settings, argv, __doc__, first="--run")
    run.require(bool(asked.run), "give a run directory: python -m lab.view runs/NAME")
    run_dir, path = Path(asked.run), Path(asked.run, "view.html")
    try:
        config = json.loads((run_dir / "config.json").read_text())["settings"]
        samples = lines_of(run_dir / "samples.jsonl")
        run.require(samples, "it has not come to its first evaluation")
        samples = [line for line in samples if line["values"]]
        run.require(samples, "there is no V in samples.jsonl: this run has no critic")
        run.require("reward" in samples[0], "an earlier revision wrote samples.jsonl: run it again")
        path.write_text(page(run_dir.name, config, [shown(line, config) for line in samples]))
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise run.BadInput(f"no view of {run_dir}: {error}") from None
    print(path)
    return str(path)


if __name__ == "__main__":
    main()
