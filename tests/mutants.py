"""Faults of one line, put in one at a time: does a test notice?

    python -m tests.mutants                 # all of them
    python -m tests.mutants --quick         # without those that need a training run: for CI
    python -m tests.mutants --only losses   # those whose row in the table has this text

A mutant is (file, old text, new text, the tests that should notice). The old text stands exactly
once in the file; if it does not, the mutant is stale, which is said, with exit code 2. A mutant is
caught if one of its tests fails, and only then: a test that cannot be collected or does not end is
an error too. Survivors are listed, with exit code 1.

Each is tried in a copy of the tree, in a process forked from this one, which has imported torch and
transformers already. The tests run once without any mutant first, and must pass.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # half of pytest's own time

import pytest
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.utils.tensorboard  # noqa: F401
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification  # noqa: F401
from transformers.models.gpt2 import modeling_gpt2  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

ROOT = Path(__file__).parent.parent
LIMIT = 300  # seconds that a mutant's tests may take

# What the tests are of, in seconds. Known mistakes of other code bases are marked with a star.
# Equivalent, hence not here: Adam for AdamW (there is no weight decay); λ clamped below 1 or at 1
# (float32 reaches 1 at answers of 10^9 tokens only).
EQUAL_LOGPROBS = "test_logprobs.py::test_log_probs_entropy_and_gradients_equal_the_plain_ones"
SAMPLED = "test_rollout.py::test_sampler_log_probs_are_training_log_probs"
GREEDY = (
    "test_rollout.py::test_greedy_answers_are_the_same_whatever_the_engine_the_slots_and_the_room"
    "_in_them"
)
BOTH = "test_rollout.py::test_top_p_and_the_log_probs_of_both_engines"
INVERSE = (
    "test_rollout.py::test_a_token_is_the_inverse_of_the_distribution_function "
    "test_rollout.py::test_no_word_of_probability_zero_is_drawn_and_every_other_one_is"
)
COLUMNS = "test_table.py::test_every_column_of_the_docstring_is_written_where_it_says_and_no_other"
NUMBERS = "test_table.py::test_the_numbers_of_a_rollout_by_hand"
CUT = "test_table.py::test_what_is_cut_out_of_rows_and_put_together_again"
SURPRISE = "test_model.py::test_a_critic_reads_how_unlikely_the_tokens_were"
EFFECTS = "lab/test_effects.py"
REPLICATE = "lab/test_report.py::test_the_second_replicate_beside_the_first"
REPORT = "lab/test_report.py::test_the_table_is_computed_from_the_files_as_by_hand"
PRESETS = "test_vapo.py::test_each_preset_as_a_line_of_literals"
EVALUATED = "test_evaluate.py::test_temperature_and_top_p_of_evaluations_are_their_own"
OBJECTIVE = "test_value.py::test_value_looks_before_every_token_and_reward_after_the_last"
ADAPTERS = "system/test_lora.py::" + (
    "test_at_first_the_model_is_what_it_was_and_equal_seeds_are_equal_adapters"
)
BEST = "test_value.py::test_it_stops_when_the_held_out_loss_rises_and_keeps_the_best_pass"
ONE_LINE = (
    "test_verifier.py::test_of_equal_statements_on_a_line_the_last_is_taken_and_many_are_none"
)
VERDICTS = "test_verifier.py::test_right test_verifier.py::test_wrong"

# fmt: off
QUICK = [
    # ★ the reward one token late; V read one token early or late; V of the padding bootstrapped
    ("gae.py", "t_T == length_B[:, None] - 1", "t_T == length_B[:, None]", "test_gae.py"),
    ("gae.py", "value_BT[:, 1:], 0)", "value_BT[:, :-1], 0)", "test_gae.py"),
    ("gae.py", "torch.where(on_BT[:, 1:], value_BT[:, 1:], 0)", "value_BT[:, 1:]", "test_gae.py"),
    ("gae.py", "torch.where(on_BT, delta_BT, 0)", "delta_BT", "test_gae.py"),
    ("gae.py", "gamma * lam_B", "lam_B", "test_gae.py"),
    ("gae.py", "decay_B1**2, 2 * span", "decay_B1, 2 * span", "test_gae.py"),
    ("gae.py", "1.0 / (alpha * length_B", "alpha / (length_B", "test_gae.py"),
    ("gae.py", "lam_B.clamp(0.0, ", "lam_B.clamp(-1.0, ", "test_gae.py"),
    # ★ targets with λ_policy, and advantages with λ_critic
    ("gae.py", "mask_BT, lam_critic, gamma)", "mask_BT, lam_policy, gamma)", "test_gae.py"),
    ("gae.py", "mask_BT, lam_policy, gamma)", "mask_BT, lam_critic, gamma)", "test_gae.py"),
    ("gae.py", "critic_adv_BT + value_BT, 0.0", "critic_adv_BT, 0.0", "test_gae.py"),
    ("gae.py", "(target_N - value_N).var(correction=0)", "(target_N - value_N).square().mean()",
     "test_gae.py"),

    ("losses.py", "return (logp_BT - old_logp_BT)", "return (old_logp_BT - logp_BT)",
     "test_losses.py"),
    ("losses.py", ".clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)", "", "test_losses.py"),
    ("losses.py", "-torch.minimum(", "-torch.maximum(", "test_losses.py"),
    # ★ the clip of the wrong side
    ("losses.py", "clamp(1 - eps_low, 1 + eps_high)", "clamp(1 - eps_high, 1 + eps_low)",
     "test_losses.py"),
    ("losses.py", "clamp(1 - eps_low, 1 + eps_high)", "clamp(max=1 + eps_high)", "test_losses.py"),
    ("losses.py", "clamp(1 - eps_low, 1 + eps_high)", "clamp(min=1 - eps_low)", "test_losses.py"),
    ("losses.py", "ratio(old_logp_BT, sampled_logp_BT)", "ratio(sampled_logp_BT, old_logp_BT)",
     "test_losses.py"),
    ("losses.py", ".clamp(max=cap)", "", "test_losses.py"),
    ("losses.py", "return 0.5 * (value_BT", "return (value_BT", "test_losses.py"),
    ("losses.py", "return -logp_BT", "return logp_BT", "test_losses.py"),
    ("losses.py", "length_B1.sum().clamp(min=1)", "mask_BT.numel()", "test_losses.py"),
    ("losses.py", "length_B1.sum().clamp(min=1)", "length_B1.sum()", "test_losses.py"),
    ("losses.py", "(length_B1 > 0).sum().clamp(min=1)", "len(mask_BT)", "test_losses.py"),
    ("losses.py", "mask_BT / length_B1.clamp(min=1) /", "mask_BT / mask_BT.shape[1] /",
     "test_losses.py"),
    ("losses.py", "(adv_BT > 0) & ", "", "test_losses.py"),
    ("losses.py", "(ratio_BT < 1 - eps_low)", "(ratio_BT < 1 - eps_high)", "test_losses.py"),
    ("losses.py", "ratio_BT - 1 - ratio_BT.log()", "-ratio_BT.log()", "test_losses.py"),
    ("losses.py", "torch.where(on_BT, ratio(logp_BT, old_logp_BT), 1.0)",
     "ratio(logp_BT, old_logp_BT)", "test_losses.py"),

    # ★ the group advantage over the wrong axis; an unbiased std
    ("dapo.py", "reward_B.float().view(-1, samples)", "reward_B.float().view(samples, -1)",
     "test_dapo.py"),
    ("dapo.py", "reward_PG.mean(dim=1, keepdim=True)", "reward_PG.mean()", "test_dapo.py"),
    ("dapo.py", "keepdim=True, correction=0", "keepdim=True, correction=1", "test_dapo.py"),
    ("dapo.py", "torch.where(std_P1 > 1e-6, centred_PG / std_P1.clamp(min=1e-6), 0.0)",
     "(centred_PG / std_P1)", "test_dapo.py"),
    ("dapo.py", "(right_P > 0) & ", "", "test_dapo.py"),
    ("dapo.py", " & (right_P < samples)", "", "test_dapo.py"),
    ("dapo.py", "(longest - cache - length_B", "(longest - length_B", "test_dapo.py"),
    ("dapo.py", ") / cache)", ") / longest)", "test_dapo.py"),
    ("dapo.py", ".clamp(-1.0, 0.0)", ".clamp(max=0.0)", "test_dapo.py"),

    ("logprobs.py", "return logit_SN / temperature if", "return logit_SN if", EQUAL_LOGPROBS),
    ("logprobs.py", "logit_SN = logit_SN * scale", "logit_SN = logit_SN", EQUAL_LOGPROBS),
    ("logprobs.py", "softcap * torch.tanh(", "torch.tanh(", EQUAL_LOGPROBS),
    ("logprobs.py", "sum_N = sum_N * fade_N +", "sum_N = sum_N +", EQUAL_LOGPROBS),
    ("logprobs.py", "product_N = product_N * fade_N +", "product_N = product_N +", EQUAL_LOGPROBS),
    ("logprobs.py", "logsumexp_N - product_N / sum_N", "logsumexp_N - product_N", EQUAL_LOGPROBS),
    ("logprobs.py", "(logp_SN + entropy_N)", "(logp_SN - entropy_N)", EQUAL_LOGPROBS),
    ("logprobs.py", "slope = scale / temperature", "slope = scale", EQUAL_LOGPROBS),
    ("logprobs.py", "(logit_SN * temperature / softcap)", "(logit_SN / softcap)", EQUAL_LOGPROBS),
    ("logprobs.py", "(grad_logp_N * inside_N)", "grad_logp_N", EQUAL_LOGPROBS),
    ("logprobs.py", "(token_N < start + words)", "(token_N <= start + words)", EQUAL_LOGPROBS),
    ("logprobs.py", "grad_SN.float().sum(dim=1)", "grad_SN.float().mean(dim=1)", EQUAL_LOGPROBS),

    # ★ the EOS masked out; a word too early
    ("table.py", '(t_T < rows["length_B"][:, None])', '(t_T < rows["length_B"][:, None] - 1)',
     "test_step.py"),
    ("table.py", 'rows["prompt_length_B"][:, None] + t_T',
     'rows["prompt_length_B"][:, None] - 1 + t_T', CUT),
    ("table.py", 'int((part["prompt_length_B"] + part["length_B"]).max())',
     'int(part["length_B"].max())', CUT),
    ("table.py", "pad_sequence(rows, True)", "pad_sequence(rows, True, 1)", CUT),
    ("table.py", 'torch.randperm(len(rows["length_B"]), generator=generator)',
     'torch.arange(len(rows["length_B"]))', "test_table.py"),
    ("table.py", 'count = -(-len(rows["length_B"]) // size)',
     'count = max(1, len(rows["length_B"]) // size)', "test_table.py"),
    ("table.py", "(i + 1 - starts[-1]) * length", "(i - starts[-1]) * length",
     "test_rollout.py::test_micro_batches_hold_every_row_once_and_taking_them_loses_no_token"),
    ("table.py", '(rows["entropy_BT"] * mask_BT).sum() / tokens', 'rows["entropy_BT"].mean()',
     NUMBERS),
    ("table.py", 'gap_BT.sum() / rows["length_B"].sum()', "gap_BT.mean()", NUMBERS),
    ("table.py", '1 - rows["stop_B"]', 'rows["stop_B"]', NUMBERS),
    ("table.py", 'last_B1 = rows["length_B"][:, None] - 1',
     'last_B1 = rows["length_B"][:, None] * 0', NUMBERS),

    # ★ V and log π read one position late; the temperature missing from training
    ("model.py", 'rows["prompt_length_B"][:, None] - 1 + shift',
     'rows["prompt_length_B"][:, None] + shift', SAMPLED),
    ("model.py", 'getattr(head, "bias", None), temperature', 'getattr(head, "bias", None), 1.0',
     SAMPLED),
    ("model.py", "own_BT * mask_BT", "own_BT", COLUMNS),
    ("model.py", "column_BT[index, :", "column_BT[index.sort().values, :", "test_step.py"),

    # ★ a denominator a micro-batch: policy, NLL, value
    ("train_vapo.py", '(loss_BT * micro["importance_BT"]).sum()',
     '(loss_BT * micro["importance_BT"]).sum() / micro["policy_weight_BT"].sum()', "test_step.py"),
    ("train_vapo.py", 'nll = (losses.nll_loss(logp_BT) * micro["nll_weight_BT"]).sum()',
     'nll = (losses.nll_loss(logp_BT) * (micro["nll_weight_BT"] > 0)).mean()', "test_step.py"),
    ("train_value.py", '(loss_BT * micro["critic_weight_BT"]).sum()',
     '(loss_BT * micro["critic_weight_BT"]).sum() / micro["critic_weight_BT"].sum()',
     "test_step.py"),
    # ★ log π_old from the sampler; of now, so that the ratio is always 1
    ("train_vapo.py", 'old_logp_BT, adv_BT = micro["old_logp_BT"]',
     'old_logp_BT, adv_BT = micro["sampled_logp_BT"]', "test_step.py"),
    ("train_vapo.py", 'old_logp_BT, adv_BT = micro["old_logp_BT"]',
     "old_logp_BT, adv_BT = logp_BT.detach()", "test_step.py"),
    # ★ λ from the padded length
    ("train_vapo.py", 'length_adaptive_lambda(rows["length_B"], settings.alpha)',
     'length_adaptive_lambda(rows["length_B"] * 0 + mask_BT.shape[1], settings.alpha)',
     "test_step.py"),
    ("train_vapo.py", "if settings.length_adaptive_gae:", "if True:", "test_step.py"),
    ("train_vapo.py", 'settings.lam_critic if settings.decoupled_gae else rows["lam_B"]',
     "settings.lam_critic", "test_step.py"),
    ("train_vapo.py", 'mask_BT, rows["lam_B"], lam_critic', 'mask_BT, lam_critic, rows["lam_B"]',
     "test_step.py"),
    # ★ NLL of all answers; of those with a high reward; one switch that changes two things
    ("train_vapo.py", 'mask_BT * batch["correct_B"][:, None]', "mask_BT", "test_step.py"),
    ("train_vapo.py", 'mask_BT * batch["correct_B"][:, None]',
     'mask_BT * (batch["reward_B"] > 0)[:, None]', "test_table.py"),
    ("train_vapo.py", 'losses.token_weights(correct_BT, "token")',
     "losses.token_weights(correct_BT, how)", "test_table.py"),
    ("train_vapo.py", 'batch["critic_weight_BT"] = losses.token_weights(mask_BT, "token")',
     'batch["critic_weight_BT"] = losses.token_weights(mask_BT, how)', "test_table.py"),
    ("train_vapo.py", 'how = "token" if settings.token_level_loss else "sample"', 'how = "token"',
     "test_step.py"),
    ("train_vapo.py", "settings.eps_high if settings.clip_higher else settings.eps_low",
     "settings.eps_high", "test_step.py"),
    ("train_vapo.py", "mu = settings.mu if", "mu = 0.1 if", "test_step.py"),
    ("train_vapo.py", "settings.mu if settings.positive_nll else 0.0", "settings.mu",
     "test_step.py"),
    ("train_vapo.py", "(ppo + mu * nll)", "(ppo + nll)", "test_step.py"),
    ("train_vapo.py", '(loss_BT * micro["importance_BT"]).sum()', "loss_BT.sum()", "test_step.py"),
    ("train_vapo.py", "2.0 * (table.sampler_gap(rows).item() > health.SMALL_GAP)", "2.0",
     "test_step.py"),
    ("train_vapo.py", "2.0 * (table.sampler_gap(rows).item() > health.SMALL_GAP)", "0.0",
     "test_step.py"),
    ("train_vapo.py", 'mask_BT * batch["stop_B"][:, None] if', "mask_BT if",
     "test_vapo.py::test_masked_truncated_answers_have_no_weight_for_the_policy_and_all_for_the_"
     "critic"),
    ("train_vapo.py", "token_weights(kept_BT, how)", "token_weights(mask_BT, how) * kept_BT",
     "test_vapo.py::test_masked_truncated_answers_have_no_weight_for_the_policy_and_all_for_the_"
     "critic"),
    # ★ DAPO's punishment beside rewards of 1 and 0
    ("train_vapo.py", '"reward_wrong": -1.0', '"reward_wrong": 0.0',
     "test_dapo.py::test_a_right_answer_at_the_limit_is_worth_more_than_a_short_wrong_one"),
    ("train_vapo.py", "weight_BT * mask_BT", "weight_BT", COLUMNS),
    ("train_vapo.py", "adv_B[:, None] * mask_BT", "adv_B[:, None].expand_as(mask_BT)", COLUMNS),
    ("train_vapo.py", "settings.rollout_shape()[1])", 'len(rows["reward_B"]))', "test_step.py"),
    ("train_vapo.py", "(settings.eps_low, eps_high)", "(eps_high, settings.eps_low)",
     "test_step.py"),
    ("train_vapo.py", "policy, micro, settings.temperature,", "policy, micro, 1.0,",
     "test_step.py"),
    ("train_vapo.py", "policy, rows, settings.temperature,", "policy, rows, 1.0,", "test_step.py"),
    ("train_vapo.py", "limits = (settings.max_grad_norm,", "limits = (1e9,", "test_step.py"),
    ("train_vapo.py", "warmup(settings.warmup)", "warmup(0)", "test_step.py"),
    ("train_vapo.py", "Learner(policy, settings.lr,", "Learner(policy, settings.critic_lr,",
     "test_step.py"),
    ("train_vapo.py", "Learner(critic, settings.critic_lr,", "Learner(critic, settings.lr,",
     "test_step.py"),
    ("train_vapo.py", "loading.update_sampler(sampler, policy)", "pass", "test_step.py"),
    ("train_vapo.py", "many = self.group_sampling", "many = True",
     "test_vapo.py::test_the_numbers_of_the_paper_are_the_defaults"),
    ("train_vapo.py", '"dynamic_sampling": 10, "overlong": 0.2,', '"dynamic_sampling": 10,',
     PRESETS),
    ("train_vapo.py", '"vc_ppo": {', '"vc_ppo": {"decoupled_gae": False, ', PRESETS),
    ("train_vapo.py",
     '"grpo": {"critic_free": True, "token_level_loss": False, "clip_higher": False,',
     '"grpo": {"critic_free": True, "token_level_loss": False,', PRESETS),
    # ★ a seed used twice, or not at all
    ("train_vapo.py", 'seeded_generator(settings.seed, "mini-batches")',
     'seeded_generator(settings.seed, "data order")', "test_step.py"),
    ("train_vapo.py", 'seeded_generator(settings.seed, "sampling"',
     'seeded_generator(0, "sampling"', "test_step.py"),
    ("system/run.py", 'random.Random(f"{purpose} {seed}")', 'random.Random(f"{seed}")',
     "test_step.py"),

    ("train_value.py", "model.critic_values(critic, micro, shift)",
     "model.critic_values(critic, micro)", "test_step.py"),
    ("train_value.py", 'losses.token_weights(mask_BT, "token")\n            loss =',
     'losses.token_weights(mask_BT, "sample")\n            loss =', "test_step.py"),
    ("train_value.py", "settings.max_grad_norm, schedule)", "1e9, schedule)", "test_step.py"),
    ("train_value.py", "min(1.0, (step + 1) / WARMUP)", "1.0", "test_step.py"),
    ("train_value.py", "measure(critic, held_out_rows, *how)", "measure(critic, rows, *how)",
     "test_step.py"),
    ("train_value.py", 'rows["reward_B"][:, None] * mask_BT',
     'rows["correct_B"][:, None] * mask_BT', OBJECTIVE),
    ("train_value.py", "return target_BT, mask_BT, 0", "return target_BT, mask_BT, 1", OBJECTIVE),
    ("train_value.py", 't_T == rows["length_B"][:, None] - 1', 't_T == rows["length_B"][:, None]',
     OBJECTIVE),
    ("train_value.py", 'torch.isin(rows["problem_B"], held)',
     'torch.isin(torch.arange(len(rows["problem_B"])), held)',
     "test_value.py::test_answers_to_one_problem_are_all_fitted_or_all_held_out"),
    ("train_value.py", '"lr": settings.pretrain_lr', '"lr": settings.critic_lr',
     "test_value.py::test_value_pretraining_in_a_run_has_the_runs_settings_and_its_own"),

    # ★ dynamic sampling by a shaped reward, without refilling; a truncated answer that is right
    ("rollout.py", 'dapo.mixed_groups(rows["correct_B"], samples)',
     'dapo.mixed_groups(rows["reward_B"] > 0, samples)', "test_dapo.py"),
    ("rollout.py", "while kept < prompts:", "while not parts:", "test_dapo.py"),
    ("rollout.py", "mixed_B.nonzero()[: (prompts - kept) * samples, 0]", "mixed_B.nonzero()[:, 0]",
     "test_dapo.py"),
    ("rollout.py", '"answers": len(correct) * prompts * samples', '"answers": kept * samples',
     "test_dapo.py"),
    # ★ the punishment at the wrong length
    ("rollout.py", 'length_B, longest = rows["length_B"], settings.response_length',
     'length_B, longest = rows["length_B"], int(rows["length_B"].max())', "test_dapo.py"),
    ("rollout.py", 'rows["reward_B"] += dapo', 'rows["reward_B"] = dapo', "test_dapo.py"),
    ("rollout.py", "right = ended and (verify(", "right = (verify(",
     "test_rollout.py::test_a_truncated_answer_is_never_right"),
    ("rollout.py", "(high if right else low)", "float(right)",
     "test_rollout.py::test_a_truncated_answer_is_never_right"),
    # adapters: the wrong weights leave, a head that does not learn, other adapters each time
    ("system/lora.py", "weight = weight + network", "weight = weight - network",
     "system/test_lora.py::test_the_weights_by_hand"),
    ("system/lora.py", "lora_alpha=2 * rank", "lora_alpha=rank", ADAPTERS),
    ("system/lora.py", "torch.manual_seed(seed)", "pass", ADAPTERS),
    ("system/lora.py", "head.requires_grad_()", "pass",
     "system/test_lora.py::test_merged_and_unmerged_agree_and_adapters_and_heads_learn"),
    ("system/lora.py", "parameter.data.to(network.compute_dtype)", "parameter.data",
     "system/test_lora.py::test_the_sampling_copy_is_merged_and_in_bfloat16_there_is_none"),
    # a rule that is said at every rollout, or forgets the best
    ("system/health.py", "if wrong not in since and", "if",
     "system/test_health.py::test_a_rule_is_said_once_and_again_in_the_end"),
    ("system/health.py", 'max(best, numbers["accuracy"])', 'numbers["accuracy"]',
     "system/test_health.py::test_each_rule_by_hand"),
    # a reward of one's own: the verdict taken from its sign, no number, a clock that runs on
    ("rollout.py", 'verify(text, problem["answer"]) if correct is None else correct',
     "number > 0 if number is not None else verify(text, problem['answer'])",
     "test_reward.py::test_the_bool_decides_then_the_verifier_and_a_cut_answer_is_wrong"),
    ("system/reward.py", "abs(number) < 1e30", "True",
     "test_reward.py::test_what_a_reward_may_not_return_is_named_by_problem_file_and_line"),
    ("system/reward.py", "signal.setitimer(signal.ITIMER_REAL, 0)", "pass",
     "test_reward.py::test_the_time_limit_is_for_the_call_alone"),
    ("rollout.py", 'rows["problem_B"].new_tensor(chosen)[rows["problem_B"]]', 'rows["problem_B"]',
     "test_rollout.py::test_answers_are_judged_by_the_problem_that_was_asked"),
    ("rollout.py", 'progress["queue"][:count], progress["queue"][count:]',
     'progress["queue"][:count], progress["queue"]',
     "test_vapo.py::test_next_problems_goes_through_all_of_them_before_any_comes_again"),
    ("rollout.py", "prompt_lengths.repeat_interleave(samples)", "prompt_lengths.repeat(samples)",
     SAMPLED),
    ("rollout.py", "token_BL[own, end : end + longest] =", "token_BL[own, -longest:] =", SAMPLED),
    ("rollout.py", "slice(i * samples, (i + 1) * samples)", "slice(i, None, len(prompts))",
     SAMPLED),
    # ★ `generate` that keeps the model's own generation_config
    ("system/generate.py", "policy.generation_config, GenerationConfig()",
     "policy.generation_config, policy.generation_config",
     "test_rollout.py::test_the_models_own_generation_config_changes_no_distribution"),
    ("logprobs.py", "// 640", "// 64_000",
     "test_logprobs.py::test_with_a_gpus_slices_a_micro_batch_takes_hundreds_of_kernels"),
    ("logprobs.py", "low = weight_SD.is_cuda and", "low = False and",
     "test_logprobs.py::test_on_a_gpu_the_product_of_bfloat16_numbers_is_float32"),
    ("system/slots.py", "draw(logit_RV, generator, temperature, top_p)",
     "draw(logit_RV, generator, 1.0, top_p)", SAMPLED),
    ("system/slots.py", "draw(logit_RV, generator, temperature, top_p)",
     "draw(logit_RV, generator, temperature)", BOTH),
    ("rollout.py", "all_logprobs(policy, rows, temperature or 1.0,",
     "all_logprobs(policy, rows, 1.0,", BOTH),

    ("evaluate.py", "comb(samples - correct, k) / comb(samples, k)", "(1 - correct / samples) ** k",
     "test_evaluate.py::test_pass_at_k_by_hand"),
    ("evaluate.py", "if answer is None else canonical(answer)", "if answer is None else answer",
     "test_evaluate.py::test_the_majority_is_of_meanings_not_of_texts"),
    ("evaluate.py", "for vote in votes if vote is not None", "for vote in votes",
     "test_evaluate.py::test_the_majority_is_of_meanings_not_of_texts"),
    ("evaluate.py", "extract_answer(t, bare_number) if ended else None",
     "extract_answer(t, bare_number)", "test_evaluate.py::test_how_each_problem_went_by_hand"),
    ("evaluate.py", "own = slice(i * samples, (i + 1) * samples)",
     "own = slice(i, None, len(problems))", "test_evaluate.py::test_how_each_problem_went_by_hand"),

    ("system/learner.py", "weight_decay=0.0", "weight_decay=0.01", "test_step.py"),
    ("system/learner.py", "learner.scheduler.step()",
     'learner.scheduler.step() if learner is not learners.get("critic") else None', "test_step.py"),
    ("system/learner.py", "start_factor=1 / steps, total_iters=steps - 1",
     "start_factor=1 / steps, total_iters=steps", "system/test_learner.py"),
    ("system/learner.py", "learner.network.parameters(), learner.max_grad_norm)",
     "learner.network.parameters(), 1e9)", "system/test_learner.py"),
    ("system/learner.py", "if finite:", "if True:", "system/test_learner.py"),
    ("system/learner.py", "all(map(math.isfinite, metrics.values()))", "True",
     "system/test_learner.py"),
    ("system/learner.py", "learner.optimizer.zero_grad()", "pass", "system/test_learner.py"),

    ("system/metrics.py", 'max(before, value) if name.endswith("_max") else before + value',
     "before + value", "system/test_metrics.py"),
    ("system/metrics.py", "sums[name] / tokens", "sums[name]", "system/test_metrics.py"),
    ("system/metrics.py", "1 - (tokens + prompts) /", "1 - tokens /", "system/test_metrics.py"),
    ("system/metrics.py", 'if not update["bad_steps"]] or updates', "] or updates",
     "system/test_metrics.py"),
    ("system/metrics.py", '{"ratio_max": largest, ', "{", "system/test_metrics.py"),
    ("system/metrics.py", 'tokens / seconds["update"]', 'tokens / seconds["sample"]',
     "system/test_metrics.py"),

    ("system/slots.py", "logit_RV.float() / temperature", "logit_RV.float() * temperature",
     "test_rollout.py::test_the_temperature_by_hand"),
    ("system/slots.py", "weight_RNB.sum(dim=-1)", "weight_RNB.amax(dim=-1)", INVERSE),
    ("system/slots.py", "share_R1 * inner_RB[:, -1:], right=True", "share_R1 * inner_RB[:, -1:]",
     INVERSE),
    ("system/slots.py", "(1 - left_R1).clamp", "left_R1.clamp", INVERSE),
    ("system/slots.py", "chosen_R1 * BLOCK + inner_R1", "chosen_R1 + inner_R1", INVERSE),
    ("system/slots.py", "position_R[enter_R] = prompt_length_P[prompt_R] - 1",
     "position_R[enter_R] = prompt_length_P[prompt_R]", SAMPLED),
    ("system/slots.py", "row_R[enter_R] // samples - read_from", "row_R[enter_R] % samples",
     GREEDY),
    ("system/slots.py", "stop_B[row_R] = torch.isin(last_R, eos_N)",
     "stop_B[row_R] = last_R == eos_N[0]", SAMPLED),
    ("system/slots.py", "(t_R + 1 == max_tokens), answers", "(t_R + 2 == max_tokens), answers",
     "test_rollout.py::test_a_row_that_ends_at_the_limit_and_one_that_is_cut_there"),
    ("system/slots.py", "(column_K >= self.start_R[:, None])", "(column_K > self.start_R[:, None])",
     SAMPLED),
    ("system/slots.py", "(self.start_R - unused).clamp(min=0)", "self.start_R", GREEDY),
    ("system/slots.py", "self.start_R = self.start_R[keep_R]",
     "self.start_R = self.start_R[: len(keep_R)]", SAMPLED),
    ("system/slots.py", "mask_PL.cumsum(dim=1) - 1", "mask_PL.cumsum(dim=1)", SAMPLED),

    ("system/truth.py", "token == truth[steps - left + 1]", "token == truth[steps - left]",
     "test_truth.py"),
    ("system/truth.py", "current == truth[steps - left], left", "True, left", "test_truth.py"),
    ("system/truth.py", "(total + 2 * prior) / (count + 2)", "total / max(count, 1)",
     "test_truth.py"),
    ("system/truth.py", "value_T[t] - value_T[t + 2]", "value_T[t] - value_T[t + 1]",
     "test_truth.py"),
    ("system/truth.py", "and on_track and stepped", "and stepped", "test_truth.py"),
    ("system/truth.py", "slips.append(not still)", "slips.append(still)", "test_truth.py"),
    ("system/truth.py", "(below + not_above)", "(below + below)", "test_truth.py"),

    # ★ a verifier that takes any last number, a first answer, or half of one
    ("verifier.py", "if bare_number else [None]", "if True else [None]", VERDICTS),
    ("verifier.py", "*earlier, last = stated", "last, *earlier = stated", ONE_LINE),
    ("verifier.py", "if None in stated or", "if", VERDICTS),
    ("verifier.py", "all(answer == last or equal(answer, last) for answer in earlier)", "True",
     VERDICTS),
    ("verifier.py", "text.rfind(\"\\n\", 0, marks[-1].start()) + 1", "0", VERDICTS),
    ("verifier.py", "if depth == 0:", "if depth <= 1 and character == \"}\":", VERDICTS),
    ("verifier.py", "0 < len(answer) <= LONGEST", "len(answer) <= LONGEST", VERDICTS),
    ("verifier.py", "text = SPECIAL_TOKEN.sub(\"\", text[-TAIL:])", "text = text[-TAIL:]",
     VERDICTS),
    ("verifier.py", "or len(stated) > MOST_STATED:", ":", ONE_LINE),

    ("toy.py", "order[1:] + order[:1]", "order[2:] + order[:2]", "test_toy.py"),
    ("toy.py", "[c for c in LETTERS if c != right]", "LETTERS", "test_toy.py"),
    ("toy.py", "text + letter + REDO, right", "text + letter + REDO, letter", "test_toy.py"),
    ("toy.py", "if (problem := draw()) not in test:", "if problem := draw():", "test_toy.py"),
    ("toy.py", "math.log((n + 0.5) / (n - 0.5))", "1.0", "test_toy.py"),
    ("toy.py", "take(rows, other), take(rows, half), pool=8",
     "take(rows, half), take(rows, half), pool=8", "test_truth.py"),
    ("system/loading.py", 't_BL - rows["prompt_length_B"][:, None]',
     't_BL - rows["prompt_length_B"][:, None] + 1', SURPRISE),
    ("system/loading.py", "(t_BL < length_B1), surprise_BL",
     "(t_BL < length_B1 - 1), surprise_BL", "test_table.py"),
    ("table.py", "1 - explained_variance(outcome_BT - adv_BT",
     "explained_variance(outcome_BT - adv_BT", NUMBERS),
    ("system/loading.py", "critic.surprise.weight.zero_()", "pass", SURPRISE),
    ("lab/plan.py", "(4, 4): 24, (2, 2): 16", "(4, 4): 16, (2, 2): 24", "lab/test_plan.py"),
    ("lab/plan.py", "tied = 3 * head", "tied = head", "lab/test_plan.py"),
    ("lab/plan.py", "s.size * (3 * s.layer", "s.size * (2 * s.layer", "lab/test_plan.py"),
    ("lab/report.py", "max(lead.mean()) < 0.05", "max(lead.mean()) > 0.05", REPORT),
    ("lab/effects.py", "signs(bits, sets) / 2", "signs(bits, sets)", EFFECTS),
    ("lab/effects.py", "ddof=1) / 2)", "ddof=1))", EFFECTS),
    ("lab/effects.py", "len(set_) >= 4", "len(set_) >= 1", EFFECTS),
    ("lab/effects.py", "effect_W**2) * 128 / 4", "effect_W**2) * 128", EFFECTS),
    ("lab/effects.py", "two[i,] - one[i,]", "one[i,] - two[i,]", EFFECTS),
    ("lab/report.py", "len(part) >= 256", "len(part) >= 128", REPLICATE),
    ("lab/effects.py", "comb(6, bits.count", "comb(7, bits.count", EFFECTS),
    ("lab/effects.py", "0.5 * so_far", "0.4 * so_far", EFFECTS),
    ("ablate.py", "key=syndrome", "key=len",
     "test_ablate.py::test_a_part_of_the_cube_is_a_regular_fraction_of_resolution_four"),
    ("ablate.py", "own = {piece: False for piece, bit in zip(PIECES, bits)",
     "own = {piece: False for piece, bit in zip(PIECES, bits[::-1])",
     "test_ablate.py::test_the_cube_is_all_combinations_and_nothing_else_changes"),
]
# Those that need a training run.
SLOW = [
    ("evaluate.py", "problems), settings.eval_top_p", "problems), 1.0", EVALUATED),
    ("evaluate.py", '(settings, verify, 1.0, f"evaluation',
     '(settings, verify, settings.temperature, f"evaluation', EVALUATED),
    ("evaluate.py", "rollout.sample(*asked, 1, temperature=0.0, **how)",
     "rollout.sample(*asked, 1, temperature=1.0, **how)", EVALUATED),
    ("train_value.py", "reward.load(settings.reward)[1] if settings.reward else None", "None",
     "test_reward.py::test_value_pretraining_has_the_same_reward_and_its_answers_are_for_it_alone"),
    ("system/reward.py", "copy.read_text() == source", "True",
     "test_reward.py::test_a_function_that_has_changed_is_noticed_on_resume"),
    ("train_vapo.py", 'progress["sampled"] + drawn["answers"]',
     'progress["sampled"] + len(rows["length_B"])',
     "test_vapo.py::test_the_rivals_run_from_start_to_saved_policy_each_in_its_own_way"),
    ("train_vapo.py", "start = starting_critic(settings, run_dir, policy)",
     "start = settings.model", "test_vapo.py::test_rewards_reach_the_pretrained_critic"),
    ("model.py", "response_hidden(critic.base_model, rows, shift, surprise)",
     "response_hidden(critic.base_model, rows, 0, surprise)",
     "test_value.py::test_critic_from_a_reward_model_gives_the_reward_models_scores"),
    ("train_value.py", "(1 - step / limit if settings.decay else 1.0)", "1.0",
     "test_value.py::test_short_answers_come_first_and_the_learning_rate_falls_to_zero_if_asked"),
    ("train_value.py", 'held_out["value_loss"] < best["value_loss"]', "True", BEST),
    ("train_value.py", 'progress["worse"] == settings.patience', "False", BEST),
    ("train_value.py", 'fit_rows["reward_B"].mean().item()', "0.0",
     "test_value.py::test_rewards_pass_into_the_values"),
]
# fmt: on


def copy_of_the_tree(directory):
    """Copies the files that git knows or would add, to be changed."""
    listed = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, text=True).split("\0"):
        if name and (ROOT / name).is_file() and not name.startswith("results/"):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, directory / name)
    return directory


def forked(copy, tests, log, mutated):
    """Starts pytest on tests of a copy of the tree. Returns: the process id."""
    if pid := os.fork():
        return pid
    os.setsid()  # what the tests start ends with them
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1), os.dup2(written, 2)
    os.chdir(copy)
    sys.path[:] = [str(copy), *(p for p in sys.path if Path(p).resolve() != ROOT)]
    sys.dont_write_bytecode = mutated
    code = pytest.main(["-x", "-q", "--tb=short", "-p", "no:cacheprovider", *tests])
    sys.stdout.flush()
    os._exit(code)


def exit_codes(jobs, copies, directory, label):
    """Yields (job, pytest's exit code or None if it did not end, log) of each job, as they end.
    Args: jobs, (file, old, new, tests), file "" for the tree as it is; directory, for the logs."""
    waiting, running, free = list(jobs), {}, list(copies)
    bar = tqdm(total=len(waiting), desc=label, unit="mutant", leave=False)
    while waiting or running:
        while waiting and free:
            job, copy = waiting.pop(0), free.pop()
            file, old, new, tests = job
            if file:
                before = (copy / file).stat()
                (copy / file).write_text((ROOT / file).read_text().replace(old, new))
                os.utime(copy / file, (1, 1))  # another time than that of the bytecode
            log = directory / f"{len(waiting)}.log"
            pid = forked(copy, [f"tests/{test}" for test in tests.split()], log, bool(file))
            undo = (copy / file, (before.st_atime, before.st_mtime)) if file else None
            running[pid] = job, copy, log, time.monotonic() + LIMIT, undo
        for pid, (job, copy, log, until, undo) in list(running.items()):
            late = time.monotonic() > until
            if late:
                os.killpg(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, 0 if late else os.WNOHANG)
            if ended:
                del running[pid]
                if undo:
                    shutil.copyfile(ROOT / job[0], undo[0])
                    os.utime(*undo)
                free.append(copy)
                bar.update()
                yield job, None if late else os.waitstatus_to_exitcode(status), log.read_text()
        time.sleep(0.02)
    bar.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="without those of a training run")
    parser.add_argument("--only", default="", help="those whose row has this text")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, help="mutants side by side")
    parser.add_argument("--verbose", action="store_true", help="say what noticed each mutant")
    asked = parser.parse_args()
    jobs = max(1, asked.jobs)
    mutants = QUICK + ([] if asked.quick else SLOW)
    mutants = [mutant for mutant in mutants if any(asked.only in text for text in mutant)]

    stale = [m for m in mutants if (ROOT / m[0]).read_text().count(m[1]) != 1]
    for file, old, *_ in stale:
        print(f"stale: {file} has {(ROOT / file).read_text().count(old)} times {old!r}")
    if stale:
        return 2
    tqdm.monitor_interval = 0  # no thread: this process forks
    broken, survived, started = [], [], time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        whole = copy_of_the_tree(directory / "whole")
        # What notices a mutant must pass without it. This writes the bytecode of all copies.
        by_file = {}
        for *_, tests in mutants:
            for test in tests.split():
                by_file.setdefault(test.partition("::")[0], {})[test] = None
        as_it_is = [("", "", "", " ".join(tests)) for tests in by_file.values()]
        for (*_, tests), code, log in exit_codes(as_it_is, [whole] * jobs, directory, "as it is"):
            if code:
                print(f"{log}\nthe tests fail without any mutant: {tests}")
                broken.append(tests)
        if broken:
            return 2
        copies = [Path(shutil.copytree(whole, directory / f"copy {i}")) for i in range(jobs)]
        for mutant, code, log in exit_codes(mutants, copies, directory, "mutants"):
            file, old, new, tests = mutant
            said = f"{file}: {old!r} → {new!r} ({tests})"
            if code == 0:
                survived.append(said)
                tqdm.write(f"survived: {said}")
            elif code != 1:
                broken.append(said)
                tqdm.write(f"{log}\npytest ended with {code}: {said}")
            elif asked.verbose:
                noticed = [line for line in log.splitlines() if line.startswith("FAILED")]
                tqdm.write(f"caught: {said}\n        {' '.join(noticed)[:200]}")
    print(f"{time.monotonic() - started:.0f} seconds")
    print(f"{len(mutants)} mutants, {len(survived)} survived")
    return 2 if broken else 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
