"""Value pretraining, and reward models: fits a critic to the outcomes of a frozen policy's answers.

    python train_value.py                                              # in the embedded world
    python train_value.py --model DIR --train FILE --out runs/value    # any causal LM, any problems
    python train_value.py --objective reward --out runs/reward         # a reward model
    python train_value.py --init runs/reward/critic --reuse_answers runs/reward/answers.pt

VAPO's piece 1 (arXiv 2504.05118 §4.1; arXiv 2503.01491):
1. Answers are sampled once from the frozen policy, judged by the verifier, and stored.
2. The critic is fitted to them in passes, on nine problems of ten. `value`: V at every token is
   regressed on the Monte-Carlo return, which is the outcome. `reward`: the score after the last
   token only, as a reward model learns it, which is why that is wrong about unfinished answers.
3. After each pass it is measured on the other problems. It stops when the held-out loss has not
   fallen for --patience passes; the best is kept.
"""

import gc
import time
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import losses
import model
import rollout
import table
import toy
from gae import explained_variance
from system import checkpoint, distributed, loading, reward, run, settings as flags
from system.learner import Learner, step_or_skip
from system.run import require, seeded_generator
from system.settings import AT_LEAST_1, INSIDE_SHARE, NOT_NEGATIVE, POSITIVE, flag

WARMUP = 10  # optimiser steps


# fmt: off
@dataclass(frozen=True)
class Settings(flags.TrainingSettings):
    out: str = flag("", "directory to write into; empty: runs/value-DATE-TIME", may_change=True)
    objective: Literal["value", "reward"] = flag(
        "value", "value: the outcome at every token; reward: after the last only")
    init: str = flag("", "start from this reward model, critic or policy; empty: from --model")
    answers: int = flag(4096, "answers to sample from the frozen policy", AT_LEAST_1)
    samples: int = flag(8, "answers per problem", AT_LEAST_1)
    reuse_answers: str = flag("", "answers.pt of another run on the same problems, to use")
    held_out: float = flag(0.1, "share of the problems that is only measured on", INSIDE_SHARE)
    lr: float = flag(2e-6, "AdamW learning rate, constant after a warm-up of 10 steps", POSITIVE)
    decay: bool = flag(False, "let the learning rate fall linearly to 0 over all the passes")
    batch: int = flag(64, "answers per optimiser step", AT_LEAST_1)
    passes: int = flag(10, "most passes over the answers", AT_LEAST_1)
    short_passes: int = flag(0, "passes over the shorter half before those", NOT_NEGATIVE)
    patience: int = flag(3, "passes without a lower held-out loss before it stops", AT_LEAST_1)
    max_grad_norm: float = flag(1.0, "gradient clipping", POSITIVE)

    def check(self):
        super().check()
        groups, processes = -(-self.answers // self.samples), distributed.world()
        for count, what in ((groups, "--answers / --samples"), (self.batch, "--batch")):
            said = f"{what} is {count} for {processes} processes: each needs one at least"
            require(count >= processes, said)
# fmt: on


def value_gradients(critic, batch, settings, shift=0):
    """Adds the gradients of Σ weight · ½ (V − target)² over a mini-batch.
    Args: batch, rows with target_BT and critic_weight_BT; shift, 0 for V before each token, 1 for
        the score after it.
    Returns: the loss, this rank's part of it."""
    value_loss = run.kernel(losses.value_loss, settings.compile, critic.device)
    total = 0.0
    for index in distributed.deal(table.micro_batches(batch, settings.micro_batch_tokens)):
        micro = table.take(batch, index, critic.device)
        value_BT = model.critic_values(critic, micro, shift)
        loss_BT = value_loss(value_BT, micro["target_BT"])
        loss = (loss_BT * micro["critic_weight_BT"]).sum()
        loss.backward()
        total += loss.item()
    return total


def objective_columns(rows, objective):
    """(target_BT, mask_BT, shift): what V is fitted to, the return target_t = R, where, and whether
    V is read before (0) or after (1) a token."""
    mask_BT = table.response_mask(rows)
    target_BT = rows["reward_B"][:, None] * mask_BT  # piece 1: the outcome, at every token
    if objective == "value":
        return target_BT, mask_BT, 0
    t_T = torch.arange(mask_BT.shape[1])
    return target_BT, mask_BT * (t_T == rows["length_B"][:, None] - 1), 1


@torch.no_grad()
def measure(critic, rows, objective, micro_batch_tokens):
    """({loss and explained variance of the objective, V at the first and last token}, value_BT)."""
    target_BT, mask_BT, shift = objective_columns(rows, objective)
    weight_BT, last_B1 = losses.token_weights(mask_BT, "token"), rows["length_B"][:, None] - 1
    fitted_BT = value_BT = model.all_values(critic, rows, micro_batch_tokens)
    if shift:
        fitted_BT = model.all_values(critic, rows, micro_batch_tokens, shift)
    return {
        "value_loss": (losses.value_loss(fitted_BT, target_BT) * weight_BT).sum().item(),
        "explained_variance": explained_variance(fitted_BT, target_BT, mask_BT).item(),
        "value_first": value_BT[:, 0].mean().item(),
        "value_last": value_BT.gather(1, last_B1).mean().item(),
    }, value_BT


def fit(settings, out, critic, tokenizer, rows, held_out_rows, truth):
    """Offline passes over the rows; goes on after the last pass that is saved in `out`.
    Args: truth, a function value_BT of the held-out rows → numbers to log.
    Returns: (metrics of the best pass, its optimiser step); its critic is OUT/best."""
    index_N = torch.arange(len(rows["length_B"]))
    short_N = rows["length_B"].sort(stable=True).indices[: -(-len(index_N) // 2)]
    passes = [short_N] * settings.short_passes + [index_N] * settings.passes
    limit = sum(-(-len(pass_N) // settings.batch) for pass_N in passes)

    def rate(step):
        return min(1.0, (step + 1) / WARMUP) * (1 - step / limit if settings.decay else 1.0)

    schedule = partial(LambdaLR, lr_lambda=rate)
    learner = Learner(critic, settings.lr, settings.max_grad_norm, schedule)
    generators = {"order": seeded_generator(settings.seed, "pretraining mini-batches")}
    progress = checkpoint.resume(out, {"critic": learner}, generators)
    log = run.Log(out, after=progress["step"] if progress else -1)
    progress = progress or {"step": 0, "passes": -1, "worse": 0, "best": None}
    bar = tqdm(total=limit, initial=progress["step"], desc="value: fitting", unit="step",
               disable=distributed.rank() > 0)  # fmt: skip

    def keep_best():  # after the save, so best/ is never of a pass that is not saved
        if progress["best"] and progress["best_step"] == progress["step"]:
            checkpoint.export(critic, tokenizer, out / "best")

    keep_best()  # a kill may have come between
    # Pass 0 fits nothing: the critic is measured as it starts.
    for number, pass_N in list(enumerate([index_N[:0], *passes]))[progress["passes"] + 1 :]:
        if progress["worse"] == settings.patience:
            break
        stop_if_asked(out, number)
        order_N = torch.randperm(len(pass_N), generator=generators["order"])
        batches = list(pass_N[order_N].split(settings.batch)) if len(pass_N) else []
        if batches and len(batches[-1]) < distributed.world():  # each process needs a row
            batches[-2:] = [torch.cat(batches[-2:])]
        numbers = {}
        for batch_N in batches:
            stop_if_asked(out, number)
            batch = table.take(rows, batch_N)
            batch["target_BT"], mask_BT, shift = objective_columns(batch, settings.objective)
            # The weights of the whole batch, before it is cut into micro-batches.
            batch["critic_weight_BT"] = losses.token_weights(mask_BT, "token")
            loss = value_gradients(critic, batch, settings, shift=shift)
            numbers = distributed.add_numbers({"train_value_loss": loss})
            made = step_or_skip({"value": learner}, numbers)
            said = f"loss or gradient is not finite {numbers}: lower --lr (--pretrain_lr)"
            require(made, f"value pretraining, step {progress['step'] + 1}: {said}")
            progress["step"] += 1
            bar.update()
            if batch_N is not batches[-1]:
                log.metrics(progress["step"], numbers)
        how = (settings.objective, settings.micro_batch_tokens)
        held_out, value_BT = measure(critic, held_out_rows, *how)
        held_out = distributed.from_rank_0(held_out | truth(value_BT))  # all decide alike
        log.metrics(progress["step"], numbers | held_out)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in held_out.items())
        tqdm.write(f"value: step {progress['step']}, held out: {shown}")
        progress["passes"], best = number, progress["best"]
        if best is None or held_out["value_loss"] < best["value_loss"]:
            progress |= {"best": held_out, "best_step": progress["step"], "worse": 0}
        elif number > settings.short_passes:  # the short answers alone are not meant to be enough
            progress["worse"] += 1
        checkpoint.save(out, {"critic": learner}, generators, progress)
        keep_best()
    bar.close()
    log.close()
    return progress["best"], progress["best_step"]


def stop_if_asked(out, number=0):
    """Raises: Stopped, with how to go on, if the process is to stop."""
    if run.stopping():
        there = number > 0 or (out / "answers.pt").exists()  # with --reuse_answers elsewhere
        done = f"pass {number} of it begins again" if there else "nothing of it is done yet"
        said = f"the same command with --out {out}, or --resume of the run, goes on"
        raise run.Stopped(f"value pretraining in {out}: {done}; {said}")


def sampled_answers(settings, out, policy, tokenizer, problems):
    """Judged rows from the frozen policy; stored, so that a second run on them samples nothing."""
    path = Path(settings.reuse_answers or out / "answers.pt")
    # What the answers depend on: those of another policy, file, … must not be used in silence.
    names = ["prompt_template", "chat_template", "response_length", "temperature", "verifier",
             "bare_number", "reward_correct", "reward_wrong"]  # fmt: skip
    names += [] if settings.reuse_answers else ["seed", "answers", "samples"]
    source = {name: getattr(settings, name) for name in names}
    source["reward"] = reward.load(settings.reward)[1] if settings.reward else None
    read = ("problem", "answer", *["columns"] * bool(settings.reward))
    texts = [[str(problem[name]) for name in read] for problem in problems]
    source["policy or problems"] = loading.fingerprint(policy, texts)
    if distributed.from_rank_0(path.exists()):
        stored = checkpoint.read(path)
        differ = ", ".join(n for n in source if stored["source"].get(n) != source[n])
        said = f"{path} holds answers with another {differ}: give another --out or remove the file"
        require(not differ, said)
        return stored["rows"]
    require(not settings.reuse_answers, f"no stored answers at {path}")
    order = seeded_generator(settings.seed, "pretraining problems")
    groups = -(-settings.answers // settings.samples)
    passes = -(-groups // len(problems))  # a short file is asked several times
    drawn = [torch.randperm(len(problems), generator=order) for _ in range(passes)]
    chosen = torch.cat(drawn)[:groups].tolist()
    generator = seeded_generator(settings.seed, "pretraining answers", policy.device)
    how = (settings.samples, settings, generator, "value: sampling")
    sampler, verify = loading.sampler_of(policy, settings), rollout.verifier_of(settings)
    rows = rollout.judged(sampler, tokenizer, problems, chosen, verify, *how)
    checkpoint.write(path, {"source": source, "rows": rows})
    return rows


def split_by_problem(rows, share, seed):
    """(rows to fit, held-out rows). By problem: two answers to one problem share too much."""
    asked = rows["problem_B"].unique()
    said = "value pretraining needs answers to at least 2 problems, one of them held out"
    require(len(asked) > 1, f"{said}: raise --answers or add problems")
    shuffle = torch.randperm(len(asked), generator=seeded_generator(seed, "held-out problems"))
    held = asked[shuffle]
    held = held[: min(len(asked) - 1, max(1, round(share * len(asked))))]
    is_held_B = torch.isin(rows["problem_B"], held)
    parts = [table.take(rows, part_B.nonzero()[:, 0]) for part_B in (~is_held_B, is_held_B)]
    many, held_out = (len(part["length_B"]) for part in parts)
    fewest, processes = min(-(-many // 2), held_out), distributed.world()  # --short_passes
    said = f"{fewest} answers to hold out or in half a pass for {processes} processes"
    require(fewest >= processes, f"{said}: raise --answers")
    return parts


def pretrain(settings, policy=None):
    """Value pretraining, or the fit of a reward model, from the answers to the critic's directory.
    Args: policy, loaded and sharded, where the caller has it already.
    Returns: the kept critic's held-out metrics, and "critic", its directory."""
    started = time.time()
    settings.check()
    stamp = distributed.from_rank_0(time.strftime("runs/value-%Y%m%d-%H%M%S"))
    out = Path(settings.out or stamp)
    there = distributed.from_rank_0((out / "critic").exists())
    require(not there, f"{out} holds a critic already: give another --out")
    flags.require_same(out, settings, ways=("init", "reuse_answers"))
    set_up = model.set_up(settings, [settings.train], [settings.init], policy)
    policy, tokenizer, (problems,) = set_up
    device = policy.device
    stop_if_asked(out)
    rows = sampled_answers(settings, out, policy, tokenizer, problems)
    stop_if_asked(out)
    del policy, set_up
    gc.collect()  # where it is sharded, its own hooks hold it
    fit_rows, held_out_rows = split_by_problem(rows, settings.held_out, settings.seed)
    start, mean_reward = settings.init or settings.model, fit_rows["reward_B"].mean().item()
    how = (settings.dtype, settings.critic_surprise, mean_reward)
    critic = loading.load_critic(start, device, *how)
    critic = loading.shard(critic, device, settings)
    flags.save_config(out, settings, device)
    world, best = toy.world_of(settings.train, tokenizer), {}
    where = (world, problems, tokenizer)
    if world and settings.objective == "value":  # what could any critic explain?
        target_BT, mask_BT, _ = objective_columns(held_out_rows, "value")
        best_BT = toy.best_values(*where, fit_rows, held_out_rows)
        best["best_explained_variance"] = explained_variance(best_BT, target_BT, mask_BT).item()

    def truth(value_BT):
        drops = toy.step_drops(*where, held_out_rows, value_BT) if world else ()
        return best | {"slip_auc": toy.auc(*drops)} if world else {}

    metrics, step = fit(settings, out, critic, tokenizer, fit_rows, held_out_rows, truth)
    distributed.on_rank_0(lambda: (out / "best").rename(out / "critic"))
    checkpoint.remove(out)
    spent, explained = time.time() - started, metrics["explained_variance"]
    print(f"value: kept step {step}, explained variance {explained:.3f}, in {out} ({spent:.0f} s)")
    return metrics | {"step": step, "critic": str(out / "critic"), "seconds": spent}


def starting_critic(settings, run_dir, policy):
    """The directory that a run's critic starts from; fits it first where the settings say so.
    Args: settings, those of train_vapo.py."""

    def fitted(name, **own):
        out = Path(run_dir) / name
        if not distributed.from_rank_0((out / "critic").exists()):  # a stopped run may have it
            shared = {f.name: getattr(settings, f.name) for f in fields(flags.TrainingSettings)}
            shared |= {"answers": settings.pretrain_answers, "lr": settings.pretrain_lr,
                       "passes": settings.pretrain_passes, "out": str(out),
                       "batch": max(Settings.batch, distributed.world())}  # fmt: skip
            pretrain(Settings(**shared | own), policy)
            gc.collect()  # its critic
        checkpoint.remove(out)  # a kill may have left them beside critic/
        return str(out / "critic")

    if settings.critic:
        return settings.critic
    reward_model, answers = settings.reward_model, ""
    if reward_model == "fit":
        reward_model = fitted("reward_model", objective="reward")
        answers = str(Path(run_dir) / "reward_model" / "answers.pt")
    if settings.value_pretraining:  # piece 1, §4.1
        return fitted("value", init=reward_model, reuse_answers=answers)
    return reward_model or settings.model


@run.exit_on_bad_input
def main(argv=None):
    """Runs the script; returns what `pretrain` does."""
    settings = flags.parse(Settings, argv, __doc__)
    distributed.start()
    defaults = toy.defaults("train_value", settings.model)
    settings = flags.parse(Settings, argv, __doc__, defaults)
    with run.finishing_the_step():
        return pretrain(settings)


if __name__ == "__main__":
    main()
