"""The evidence: VAPO, VAPO without each of its seven pieces, and its rivals, over several seeds, in a table and figures.

    python ablate.py                                # all rows, 5 seeds; stopped and started again, it goes on
    python ablate.py --rows vapo dapo --seeds 0     # some of them
    python ablate.py --rows tuning --seeds 100 101  # how the learning rates were chosen
    python ablate.py --out runs/again/results --runs runs/again   # from nothing, beside the results that are there
    python ablate.py --rows alpha                   # α of length-adaptive GAE, which the paper does not sweep
    python ablate.py --rows added                   # PPO with one of the seven pieces each: what one does alone
    python ablate.py --quick                        # everything once in small: a smoke test, its numbers mean nothing

1. One embedded world (WORLD), one reward model and one pretrained critic in it; every run with a critic starts from one of them.
2. Each run is `python train_vapo.py` with one row's flags, on one core; a killed run is resumed, a finished one never repeated.
3. A finished run's metrics.jsonl is copied to OUT/raw; all that is said is computed from those files: OUT/README.md and PNGs.
"""

import fcntl
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

import plot
from report import curve, read_raw, report
from run import BadInput, exit_on_bad_input, flag, parse_settings, require

# Long, heterogeneous answers with a sparse outcome: 10 to 120 steps, 22 to 250 tokens and more with redone ones.
# Its base model is trained until it tells slips from steps (it has to, to write the mark), as a pretrained model does.
WORLD = {
    "min_steps": 10, "max_steps": 120, "slip": 0.08, "layers": 4, "updates": 2000, "update_rows": 32, "test_problems": 128,
}  # fmt: skip
# 16 updates a rollout, as in the paper; results/eight_updates has a first look with 8.
RUN = {
    "steps": 24, "prompts": 16, "samples": 16, "mini_batch": 16, "alpha": 0.5, "critic_lr": 5e-4,
    "eval_every": 3, "eval_samples": 4, "save_every": 6,
}  # fmt: skip
REWARD_MODEL = {"answers": 8192, "lr": 5e-4, "batch": 32, "passes": 8, "patience": 3}
VALUE = {"answers": 8192, "lr": 1e-3, "decay": True, "batch": 32, "short_passes": 12, "passes": 6, "patience": 6}
QUICK_WORLD = {"min_steps": 2, "max_steps": 8, "layers": 2, "updates": 60, "test_problems": 8}
QUICK_RUN = {"steps": 3, "prompts": 4, "samples": 8, "mini_batch": 8, "eval_every": 1, "eval_samples": 2, "generations": 100}
QUICK_VALUE = {"answers": 128, "short_passes": 0, "passes": 1}

LEARNING_RATES = {
    "vapo": 2e-4,
    "vc_ppo": 1e-4,
    "ppo": 2e-4,
    "grpo": 2e-4,
    "dapo": 2e-4,
}  # by training accuracy, `--rows tuning --seeds 100`, and 101 where the best two are within 0.01
TRIED = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)  # the outer two only for whom the best of the inner three was next to them

# AIME 2024, avg@32, of Qwen2.5-32B (arXiv 2504.05118, table 1).
PAPER = {
    "vapo": 60, "no_value_pretraining": 11, "no_decoupled_gae": 33, "no_length_adaptive_gae": 45, "no_clip_higher": 46,
    "no_token_level_loss": 53, "no_positive_nll": 54, "no_group_sampling": 55, "ppo": 5, "dapo": 50,
}  # fmt: skip
PIECES = {
    "value_pretraining": "value pretraining", "decoupled_gae": "decoupled GAE", "length_adaptive_gae": "length-adaptive GAE",
    "clip_higher": "clip-higher", "token_level_loss": "token-level loss", "positive_nll": "positive-example NLL",
    "group_sampling": "group sampling",
}  # fmt: skip
RIVALS = {"vc_ppo": "VC-PPO", "ppo": "PPO", "grpo": "GRPO", "dapo": "DAPO"}
# row → (title, the flags in which it differs from the first row)
ROWS = {"vapo": ("VAPO", {})}
ROWS |= {f"no_{piece}": (f"w/o {title}", {piece: False}) for piece, title in PIECES.items()}
ROWS |= {preset: (title, {"preset": preset, "lr": LEARNING_RATES[preset]}) for preset, title in RIVALS.items()}
GROUPS = {"paper": list(ROWS)}
ROWS |= {
    f"ppo_with_{piece}": (f"PPO with {title}", {"preset": "ppo", "lr": LEARNING_RATES["ppo"], piece: True}) for piece, title in PIECES.items()
}  # fmt: skip
GROUPS["added"] = ["ppo", *(row for row in ROWS if row.startswith("ppo_with_"))]
ROWS |= {f"alpha_{alpha:g}": (f"VAPO, α = {alpha:g}", {"alpha": alpha}) for alpha in (0.05, 0.1, 0.2, 1.0, 2.0)}
GROUPS["alpha"] = ["vapo", *(row for row in ROWS if row.startswith("alpha_"))]
ROWS |= {f"{preset}_lr_{lr:g}": (f"{preset}, lr {lr:g}", {"preset": preset, "lr": lr}) for preset in LEARNING_RATES for lr in TRIED}
ROWS |= {f"vapo_critic_lr_{lr:g}": (f"vapo, critic lr {lr:g}", {"critic_lr": lr}) for lr in (1e-4, 1e-3)}
ROWS["vapo_from_reward_model"] = ("VAPO, critic pretrained from the reward model", {"critic": "value_from_reward_model"})
GROUPS["paper"].append("vapo_from_reward_model")
GROUPS["tuning"] = [row for row in ROWS if "_lr_" in row]


@dataclass(frozen=True)
class Settings:
    rows: list[str] = field(default_factory=lambda: ["paper"], metadata={"help": f"rows, or groups of rows: {', '.join(GROUPS)}"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "seeds of every row"})
    out: str = flag("results", "directory for the table, the figures and raw/ (one file a finished run)")
    runs: str = flag("runs/ablate", "directory for the world, the critics and the runs")
    jobs: int = flag(0, "runs side by side, one core each; 0: as many as there are cores")
    quick: bool = flag(False, "small world, three short rollouts, seed 0, into RUNS/quick: a smoke test")


def to_flags(values):
    return [f"--{name}={value}" for name, value in values.items()]


def row_settings(row, seed, quick=False):
    """What one row and seed is told, but for files: RUN, then the row's own."""
    own = ROWS[row][1]
    return RUN | {"lr": LEARNING_RATES["vapo"]} | (QUICK_RUN if quick else {}) | own | {"seed": seed, "device": "cpu"}


def run_flags(row, seed, runs, quick=False):
    """The flags of `train_vapo.py` for one row and seed: the world's, then the row's settings, then its files."""
    own = ROWS[row][1]
    preset, files = own.get("preset", "vapo"), {"out": runs / f"{row}-{seed}"}
    if "critic" in own:
        own = own | {"critic": runs / own["critic"] / "critic"}
        files["critic"] = own["critic"]
    elif own.get("value_pretraining", preset in ("vapo", "vc_ppo")):
        files["critic"] = runs / "value" / "critic"
    elif preset not in ("grpo", "dapo"):
        files["reward_model"] = runs / "reward_model" / "critic"
    return [f"@{runs}/world/train_vapo.args", *to_flags(row_settings(row, seed, quick) | files)]


def is_finished(row, seed, out, quick=False):
    """Whether OUT/raw has this run. Raises: BadInput if it has it with other settings than it would have now."""
    path = out / "raw" / f"{row}-{seed}.jsonl"
    if not path.exists():
        return False
    check_settings(path, json.loads(path.read_text().partition("\n")[0])["config"], row, seed, quick)
    return True


def check_settings(path, config, row, seed, quick):
    """Raises: BadInput if a run's config.json tells of other settings than the row has now."""
    had = dict(flag.removeprefix("--").split("=", 1) for flag in config["settings"])
    differ = [n for n, v in row_settings(row, seed, quick).items() if n not in ("critic", "device") and had.get(n) != str(v)]
    require(not differ, f"{path} has another {', '.join(differ)} than {row} has now: remove it, or give another --out and --runs")


def call(script, argv, log):
    """Runs a script of this directory on one core, its output into the file `log`. Raises: BadInput with its last line."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "a") as file:  # a resumed run goes on in the log of its first part
        command = [sys.executable, str(Path(__file__).parent / script), *map(str, argv)]
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        *_, last = ["", *Path(log).read_text().replace("\r", "\n").strip().split("\n")]
        raise BadInput(f"{script} ended with exit code {code}, see {log}: {last}")


def prepare(runs, out, quick):
    """The world, the reward model and the pretrained critic, unless they are there; their curves go to OUT/raw."""
    world = runs / "world"
    flags = WORLD | (QUICK_WORLD if quick else {}) | {"out": world}
    if not (world / "train_vapo.args").exists():
        print(f"building the world: see {world}.log", flush=True)
    call("toy.py", to_flags(flags), f"{world}.log")
    reward_model, answers = runs / "reward_model" / "critic", runs / "reward_model" / "answers.pt"
    for name, flags in (
        ("reward_model", REWARD_MODEL | {"objective": "reward"}),
        # VAPO's critic starts from the policy's trunk; the paper's starts from the reward model. Here that one has unlearned
        # to see slips: the third critic shows how far pretraining gets from there, and is the "after" of bias.py.
        ("value", VALUE | {"reuse_answers": answers}),
        ("value_from_reward_model", VALUE | {"reuse_answers": answers, "init": reward_model}),
    ):
        flags |= (QUICK_VALUE if quick else {}) | {"device": "cpu", "out": runs / name}
        if not (runs / name / "critic").exists():
            print(f"fitting {name}: see {runs / name}.log", flush=True)
            call("train_value.py", [f"@{world}/train_value.args", *to_flags(flags)], f"{runs / name}.log")
        kept, fresh = out / "raw" / f"{name}.jsonl", runs / f"{name}.jsonl"
        keep(runs / name, fresh)
        same = not kept.exists() or plot.lines_of(kept) == plot.lines_of(fresh)
        require(same, f"{name} is not the critic of the runs that are finished in {out} (another machine or version): give another --out")
        keep(runs / name, kept)
    if not (out / "positions.jsonl").exists():
        flags = {"before": reward_model, "after": runs / "value_from_reward_model" / "critic", "answers": answers, "device": "cpu"}
        call("bias.py", to_flags(flags | {"out": out / "positions.jsonl"}), f"{runs}/bias.log")


def keep(run_dir, path):
    """Copies a finished run's metrics.jsonl to `path`, five digits a number, its config.json as the first line."""
    config = json.loads((run_dir / "config.json").read_text())
    lines = [{"config": config}]
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        numbers = json.loads(line)
        lines.append({name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in numbers.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text("".join(json.dumps(line) + "\n" for line in lines))
    beside.replace(path)


def run(row, seed, runs, out, quick):
    """One run from where it stands to its end."""
    run_dir = runs / f"{row}-{seed}"
    argv = run_flags(row, seed, runs, quick)
    if (run_dir / "config.json").exists():
        check_settings(run_dir, json.loads((run_dir / "config.json").read_text()), row, seed, quick)
        argv = [f"--resume={run_dir}"]
    call("train_vapo.py", argv, f"{run_dir}.log")
    keep(run_dir, out / "raw" / f"{row}-{seed}.jsonl")


def lock(runs):
    """An open file, to be closed when done, that one process at a time can have. Raises: BadInput if another has it."""
    runs.mkdir(parents=True, exist_ok=True)
    file = open(runs / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise BadInput(f"another ablate.py is at work in {runs}: let it finish, or give another --runs and --out") from None
    return file


def run_all(waiting, runs, out, settings, written):
    """The runs that are missing, side by side; calls written() after each. Returns a line for each that failed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS has only the latter
    failed, pool = [], ThreadPoolExecutor(settings.jobs or cores)
    jobs = {pool.submit(run, row, seed, runs, out, settings.quick): (row, seed) for row, seed in waiting}
    try:
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="runs"):
            row, seed = jobs[job]
            try:
                job.result()
                tqdm.write(f"{row}, seed {seed}: {curve(read_raw(out, ROWS)[row][seed])[-1][1]:.3f}")
            except BadInput as error:
                failed.append(f"{row}, seed {seed}: {error}")
                tqdm.write(failed[-1])
            written()
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C stops after the runs that are under way, which Ctrl-C reaches too
    return failed


@exit_on_bad_input
def main(argv=None):
    """Runs the script; returns the summary of all finished runs."""
    settings = parse_settings(Settings, argv, __doc__)
    unknown = [row for row in settings.rows if row not in ROWS and row not in GROUPS]
    require(not unknown, f"--rows: there is no {', '.join(unknown)}; there are {', '.join([*GROUPS, *ROWS])}")
    require(settings.jobs >= 0 and bool(settings.seeds), "--jobs must not be negative, --seeds not empty")
    rows = list(dict.fromkeys(name for row in settings.rows for name in GROUPS.get(row, [row])))
    runs, out, seeds = Path(settings.runs), Path(settings.out), settings.seeds
    if settings.quick:
        runs, out, seeds = runs / "quick", runs / "quick" / "results", [0]
    titles = {row: title for row, (title, _) in ROWS.items()}

    def written():
        return report(out, GROUPS, titles, PAPER, RUN["alpha"])

    waiting = [(row, seed) for seed in seeds for row in rows if not is_finished(row, seed, out, settings.quick)]
    written()  # also shows at once whether matplotlib is there
    failed = []
    if waiting:
        with lock(runs):
            prepare(runs, out, settings.quick)
            failed = run_all(waiting, runs, out, settings, written)
    summary = written()
    print(f"\nthe table and the figures are in {out}/README.md")
    require(not failed, f"{len(failed)} runs failed: {'; '.join(failed)}")
    return summary


if __name__ == "__main__":
    main()
