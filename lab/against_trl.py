"""TRL's GRPO trainer on our answers: what `bench.py --parts trl` compares our update with (pip install trl datasets).

One rollout as in the default run, 512 answers to 32 problems, is sampled once, by our sampler. From the same weights both sides
train on it in 8 optimiser steps of 64 answers: DAPO's loss (no critic, no KL term, clip 0.2 and 0.28, token-level), fused AdamW,
gradient clip 1. TRL's side is `GRPOTrainer.train` itself, handed the answers instead of generating, without logging, saving and
gradient checkpointing, with the fastest of the micro-batches in SIZES; its time is its own `train_runtime`, without set-up.

Shapes: B rows as in rollout.py.
"""

import tempfile
import time
from functools import partial
from types import SimpleNamespace

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

import logprobs
import losses
import ppo
import rollout
import table

PROBLEMS, STEP = 32, 64  # problems of the rollout; answers of an optimiser step
SIZES = (8, 16, 32, 64)  # answers of a micro-batch of TRL
LEARNING = {"lr": 4e-4, "weight_decay": 0.0}
KERNELS = SimpleNamespace(logprobs=(logprobs.add_slice, logprobs.slice_gradient), policy_loss=losses.policy_loss)
OURS = SimpleNamespace(
    temperature=1.0, micro_batch_tokens=4096, clip_higher=True, eps_low=0.2, eps_high=0.28, token_level_loss=True, mu=0.0,
    positive_nll=False, critic_free=True, is_clip=0.0, engine="slots", samples=16,
)  # fmt: skip


class Trainer(GRPOTrainer):
    """TRL's trainer, whose rollouts are all `rows`; with `keep`, only the first is padded and given its old log-probs."""

    rows, keep, kept = None, False, None

    def _generate_and_score_completions(self, inputs):
        if self.kept is None or not self.keep:
            # Its own advantages differ from ours by a factor: it divides by the root of 1/(G - 1) Σ …, plus 0.0001.
            ours = {"advantages": self.rows["adv_BT"][:, 0], "row_B": torch.arange(len(self.rows["length_B"]))}
            self.kept = super()._generate_and_score_completions(inputs) | ours
        return self.kept


def trainer_of(rows, policy, tokenizer, problems, size, directory):
    """A `Trainer` on the rows with micro-batches of `size` answers, from the policy's weights."""
    prompt_B, end_B = rows["prompt_length_B"].tolist(), (rows["prompt_length_B"] + rows["length_B"]).tolist()
    tokens = list(zip(rows["token_BL"].tolist(), prompt_B, end_B))
    answered = {"prompt_ids": [row[:start] for row, start, _ in tokens], "completion_ids": [row[start:end] for row, start, end in tokens]}
    settings = GRPOConfig(
        directory, per_device_train_batch_size=size, gradient_accumulation_steps=STEP // size, steps_per_generation=len(tokens) // size,
        num_generations=OURS.samples, num_train_epochs=1, loss_type="dapo", beta=0.0, epsilon=OURS.eps_low, epsilon_high=OURS.eps_high,
        temperature=OURS.temperature, learning_rate=LEARNING["lr"], weight_decay=LEARNING["weight_decay"], max_grad_norm=1.0,
        lr_scheduler_type="constant", optim="adamw_torch_fused", gradient_checkpointing=False, shuffle_dataset=False,
        bf16=policy.arithmetic == torch.bfloat16, use_cpu=policy.device.type == "cpu", disable_tqdm=True, report_to="none",
        logging_strategy="no", save_strategy="no",
    )  # fmt: skip
    network = AutoModelForCausalLM.from_config(policy.config, dtype=torch.float32)
    network.load_state_dict(policy.state_dict())
    trainer = Trainer(
        network, reward_funcs=lambda reward, **_: reward, args=settings, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": problem["problem"]} for problem in problems]),
        rollout_func=lambda *_: answered | {"logprobs": None, "reward": rows["reward_B"].tolist()},
    )  # fmt: skip
    trainer.rows = rows
    trainer.remove_callback(PrinterCallback)
    return trainer


def sides(policy, tokenizer, problems, generator, longest):
    """Yields (title, TRL's settings, ours, theirs); `ours` and `theirs` train on the rollout and return (seconds, tokens)."""
    problems, device = problems[:PROBLEMS], policy.device
    rows = rollout.sample(policy, tokenizer, problems, OURS.samples, longest, 1.0, generator)
    rollout.judge(rows, tokenizer, problems)

    def prepare():
        ppo.old_logprobs_and_values(policy, None, rows, OURS, KERNELS)
        ppo.compute_advantages(rows, OURS)

    prepare()
    start = {name: weight.clone() for name, weight in policy.state_dict().items()}
    tokens, answers = int(rows["length_B"].sum()), len(rows["length_B"])
    optimizer = torch.optim.AdamW(policy.parameters(), **LEARNING, fused=True)

    def ours(whole):
        policy.load_state_dict(start)
        started = time.perf_counter()
        if whole:
            prepare()
        for index in torch.randperm(answers, generator=generator, device=device).split(STEP):
            ppo.backward(policy, None, ppo.add_weights(table.take(rows, index), OURS), OURS, KERNELS)
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item()
            optimizer.step()
            optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started, tokens

    def theirs(trainer, whole):
        trainer.model.load_state_dict(start)
        trainer.keep = not whole
        return trainer.train().metrics["train_runtime"], tokens

    with tempfile.TemporaryDirectory() as directory:
        trainers = {size: trainer_of(rows, policy, tokenizer, problems, size, directory) for size in SIZES}
        turns = [[theirs(trainer, whole=False)[0] for trainer in trainers.values()] for _ in range(3)]
        times = {size: min(taken) for size, taken in zip(SIZES, zip(*turns))}
        best = min(times, key=times.get)
        agree(policy, rows, trainers[best])
        print("TRL, seconds of the update by micro-batch: " + ", ".join(f"{size} answers {taken:.2f}" for size, taken in times.items()))
        for title, whole in (("update", False), ("old log-probs and update", True)):
            yield f"{title}, toy", f"TRL, {best} at a time", partial(ours, whole), partial(theirs, trainers[best], whole)


def agree(policy, rows, trainer):
    """Raises AssertionError unless both sides, at the weights where TRL's training has ended, have the same gradient of the last
    optimiser step's 64 answers."""
    policy.load_state_dict(trainer.model.state_dict())
    micro_batches = trainer._buffered_inputs[-trainer.args.gradient_accumulation_steps :]
    for micro in micro_batches:
        trainer.compute_loss(trainer.model, micro).backward()
    batch = ppo.add_weights(table.take(rows, torch.cat([micro["row_B"] for micro in micro_batches])), OURS)
    metrics = ppo.backward(policy, None, batch, OURS, KERNELS)
    # TRL divides by the tokens that an optimiser step of the rollout has on average, we by those of this one.
    scale = int(rows["length_B"].sum()) * STEP / len(rows["length_B"]) / int(batch["length_B"].sum())
    gradients = [torch.cat([p.grad.flatten() for p in network.parameters()]) for network in (policy, trainer.model)]
    for network in (policy, trainer.model):
        network.zero_grad()
    error = (gradients[0] - scale * gradients[1]).norm() / gradients[0].norm()
    clipped = metrics["clip_low"] + metrics["clip_high"]
    print(
        f"TRL, gradient of 64 answers: relative difference {error:.1e}, norm {gradients[0].norm():.3f}, {clipped:.2%} of the tokens clipped"
    )
    assert error < (1e-4 if policy.arithmetic == torch.float32 else 0.05), "TRL and we do not train on the same thing"
