"""TRL's GRPO trainer trains on our answers: it has our gradient. How fast is it?

    python -m pytest tests/lab/test_trl.py     # the gradient (pip install trl datasets)
    python -m tests.lab.test_trl               # the README's line, in the embedded world

One rollout, of 512 answers to 32 problems, is sampled once, by our sampler. From the same weights
both sides train on it in 8 optimiser steps with DAPO's loss (no critic, no KL term) and fused
AdamW. TRL's side is `GRPOTrainer.train` itself, handed the answers instead of generating, without
logging, saving and gradient checkpointing, with the fastest of the micro-batches in SIZES. Its time
is its own `train_runtime`, without set-up.
"""

import tempfile
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, PrinterCallback

import model
import rollout
import table
import toy
import train_vapo
from lab import bench
from system import loading, settings
from system.learner import Learner, step_or_skip, warmup
from system.run import seeded_generator

pytest.importorskip("trl", reason="TRL is not installed")
from datasets import Dataset  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

SIZES = (8, 16, 32, 64)  # answers of a micro-batch of TRL


class Trainer(GRPOTrainer):
    """TRL's trainer, whose rollouts are all `rows`; with `keep` they are scored once."""

    rows, keep, kept = None, False, None

    def _generate_and_score_completions(self, inputs):
        if self.kept is None or not self.keep:
            # Its own advantages differ: divided by the root of 1/(G - 1) Σ …, plus 0.0001.
            index_B = torch.arange(len(self.rows["length_B"]))
            ours = {"advantages": self.rows["adv_BT"][:, 0], "row_B": index_B}
            self.kept = super()._generate_and_score_completions(inputs) | ours
        return self.kept


def trainer_of(rows, policy, tokenizer, problems, asked, directory, size):
    """A `Trainer` on the rows with micro-batches of `size` answers, from the policy's weights."""
    columns = (rows[name].tolist() for name in ("token_BL", "prompt_length_B", "length_B"))
    prompts, answers = zip(*((row[:p], row[p : p + n]) for row, p, n in zip(*columns)))
    answered = {"prompt_ids": list(prompts), "completion_ids": list(answers), "logprobs": None,
                "reward": rows["reward_B"].tolist()}  # fmt: skip
    how = GRPOConfig(
        directory, per_device_train_batch_size=size, num_generations=asked.samples,
        gradient_accumulation_steps=asked.mini_batch // size, num_train_epochs=1,
        steps_per_generation=len(answers) // size, loss_type="dapo", beta=0.0,
        epsilon=asked.eps_low, epsilon_high=asked.eps_high, temperature=asked.temperature,
        learning_rate=asked.lr, weight_decay=0.0, max_grad_norm=asked.max_grad_norm,
        lr_scheduler_type="constant", optim="adamw_torch_fused",
        bf16=policy.compute_dtype == torch.bfloat16, use_cpu=policy.device.type == "cpu",
        gradient_checkpointing=False, shuffle_dataset=False, disable_tqdm=True, report_to="none",
        logging_strategy="no", save_strategy="no",
    )  # fmt: skip
    network = AutoModelForCausalLM.from_config(policy.config, dtype=torch.float32)
    network.load_state_dict(policy.state_dict())
    trainer = Trainer(
        network, reward_funcs=lambda reward, **_: reward, args=how, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": problem["problem"]} for problem in problems]),
        rollout_func=lambda *_: answered,
    )  # fmt: skip
    trainer.rows = rows
    trainer.remove_callback(PrinterCallback)
    return trainer


def score(policy, rows, asked):
    """Old log-probs and advantages."""
    train_vapo.score(policy, None, rows, asked)
    train_vapo.advantages(rows, asked)


def ours(policy, start, rows, asked, whole):
    """Trains on the rollout from the weights `start`. Returns: (seconds, rows)."""
    policy.load_state_dict(start)
    learners = {"policy": Learner(policy, asked.lr, asked.max_grad_norm, warmup(0))}
    started = time.perf_counter()
    if whole:
        score(policy, rows, asked)
    for batch in table.mini_batches(rows, asked.mini_batch, None):
        train_vapo.weights(batch, asked)
        train_vapo.policy_gradients(policy, batch, asked)
        step_or_skip(learners, {})
    if policy.device.type == "cuda":
        torch.cuda.synchronize(policy.device)
    return time.perf_counter() - started, rows


def theirs(trainer, start, rows, whole):
    """The same by TRL."""
    trainer.model.load_state_dict(start)
    trainer.keep = not whole
    return trainer.train().metrics["train_runtime"], rows


def gradient_error(policy, rows, asked, trainer):
    """(relative difference of both gradients of the last optimiser step's answers at the weights
    where TRL's training has ended, share of their tokens that are clipped)."""
    policy.load_state_dict(trainer.model.state_dict())
    micro_batches = trainer._buffered_inputs[-trainer.args.gradient_accumulation_steps :]
    for micro in micro_batches:
        trainer.compute_loss(trainer.model, micro).backward()
    batch = table.take(rows, torch.cat([micro["row_B"] for micro in micro_batches]))
    train_vapo.weights(batch, asked)
    sums = train_vapo.policy_gradients(policy, batch, asked)
    networks = policy, trainer.model
    ours, theirs = (torch.cat([p.grad.flatten() for p in n.parameters()]) for n in networks)
    for network in networks:
        network.zero_grad()
    # TRL divides by the mean tokens of the rollout's optimiser steps, we by those of this one.
    tokens = int(batch["length_B"].sum())
    scale = int(rows["length_B"].sum()) * asked.mini_batch / len(rows["length_B"]) / tokens
    error = (ours - scale * theirs).norm() / ours.norm()
    return error.item(), (sums["clip_low"] + sums["clip_high"]) / tokens


def setting(flags):
    """(policy, its weights, tokenizer, problems, rows of a scored rollout, settings)."""
    asked = settings.parse(train_vapo.Settings, flags, "")
    asked = replace(asked, critic_free=True, positive_nll=False)
    policy, tokenizer, (problems,) = model.set_up(asked, [asked.train])
    problems, generator = problems[: asked.prompts], seeded_generator(0, "bench", policy.device)
    how = (asked.samples, asked.response_length, asked.temperature, generator)
    rows = rollout.sample(loading.sampling_copy(policy), tokenizer, problems, *how)
    rollout.judge(rows, tokenizer, problems)
    score(policy, rows, asked)
    start = {name: weight.clone() for name, weight in policy.state_dict().items()}
    return policy, start, tokenizer, problems, rows, asked


@pytest.mark.parametrize("size", [16, 64])
def test_trl_trains_on_our_answers_and_has_our_gradient(world, tmp_path, size):
    flags = [f"@{world}/train_vapo.args", "--device=cpu", "--prompts=8", "--response_length=40"]
    policy, start, tokenizer, problems, rows, asked = setting(flags)
    trainer = trainer_of(rows, policy, tokenizer, problems, asked, str(tmp_path), size)
    assert theirs(trainer, start, rows, whole=False)[0] > 0
    error, clipped = gradient_error(policy, rows, asked, trainer)
    assert error < 1e-4 and clipped > 0
    assert all(ours(policy, start, rows, asked, whole)[0] > 0 for whole in (False, True))


def main(repeats=5):
    """Prints the gradients' difference, and the lines of the README."""
    defaults = toy.defaults("train_vapo", "")
    flags = [f"--{name}={value}" for name, value in defaults.items()]
    policy, start, tokenizer, problems, rows, asked = setting([*flags, "--response_length=160"])
    with tempfile.TemporaryDirectory() as directory:
        how = (rows, policy, tokenizer, problems, asked, directory)
        trainers = {size: trainer_of(*how, size) for size in SIZES}
        times = {}
        for size, trainer in trainers.items():
            times[size] = min(theirs(trainer, start, rows, whole=False)[0] for _ in range(3))
        best = min(times, key=times.get)
        error, clipped = gradient_error(policy, rows, asked, trainers[best])
        print(f"TRL, seconds of the update by answers of a micro-batch: {times}")
        print(f"gradients: relative difference {error:.1e}, {clipped:.2%} of the tokens clipped")
        bench.seconds = lambda function: function()  # both tell their own time
        for title, whole in (("updates", False), ("old log-probs too", True)):
            sides = (partial(ours, policy, start, rows, asked, whole),
                     partial(theirs, trainers[best], start, rows, whole))  # fmt: skip
            bench.side_by_side(title, f"TRL, {best} at a time", *sides, repeats)


if __name__ == "__main__":
    main()
