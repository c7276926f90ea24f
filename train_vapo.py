"""VAPO (arXiv 2504.05118): value-based PPO for long chains of thought with verifiable rewards.

    python train_vapo.py                                             # the embedded world, minutes on a laptop
    python train_vapo.py --model DIR --train FILE --test FILE        # any causal LM, any JSONL of problems
    python train_vapo.py --no_length_adaptive_gae                    # without one of the seven pieces
    python train_vapo.py --preset ppo                                # or vc_ppo, grpo, dapo: the rivals, as settings of it
    python train_vapo.py --eval_only --model DIR --test FILE --samples 32 --eval_top_p 0.7     # avg@k, pass@k, maj@k
    python train_vapo.py --resume runs/NAME                          # go on from the last checkpoint
    python train_vapo.py --plan --model NAME --gpus 64               # what a run would need, on paper

PPO with seven changes, each with a flag, and each in its place here or in ppo.py:
1. value pretraining     the critic starts from Monte-Carlo returns of the frozen policy     --no_value_pretraining
2. decoupled GAE         the critic's targets use λ = 1, the policy's advantages their own    --no_decoupled_gae
3. length-adaptive GAE   λ_policy = 1 − 1/(α l) for an answer of l tokens                     --no_length_adaptive_gae
4. token-level loss      every token of the mini-batch weighs the same                        --no_token_level_loss
5. clip-higher           the ratio may rise further (ε_high) than fall (ε_low)                --no_clip_higher
6. positive NLL          plus μ times the NLL of the correct answers                          --no_positive_nll
7. group sampling        few prompts, many samples each; off: as many prompts, one sample     --no_group_sampling
"""

import gc
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
from tqdm import tqdm

import checkpoint
import dapo
import distributed
import evaluate
import logprobs
import losses
import model
import plan
import ppo
import problems as problem_files
import rollout
import table
import toy
import train_value
import truth
from run import (
    Log,
    RunSettings,
    Stopped,
    compiler,
    describe,
    exit_on_bad_input,
    finishing_the_step,
    flag,
    parse_settings,
    pick_device,
    require,
    seeded_generator,
    stopping,
    to_argv,
    write_json,
)  # fmt: skip

# The rivals, each as what differs from VAPO. A flag given beside --preset counts more than the preset.
PRESETS = {
    "vapo": {},
    "vc_ppo": {  # arXiv 2503.01491: PPO with value pretraining and decoupled GAE, λ_policy fixed
        "length_adaptive_gae": False, "token_level_loss": False, "clip_higher": False, "positive_nll": False, "group_sampling": False,
    },
    "ppo": {  # arXiv 2504.05118 §5.1, "vanilla PPO": all seven off, the critic starts from a reward model
        "value_pretraining": False, "decoupled_gae": False, "length_adaptive_gae": False, "token_level_loss": False,
        "clip_higher": False, "positive_nll": False, "group_sampling": False, "reward_model": "fit",
    },
    "grpo": {"critic_free": True, "token_level_loss": False, "clip_higher": False, "positive_nll": False},  # arXiv 2402.03300, no KL
    "dapo": {"critic_free": True, "positive_nll": False, "dynamic_sampling": True, "overlong": 0.2},  # arXiv 2503.14476
}  # fmt: skip


LARGE_GAP = 0.2  # nats a token between the sampler's log-probs and the training's; rounding to bfloat16 made 0.04 of SmolLM2's

# What --resume may change: nothing of the mathematics.
MAY_CHANGE = ("resume", "steps", "eval_every", "save_every", "keep", "generations", "max_bad_steps", "micro_batch_tokens",
              "gradient_checkpointing", "cpu_offload", "rank_timeout", "tensor_parallel", "vllm_memory")  # fmt: skip


@dataclass(frozen=True)
class Settings(RunSettings):
    preset: Literal["vapo", "vc_ppo", "ppo", "grpo", "dapo"] = flag("vapo", "the algorithm: what it changes stands in PRESETS")
    test: str = flag("", "held-out problems, like --train")
    out: str = flag("", "run directory; empty: runs/vapo-DATE-TIME")
    resume: str = flag("", "go on with the run in this directory, as it is; of other flags only those that leave the mathematics as it was")
    critic: str = flag("", "start from this pretrained critic, as it is; empty: pretrain one (train_value.py)")
    reward_model: str = flag("", "the critic starts from this reward model; fit: from one fitted here; empty: from the policy's trunk")

    value_pretraining: bool = flag(True, "1: pretrain the critic; off: it starts as --critic or --reward_model says")
    decoupled_gae: bool = flag(True, "2: λ of its own for the critic's targets; off: they use the policy's")
    length_adaptive_gae: bool = flag(True, "3: λ_policy = 1 - 1/(alpha l); off: --lam_policy")
    token_level_loss: bool = flag(True, "4: every token weighs the same in the policy loss; off: every answer does")
    clip_higher: bool = flag(True, "5: clip the ratio at 1 + eps_high above; off: at 1 + eps_low")
    positive_nll: bool = flag(True, "6: add mu times the NLL of the correct answers")
    group_sampling: bool = flag(True, "7: prompts x samples; off: prompts*samples prompts with one sample each")

    steps: int = flag(30, "rollouts")
    prompts: int = flag(32, "prompts per rollout (the paper: 512)")
    samples: int = flag(16, "samples per prompt")
    mini_batch: int = flag(64, "answers per optimiser step (the paper: 512 of 8192)")
    lr: float = flag(1e-6, "AdamW learning rate of the policy, constant after the warm-up")
    critic_lr: float = flag(2e-6, "AdamW learning rate of the critic")
    warmup: int = flag(10, "optimiser steps of linear warm-up")
    max_bad_steps: int = flag(8, "stop after so many optimiser steps in a row whose loss or gradient is not finite; they are skipped")
    max_grad_norm: float = flag(1.0, "gradient clipping, of policy and critic each")
    alpha: float = flag(0.05, "α of length-adaptive GAE; the outcome reaches the first token with weight exp(-1/α)")
    lam_policy: float = flag(0.95, "λ of the policy's advantages without length-adaptive GAE")
    lam_critic: float = flag(1.0, "λ of the critic's targets")
    eps_low: float = flag(0.2, "lower clip range")
    eps_high: float = flag(0.28, "upper clip range")
    mu: float = flag(0.1, "weight of the positive-example NLL")
    value_clip: float = flag(0.0, "clip range of the value loss around the old values; 0: none")
    is_clip: float = flag(
        None,
        "cap of the importance weights that correct for the sampler's own log-probs; 0: no correction; default: 2 with --engine vllm, else 0",
    )
    whiten: bool = flag(False, "whiten the advantages over the rollout")

    critic_free: bool = flag(False, "no critic: one advantage an answer, relative to its group (GRPO, DAPO); pieces 1 to 3 have no part")
    dynamic_sampling: bool = flag(False, "replace the groups that are all right or all wrong by others (DAPO)")
    generations: int = flag(10, "dynamic sampling: most batches of answers for one rollout")
    overlong: float = flag(0.0, "soft overlong punishment over this last share of --response_length (DAPO: 0.2); 0: none")

    pretrain_answers: int = flag(4096, "value pretraining: answers sampled from the frozen policy")
    pretrain_lr: float = flag(2e-6, "value pretraining: learning rate")
    pretrain_passes: int = flag(10, "value pretraining: most passes over the answers")
    pretrain_short_passes: int = flag(0, "value pretraining: passes over the shorter half of the answers before those")
    pretrain_decay: bool = flag(False, "value pretraining: let the learning rate fall linearly to 0")
    pretrain_steps: int = flag(0, "value pretraining: most optimiser steps (the paper: 50); 0: no limit but the passes")

    eval_only: bool = flag(False, "train nothing: --samples answers to each problem of --test, the numbers, and a file with each problem's")
    eval_temperature: float = flag(1.0, "sampling temperature of evaluations")
    eval_top_p: float = flag(1.0, "evaluations sample from the most likely tokens of this probability (the paper: 0.7)")
    eval_every: int = flag(5, "rollouts between evaluations; 0: only before and after")
    eval_samples: int = flag(8, "samples per test problem in an evaluation")
    save_every: int = flag(5, "rollouts between checkpoints; 0: only at the end")
    keep: int = flag(2, "checkpoints to keep, the last ones")

    plan: bool = flag(False, "train nothing: memory and time of this run on --gpus GPUs, on paper (plan.py); reads only the model's config")
    gpus: int = flag(1, "--plan: how many GPUs")
    gpu_memory: float = flag(80.0, "--plan: GB of one GPU (10^9 bytes)")
    gpu_tflops: float = flag(989.0, "--plan: 10^12 operations a second of one GPU, as its maker states (H100 SXM, bfloat16, dense)")
    gpu_bandwidth: float = flag(3350.0, "--plan: GB a second between a GPU and its memory, as its maker states (H100 SXM)")

    def check(self):
        super().check(needs_train=not (self.eval_only or self.plan), planned=self.gpus if self.plan else 0)
        for name in (
            "prompts", "samples", "mini_batch", "pretrain_answers", "pretrain_passes", "eval_samples", "generations", "keep", "max_bad_steps",
            "gpus",
        ):  # fmt: skip
            require(getattr(self, name) >= 1, f"--{name} must be at least 1")
        for name in ("steps", "warmup", "mu", "value_clip", "eval_every", "save_every", "pretrain_steps", "pretrain_short_passes"):
            require(getattr(self, name) >= 0, f"--{name} must not be negative")
        for name in (
            "lr", "critic_lr", "pretrain_lr", "max_grad_norm", "alpha", "eps_high", "eval_temperature",
            "gpu_memory", "gpu_tflops", "gpu_bandwidth",
        ):  # fmt: skip
            require(getattr(self, name) > 0, f"--{name} must be positive")
        for name in ("lam_policy", "lam_critic", "overlong"):
            require(0 <= getattr(self, name) <= 1, f"--{name} must be between 0 and 1")
        require(self.is_clip is None or self.is_clip == 0 or self.is_clip >= 1, "--is_clip is 0 or at least 1")
        answers = self.prompts * self.samples
        smallest = answers // -(-answers // self.mini_batch)
        prompts = self.prompts if self.group_sampling else answers
        for rows, what in ((prompts, "--prompts"), (smallest, "answers in a mini-batch (--mini_batch)")):
            require(rows >= distributed.world(), f"{rows} {what} for {distributed.world()} processes: each needs one at least")
        require(0 < self.eps_low < 1, "--eps_low must be between 0 and 1")
        require(0 < self.eval_top_p <= 1, "--eval_top_p is a probability: above 0, at most 1")
        if self.critic_free:  # a switch that would change nothing is refused
            for name in ("critic", "reward_model", "value_clip", "whiten"):
                require(not getattr(self, name), f"--critic_free has no use for --{name}")
            for name in ("value_pretraining", "decoupled_gae", "length_adaptive_gae"):
                require(getattr(self, name), f"--critic_free has no use for --no_{name}: it has no part in it")
        if self.critic_free or self.dynamic_sampling:
            name = "--critic_free" if self.critic_free else "--dynamic_sampling"
            require(self.group_sampling and self.samples > 1, f"{name} compares the answers of a group: it needs --samples above 1")
        require(bool(self.test) or self.plan, 'give --test FILE: held-out problems, say a JSONL of {"problem": ..., "answer": ...}')


def train(settings, run_dir, policy, critic, tokenizer, problems, test_problems, log, state):
    """The run, from prompt to gradient. `state` is a checkpoint to go on from, or None.

    Returns: (before, after), the metrics of `evaluate.evaluate` on the test problems.
    """
    device = model.device_of(policy)
    wrap = compiler(settings, device)
    kernels = SimpleNamespace(
        logprobs=(wrap(logprobs.add_slice), wrap(logprobs.slice_gradient)),
        policy_loss=wrap(losses.policy_loss),
        value_loss=wrap(losses.value_loss),
    )
    learners = {}
    for name, network, lr in (("critic", critic, settings.critic_lr), ("policy", policy, settings.lr)):
        if network is None:
            continue
        optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.0, fused=True)
        warmup = max(1, settings.warmup)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
        learners |= {name: network, f"{name}_optimizer": optimizer, f"{name}_scheduler": scheduler}
    generators = {
        "order": seeded_generator(settings.seed, "data order"),
        "sample": seeded_generator(settings.seed, "sampling", device),
        "mini_batch": seeded_generator(settings.seed, "mini-batches"),
    }
    order = {"generator": generators["order"], "queue": []}
    sampler, verify = rollout.sampler_of(policy, settings), rollout.verifier_of(settings)
    # Piece 7, group sampling: few prompts with many samples each, or as many answers to as many prompts.
    prompts, samples = (settings.prompts, settings.samples) if settings.group_sampling else (settings.prompts * settings.samples, 1)

    def answers():
        """One batch of judged answers. The verifier's verdict is the reward; DAPO punishes length beside it."""
        asked = rollout.next_problems(problems, prompts, order)
        with model.at_work(sampler, device, settings.cpu_offload):
            rows = rollout.sample(
                sampler, tokenizer, [problems[i] for i in asked], samples, settings.response_length, settings.temperature,
                generators["sample"], settings.sample_rows, progress="sampling", engine=settings.engine,
            )  # fmt: skip
        rows["problem_B"] = torch.tensor(asked, device=device)[rows["problem_B"]]
        rollout.judge(rows, tokenizer, problems, verify, settings.reward_correct, settings.reward_wrong)
        if cache := round(settings.overlong * settings.response_length):
            rows["reward_B"] += dapo.overlong_punishment(rows["length_B"], settings.response_length, cache)
        return rows

    def tested(step):
        started = time.time()
        with model.at_work(sampler, device, settings.cpu_offload):
            metrics, rows, _ = evaluate.evaluate(
                sampler, tokenizer, test_problems, settings.eval_samples, settings, verify, progress=f"evaluation {step}"
            )
        log.samples(step, table.describe_samples(critic, tokenizer, test_problems, rows, settings.eval_samples))
        return metrics, {f"test_{name}": value for name, value in metrics.items()} | {"seconds_eval": time.time() - started}

    def save(step):
        rest = {"step": step, "queue": order["queue"], "sampled": sampled, "before": before, "after": after, "bad_steps": bad_steps}
        rest |= {f"{name}_generator": source.get_state() for name, source in generators.items()}
        checkpoint.save(run_dir, step, learners, rest, settings.keep)

    def stop_if_asked(step):
        if stopping():
            raise Stopped(f"rollout {step} of {settings.steps} is saved: python train_vapo.py --resume {run_dir} goes on")

    stop_if_asked(state[1]["step"] if state else 0)
    if state is None:
        first, sampled, bad_steps, (before, numbers) = 0, 0, 0, tested(0)
        after = before
        log.metrics(0, numbers)
        save(0)
    else:
        directory, rest = state
        checkpoint.restore(directory, rest, learners)
        rollout.refresh(sampler, policy)
        for name, source in generators.items():
            source.set_state(rest[f"{name}_generator"])
        order["queue"], first, sampled, bad_steps = rest["queue"], rest["step"], rest["sampled"], rest["bad_steps"]
        before, after = rest["before"], rest["after"]
    stop_if_asked(first)

    bar = tqdm(range(first + 1, settings.steps + 1), initial=first, total=settings.steps, desc=settings.preset, unit="rollout")
    for step in bar:
        clock = [time.time()]
        rows, drawn = rollout.refill(answers, prompts, samples, settings.generations if settings.dynamic_sampling else None)
        clock.append(time.time())
        # Pieces 2 and 3 make advantages and targets of the outcome on the last token.
        ppo.old_logprobs_and_values(policy, critic, rows, settings, kernels)
        ppo.compute_advantages(rows, settings)
        clock.append(time.time())

        # Several optimiser steps a rollout: the ratio moves away from 1. Pieces 4, 5 and 6 are in the losses.
        updates = []
        count = -(-len(rows["length_B"]) // settings.mini_batch)
        for index in torch.randperm(len(rows["length_B"]), generator=generators["mini_batch"]).tensor_split(count):
            batch = ppo.add_weights(table.take(rows, index.to(device)), settings)
            metrics = ppo.backward(policy, critic, batch, settings, kernels)
            names = ("critic", "policy") if critic else ("policy",)
            for name in names:
                metrics[f"{name}_grad_norm"] = distributed.clip_gradients(learners[name].parameters(), settings.max_grad_norm)
            bad_steps = 0 if (finite := all(map(math.isfinite, metrics.values()))) else bad_steps + 1
            if not finite:
                checkpoint.keep_bad_batch(run_dir, step, len(updates), batch, metrics, bad_steps, settings.max_bad_steps)
            for name in names:
                if finite:
                    learners[f"{name}_optimizer"].step()
                    learners[f"{name}_scheduler"].step()
                learners[f"{name}_optimizer"].zero_grad()
            updates.append(metrics | {"bad_steps": float(not finite)})
        rollout.refresh(sampler, policy)
        clock.append(time.time())

        sampled += drawn["answers"]
        numbers = table.rollout_metrics(rows) | drawn | {"answers": sampled}
        if numbers["sampler_gap"] > LARGE_GAP:
            tqdm.write(
                f"warning: rollout {step} was sampled from another distribution than is trained: sampler_gap {numbers['sampler_gap']:.2f}"
            )
        if critic and settings.world:  # the truth is known there
            numbers |= truth.score_critic(settings.world, problems, tokenizer, rows, rows["old_value_BT"])
        good = [update for update in updates if not update["bad_steps"]] or updates
        numbers |= {name: sum(update[name] for update in good) / len(good) for name in updates[0]}
        numbers |= {"ratio_max": max(update["ratio_max"] for update in good), "bad_steps": sum(update["bad_steps"] for update in updates)}
        seconds = [end - start for start, end in zip(clock, clock[1:])]
        numbers |= dict(zip(("seconds_sample", "seconds_score", "seconds_update"), seconds))
        tokens = int(rows["length_B"].sum())
        numbers["sample_tokens_per_second"], numbers["train_tokens_per_second"] = tokens / seconds[0], tokens / seconds[2]
        numbers["gradient_steps"] = learners["policy_scheduler"].last_epoch  # without those that were skipped
        bar.set_postfix(accuracy=f"{numbers['accuracy']:.2f}", length=f"{numbers['length']:.0f}")

        last = step == settings.steps
        if last or (settings.eval_every and step % settings.eval_every == 0):
            after, measured = tested(step)
            numbers |= measured
        log.metrics(step, numbers)
        stop = stopping()
        if last or stop or (settings.save_every and step % settings.save_every == 0):
            save(step)
        if stop and not last:
            raise Stopped(f"rollout {step} of {settings.steps} is saved: python train_vapo.py --resume {run_dir} goes on")
    return before, after


def starting_critic(settings, run_dir, policy):
    """The directory that the run's critic starts from; fits it first where the settings say so. Piece 1."""

    def fitted(name, **own):
        out = Path(run_dir) / name
        if not distributed.from_rank_0((out / "critic").exists()):  # a run that was stopped after it need not repeat it
            shared = {f.name: getattr(settings, f.name) for f in fields(RunSettings)}
            own |= {n.removeprefix("pretrain_"): v for n, v in asdict(settings).items() if n.startswith("pretrain_")}
            train_value.pretrain(train_value.Settings(**shared, **own, out=str(out)), policy)
            gc.collect()  # its critic: where that is shared out, its own hooks hold it
        return str(out / "critic")

    if settings.critic:
        return settings.critic
    reward_model, answers = settings.reward_model, ""
    if reward_model == "fit":
        reward_model = fitted("reward_model", objective="reward")
        answers = str(Path(run_dir) / "reward_model" / "answers.pt")
    if settings.value_pretraining:
        return fitted("value", init=reward_model, reuse_answers=answers)
    return reward_model or settings.model


def resolve(argv):
    """Flags → (settings, run directory, checkpoint or None). No --model: the embedded world, and what suits it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    settings = parse_settings(Settings, argv, __doc__)
    distributed.start(settings.rank_timeout)
    if settings.resume:
        run_dir = Path(settings.resume)
        require((run_dir / "config.json").is_file(), f"--resume {run_dir}: not a run directory (no config.json in it)")
        saved_argv = json.loads((run_dir / "config.json").read_text())["settings"]
        saved = asdict(parse_settings(Settings, saved_argv, __doc__))
        settings = parse_settings(Settings, saved_argv + argv, __doc__)
        changed = [name for name, value in asdict(settings).items() if value != saved[name]]
        changed = [name for name in changed if name not in MAY_CHANGE]
        require(not changed, f"--resume goes on with the run's own settings: --{' and --'.join(changed)} cannot change")
        return settings, run_dir, checkpoint.load(run_dir)
    with distributed.rank_0_first():
        world = [] if settings.model else [f"@{toy.build(toy.World())}/train_vapo.args"]
    preset = [f"--{name}={value}" for name, value in PRESETS[settings.preset].items()]
    settings = parse_settings(Settings, world + preset + argv, __doc__)
    run_dir = Path(
        settings.out or distributed.from_rank_0(time.strftime(f"runs/{'eval' if settings.eval_only else settings.preset}-%Y%m%d-%H%M%S"))
    )
    require(
        not distributed.from_rank_0((run_dir / "config.json").exists()),
        f"{run_dir} holds a run: --resume {run_dir} goes on with it, or give another --out",
    )
    return settings, run_dir, None


@exit_on_bad_input
def main(argv=None):
    """Runs the script; returns the final metrics: accuracy, greedy_accuracy, length and truncated on the test problems,
    each also as `before_…`, and run_dir."""
    started = time.time()
    settings, run_dir, state = resolve(argv)
    settings.check()
    if settings.plan:
        return plan.report(settings)
    device = pick_device(settings.device)
    require(device.type == "cuda" or not settings.cpu_offload, "--cpu_offload keeps a GPU's memory free: it is for CUDA")
    torch.manual_seed(settings.seed)
    tokenizer = model.load_tokenizer(settings.model, settings.trust_remote_code)
    files = (settings.test,) if settings.eval_only else (settings.train, settings.test)
    *data, test_problems = [problem_files.prompted_problems(path, tokenizer, settings) for path in files]
    if data and (twice := problem_files.repeated(test_problems, data[0])):
        print(f"warning: {twice} of the {len(test_problems)} test problems are training problems too")
    length = settings.prompt_length + settings.response_length
    for path in {settings.critic, settings.reward_model} - {"", "fit"}:  # before any long work
        model.require_critic(path, tokenizer, length, settings.trust_remote_code)
    policy = model.load_policy(settings.model, device, settings.dtype, length, settings.trust_remote_code)
    model.require_same_words(policy, tokenizer, settings.model)
    print(
        f"{'evaluation' if settings.eval_only else settings.preset}:",
        ", ".join(f"{name} {value}" for name, value in describe(device).items()),
    )
    if settings.eval_only:
        return evaluate.evaluate_only(settings, run_dir, model.ready(policy, device, settings), tokenizer, test_problems)
    if settings.mini_batch >= settings.prompts * settings.samples:
        print("warning: --mini_batch takes the whole rollout: with one update the ratio is always 1, and clipping does nothing")
    if not settings.resume:
        write_json(run_dir / "config.json", {"settings": to_argv(settings), "on": describe(device)})
    with finishing_the_step():
        policy, critic = model.ready(policy, device, settings), None
        if not settings.critic_free:
            start = starting_critic(settings, run_dir, policy)
            critic = model.load_critic(start, device, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code)
            critic = model.ready(critic, device, settings)
        log = Log(run_dir, after=state[1]["step"] if state else -1)
        before, after = train(settings, run_dir, policy, critic, tokenizer, data[0], test_problems, log, state)
    log.close()
    checkpoint.export(policy, tokenizer, run_dir / "policy")
    if critic:
        checkpoint.export(critic, tokenizer, run_dir / "critic")

    evaluate.print_before_and_after(before, after, len(test_problems), settings)
    print(f"\nrun directory: {run_dir}   ({time.time() - started:.0f} s)")
    return after | {f"before_{name}": value for name, value in before.items()} | {"run_dir": str(run_dir)}


if __name__ == "__main__":
    main()
