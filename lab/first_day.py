"""A GPU's first day: all that can be tried on one, unattended, in ten minutes.

    python -m lab.first_day                        # writes runs/first_day/README.md, numbers.json
    python -m lab.first_day --device cpu --quick   # the same in small

A step is a process of its own, or a function. What fails is noted, and the next one begins.
"""

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers

import model
import toy
import train_vapo
from ablate import to_flags
from lab import bench, plan
from lab.dryrun import Live
from system import jobs, loading, run, settings
from system.settings import flag

# fmt: off
SMALL = {"steps": 2, "prompts": 8, "samples": 8, "mini_batch": 16, "pretrain_answers": 128,
         "pretrain_passes": 1, "eval_samples": 2}
QWEN = {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}  # 0.5B
TINY = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1}


@dataclass(frozen=True)
class Settings(settings.Settings):
    out: str = flag("runs/first_day", "directory for the page, the numbers and what was run")
    device: str = flag("auto", "auto (cuda if there is one), cpu or cuda")
    quick: bool = flag(False, "all in small: its numbers mean nothing")
# fmt: on


def commands(asked, device, out, large):
    """{what is tried: (script, flags)}; large: the settings of the random model, as flags."""
    tests = ["tests/test_gae.py", "tests/test_losses.py"] if asked.quick else ["-k", device.type]
    found = {"tests on the device": ("pytest", ["-q", "--no-header", *tests])}
    runs = {f"preset {name}": {"preset": name} for name in train_vapo.PRESETS}
    runs["preset dapo"]["dynamic_sampling"] = 100
    runs |= {"compiled": {"compile": True}, "eager": {"compile": False}, "FSDP2": {}}
    runs |= {"bfloat16": {"dtype": "bfloat16"}, "main command": {}}
    for name, own in runs.items():
        own |= {} if name == "main command" and not asked.quick else SMALL
        own |= {"device": device.type, "out": out / name.replace(" ", "_")}
        found[name] = ("train_vapo.py", to_flags(own))
    each = max(1 + (device.type == "cpu"), torch.cuda.device_count())
    together = ["--standalone", f"--nproc_per_node={each}", "train_vapo.py"]
    found["FSDP2"] = ("torch.distributed.run", together + found["FSDP2"][1])
    for name, flags in {"toy": [f"--device={device.type}"], "0.5B": large}.items():
        own = ["--parts", "sampling", "update", f"--json={out}/{name}.json", "--repeats=2"]
        found[f"bench, {name}"] = ("lab.bench", [*flags, *own])
    return found


def large_model(asked, device, out):
    """Flags for a Qwen2 of half a billion random weights, with the embedded world's problems."""
    world = toy.defaults("train_vapo", "")
    tokenizer = loading.load_tokenizer(world["model"])
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
    config = transformers.Qwen2Config(**(TINY if asked.quick else QWEN) | ends)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    flags = world | {"model": out / "model", "device": device.type, "prompts": 16, "samples": 16,
                     "micro_batch_tokens": 16_384, "response_length": 512}  # fmt: skip
    small = {"prompts": 2, "samples": 4, "response_length": 16, "mini_batch": 4}
    return to_flags(flags | (small if asked.quick else {}))


def device_limits(device, quick):
    """Bytes and operations a second: a copy's, and those of a product of bfloat16 matrices."""
    size = 2**9 if quick else 2**13
    number, matrix = torch.zeros(size**2, device=device), torch.zeros(size, size, device=device)
    matrix = matrix.bfloat16()
    copied = min(bench.seconds(number.clone, device)[0] for _ in range(5))
    product = min(bench.seconds(partial(torch.mm, matrix, matrix), device)[0] for _ in range(5))
    return {"bytes": 2 * number.nbytes / copied, "operations": 2 * size**3 / product}


def of_the_limit(flags, path, limits):
    """What share of the device's limit decoding and updates reach, by the bench's JSON in `path`.
    Bytes a token: weights / slots + keys and values of (P + T/2); operations: `plan.step`."""
    asked = settings.parse(plan.Settings, flags, "")
    s, (work, _) = plan.shapes(asked), plan.step(asked)["updates"]
    lines = json.loads(path.read_text())["lines"]
    speed = {line["part"].partition(",")[0]: line["ours"] for line in lines}
    kept = s.token * (asked.prompt_length + asked.response_length / 2)
    moved = s.policy * s.size / s.slots + kept
    tokens = s.updates * s.updated * asked.response_length
    return {"decoding, share of the device's bytes/s": speed["sampling"] * moved / limits["bytes"],
            "update, share of its operations/s":
                speed["update"] * work / tokens / limits["operations"]}  # fmt: skip


def memory(flags, device):
    """Gigabytes of the update that were planned for one GPU, and those that were alive."""
    asked = settings.parse(plan.Settings, flags, "")
    policy, tokenizer, (problems,) = model.set_up(asked, [asked.train])
    generator, cuda = run.seeded_generator(0, "first day", device), device.type == "cuda"
    how = (loading.sampling_copy(policy), tokenizer, problems[: asked.prompts], asked, generator)
    inputs = bench.scored(policy, bench.sample(*how), asked)  # the copy stays, as in a run
    torch.cuda.reset_peak_memory_stats() if cuda else None
    with Live() as live:
        bench.update(*inputs)
    weights = sum(p.nbytes for network in inputs[:2] for p in network.parameters())
    alive = torch.cuda.max_memory_allocated() if cuda else live.peak + weights
    parts = plan.memory(asked)
    planned = sum(update for name, (*_, update) in parts.items() if "moments" not in name)
    return {"planned GB of the update": planned / 1e9, "measured": alive / 1e9}


def attempt(name, function, numbers):
    """Runs function() and notes seconds, and what it returned or what went wrong."""
    started, found = time.time(), {}
    print(f"{name} …", flush=True)
    try:
        found = function() or {}
    except Exception as error:  # whatever it is: the day goes on
        found = {"failed": str(error).strip()[-500:] or type(error).__name__}
    numbers[name] = {"seconds": round(time.time() - started, 1)} | found


def last_metrics(directory):
    """What is worth a look in the last line of a run's metrics."""
    line = jobs.lines_of(directory / "metrics.jsonl")[-1]
    names = ("test_accuracy", "sampler_gap", "importance", "ratio_max")
    names += ("sample_tokens_per_second", "train_tokens_per_second")
    return {name: line[name] for name in names}


@run.exit_on_bad_input
def main(argv=None):
    """Runs the script; returns the names of what failed."""
    asked = settings.parse(Settings, argv, __doc__)
    device, out, numbers = run.pick_device(asked.device), Path(asked.out), {}
    run.require(not out.exists(), f"{out} is there: remove it, or give another --out")
    out.mkdir(parents=True)
    large = large_model(asked, device, out)
    for name, (script, flags) in commands(asked, device, out, large).items():

        def call(name=name, script=script, flags=flags):
            jobs.call(script, flags, out / f"{name}.log")
            directory = out / name.replace(" ", "_")
            return last_metrics(directory) if directory.is_dir() else {}

        attempt(name, call, numbers)
    attempt("memory against the plan", partial(memory, large, device), numbers)
    attempt("limits", partial(device_limits, device, asked.quick), numbers)
    attempt("shares", lambda: of_the_limit(large, out / "0.5B.json", numbers["limits"]), numbers)
    failed = [name for name, found in numbers.items() if "failed" in found]
    run.write_json(out / "numbers.json", {"on": run.describe(device), "steps": numbers})
    rows = [f"| {name} | " + ", ".join(f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}"
            for n, v in found.items()) + " |" for name, found in numbers.items()]  # fmt: skip
    page = ["# First day", f"`{run.describe(device)}`"]
    page += ["\n".join(["| step | |", "|---|---|", *rows])]
    page += [f"Failed: {', '.join(failed) or 'nothing'}."]
    (out / "README.md").write_text("\n\n".join(page) + "\n")
    print(f"{out}/README.md\nfailed: {', '.join(failed) or 'nothing'}")
    return failed


if __name__ == "__main__":
    main()
