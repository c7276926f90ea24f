"""Value pretraining, and reward models: fits a critic to the outcomes of a frozen policy's answers.

    python train_value.py                                              # in the embedded world
    python train_value.py --model DIR --train FILE --out runs/value    # any causal LM, any JSONL of problems
    python train_value.py --objective reward --out runs/reward         # a reward model, when there is none …
    python train_value.py --init runs/reward/critic --reuse_answers runs/reward/answers.pt   # … and pretraining from it

1. Answers are sampled once from the frozen policy, judged by the verifier, and stored.
2. The critic is fitted to them offline, several passes, on nine problems of ten. `value`: V at every token is regressed
   on the Monte-Carlo return, which is the outcome (arXiv 2503.01491; arXiv 2504.05118 §4.1). `reward`: the score after
   the last token only, which is what a reward model learns, and why it is wrong about unfinished answers.
   Short answers first (--short_passes): the cheapest way to a critic that sees mistakes.
3. After each pass it is measured on the answers to the other problems. It stops at --target_explained_variance, when
   the held-out loss has not fallen for --patience passes (overfitting is real), or at --steps; the best pass is kept.
"""

import copy
import gc
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import checkpoint
import distributed
import losses
import model
import problems as problem_files
import rollout
import table
import toy
import truth
from gae import explained_variance
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

WARMUP = 10  # optimiser steps


@dataclass(frozen=True)
class Settings(RunSettings):
    out: str = flag("", "directory for answers.pt, metrics.jsonl, tb/ and critic/; empty: runs/value-DATE-TIME")
    objective: Literal["value", "reward"] = flag("value", "value: the outcome at every token; reward: after the last only")
    init: str = flag("", "start from this reward model, critic or policy directory; empty: from the policy in --model")
    answers: int = flag(4096, "answers to sample from the frozen policy")
    samples: int = flag(8, "answers per problem")
    reuse_answers: str = flag("", "answers.pt of an earlier run on the same problems, instead of sampling")
    held_out: float = flag(0.1, "share of the problems whose answers are only measured on")
    lr: float = flag(2e-6, "AdamW learning rate, constant after a warm-up of 10 steps")
    decay: bool = flag(False, "let the learning rate fall linearly to 0 over all the passes instead")
    batch: int = flag(64, "answers per optimiser step")
    passes: int = flag(10, "most passes over the answers")
    short_passes: int = flag(0, "passes over the shorter half of the answers before those; cheap, and a mistake is near its outcome there")
    steps: int = flag(0, "most optimiser steps; 0: no limit but --passes")
    patience: int = flag(3, "passes without a lower held-out loss before it stops")
    target_explained_variance: float = flag(1.0, "stop once the held-out explained variance is this high")
    max_grad_norm: float = flag(1.0, "gradient clipping")

    def check(self):
        super().check()
        for name in ("answers", "samples", "batch", "passes", "patience"):
            require(getattr(self, name) >= 1, f"--{name} must be at least 1")
        require(self.steps >= 0 and self.short_passes >= 0, "--steps and --short_passes must not be negative")
        groups = -(-self.answers // self.samples)
        require(
            groups >= distributed.world(), f"--answers / --samples: {groups} problems for {distributed.world()} processes: each needs one"
        )
        require(0 < self.held_out < 1, "--held_out is a share: above 0, below 1")
        require(self.lr > 0 and self.max_grad_norm > 0, "--lr and --max_grad_norm must be positive")
        require(self.target_explained_variance <= 1, "--target_explained_variance is at most 1")


def mathematics(argv):
    """{flag: value}, but for those that change only memory and patience; its own files by their way from --out, which may have moved."""
    other = ("out", "micro_batch_tokens", "gradient_checkpointing", "cpu_offload", "rank_timeout", "tensor_parallel", "vllm_memory")
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in argv)
    for name in ("init", "reuse_answers"):
        flags[name] = flags[name] and os.path.relpath(flags[name], flags["out"])
    return {name: value for name, value in flags.items() if name not in other}


def fingerprint(policy, problems):
    """Tells one policy and list of problems from another: a hash of one number of every weight, and of all the texts."""
    if distributed.rank():  # the first numbers are rank 0's
        return distributed.from_rank_0(None)
    firsts = torch.stack([distributed.local(weight).detach().flatten()[0].float().cpu() for weight in policy.parameters()])
    texts = json.dumps([[problem["problem"], problem["answer"]] for problem in problems])
    return distributed.from_rank_0(hashlib.sha256(firsts.numpy().tobytes() + texts.encode()).hexdigest()[:16])


def sampled_answers(settings, out, policy, tokenizer, problems, mark):
    """Judged rows from the frozen policy; stored, so that a second run on them samples nothing. mark: the `fingerprint`."""
    device = model.device_of(policy)
    path = Path(settings.reuse_answers or out / "answers.pt")
    # What the answers depend on: those of another policy, file, temperature … must not be used in silence.
    names = [
        "prompt_template", "chat_template", "response_length", "temperature", "verifier", "bare_number", "reward_correct", "reward_wrong",
    ]  # fmt: skip
    names += [] if settings.reuse_answers else ["seed", "answers", "samples"]
    source = {name: getattr(settings, name) for name in names} | {"policy or problems": mark}
    if distributed.from_rank_0(path.exists()):
        stored = checkpoint.read(path)
        differ = [name for name in source if stored["source"].get(name) != source[name]]
        require(not differ, f"{path} holds answers with another {', '.join(differ)}: give another --out or remove the file")
        return {name: column.to(device) for name, column in stored["rows"].items()}
    require(not settings.reuse_answers, f"no stored answers at {path}")
    order = seeded_generator(settings.seed, "pretraining problems")
    groups = -(-settings.answers // settings.samples)
    passes = -(-groups // len(problems))  # a short file is asked several times
    chosen = torch.cat([torch.randperm(len(problems), generator=order) for _ in range(passes)])[:groups]
    rows = rollout.sample(
        rollout.sampler_of(policy, settings), tokenizer, [problems[i] for i in chosen.tolist()], settings.samples, settings.response_length,
        settings.temperature,
        seeded_generator(settings.seed, "pretraining answers", device), settings.sample_rows, progress="value: sampling",
        engine=settings.engine,
    )  # fmt: skip
    rows["problem_B"] = chosen.to(device)[rows["problem_B"]]
    rollout.judge(rows, tokenizer, problems, rollout.verifier_of(settings), settings.reward_correct, settings.reward_wrong)
    checkpoint.write(path, {"source": source, "rows": rows})
    return rows


def split_by_problem(rows, share, seed):
    """(rows to fit, held-out rows). By problem, not by answer: two answers to one problem share too much."""
    asked = rows["problem_B"].unique()
    require(len(asked) > 1, "value pretraining needs answers to at least 2 problems, one of them held out: raise --answers or add problems")
    held = asked[torch.randperm(len(asked), generator=seeded_generator(seed, "held-out problems")).to(asked.device)]
    held = held[: min(len(asked) - 1, max(1, round(share * len(asked))))]
    is_held_B = torch.isin(rows["problem_B"], held)
    return table.take(rows, (~is_held_B).nonzero()[:, 0]), table.take(rows, is_held_B.nonzero()[:, 0])


def objective_columns(rows, objective):
    """(target_BT, mask_BT, shift): what V is fitted to, where, and whether it is read before (0) or after (1) a token."""
    mask_BT = table.response_mask(rows)
    target_BT = rows["reward_B"][:, None] * mask_BT
    if objective == "value":
        return target_BT, mask_BT, 0
    last_BT = mask_BT * (torch.arange(mask_BT.shape[1], device=mask_BT.device) == rows["length_B"][:, None] - 1)
    return target_BT, last_BT, 1


@torch.no_grad()
def measure(critic, rows, objective, micro_batch_tokens):
    """Returns: (loss and explained variance under the objective, V at the first and last token; value_BT, as a critic's)."""
    target_BT, mask_BT, shift = objective_columns(rows, objective)
    value_BT = table.values(critic, rows, micro_batch_tokens)
    fitted_BT = table.values(critic, rows, micro_batch_tokens, shift) if shift else value_BT
    weight_BT = losses.token_weights(mask_BT, "token")
    last_B1 = rows["length_B"][:, None] - 1
    return {
        "value_loss": (losses.value_loss(fitted_BT, target_BT) * weight_BT).sum().item(),
        "explained_variance": explained_variance(fitted_BT, target_BT, mask_BT).item(),
        "value_first": value_BT[:, 0].mean().item(),
        "value_last": value_BT.gather(1, last_B1).mean().item(),
    }, value_BT


def fit(settings, out, critic, rows, held_out_rows, score, log, state):
    """Offline passes over the rows. `score`: value_BT of the held-out rows → numbers to log beside each measurement; `state`: a
    checkpoint to go on from, or None. There is one after each pass.

    Returns: (metrics of the kept pass, its optimiser step); the critic has the weights of that pass.
    """
    optimizer = torch.optim.AdamW(critic.parameters(), lr=settings.lr, weight_decay=0.0, fused=True)
    device = model.device_of(critic)
    value_loss = compiler(settings, device)(losses.value_loss)
    order = seeded_generator(settings.seed, "pretraining mini-batches")
    everything_N = torch.arange(len(rows["length_B"]), device=device)
    short_N = rows["length_B"].sort(stable=True).indices[: -(-len(everything_N) // 2)]
    passes = [short_N] * settings.short_passes + [everything_N] * settings.passes
    limit = sum(-(-len(index_N) // settings.batch) for index_N in passes)
    limit = min(limit, settings.steps or limit)

    def rate(step):
        return min(1.0, (step + 1) / WARMUP) * (1 - step / limit if settings.decay else 1.0)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    step, worse = 0, 0

    def measured(numbers):
        """Reports a pass; returns its metrics, its step and the critic's weights."""
        held_out, value_BT = measure(critic, held_out_rows, settings.objective, settings.micro_batch_tokens)
        held_out |= score(value_BT)
        report(log, step, numbers | held_out)
        return {"held_out": held_out, "step": step, "weights": copy.deepcopy(critic.state_dict())}

    learners = {"critic": critic, "optimizer": optimizer, "scheduler": scheduler}
    if state is None:
        first, skipped, done, best = 0, 0, False, measured({})
    else:
        directory, rest = state
        first, skipped, step, worse, done, best = (rest[name] for name in ("passes", "in_pass", "step", "worse", "done", "best"))
        best["weights"] = copy.deepcopy(critic.state_dict())
        checkpoint.restore(directory, rest, learners | {"best_weights": best["weights"]})
        order.set_state(rest["order"])

    def save(passes, in_pass, order_state):
        rest = {"passes": passes, "in_pass": in_pass, "order": order_state, "step": step, "worse": worse, "done": done}
        rest |= {"best": {"held_out": best["held_out"], "step": best["step"]}, "settings": to_argv(settings)}
        checkpoint.save(out, step, learners | {"best_weights": best["weights"]}, rest, keep=1)

    def stop_if_asked(*where):
        if stopping():
            save(*where)
            raise stopped(out, step)

    bar = tqdm(total=limit, initial=step, desc="value: fitting", unit="step", leave=False)
    for number, pass_N in list(enumerate(passes))[first:]:
        if step == limit or worse == settings.patience or done:
            break
        order_state = order.get_state()
        shuffled_N = pass_N[torch.randperm(len(pass_N), generator=order).to(pass_N.device)]
        batches = list(shuffled_N.split(settings.batch))
        if len(batches[-1]) < distributed.world():  # each process needs a row
            batches[-2:] = [torch.cat(batches[-2:])]
        batches = batches[: limit - step + skipped]
        numbers = {}  # of the pass's last step; after a stop there may be none left of it, on more processes
        for done_in_pass, index_N in list(enumerate(batches, 1))[skipped:]:
            batch = table.take(rows, index_N)
            target_BT, mask_BT, shift = objective_columns(batch, settings.objective)
            weight_BT = losses.token_weights(mask_BT, "token")  # over the whole batch, before it is split
            total = 0.0
            for micro in distributed.deal(table.micro_batches(batch, settings.micro_batch_tokens)):
                value_BT = model.critic_values(critic, table.take(batch, micro), shift)
                width = value_BT.shape[1]
                loss = (value_loss(value_BT, target_BT[micro, :width]) * weight_BT[micro, :width]).sum()
                loss.backward()
                total += loss.item()
            numbers = distributed.add_numbers({"train_value_loss": total})
            numbers["value_grad_norm"] = distributed.clip_gradients(critic.parameters(), settings.max_grad_norm)
            finite = all(map(math.isfinite, numbers.values()))
            require(finite, f"value pretraining, step {step + 1}: loss or gradient is not finite {numbers}: lower --lr (--pretrain_lr)")
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
            if index_N is not batches[-1]:
                log.metrics(step, numbers)
                stop_if_asked(number, done_in_pass, order_state)
        skipped = 0
        now = measured(numbers)
        if now["held_out"]["value_loss"] < best["held_out"]["value_loss"]:
            best, worse = now, 0
        elif number >= settings.short_passes:  # the short answers alone are not meant to be enough
            worse += 1
        done = now["held_out"]["explained_variance"] >= settings.target_explained_variance
        stop_if_asked(number + 1, 0, order.get_state())
        save(number + 1, 0, order.get_state())
    bar.close()
    critic.load_state_dict(best["weights"])
    return best["held_out"], best["step"]


def stopped(out, step=0):
    """The exception that says how to go on."""
    done = f"step {step} of it is saved" if (out / "answers.pt").exists() else "nothing of it is done yet"
    return Stopped(f"value pretraining in {out}: {done}; the same command with --out {out}, or --resume of the run, goes on")


def report(log, step, numbers):
    """One line in the log and on the screen for a measurement on held-out problems."""
    log.metrics(step, numbers)
    possible = f" of {numbers['best_explained_variance']:.3f} possible" if "best_explained_variance" in numbers else ""
    slips = f"   first-slip AUC {numbers['slip_auc']:.3f}" if "slip_auc" in numbers else ""
    tqdm.write(
        f"value: step {step:4d}   held-out loss {numbers['value_loss']:.4f}   explained variance {numbers['explained_variance']:6.3f}"
        f"{possible}{slips}   V first token {numbers['value_first']:.3f}, last {numbers['value_last']:.3f}"
    )


def pretrain(settings, policy=None):
    """Value pretraining, or the fit of a reward model, from the answers to the critic's directory.

    Args: policy, as `model.ready` returns it, where the caller has it already.
    Returns: the kept critic's held-out metrics, its directory and, where known, the best possible. Raises: BadInput, Stopped.
    """
    started = time.time()
    settings.check()
    device = pick_device(settings.device)
    require(device.type == "cuda" or not settings.cpu_offload, "--cpu_offload keeps a GPU's memory free: it is for CUDA")
    torch.manual_seed(settings.seed)
    out = Path(settings.out or distributed.from_rank_0(time.strftime("runs/value-%Y%m%d-%H%M%S")))
    require(not distributed.from_rank_0((out / "critic").exists()), f"{out} holds a critic already: give another --out")
    tokenizer = model.load_tokenizer(settings.model, settings.trust_remote_code)
    if settings.init:
        model.require_critic(settings.init, tokenizer, settings.prompt_length + settings.response_length, settings.trust_remote_code)
    problems = problem_files.prompted_problems(settings.train, tokenizer, settings)
    length = settings.prompt_length + settings.response_length
    if policy is None:
        policy = model.load_policy(settings.model, device, settings.dtype, length, settings.trust_remote_code)
        model.require_same_words(policy, tokenizer, settings.model)
        policy = model.ready(policy, device, settings)
    if stopping():
        raise stopped(out)
    rows = sampled_answers(settings, out, policy, tokenizer, problems, fingerprint(policy, problems))
    if stopping():
        raise stopped(out)
    del policy
    gc.collect()  # where it is shared out, its own hooks hold it
    fit_rows, held_out_rows = split_by_problem(rows, settings.held_out, settings.seed)
    fewest = min(len(part["length_B"]) for part in (fit_rows, held_out_rows))
    require(fewest >= distributed.world(), f"{fewest} answers to fit or hold out for {distributed.world()} processes: raise --answers")
    known = {}
    if settings.world and settings.objective == "value":  # the truth is known there: what could any critic explain?
        target_BT, mask_BT, _ = objective_columns(held_out_rows, "value")
        best_BT = truth.best_values(settings.world, problems, tokenizer, fit_rows, held_out_rows).to(device)
        known["best_explained_variance"] = explained_variance(best_BT, target_BT, mask_BT).item()

    def score(value_BT):
        if not settings.world:
            return {}
        drops = truth.step_drops(settings.world, problems, tokenizer, held_out_rows, value_BT)
        return known | {"slip_auc": truth.auc(*drops)}

    mean_reward = fit_rows["reward_B"].mean().item()
    critic = model.load_critic(settings.init or settings.model, device, mean_reward, settings.dtype, settings.trust_remote_code)
    critic = model.ready(critic, device, settings)
    state = checkpoint.load(out)
    require(
        not state or mathematics(state[1]["settings"]) == mathematics(to_argv(settings)),
        f"{out} holds value pretraining that was stopped, with other settings: give another --out, or remove it",
    )
    log = Log(out, after=state[1]["step"] if state else -1)
    write_json(out / "config.json", {"settings": to_argv(settings), "on": describe(device)})
    metrics, step = fit(settings, out, critic, fit_rows, held_out_rows, score, log, state)
    critic_dir = out / "critic"
    checkpoint.export(critic, tokenizer, critic_dir)
    checkpoint.remove(out)
    log.close()
    print(
        f"value: kept step {step}, explained variance {metrics['explained_variance']:.3f}, in {critic_dir} ({time.time() - started:.0f} s)"
    )
    return metrics | {"step": step, "critic": str(critic_dir), "seconds": time.time() - started}


@exit_on_bad_input
def main(argv=None):
    """Runs the script; returns what `pretrain` does."""
    settings = parse_settings(Settings, argv, __doc__)
    distributed.start(settings.rank_timeout)
    if not settings.model:
        with distributed.rank_0_first():
            world = toy.build(toy.World())
        settings = parse_settings(Settings, [f"@{world}/train_value.args", *(sys.argv[1:] if argv is None else argv)], __doc__)
    with finishing_the_step():
        return pretrain(settings)


if __name__ == "__main__":
    main()
