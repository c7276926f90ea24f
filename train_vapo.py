"""VAPO (arXiv 2504.05118): value-based PPO for long chains of thought with verifiable rewards.

    python train_vapo.py                                      # the embedded world, minutes on a CPU
    python train_vapo.py --model DIR --train FILE --test FILE # any causal LM, any JSONL of problems
    python train_vapo.py --no_length_adaptive_gae             # without one of the seven pieces
    python train_vapo.py --preset ppo                         # or vc_ppo, grpo, dapo: the rivals
    python train_vapo.py --resume runs/NAME                   # go on from the last checkpoint

PPO with seven changes, each with a flag that turns it off:
1. value pretraining     the critic starts from Monte-Carlo returns of the frozen policy
2. decoupled GAE         the critic's targets use λ = 1, the policy's advantages their own λ
3. length-adaptive GAE   λ_policy = 1 − 1/(α l) for an answer of l tokens
4. token-level loss      every token of the mini-batch weighs the same
5. clip-higher           the ratio may rise further (ε_high) than fall (ε_low)
6. positive NLL          plus μ times the NLL of the correct answers
7. group sampling        few prompts, many samples each; off: as many prompts, one sample

Read `train` first; the functions above it are in the order of its calls: `score` and `advantages`
of the rollout, `weights` and `policy_gradients` of each optimiser mini-batch (`value_gradients` is
in train_value.py). What a row is, is in table.py; the equations are in gae.py, losses.py,
logprobs.py and dapo.py.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import dapo
import evaluate
import gae
import losses
import model
import rollout
import table
import toy
from system import checkpoint, distributed, health, loading, metrics, run, settings as flags
from system.learner import Learner, step_or_skip, warmup
from system.run import require, seeded_generator, timed
from system.settings import AT_LEAST_1, INSIDE_SHARE, NOT_NEGATIVE, POSITIVE, SHARE, flag
from train_value import starting_critic, value_gradients

# fmt: off
# The rivals, each as what differs from VAPO. A flag given beside --preset overrides it.
PRESETS = {
    "vapo": {},
    # arXiv 2503.01491: PPO with value pretraining and decoupled GAE, λ_policy fixed
    "vc_ppo": {"length_adaptive_gae": False, "token_level_loss": False, "clip_higher": False,
               "positive_nll": False, "group_sampling": False},
    # arXiv 2504.05118 §5.1, "vanilla PPO": all seven off, the critic starts from a reward model
    "ppo": {"value_pretraining": False, "decoupled_gae": False, "length_adaptive_gae": False,
            "token_level_loss": False, "clip_higher": False, "positive_nll": False,
            "group_sampling": False, "reward_model": "fit"},
    # arXiv 2402.03300, without its KL term; arXiv 2503.14476
    "grpo": {"critic_free": True, "token_level_loss": False, "clip_higher": False,
             "positive_nll": False},
    "dapo": {"critic_free": True, "positive_nll": False, "dynamic_sampling": 10, "overlong": 0.2,
             "reward_wrong": -1.0},
}


@dataclass(frozen=True)
class Settings(flags.TrainingSettings):
    preset: Literal["vapo", "vc_ppo", "ppo", "grpo", "dapo"] = flag(
        "vapo", "what it changes is in PRESETS: vapo, vc_ppo, ppo, grpo, dapo")
    test: str = flag("", "held-out problems, like --train", flags.PROBLEMS)
    out: str = flag("", "run directory; empty: runs/PRESET-DATE-TIME")
    resume: str = flag("", "go on with the run in this directory, as it is", may_change=True)
    critic: str = flag("", "start from this pretrained one; truth: V is what is true (toy)")
    reward_model: str = flag("", "start the critic from this reward model; fit: from one made here")

    value_pretraining: bool = flag(True, "1: pretrain the critic; off: --reward_model, or V = 0")
    decoupled_gae: bool = flag(True, "2: λ of its own for the critic's targets; off: the policy's")
    length_adaptive_gae: bool = flag(True, "3: λ_policy = 1 - 1/(alpha l); off: --lam_policy")
    token_level_loss: bool = flag(True, "4: tokens weigh the same in the loss; off: answers do")
    clip_higher: bool = flag(True, "5: clip the ratio at 1 + eps_high above; off: at 1 + eps_low")
    positive_nll: bool = flag(True, "6: add mu times the NLL of the correct answers")
    group_sampling: bool = flag(True, "7: prompts x samples; off: prompts*samples, 1 each")

    steps: int = flag(30, "rollouts", NOT_NEGATIVE, may_change=True)
    prompts: int = flag(32, "prompts per rollout (the paper: 512)", AT_LEAST_1)
    samples: int = flag(16, "samples per prompt", AT_LEAST_1)
    mini_batch: int = flag(64, "answers per optimiser step (the paper: 512 of 8192)", AT_LEAST_1)
    lr: float = flag(1e-6, "AdamW learning rate of the policy, constant after warm-up", POSITIVE)
    critic_lr: float = flag(2e-6, "AdamW learning rate of the critic", POSITIVE)
    warmup: int = flag(10, "optimiser steps of linear warm-up", NOT_NEGATIVE)
    max_grad_norm: float = flag(1.0, "gradient clipping, of policy and critic each", POSITIVE)
    alpha: float = flag(0.05, "α of piece 3; the outcome reaches token 1 by exp(-1/α)", POSITIVE)
    lam_policy: float = flag(0.95, "λ of the policy's advantages without piece 3", SHARE)
    lam_critic: float = flag(1.0, "λ of the critic's targets", SHARE)
    eps_low: float = flag(0.2, "lower clip range", INSIDE_SHARE)
    eps_high: float = flag(0.28, "upper clip range", POSITIVE)
    mu: float = flag(0.1, "weight of the positive-example NLL", NOT_NEGATIVE)
    is_clip: float = flag(None, "cap of importance weights; 0: none; default: 2 where needed", (
        "is 0 or at least 1", lambda cap: cap == 0 or cap >= 1))
    mask_truncated: bool = flag(False, "leave truncated answers out of the policy's loss only")

    critic_free: bool = flag(False, "group-relative advantages (GRPO, DAPO); no pieces 1 to 3")
    dynamic_sampling: int = flag(
        0, "DAPO: only mixed groups, from at most N batches", NOT_NEGATIVE, may_change="above 0")
    overlong: float = flag(0.0, "DAPO: punish length over this last share of the limit", SHARE)

    pretrain_answers: int = flag(4096, "value pretraining: answers to sample", AT_LEAST_1)
    pretrain_lr: float = flag(2e-6, "value pretraining: learning rate", POSITIVE)
    pretrain_passes: int = flag(10, "value pretraining: most passes over the answers", AT_LEAST_1)

    eval_top_p: float = flag(1.0, "top-p of evaluations (the paper: 0.7)", flags.ABOVE_0_SHARE)
    eval_every: int = flag(5, "rollouts between evaluations; 0: first and last", NOT_NEGATIVE, True)
    eval_samples: int = flag(8, "samples per test problem in an evaluation", AT_LEAST_1)
    save_every: int = flag(5, "rollouts between checkpoints; 0: at the end", NOT_NEGATIVE, True)
    # fmt: on

    def check(self):
        super().check()
        prompts, samples = self.rollout_shape()
        updates, processes = -(-prompts * samples // self.mini_batch), self.processes()
        if updates == 1:
            print("warning: --mini_batch is the whole rollout: the ratio is 1, nothing is clipped")
        smallest = prompts * samples // updates
        for rows, what in ((prompts, "--prompts"), (smallest, "answers in a mini-batch")):
            said = f"{rows} {what} for {processes} processes: each needs one at least"
            require(rows >= processes, said)
        pieces = ("value_pretraining", "decoupled_gae", "length_adaptive_gae")
        idle = ("critic", "reward_model", "critic_surprise")
        idle = [name for name in idle if getattr(self, name)]
        idle += [f"no_{name}" for name in pieces if not getattr(self, name)]
        said = f"--critic_free has no use for --{' and --'.join(idle)}"
        require(not (self.critic_free and idle), said)
        needs = "--samples above 1" if self.group_sampling else "group sampling"
        for name in ("critic_free", "dynamic_sampling"):
            said = f"--{name} compares the answers of a group: it needs {needs}"
            require(samples > 1 or not getattr(self, name), said)

    def rollout_shape(self):
        """(prompts, samples of each) of a rollout. Piece 7."""
        many = self.group_sampling
        return (self.prompts, self.samples) if many else (self.prompts * self.samples, 1)


def score(policy, critic, rows, settings):
    """Adds old_logp_BT, entropy_BT and, with a critic, old_value_BT to a rollout.
    By the same code as training, not the sampler's, so the first ratio is 1."""
    tokens = 4 * settings.micro_batch_tokens  # no gradient is kept
    rows["old_logp_BT"], rows["entropy_BT"] = model.all_logprobs(
        policy, rows, settings.temperature, tokens, settings.compile
    )
    if critic:
        rows["old_value_BT"] = model.all_values(critic, rows, tokens)


def advantages(rows, settings):
    """Adds importance_BT and adv_BT and, with a critic, lam_B and target_BT to a scored rollout."""
    mask_BT, old_logp_BT = table.response_mask(rows), rows["old_logp_BT"]
    if (cap := settings.is_clip) is None:  # by need: more than float32's rounding
        cap = 2.0 * (table.sampler_gap(rows).item() > health.SMALL_GAP)
    weight_BT = losses.importance_weight(old_logp_BT, rows["sampled_logp_BT"], cap or None)
    rows["importance_BT"] = weight_BT * mask_BT
    if settings.critic_free:  # arXiv 2402.03300 §4.1
        adv_B = dapo.group_advantage(rows["reward_B"], settings.rollout_shape()[1])
        rows["adv_BT"] = adv_B[:, None] * mask_BT
        return
    reward_BT = gae.terminal_reward(rows["reward_B"], rows["length_B"], mask_BT.shape[1])
    rows["lam_B"] = torch.full_like(rows["reward_B"], settings.lam_policy)
    if settings.length_adaptive_gae:  # piece 3, §4.2
        rows["lam_B"] = gae.length_adaptive_lambda(rows["length_B"], settings.alpha)
    lam_critic = settings.lam_critic if settings.decoupled_gae else rows["lam_B"]  # piece 2, §4.1
    rows["adv_BT"], rows["target_BT"] = gae.decoupled_gae(
        reward_BT, rows["old_value_BT"], mask_BT, rows["lam_B"], lam_critic
    )


def weights(batch, settings):
    """Adds policy_weight_BT, critic_weight_BT and nll_weight_BT to an optimiser mini-batch.
    Each sums to one over the whole of it: made before it is cut into micro-batches (§4.2)."""
    mask_BT = table.response_mask(batch)
    how = "token" if settings.token_level_loss else "sample"  # piece 4
    kept_BT = mask_BT * batch["stop_B"][:, None] if settings.mask_truncated else mask_BT
    batch["policy_weight_BT"] = losses.token_weights(kept_BT, how)
    batch["critic_weight_BT"] = losses.token_weights(mask_BT, "token")
    correct_BT = mask_BT * batch["correct_B"][:, None]
    batch["nll_weight_BT"] = losses.token_weights(correct_BT, "token")  # piece 6


def policy_gradients(policy, batch, settings):
    """Adds the gradients of L_PPO + μ L_NLL over a mini-batch. Returns: this rank's metrics."""
    eps_high = settings.eps_high if settings.clip_higher else settings.eps_low  # piece 5, §4.3
    mu = settings.mu if settings.positive_nll else 0.0  # piece 6, §4.3
    loss_of = run.kernel(losses.policy_loss, settings.compile, policy.device)
    eps, sums = (settings.eps_low, eps_high), {}
    for index in distributed.deal(table.micro_batches(batch, settings.micro_batch_tokens)):
        micro = table.take(batch, index, policy.device)
        logp_BT, _ = model.policy_logprobs(policy, micro, settings.temperature, settings.compile)
        old_logp_BT, adv_BT = micro["old_logp_BT"], micro["adv_BT"]
        loss_BT = loss_of(logp_BT, old_logp_BT, adv_BT, *eps) * micro["policy_weight_BT"]
        ppo = (loss_BT * micro["importance_BT"]).sum()
        nll = (losses.nll_loss(logp_BT) * micro["nll_weight_BT"]).sum()
        (ppo + mu * nll).backward()
        found = {"policy_loss": ppo, "nll_loss": nll}
        how = (logp_BT, old_logp_BT, adv_BT, table.response_mask(micro))
        found |= losses.ratio_metrics(*how, *eps)
        metrics.add(sums, found, micro)
    return sums


def train(settings, run_dir, policy, critic, tokenizer, problems, test_problems):
    """The run, from prompt to gradient; from its last checkpoint, if it has one.
    Returns: (before, after), the metrics of `evaluate.evaluate` on the test problems."""
    limits = (settings.max_grad_norm, warmup(settings.warmup))
    learners = {"policy": Learner(policy, settings.lr, *limits)}
    if critic:  # started by piece 1
        learners = {"critic": Learner(critic, settings.critic_lr, *limits)} | learners
    generators = {
        "order": seeded_generator(settings.seed, "data order"),
        "sample": seeded_generator(settings.seed, "sampling", policy.device),
        "mini_batch": seeded_generator(settings.seed, "mini-batches"),
    }
    progress = checkpoint.resume(run_dir, learners, generators)
    log = run.Log(run_dir, after=progress["step"] if progress else -1)
    sampler, verify = loading.sampler_of(policy, settings), rollout.verifier_of(settings)
    testing = (sampler, critic, tokenizer, test_problems, settings, verify, log)
    world = toy.world_of(settings.train, tokenizer)
    require(world or settings.critic != "truth", "--critic truth: it is not known here")
    stop_if_asked(progress["step"] if progress else 0, settings, run_dir)
    if progress is None:
        progress = {"step": 0, "queue": [], "sampled": 0, "bad_steps": 0}
        progress["before"], numbers = evaluate.evaluate_in_run(0, *testing)
        progress["after"] = progress["before"]
        log.metrics(0, numbers)
        checkpoint.save(run_dir, learners, generators, progress)
        stop_if_asked(0, settings, run_dir)

    bar = tqdm(range(progress["step"] + 1, settings.steps + 1), initial=progress["step"],
               total=settings.steps, desc=settings.preset, unit="rollout",
               disable=distributed.rank() > 0)  # fmt: skip
    for step in bar:
        seconds, updates = {}, []
        with timed(seconds, "sample"):  # piece 7: as many as rollout_shape says, judged
            rows, drawn = rollout.collect(
                sampler, tokenizer, problems, verify, settings, generators, progress
            )
        with timed(seconds, "score"):  # pieces 2 and 3: advantages and targets from the outcome
            score(policy, critic, rows, settings)
            if settings.critic == "truth":
                before, progress["rows"] = progress.get("rows"), rows
                rows["old_value_BT"] = toy.perfect_values(world, problems, tokenizer, before, rows)
            advantages(rows, settings)
        with timed(seconds, "update"):  # several steps a rollout: the ratio moves away from 1
            shuffle = generators["mini_batch"]
            for batch in table.mini_batches(rows, settings.mini_batch, shuffle):
                weights(batch, settings)  # piece 4
                sums = {}
                if critic:
                    sums["value_loss"] = value_gradients(critic, batch, settings)
                sums |= policy_gradients(policy, batch, settings)  # pieces 5 and 6
                update = metrics.of_mini_batch(distributed.add_numbers(sums), batch)
                made = step_or_skip(learners, update)  # clip, AdamW, schedule; gradients to zero
                progress["bad_steps"] = 0 if made else progress["bad_steps"] + 1
                if not made:
                    bad = (batch, update, progress["bad_steps"])
                    checkpoint.keep_bad_batch(run_dir, step, len(updates), *bad)
                updates.append(update | {"bad_steps": float(not made)})
            loading.update_sampler(sampler, policy)

        progress |= {"step": step, "sampled": progress["sampled"] + drawn["answers"]}
        numbers = table.rollout_metrics(rows) | drawn | {"answers": progress["sampled"]}
        if world and not settings.critic_free:  # the truth is known there
            numbers |= toy.score_critic(world, problems, tokenizer, rows, rows["old_value_BT"])
        numbers |= metrics.means(updates) | metrics.speeds(seconds, rows)
        numbers["gradient_steps"] = learners["policy"].scheduler.last_epoch  # none that was skipped
        bar.set_postfix(accuracy=f"{numbers['accuracy']:.2f}", length=f"{numbers['length']:.0f}")
        health.watch(step, numbers, progress)
        last = step == settings.steps
        if last or (settings.eval_every and step % settings.eval_every == 0):
            progress["after"], measured = evaluate.evaluate_in_run(step, *testing)
            numbers |= measured
        log.metrics(step, numbers)
        stop = run.stopping()
        if last or stop or (settings.save_every and step % settings.save_every == 0):
            checkpoint.save(run_dir, learners, generators, progress)
        if stop and not last:  # never before the save
            stop_if_asked(step, settings, run_dir)
    log.close()
    health.summary(progress)
    return progress["before"], progress["after"]


def stop_if_asked(step, settings, run_dir):
    """Raises: Stopped, with how to go on, if the process is to stop."""
    if run.stopping():
        said = f"rollout {step} of {settings.steps} is saved"
        raise run.Stopped(f"{said}: python train_vapo.py --resume {run_dir} goes on")


def settings_of(argv):
    """Flags → (settings, run directory). Without --model: the embedded world, and what suits it."""
    settings = flags.parse(Settings, argv, __doc__)
    distributed.start()
    if settings.resume:
        settings = flags.resumed(Settings, argv, __doc__, settings.resume)
        return settings, Path(settings.resume)
    preset = PRESETS[settings.preset] | ({"reward_wrong": 0.0} if settings.reward else {})
    defaults = toy.defaults("train_vapo", settings.model) | preset
    settings = flags.parse(Settings, argv, __doc__, defaults)
    return settings, flags.new_run_dir(settings.out, settings.preset)


@run.exit_on_bad_input
def main(argv=None):
    """Runs the script. Returns: the last metrics, the first as `before_…`, and "run_dir"."""
    started = time.time()
    settings, run_dir = settings_of(argv)
    settings.check()
    with run.finishing_the_step():
        files, critics = (settings.train, settings.test), (settings.critic, settings.reward_model)
        policy, tokenizer, (problems, test_problems) = model.set_up(settings, files, critics)
        device, critic = policy.device, None
        print(f"{settings.preset}: {run.describe(device)}")
        flags.save_config(run_dir, settings, device)  # of a resumed run too: some may change
        if not settings.critic_free and settings.critic != "truth":
            start = starting_critic(settings, run_dir, policy)  # piece 1
            critic = loading.load_critic(start, device, settings.dtype, settings.critic_surprise)
            critic = loading.shard(critic, device, settings)
        before, after = train(settings, run_dir, policy, critic, tokenizer, problems, test_problems)
    checkpoint.export(policy, tokenizer, run_dir / "policy")
    if critic:
        checkpoint.export(critic, tokenizer, run_dir / "critic")
    evaluate.print_before_and_after(before, after, len(test_problems), settings)
    print(f"\nrun directory: {run_dir}   ({time.time() - started:.0f} s)")
    return after | {f"before_{n}": v for n, v in before.items()} | {"run_dir": str(run_dir)}


if __name__ == "__main__":
    main()
