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

import toy
import train_vapo
from ablate import to_flags
from lab import bench, plan
from system import jobs, loading, run, settings
from system.settings import flag

# fmt: off
SMALL = {"steps": 2, "prompts": 8, "samples": 8, "mini_batch": 16, "pretrain_answers": 128,
         "pretrain_passes": 1, "eval_samples": 2}
QWEN = {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}  # 0.5B
TINY = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1}
WORTH_A_LOOK = ("test_accuracy", "sampler_gap", "importance", "ratio_max",
                "sample_tokens_per_second", "train_tokens_per_second")


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
    runs = {f"preset {name}": SMALL | {"preset": name} for name in train_vapo.PRESETS}
    runs["preset dapo"]["dynamic_sampling"] = 100
    runs |= {"compiled": SMALL | {"compile": True}, "eager": SMALL | {"compile": False}}
    runs |= {"FSDP2": SMALL, "bfloat16": SMALL | {"dtype": "bfloat16"}}
    runs["main command"] = SMALL if asked.quick else {}
    for name, own in runs.items():
        where = {"device": device.type, "out": out / name.replace(" ", "_")}
        found[name] = ("train_vapo.py", to_flags(own | where))
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
    full = torch.zeros(size, size, device=device)
    half = full.bfloat16()
    copied, product = (min(bench.seconds(function, device)[0] for _ in range(5))
                       for function in (full.clone, partial(torch.mm, half, half)))  # fmt: skip
    return {"bytes": 2 * full.nbytes / copied, "operations": 2 * size**3 / product}


def of_the_limit(flags, path, limits):
    """What share of the device's limit decoding and updates reach, by the bench's JSON in `path`.
    Bytes a token: weights / slots + keys and values of (P + T/2). Operations a token: 6 for each
    parameter of policy and critic, 8 with checkpointing; without attention's, without prompts'."""
    asked = settings.parse(plan.Settings, flags, "")
    s, lines = plan.shapes(asked), json.loads(path.read_text())["lines"]
    speed = {line["part"].partition(",")[0]: line["ours"] for line in lines}
    kept = s.token * (asked.prompt_length + asked.response_length / 2)
    moved = speed["sampling"] * (s.policy * s.size / s.slots + kept)
    work = speed["update"] * (6 + 2 * asked.gradient_checkpointing) * (s.policy + s.critic)
    return {"decoding, share of the device's bytes/s": moved / limits["bytes"],
            "update, share of its operations/s": work / limits["operations"]}  # fmt: skip


def memory(flags, device):
    """Gigabytes of the update that were planned for one GPU, and those that were alive."""
    asked, cuda = settings.parse(plan.Settings, flags, ""), device.type == "cuda"
    generator = run.seeded_generator(0, "first day", device)
    _sampler, *inputs = bench.scored(asked, generator)  # the copy stays, as in a run
    weights = sum(p.nbytes for network in inputs[:2] for p in network.parameters())
    torch.cuda.reset_peak_memory_stats() if cuda else None
    made = bench.peak_gigabytes(partial(bench.update, *inputs))
    alive = torch.cuda.max_memory_allocated() / 1e9 if cuda else made + weights / 1e9
    planned = sum(n for name, (*_, n) in plan.memory(asked).items() if "moments" not in name)
    return {"planned GB of the update": planned / 1e9, "measured": alive}


def ended(name, script, flags, out):
    """Runs one of `commands`; returns what is worth a look in the last line of a run's metrics."""
    jobs.call(script, flags, out / f"{name}.log")
    path = out / name.replace(" ", "_") / "metrics.jsonl"
    last = jobs.lines_of(path)[-1] if path.exists() else {}
    return {metric: last[metric] for metric in WORTH_A_LOOK if last}


@run.exit_on_bad_input
def main(argv=None):
    """Runs the script; returns the names of what failed."""
    asked = settings.parse(Settings, argv, __doc__)
    device, out, numbers = run.pick_device(asked.device), Path(asked.out), {}
    run.require(not out.exists(), f"{out} is there: remove it, or give another --out")
    out.mkdir(parents=True)
    large, on = large_model(asked, device, out), run.describe(device)
    tried = commands(asked, device, out, large)
    steps = {name: partial(ended, name, *command, out) for name, command in tried.items()}
    steps["memory against the plan"] = partial(memory, large, device)
    steps["limits"] = partial(device_limits, device, asked.quick)
    steps["shares"] = lambda: of_the_limit(large, out / "0.5B.json", numbers["limits"])
    for name, step in steps.items():
        print(f"{name} …", flush=True)
        started = time.time()
        try:
            found = step()
        except Exception as error:  # whatever it is: the day goes on
            found = {"failed": str(error).strip()[-500:] or type(error).__name__}
        numbers[name] = {"seconds": round(time.time() - started, 1)} | found
    run.write_json(out / "numbers.json", {"on": on, "steps": numbers})
    failed = [name for name, found in numbers.items() if "failed" in found]
    said = ", ".join(failed) or "nothing"
    page = f"# First day\n\n`{on}`\n\n| step | |\n|---|---|\n"
    for name, found in numbers.items():
        cells = (f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in found.items())
        page += f"| {name} | {', '.join(cells)} |\n"
    (out / "README.md").write_text(f"{page}\nFailed: {said}.\n")
    print(f"{out}/README.md\nfailed: {said}")
    return failed


if __name__ == "__main__":
    main()
