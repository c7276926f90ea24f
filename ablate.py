"""The evidence: all combinations of VAPO's pieces, its rivals, a perfect critic, three lengths.

    python ablate.py --rows cube          # all 128 combinations of the seven pieces, two seeds
    python ablate.py --rows main 30 300   # VAPO, its rivals, other critics: 30, 100, 300 tokens
    python ablate.py --rows long --quick  # three times as many rollouts; in small: a smoke test

One embedded world for each length, a reward model in it, and a critic pretrained from that, as in
the paper, are in OUT/start: with value pretraining a run starts from the critic, without from the
reward model. Each run is `python train_vapo.py` with a row's flags; a killed one is resumed, a
finished one never repeated. OUT/raw has each one's metrics, OUT/README.md what lab.report says.
"""

import json
from dataclasses import dataclass
from functools import partial, reduce
from itertools import product
from operator import xor
from pathlib import Path

from tqdm import tqdm

from system import jobs, settings as flags
from system.run import exit_on_bad_input, require
from system.settings import NOT_NEGATIVE, flag
from train_vapo import PRESETS

# fmt: off
# Heterogeneous answers, a sparse outcome. By the mean tokens of an answer that works: the longer,
# the fewer slips, so that the base models, which tell slips from steps, are right equally often.
WORLDS = {"30": {"min_steps": 3, "max_steps": 36, "slip": 0.25},
          "100": {"min_steps": 10, "max_steps": 120, "slip": 0.08},
          "300": {"min_steps": 30, "max_steps": 360, "slip": 0.027}}
WORLD = {"layers": 4, "updates": 2000, "update_rows": 32, "test_problems": 128}
RUN = {"steps": 24, "prompts": 16, "samples": 16, "mini_batch": 16, "alpha": 0.5, "critic_lr": 5e-4,
       "eval_every": 3, "eval_samples": 4, "save_every": 6}
REWARD_MODEL = {"objective": "reward", "answers": 8192, "lr": 5e-4, "batch": 32, "passes": 8,
                "patience": 3}
VALUE = {"answers": 8192, "lr": 1e-3, "decay": True, "batch": 32, "short_passes": 12, "passes": 6,
         "patience": 6}
QUICK_WORLD = {"min_steps": 2, "max_steps": 8, "layers": 2, "updates": 60, "test_problems": 8}
QUICK_RUN = {"steps": 3, "prompts": 4, "samples": 8, "mini_batch": 8, "eval_every": 1,
             "eval_samples": 2}
QUICK_VALUE = {"answers": 128, "short_passes": 0, "passes": 1}

# Each the best of 1e-4 to 4e-4 by the last quarter's training accuracy on another seed (66f9900).
LEARNING_RATES = {"vapo": 2e-4, "vc_ppo": 1e-4, "ppo": 2e-4, "grpo": 2e-4, "dapo": 2e-4}
CUBE_RUN = {"eval_every": 0, "eval_samples": 8}  # tested at the end: 1,024 answers
CUBE_LR = {0: 2e-4, 1: 1e-4}  # by seed: does the answer depend on it?

PIECES = {"value_pretraining": "value pretraining", "decoupled_gae": "decoupled GAE",
          "length_adaptive_gae": "length-adaptive GAE", "clip_higher": "clip-higher",
          "token_level_loss": "token-level loss", "positive_nll": "positive-example NLL",
          "group_sampling": "group sampling"}
FEWER = {"prompts": 4, "mini_batch": 4}  # 64 answers a rollout, and 16 updates still
# fmt: on
# row → (title, the flags in which it differs from the first row)
MAIN = {"vapo": ("VAPO", {})}
MAIN |= {f"no_{piece}": (f"w/o {PIECES[piece]}", {piece: False}) for piece in list(PIECES)[:3]}
for row, title in {"ppo": "PPO", "vc_ppo": "VC-PPO", "grpo": "GRPO", "dapo": "DAPO"}.items():
    MAIN[row] = (title, {"preset": row, "lr": LEARNING_RATES[row]})
MAIN["perfect_critic"] = ("VAPO, perfect critic", {"critic": "truth"})
MAIN["critic_surprise"] = ("VAPO, critic that reads −log π", {"critic_surprise": True})
ROWS = dict(MAIN)
for row in ("vapo", "dapo", "perfect_critic"):
    ROWS[f"{row}_64"] = (f"{MAIN[row][0]}, 64 answers", MAIN[row][1] | FEWER)
GROUPS = {"main": list(ROWS)}
for length in ("30", "300"):
    ROWS |= {f"{length}_{row}": (title, own) for row, (title, own) in MAIN.items()}
for row in ("vapo", "ppo", "grpo", "dapo"):
    ROWS[f"long_{row}"] = (MAIN[row][0], MAIN[row][1] | {"steps": 72})
for group in ("30", "300", "long"):
    GROUPS[group] = [row for row in ROWS if row.startswith(group + "_")]


def syndrome(bits):
    """Of a combination of the pieces: the exclusive or of the places, 1 to 7, of those that are on.
    In its order every part of the cube says most: the 16 of syndrome 0 (Hamming's code), 32 of 0
    and 1, 64 of 0 to 3 mix up no main effect with an interaction of two (resolution IV)."""
    return reduce(xor, (place for place, bit in enumerate(bits, 1) if bit == "1"), 0)


for bits in sorted(map("".join, product("10", repeat=len(PIECES))), key=syndrome):
    own = {piece: False for piece, bit in zip(PIECES, bits) if bit == "0"}
    ROWS[f"cube_{bits}"] = (bits, own)
GROUPS["cube"] = [row for row in ROWS if row.startswith("cube_")]


@dataclass(frozen=True)
class Settings(flags.Settings):
    rows: list[str] = flag(["cube", "main"], f"rows, or groups of rows: {', '.join(GROUPS)}")
    seeds: list[int] = flag([], "seeds of every row; none: 0 to 2, of the cube 0 and 1")
    out: str = flag("results", "directory for table, figures, raw/ (a file a run), start/")
    runs: str = flag("runs/ablate", "directory for the runs")
    jobs: int = flag(0, "runs side by side, one core each; 0: one a core", NOT_NEGATIVE)
    quick: bool = flag(False, "all in small, seed 0, into RUNS/quick; its numbers mean nothing")


def to_flags(values):
    return [f"--{name}={value}" for name, value in values.items()]


def row_settings(row, seed, quick=False):
    """What one row and seed is told, but for files: RUN, then the row's own."""
    own, small = ROWS[row][1], QUICK_RUN if quick else {}
    if quick and own.get("preset") == "dapo":
        small = small | {"dynamic_sampling": 100}
    common = RUN | {"lr": LEARNING_RATES["vapo"], "seed": seed, "device": "cpu"}
    if row in GROUPS["cube"]:
        common |= CUBE_RUN | {"lr": CUBE_LR.get(seed, LEARNING_RATES["vapo"])}
    return PRESETS[own.get("preset", "vapo")] | common | small | own


def start_of(row, out):
    """Where a row's world, reward model and critic are."""
    length = row.partition("_")[0]
    return out / "start" / (length if length in WORLDS else "100")


def run_flags(row, seed, start, quick=False):
    """The flags of `train_vapo.py` for one row and seed: the world's, the row's, its critic's."""
    own, files = ROWS[row][1], {}
    preset, critic = own.get("preset", "vapo"), "surprise" if "surprise" in row else "value"
    if own.get("value_pretraining", preset in ("vapo", "vc_ppo")):
        files = {} if "perfect" in row else {"critic": start / critic / "critic"}
    elif preset not in ("grpo", "dapo"):
        files["reward_model"] = start / "reward_model" / "critic"
    settings = row_settings(row, seed, quick)
    return [f"@{start}/world/train_vapo.args", *to_flags(settings | files)]


def is_there(path, where, row, seed, quick):
    """Whether `path`, with the config of a run in it, is there; `where` is what a user removes.
    Raises: BadInput if it tells of other settings than the row has now."""
    if path.exists():
        first = path.read_text() if path.suffix == ".json" else path.read_text().split("\n")[0]
        had, wanted = json.loads(first), row_settings(row, seed, quick)
        had = had.get("config", had)["settings"] | {"device": "cpu"}
        wanted.pop("reward_model", None)  # "fit" in a preset, a directory here
        differ = ", ".join(name for name, value in wanted.items() if had.get(name) != value)
        require(not differ, f"{where} has another {differ} than {row} has now: use another --out")
    return path.exists()


def prepare(start, rows, quick):
    """World, reward model and the rows' critics in OUT/start/LENGTH, unless they are there: kept
    with the results, so that runs on other machines, which round otherwise, start alike."""
    world, log = start / "world", f"{start}/log"
    own = WORLD | (QUICK_WORLD if quick else WORLDS[start.name]) | {"out": world}
    jobs.call("toy.py", to_flags(own), log)
    scores, value = start / "reward_model", VALUE | {"init": start / "reward_model" / "critic"}
    fits = {"reward_model": REWARD_MODEL, "value": value}
    if any("surprise" in row for row in rows):
        fits["surprise"] = value | {"critic_surprise": True}
    for name, own in fits.items():
        own = own | (QUICK_VALUE if quick else {}) | {"device": "cpu", "out": start / name}
        if (answers := scores / "answers.pt").exists() and "init" in own:
            own["reuse_answers"] = answers
        if not (start / name / "critic").exists():
            print(f"fitting {name} for {start.name} tokens: see {log}", flush=True)
            jobs.call("train_value.py", [f"@{world}/train_value.args", *to_flags(own)], log)


def run(row, seed, runs, out, quick):
    """One run from where it stands to its end. Returns: its last held-out accuracy."""
    run_dir = runs / f"{row}-{seed}"
    there = is_there(run_dir / "config.json", run_dir, row, seed, quick)
    fresh = [*run_flags(row, seed, start_of(row, out), quick), f"--out={run_dir}"]
    argv = [f"--resume={run_dir}"] if there else fresh
    jobs.call("train_vapo.py", argv, f"{run_dir}.log")
    path = out / "raw" / f"{row}-{seed}.jsonl"
    jobs.keep(run_dir, path)
    return [line["test_accuracy"] for line in jobs.lines_of(path) if "test_accuracy" in line][-1]


@exit_on_bad_input
def main(argv=None):
    settings = flags.parse(Settings, argv, __doc__)
    settings.check()
    unknown = ", ".join(row for row in settings.rows if row not in ROWS and row not in GROUPS)
    known = [*GROUPS, *(row for row in ROWS if row not in GROUPS["cube"])]
    require(not unknown, f"--rows: there is no {unknown}; there are {', '.join(known)}")
    rows = dict.fromkeys(name for row in settings.rows for name in GROUPS.get(row, [row]))
    runs, out = Path(settings.runs), Path(settings.out)
    if settings.quick:
        runs, out = runs / "quick", runs / "quick" / "results"
        rows = [row for row in rows if row not in GROUPS["cube"][2:]]
    report = partial(jobs.call, "lab.report", [f"--out={out}"], runs / "report.log")
    seeds = [0] if settings.quick else settings.seeds or [0, 1, 2]
    pairs = [(row, seed) for seed in seeds for row in rows
             if settings.seeds or row not in GROUPS["cube"] or seed in CUBE_LR]  # fmt: skip
    raw = {pair: out / "raw" / f"{pair[0]}-{pair[1]}.jsonl" for pair in pairs}
    waiting = [p for p in pairs if not is_there(raw[p], raw[p], *p, settings.quick)]
    report()  # also shows at once whether matplotlib is there
    workers, failed = settings.jobs or jobs.cores(), []
    print(jobs.time_left(waiting, runs, out / "raw", workers), flush=True)
    for start in dict.fromkeys(start_of(row, out) for row, _ in waiting):
        prepare(start, [row for row, _ in waiting], settings.quick)
    work = {pair: partial(run, *pair, runs, out, settings.quick) for pair in waiting}
    for (row, seed), accuracy, error in jobs.side_by_side(work, workers) if waiting else ():
        failed += [f"{row}, seed {seed}: {error}"] if error else []
        tqdm.write(failed[-1] if error else f"{row}, seed {seed}: {accuracy:.3f}")
        report()
    print(f"\nthe table and the figures are in {out}/README.md")
    require(not failed, f"{len(failed)} runs failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
