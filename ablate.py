"""The evidence: VAPO, VAPO without each of its seven pieces, and its rivals, over several seeds, in a table and figures.

    python ablate.py                                # all rows, 5 seeds; stopped and started again, it goes on
    python ablate.py --rows vapo dapo --seeds 0     # some of them
    python ablate.py --rows tuning --seeds 100      # how the learning rates were chosen
    python ablate.py --rows alpha                   # α of length-adaptive GAE, which the paper does not sweep
    python ablate.py --quick                        # everything once in small: a smoke test, its numbers mean nothing

1. One embedded world (WORLD), one reward model and one pretrained critic of it; every run with a critic starts from them.
2. Each run is `python train_vapo.py` with one row's flags, on one core; a killed run is resumed, a finished one never repeated.
3. A finished run's metrics.jsonl is copied to OUT/raw; all that is said is computed from those files: OUT/README.md and PNGs.
"""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import plot
from run import BadInput, exit_on_bad_input, flag, parse_settings, require

# Long, heterogeneous answers with a sparse outcome: 10 to 120 steps, 22 to 250 tokens and more with redone ones.
# Its base model is trained until it tells slips from steps (it has to, to write the mark), as a pretrained model does.
WORLD = {
    "min_steps": 10, "max_steps": 120, "slip": 0.08, "layers": 4, "updates": 2000, "update_rows": 32, "test_problems": 128,
}  # fmt: skip
RUN = {
    "steps": 24, "prompts": 16, "samples": 16, "mini_batch": 32, "alpha": 0.5, "critic_lr": 5e-4, "micro_batch": 32,
    "eval_every": 3, "eval_samples": 4, "save_every": 6,
}  # fmt: skip
VALUE = {"answers": 8192, "lr": 1e-3, "decay": True, "batch": 32, "short_passes": 12, "passes": 6, "patience": 6}
QUICK_WORLD = {"min_steps": 2, "max_steps": 8, "layers": 2, "updates": 60, "test_problems": 8}
QUICK_RUN = {"steps": 3, "prompts": 4, "samples": 8, "mini_batch": 8, "eval_every": 1, "eval_samples": 2, "generations": 100}
QUICK_VALUE = {"answers": 128, "short_passes": 0, "passes": 1}

LEARNING_RATES = {"vapo": 2e-4, "vc_ppo": 2e-4, "ppo": 2e-4, "grpo": 2e-4, "dapo": 2e-4}  # chosen by `--rows tuning --seeds 100`
TRIED = (1e-4, 2e-4, 4e-4, 8e-4)  # 8e-4 only where 4e-4 was the best of the other three

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
ROWS |= {f"alpha_{alpha:g}": (f"VAPO, α = {alpha:g}", {"alpha": alpha}) for alpha in (0.05, 0.1, 0.2, 1.0, 2.0)}
GROUPS["alpha"] = ["vapo", *(row for row in ROWS if row.startswith("alpha_"))]
ROWS |= {f"{preset}_lr_{lr:g}": (f"{preset}, lr {lr:g}", {"preset": preset, "lr": lr}) for preset in LEARNING_RATES for lr in TRIED}
GROUPS["tuning"] = [row for row in ROWS if "_lr_" in row]


@dataclass(frozen=True)
class Settings:
    rows: list[str] = field(default_factory=lambda: ["paper"], metadata={"help": f"rows, or groups of rows: {', '.join(GROUPS)}"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "seeds of every row"})
    out: str = flag("results", "directory for the table, the figures and raw/ (one file a finished run)")
    runs: str = flag("runs/ablate", "directory for the world, the critics and the runs")
    jobs: int = flag(0, "runs side by side, one core each; 0: as many as there are cores")
    quick: bool = flag(False, "small world, three short rollouts, seed 0, into RUNS/quick: a smoke test")


def run_flags(row, seed, runs, quick=False):
    """The flags of `train_vapo.py` for one row and seed: the world's, then RUN's, then the row's own."""
    _, own = ROWS[row]
    flags = RUN | {"lr": LEARNING_RATES["vapo"]} | (QUICK_RUN if quick else {}) | own
    preset = own.get("preset", "vapo")
    if preset in ("vapo", "vc_ppo") and own.get("value_pretraining", True):
        flags["critic"] = runs / "value" / "critic"
    elif preset not in ("grpo", "dapo"):
        flags["reward_model"] = runs / "reward_model" / "critic"
    flags |= {"seed": seed, "out": runs / f"{row}-{seed}"}
    return [f"@{runs}/world/train_vapo.args", *(f"--{name}={value}" for name, value in flags.items())]


def call(script, argv, log):
    """Runs a script of this directory on one core, its output into the file `log`. Raises: BadInput with its last line."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
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
    call("toy.py", [f"--{name}={value}" for name, value in flags.items()], f"{world}.log")
    flags = VALUE | (QUICK_VALUE if quick else {})
    flags = [f"@{world}/train_value.args", *(f"--{name}={value}" for name, value in flags.items())]
    answers = runs / "reward_model" / "answers.pt"
    for name, own in (
        ("reward_model", ["--objective=reward", "--short_passes=0"]),
        # From the policy's trunk, not from the reward model as in the paper: that one has unlearned to see slips (57% of
        # the best possible explained variance at most, where the policy's trunk gets further in fewer steps).
        ("value", [f"--reuse_answers={answers}"]),
    ):
        if not (runs / name / "critic").exists():
            print(f"fitting {name}: see {runs / name}.log", flush=True)
            call("train_value.py", [*flags, *own, f"--out={runs / name}"], f"{runs / name}.log")
        kept = out / "raw" / f"{name}.jsonl"
        before = plot.lines_of(kept)
        keep(runs / name, kept)
        if before and before != plot.lines_of(kept):
            print(f"warning: {name} came out otherwise than for the runs that are finished in {out}: another machine or version")
    if not (out / "positions.jsonl").exists():
        critics = [f"--before={runs}/reward_model/critic", f"--after={runs}/value/critic"]
        call("bias.py", [*critics, f"--answers={answers}", f"--out={out}/positions.jsonl"], f"{runs}/bias.log")


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
    argv = [f"--resume={run_dir}"] if (run_dir / "config.json").exists() else run_flags(row, seed, runs, quick)
    call("train_vapo.py", argv, f"{run_dir}.log")
    keep(run_dir, out / "raw" / f"{row}-{seed}.jsonl")


# --- from the files in OUT/raw to what they say ---

# Student's t, 97.5% quantile for 1, 2, 3 … degrees of freedom
T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101]


def mean_interval(numbers):
    """(mean, half width of its 95% interval): t · s / √n; the half is NaN for a single number."""
    mean = sum(numbers) / len(numbers)
    if len(numbers) < 2:
        return mean, math.nan
    variance = sum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1)
    t = T975[len(numbers) - 2] if len(numbers) - 2 < len(T975) else 2.0
    return mean, t * math.sqrt(variance / len(numbers))


def ranks(numbers):
    """Ranks from 1, ties share their mean."""
    return [sum(y < x for y in numbers) + (sum(y == x for y in numbers) + 1) / 2 for x in numbers]


def rank_correlation(xs, ys):
    """Spearman's ρ: the correlation of the ranks."""
    if len(xs) < 2:
        return math.nan
    pair = torch.tensor([ranks(xs), ranks(ys)], dtype=torch.float64)
    return torch.corrcoef(pair)[0, 1].item()


def read_raw(out):
    """{row: {seed: lines}} of the finished runs in OUT/raw."""
    runs = {}
    for path in sorted((Path(out) / "raw").glob("*-*.jsonl")):
        row, seed = path.stem.rsplit("-", 1)
        if row in ROWS and seed.isdigit():
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            runs.setdefault(row, {})[int(seed)] = [line for line in lines if "step" in line]
    return {row: runs[row] for row in ROWS if row in runs}


def curve(lines, name="test_accuracy"):
    """[(step, number)] where it was logged."""
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def mean_curve(by_seed, name="test_accuracy"):
    """[(step, mean over seeds)], at the steps that every seed has."""
    curves = [dict(curve(lines, name)) for lines in by_seed.values()]
    steps = sorted(set.intersection(*map(set, curves)))
    return [(step, sum(c[step] for c in curves) / len(curves)) for step in steps]


def last_quarter(points):
    """The numbers of a curve in the last quarter of its steps."""
    return [y for step, y in points if step >= 0.75 * points[-1][0]]


def summarise(runs):
    """{row: numbers} from `read_raw`: what the table says of each row."""
    best_dapo = max((y for _, y in mean_curve(runs["dapo"])), default=math.nan) if "dapo" in runs else math.nan
    summary = {}
    for row, by_seed in runs.items():
        finals = {seed: curve(lines)[-1][1] for seed, lines in by_seed.items()}
        mean, half = mean_interval(list(finals.values()))
        falls = []
        for lines in by_seed.values():  # below the best so far, not below a best to come
            points = curve(lines)
            falls += last_quarter([(step, max(best for _, best in points[: i + 1]) - y) for i, (step, y) in enumerate(points)])
        numbers = {"seeds": len(finals), "accuracy": mean, "half": half, "fall": max(falls)}
        shared = [seed for seed in finals if seed in runs.get("vapo", {})]
        if row != "vapo" and shared:
            vapo = {seed: curve(runs["vapo"][seed])[-1][1] for seed in shared}
            numbers["difference"], numbers["difference_half"] = mean_interval([finals[seed] - vapo[seed] for seed in shared])
        reached = [step for step, y in mean_curve(by_seed) if y >= best_dapo]
        per_rollout = by_seed[min(by_seed)][-1]["gradient_steps"] / by_seed[min(by_seed)][-1]["step"]
        numbers["steps_to_dapo"] = round(reached[0] * per_rollout) if reached else None
        numbers["answers"] = sum(lines[-1]["answers"] for lines in by_seed.values()) / len(by_seed)
        seconds = [sum(y for line in lines for name, y in line.items() if name.startswith("seconds_")) for lines in by_seed.values()]
        numbers["minutes"] = sum(seconds) / len(seconds) / 60
        tails = [last_quarter(curve(lines, "accuracy")) for lines in by_seed.values()]
        numbers["training_accuracy"] = sum(sum(tail) / len(tail) for tail in tails) / len(tails)
        summary[row] = numbers
    return summary


def table(summary, rows):
    """The Markdown table of some rows."""
    lines = [
        "| | paper: AIME 2024 | here: accuracy | minus VAPO, paired | steps to DAPO's best | answers | minutes | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def pm(x, half):
        return f"{x:.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")

    for row in rows:
        n = summary[row]
        difference = pm(n["difference"], n["difference_half"]) if "difference" in n else ""
        lines.append(
            f"| {ROWS[row][0]} | {PAPER.get(row, '')} | {pm(n['accuracy'], n['half'])} | {difference} | {n['steps_to_dapo'] or '–'} | "
            f"{n['answers']:.0f} | {n['minutes']:.1f} | {n['seeds']} |"
        )
    return "\n".join(lines)


def findings(runs, summary, value):
    """What a reader of the paper would ask of the table, each with what came out; a list of lines. `value`: the lines of
    value pretraining."""
    lines = []
    pieces = [row for row in summary if row.startswith("no_") and "difference" in summary[row]]
    below = [row for row in pieces if summary[row]["difference"] < 0]
    surely = [row for row in below if summary[row]["difference"] + summary[row]["difference_half"] < 0]
    if pieces:
        lines.append(f"Without one piece, below VAPO: {len(below)} of {len(pieces)} rows; the 95% interval excludes 0: {len(surely)}.")
    shared = [row for row in PAPER if row in summary]
    if len(shared) > 2:
        rho = rank_correlation([PAPER[row] for row in shared], [summary[row]["accuracy"] for row in shared])
        lines.append(f"Rank correlation with the paper's table over {len(shared)} rows: {rho:.2f}.")
    if "vapo" in summary and "dapo" in summary:
        best = max(y for _, y in mean_curve(runs["dapo"]))
        ours, last = summary["vapo"]["steps_to_dapo"], summary["dapo"]["steps_to_dapo"]
        reached = f"VAPO reaches it after {ours}: {ours / last:.0%}" if ours else "VAPO never reaches it"
        lines.append(f"DAPO's best score, {best:.3f} (mean over seeds), comes after {last} gradient steps; {reached} (the paper: 60%).")
    if "vapo" in summary:
        lines.append(f"VAPO's largest fall below its best so far, in the last quarter of any seed: {summary['vapo']['fall']:.3f}.")
        through = [curve(lines_, "slip_auc") for lines_ in runs["vapo"].values()]
        if all(through):
            tails = [y for points in through for y in last_quarter(points)]
            lines.append(f"First-slip AUC of VAPO's critic in the last quarter of RL: {sum(tails) / len(tails):.2f}.")
    kept = [line for line in value if line.get("best_explained_variance")]
    if kept:
        line = min(kept, key=lambda line: line["value_loss"])
        share = line["explained_variance"] / line["best_explained_variance"]
        lines.append(
            f"The pretrained critic, on held-out problems: explained variance {line['explained_variance']:.3f}, {share:.0%} of the best "
            f"possible; first-slip AUC {line['slip_auc']:.2f}."
        )
    return lines


def provenance(out):
    """One line: how many runs, on which revisions, versions and machines."""
    configs = [json.loads(path.read_text().partition("\n")[0])["config"]["on"] for path in sorted((out / "raw").glob("*-*.jsonl"))]
    told = [
        f"{name} {', '.join(sorted({str(on.get(name, '?')) for on in configs}))}" for name in ("revision", "torch", "device", "threads")
    ]
    return f"{len(configs)} runs; {'; '.join(told)}."


def report(out):
    """OUT/README.md and the figures, from OUT/raw."""
    out = Path(out)
    runs = read_raw(out)
    if not runs:
        return
    summary = summarise(runs)
    text = ["# Results", "", "Written by `python ablate.py` from the files in raw/.", "", provenance(out), ""]
    text += ["Accuracy: held-out problems, T = 1, after the last rollout; mean over seeds ± 95% interval (Student's t).", ""]
    for group, title in (("paper", ""), ("alpha", "α of length-adaptive GAE"), ("tuning", "Learning rates")):
        rows = [row for row in GROUPS[group] if row in summary and (group == "paper" or row != "vapo" or "alpha_0.1" in summary)]
        if not rows or (group == "alpha" and len(rows) < 2):
            continue
        text += [f"## {title}", ""] if title else []
        if group == "tuning":
            text += ["Chosen by the accuracy of the training rollouts, mean of the last quarter (seed 100, which no table uses).", ""]
            text += ["| | training accuracy |", "|---|---|"]
            text += [f"| {ROWS[row][0]} | {summary[row]['training_accuracy']:.3f} |" for row in rows] + [""]
        else:
            text += [table(summary, rows), ""]
        if group == "paper":
            text += [f"- {line}" for line in findings(runs, summary, plot.lines_of(out / "raw" / "value.jsonl"))] + [""]
    for name, sentence in plot.ablation_figures(runs, summary, ROWS, PAPER, RUN["alpha"], out):
        text += [f"![{name}]({name})", "", sentence, ""]
    (out / "README.md").write_text("\n".join(text))


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
    waiting = [(row, seed) for seed in seeds for row in rows if not (out / "raw" / f"{row}-{seed}.jsonl").exists()]
    if waiting:
        prepare(runs, out, settings.quick)
    failed = []
    with ThreadPoolExecutor(settings.jobs or os.cpu_count()) as pool:
        jobs = {pool.submit(run, row, seed, runs, out, settings.quick): (row, seed) for row, seed in waiting}
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="runs", disable=not jobs):
            row, seed = jobs[job]
            try:
                job.result()
                tqdm.write(f"{row}, seed {seed}: {curve(read_raw(out)[row][seed])[-1][1]:.3f}")
            except BadInput as error:
                failed.append(str(error))
                tqdm.write(f"{row}, seed {seed}: {error}")
            report(out)
    report(out)
    print(f"\nthe table and the figures are in {out}/README.md")
    require(not failed, f"{len(failed)} runs failed: {'; '.join(failed)}")
    return summarise(read_raw(out))


if __name__ == "__main__":
    main()
