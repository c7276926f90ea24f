"""train_vapo.py: the mini-batch, the seven flags, the run, its artefacts and its resumption."""

import functools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, GPT2Config

import checkpoint
import logprobs
import losses
import model
import ppo
import problems as problem_files
import rollout
import summary
import table
import toy
import train_value
import train_vapo

KERNELS = SimpleNamespace(
    logprobs=(logprobs.add_slice, logprobs.slice_gradient), policy_loss=losses.policy_loss, value_loss=losses.value_loss
)
SETTINGS = train_vapo.Settings(train="t", test="t", alpha=0.5)
SMALL = ["--device=cpu", "--prompts=6", "--samples=4", "--mini_batch=8", "--micro_batch_tokens=256", "--eval_samples=2", "--save_every=2", "--eval_every=2",
         "--pretrain_answers=64", "--pretrain_passes=1"]  # fmt: skip
PIECES = ["value_pretraining", "decoupled_gae", "length_adaptive_gae", "token_level_loss", "clip_higher", "positive_nll", "group_sampling"]


def vapo_run(world, out, *flags):
    return train_vapo.main([f"@{world}/train_vapo.args", *SMALL, f"--out={out}", *flags])


def metrics_of(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def without_clock(lines):
    return [{name: v for name, v in line.items() if "second" not in name} for line in lines]


def tensors_of(run_dir):
    """All tensors of the run's last checkpoint, by name."""
    directory, _ = checkpoint.load(run_dir)
    known = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(kind.size, dtype=kind.properties.dtype) for name, kind in known.items()}
    dcp.load(tensors, checkpoint_id=directory, no_dist=True)
    return tensors


def saved_network(run_dir, name):
    """The state dict of `policy` or `critic` in the run's last checkpoint."""
    return {key.removeprefix(f"{name}/"): tensor for key, tensor in tensors_of(run_dir).items() if key.startswith(f"{name}/")}


def weights_of(run_dir):
    return AutoModelForCausalLM.from_pretrained(Path(run_dir) / "policy", dtype=torch.float32).state_dict()


@pytest.fixture
def pair(world, device):
    """(policy, critic, tokenizer): the world's base model and a critic with a random head."""
    base = str(world / "base")
    critic = model.load_critic(base, device)
    torch.manual_seed(0)
    torch.nn.init.normal_(critic.score.weight, std=0.1)
    return model.load_policy(base, device), critic, model.load_tokenizer(base)


@pytest.fixture
def rows(world, pair, device):
    """A judged rollout of 24 answers, some right and some wrong, with advantages as SETTINGS make them."""
    policy, critic, tokenizer = pair
    problems = problem_files.load_problems(world / "train.jsonl")[:6]
    problem_files.encode_prompts(problems, tokenizer, "{problem}:", 8)
    rows = rollout.sample(policy, tokenizer, problems, 4, 24, 1.0, torch.Generator(device).manual_seed(0))
    rollout.judge(rows, tokenizer, problems)
    assert 0 < rows["correct_B"].float().mean() < 1 and len(rows["length_B"].unique()) > 3
    ppo.old_logprobs_and_values(policy, critic, rows, SETTINGS, KERNELS)
    return ppo.compute_advantages(rows, SETTINGS)


def gradients(pair, rows, settings):
    """(policy's, critic's, metrics) of one mini-batch, the gradients as one vector each."""
    policy, critic, _ = pair
    policy.zero_grad(), critic.zero_grad()
    metrics = ppo.backward(policy, critic, ppo.add_weights(dict(rows), settings), settings, KERNELS)
    return *(torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (policy, critic)), metrics


# Zero advantages leave only the NLL in the policy's gradient; μ = 0 leaves only the clipped loss.
@pytest.mark.parametrize("only", ["policy and value", "nll", "sample-level"])
def test_gradients_do_not_depend_on_the_micro_batch_split(pair, rows, only):
    settings = replace(SETTINGS, positive_nll=only == "nll", mu=1.0, token_level_loss=only != "sample-level")
    if only == "nll":
        rows = rows | {"adv_BT": torch.zeros_like(rows["adv_BT"])}
    else:  # ratios away from 1, some of them clipped
        rows = rows | {"old_logp_BT": rows["old_logp_BT"] + torch.randn_like(rows["old_logp_BT"]) * 0.3}
    results = [gradients(pair, rows, replace(settings, micro_batch_tokens=tokens)) for tokens in (10_000, 60, 1)]
    tolerance = 1e-5 if rows["adv_BT"].device.type == "cpu" else 2e-2
    for policy_gradient, critic_gradient, metrics in results[1:]:
        torch.testing.assert_close(policy_gradient, results[0][0], rtol=0, atol=tolerance * results[0][0].abs().max().item())
        torch.testing.assert_close(critic_gradient, results[0][1], rtol=0, atol=tolerance * results[0][1].abs().max().item())
        assert 0 <= metrics.pop("padding") <= 1
        assert metrics == pytest.approx(
            {name: number for name, number in results[0][2].items() if name != "padding"}, rel=10 * tolerance, abs=10 * tolerance
        )
    assert results[0][0].abs().max() > 1e-3 and results[0][1].abs().max() > 1e-3
    assert results[0][2]["padding"] > 0  # all rows side by side; one by one there is none


def test_gradient_checkpointing_runs_the_layers_twice_and_changes_no_gradient(pair, rows):
    layers = [pair[0].model.layers[0], pair[1].model.layers[0]]
    runs = {layer: [] for layer in layers}
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda *_, layer=layer: runs[layer].append(torch.is_grad_enabled()))
    expected = gradients(pair, rows, SETTINGS)
    once = [len(runs[layer]) for layer in layers]
    for network in pair[:2]:
        model.checkpoint_gradients(network, True)
    again = gradients(pair, rows, SETTINGS)
    assert [len(runs[layer]) for layer in layers] == [3 * count for count in once]  # one pass more, and its repetition
    for ours, theirs in zip(again[:2], expected):
        torch.testing.assert_close(ours, theirs)
    assert not any(part.training for network in pair[:2] for part in network.modules())  # a sampler would lose its cache


def test_rows_one_by_one_have_no_padding(pair, rows):
    length_B = rows["prompt_length_B"] + rows["length_B"]
    for tokens, padding in ((1, 0), (10_000, 1 - length_B.sum().item() / (len(length_B) * length_B.max().item()))):
        assert gradients(pair, rows, replace(SETTINGS, micro_batch_tokens=tokens))[2]["padding"] == pytest.approx(padding)


def test_padding_content_never_matters_for_gradients(pair, rows):
    clean = gradients(pair, rows, SETTINGS)
    dirty = dict(rows)
    off_BT = table.response_mask(rows) == 0
    for name in ("old_logp_BT", "adv_BT", "target_BT", "old_value_BT"):
        dirty[name] = rows[name].masked_fill(off_BT, 1e6)
    position_L = torch.arange(rows["token_BL"].shape[1], device=off_BT.device)
    off_BL = position_L >= (rows["prompt_length_B"] + rows["length_B"])[:, None]
    dirty["token_BL"] = rows["token_BL"].masked_fill(off_BL, 9)
    assert off_BT.any() and off_BL.any()
    for a, b in zip(clean[:2], gradients(pair, dirty, SETTINGS)[:2]):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * a.abs().max().item())


def test_targets_are_the_outcome_and_lambda_follows_the_length(rows):
    mask_BT = table.response_mask(rows)
    torch.testing.assert_close(rows["target_BT"], rows["reward_B"][:, None] * mask_BT, rtol=0, atol=1e-5)
    torch.testing.assert_close(rows["lam_B"], (1 - 2 / rows["length_B"].float()).clamp(min=0))


def test_decoupled_gae_off_gives_the_critic_the_policys_lambda(rows):
    coupled = ppo.compute_advantages(dict(rows), replace(SETTINGS, decoupled_gae=False))
    assert torch.equal(coupled["adv_BT"], rows["adv_BT"])
    expected_BT = (rows["adv_BT"] + rows["old_value_BT"]) * table.response_mask(rows)
    torch.testing.assert_close(coupled["target_BT"], expected_BT)
    assert not torch.allclose(coupled["target_BT"], rows["target_BT"], atol=1e-2)


def test_length_adaptive_gae_off_gives_one_lambda(rows):
    fixed = ppo.compute_advantages(dict(rows), replace(SETTINGS, length_adaptive_gae=False, lam_policy=0.9))
    assert (fixed["lam_B"] == 0.9).all() and torch.equal(fixed["target_BT"], rows["target_BT"])
    assert not torch.allclose(fixed["adv_BT"], rows["adv_BT"], atol=1e-2)


def test_token_level_loss_off_weighs_answers(rows):
    for settings, expected_B in (
        (SETTINGS, rows["length_B"] / rows["length_B"].sum()),
        (replace(SETTINGS, token_level_loss=False), torch.full_like(rows["reward_B"], 1 / 24)),
    ):
        batch = ppo.add_weights(dict(rows), settings)
        torch.testing.assert_close(batch["policy_weight_BT"].sum(dim=1), expected_B)
        torch.testing.assert_close(batch["critic_weight_BT"].sum(dim=1), rows["length_B"] / rows["length_B"].sum())


def test_clip_higher_lets_good_tokens_rise_between_the_two_limits(pair, rows):
    # Every ratio is 1.25, every advantage positive: beyond 1 + ε_low, within 1 + ε_high.
    risen = rows | {"old_logp_BT": rows["old_logp_BT"] - 0.2231, "adv_BT": torch.ones_like(rows["adv_BT"])}
    settings = replace(SETTINGS, positive_nll=False)
    policy_gradient, _, metrics = gradients(pair, risen, settings)
    assert policy_gradient.abs().max() > 1e-3 and metrics["clip_high"] == 0
    policy_gradient, _, metrics = gradients(pair, risen, replace(settings, clip_higher=False))
    assert policy_gradient.abs().max() == 0 and metrics["clip_high"] == 1


def test_positive_nll_pulls_towards_correct_answers_by_the_verdict(pair, rows):
    still = rows | {"adv_BT": torch.zeros_like(rows["adv_BT"]), "reward_B": 1 - rows["reward_B"]}  # a shaped reward
    on, _, metrics = gradients(pair, still, SETTINGS)
    off, _, _ = gradients(pair, still, replace(SETTINGS, positive_nll=False))
    correct = table.take(rows, rows["correct_B"].nonzero()[:, 0])
    mask_BT = table.response_mask(correct)
    assert metrics["nll_loss"] == pytest.approx((-(correct["old_logp_BT"] * mask_BT).sum() / mask_BT.sum()).item(), rel=1e-2)
    assert on.abs().max() > 1e-3 and off.abs().max() == 0
    none, _, metrics = gradients(pair, still | {"correct_B": torch.zeros_like(rows["correct_B"])}, SETTINGS)
    assert none.abs().max() == 0 and metrics["nll_loss"] == 0


def test_every_piece_has_a_flag_that_turns_it_off(world):
    on = train_vapo.parse_settings(train_vapo.Settings, [f"@{world}/train_vapo.args"], "")
    for piece in PIECES:
        off = train_vapo.parse_settings(train_vapo.Settings, [f"@{world}/train_vapo.args", f"--no_{piece}"], "")
        assert getattr(on, piece) and off == replace(on, **{piece: False})


def test_group_sampling_off_asks_as_many_prompts_once(world, tmp_path, monkeypatch):
    asked, sample = [], rollout.sample

    def spy(policy, tokenizer, problems, samples, *rest, **options):
        asked.append((len(problems), samples))
        return sample(policy, tokenizer, problems, samples, *rest, **options)

    monkeypatch.setattr(rollout, "sample", spy)
    for name, flags in (("on", []), ("off", ["--no_group_sampling"])):
        vapo_run(world, tmp_path / name, "--steps=1", "--no_value_pretraining", *flags)
    assert (6, 4) in asked and (24, 1) in asked


def test_value_pretraining_off_starts_from_an_ignorant_critic(world, run, tmp_path):
    vapo_run(world, tmp_path / "off", "--steps=1", "--no_value_pretraining")
    assert not (tmp_path / "off" / "value").exists()
    assert metrics_of(tmp_path / "off")[1]["value_first"] == 0
    assert metrics_of(run)[1]["value_first"] > 0.05
    # the critic that the run started from is the pretrained one
    pretrained = AutoModelForTokenClassification.from_pretrained(run / "value" / "critic", dtype=torch.float32).state_dict()
    saved = saved_network(run, "critic")
    assert pretrained.keys() == saved.keys() and not torch.equal(pretrained["score.weight"], saved["score.weight"])


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """The directory of a whole run of 4 rollouts with 3 optimiser steps each."""
    out = tmp_path_factory.mktemp("run") / "vapo"
    returned = vapo_run(world, out, "--steps=4")
    assert returned["run_dir"] == str(out) and {"accuracy", "before_accuracy", "greedy_accuracy", "length", "truncated"} <= returned.keys()
    return out


def test_the_ratio_is_one_at_the_first_update_and_moves_later(world, tmp_path):
    for name, mini_batch in (("one", 24), ("several", 6)):
        vapo_run(world, tmp_path / name, "--steps=1", "--no_value_pretraining", f"--mini_batch={mini_batch}", "--warmup=0")
    one, several = metrics_of(tmp_path / "one")[1], metrics_of(tmp_path / "several")[1]
    assert one["ratio_max"] == pytest.approx(1, abs=1e-4) and one["approx_kl"] == pytest.approx(0, abs=1e-6) and one["gradient_steps"] == 1
    assert several["ratio_max"] > 1.001 and several["approx_kl"] > 1e-6 and several["gradient_steps"] == 4


def test_a_compiled_run_equals_an_eager_one(world, tmp_path, monkeypatch):
    compiled, compile_it = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda kernel, **options: compiled.append(kernel.__name__) or compile_it(kernel, **options))
    for name, flags in (("eager", []), ("compiled", ["--compile"])):
        vapo_run(world, tmp_path / name, "--steps=1", "--no_value_pretraining", *flags)
    eager, fast = (without_clock(metrics_of(tmp_path / name))[1] for name in ("eager", "compiled"))
    assert compiled == ["add_slice", "slice_gradient", "policy_loss", "value_loss"]
    assert fast == pytest.approx(eager, rel=1e-3, abs=1e-5)


def test_a_run_on_every_device(world, device, tmp_path):
    vapo_run(world, tmp_path, "--steps=2", f"--device={device}")
    assert metrics_of(tmp_path)[2]["sampler_gap"] < (1e-5 if device.type == "cpu" else 0.1)


def test_the_temperature_is_that_of_the_sampler_and_of_training(world, tmp_path):
    vapo_run(world, tmp_path, "--steps=1", "--no_value_pretraining", "--temperature=0.6", "--mini_batch=24")
    line = metrics_of(tmp_path)[1]
    assert line["sampler_gap"] < 1e-5 and line["ratio_max"] == pytest.approx(1, abs=1e-4)


def test_rewards_reach_the_pretrained_critic(world, tmp_path):
    vapo_run(world, tmp_path, "--steps=1", "--reward_correct=0", "--reward_wrong=-2")
    assert metrics_of(tmp_path)[1]["value_first"] < -0.5


def test_without_a_model_the_embedded_world_is_built_and_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = functools.partial(toy.World, min_steps=1, max_steps=4, layers=1, width=32, updates=20, update_rows=16, test_problems=4)
    monkeypatch.setattr(toy, "World", small)
    returned = train_vapo.main([*SMALL, "--steps=1"])
    assert (Path(returned["run_dir"]) / "policy" / "model.safetensors").exists() and returned["run_dir"].startswith("runs/vapo-")
    critic = train_value.main(["--device=cpu", "--answers=64", "--passes=1", "--out=runs/value"])["critic"]
    assert (Path(critic) / "model.safetensors").exists() and (tmp_path / "runs" / "toy" / "base").exists()


def test_another_model_and_other_problems_take_the_same_path(tokenizer, tmp_path):
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=512, bos_token_id=None, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "problems.jsonl").write_text("".join(f'{{"problem": "What is {n} plus 1?", "answer": {n + 1}}}\n' for n in range(9)))
    files = [f"--model={tmp_path}/model", f"--train={tmp_path}/problems.jsonl", f"--test={tmp_path}/problems.jsonl"]
    train_vapo.main([*files, *SMALL, "--steps=1", "--prompt_length=400", "--response_length=16", f"--out={tmp_path}/run"])
    line = metrics_of(tmp_path / "run")[1]
    assert line["accuracy"] == 0 and line["explained_variance"] is None and line["sampler_gap"] < 1e-5
    critic = AutoModelForTokenClassification.from_pretrained(tmp_path / "run" / "critic")
    assert critic.config.num_labels == 1 and critic.config.classifier_dropout == 0


def test_a_sampler_that_is_not_the_policy_is_reported(world, tmp_path, monkeypatch, capsys):
    sample = rollout.sample

    def another(*args, **options):
        rows = sample(*args, **options)
        return rows | {"sampled_logp_BT": rows["sampled_logp_BT"] * 3}

    monkeypatch.setattr(rollout, "sample", another)
    vapo_run(world, tmp_path, "--steps=1", "--no_value_pretraining")
    assert "warning: rollout 1 was sampled from another distribution than is trained: sampler_gap" in capsys.readouterr().out


def test_a_run_stopped_before_its_first_checkpoint_starts_again(world, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_vapo, "train", stopped)
        with pytest.raises(SystemExit):
            vapo_run(world, tmp_path, "--steps=1")
    pretrained = (tmp_path / "value" / "critic" / "model.safetensors").stat().st_mtime_ns
    train_vapo.main([f"--resume={tmp_path}"])
    assert [line["step"] for line in metrics_of(tmp_path)] == [0, 1]
    assert (tmp_path / "value" / "critic" / "model.safetensors").stat().st_mtime_ns == pretrained


def test_a_run_is_deterministic(world, run, tmp_path):
    vapo_run(world, tmp_path / "again", "--steps=4")
    assert without_clock(metrics_of(tmp_path / "again")) == without_clock(metrics_of(run))
    again, first = weights_of(tmp_path / "again"), weights_of(run)
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(world, run, tmp_path):
    out = tmp_path / "part"
    vapo_run(world, out, "--steps=2")
    with open(out / "metrics.jsonl", "a") as file:  # a step that was logged, and lost before its checkpoint
        file.write('{"step": 3, "reward": 9.9}\n{"step": 4, "rew')
    train_vapo.main([f"--resume={out}", "--steps=4"])
    assert without_clock(metrics_of(out)) == without_clock(metrics_of(run))
    assert [line["step"] for line in metrics_of(out)] == [0, 1, 2, 3, 4]
    for part, whole in ((out / "policy", run / "policy"), (out / "critic", run / "critic")):
        assert (part / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    tensors, whole = tensors_of(out), tensors_of(run)
    assert tensors.keys() == whole.keys() and all(torch.equal(tensors[name], whole[name]) for name in whole)
    assert {name.split("/")[0] for name in whole} == {"policy", "critic", "policy_optimizer", "critic_optimizer"}
    (_, rest), (_, expected) = checkpoint.load(out), checkpoint.load(run)
    assert rest["queue"] == expected["queue"] and rest["policy_scheduler"] == expected["policy_scheduler"]
    assert all(torch.equal(rest[f"{g}_generator"], expected[f"{g}_generator"]) for g in ("order", "sample", "mini_batch"))


def test_the_rivals_run_from_start_to_saved_policy_each_in_its_own_way(world, tmp_path):
    for preset in train_vapo.PRESETS:
        vapo_run(world, tmp_path / preset, f"--preset={preset}", "--steps=1", "--overlong=0.5")
        saved = {path.name for path in (tmp_path / preset).iterdir() if path.is_dir()} - {"tb", "checkpoint"}
        assert saved == {
            "vapo": {"value", "policy", "critic"}, "vc_ppo": {"value", "policy", "critic"}, "ppo": {"reward_model", "policy", "critic"},
            "grpo": {"policy"}, "dapo": {"policy"},
        }[preset]  # fmt: skip
        line = metrics_of(tmp_path / preset)[1]
        assert ("value_loss" in line) == ("explained_variance" in line) == ("lambda" in line) == (preset not in ("grpo", "dapo"))
        assert (line["answers"] == 24 * line["generations"]) and (line["generations"] == 1 or preset == "dapo")
    grpo, dapo = (metrics_of(tmp_path / preset)[1] for preset in ("grpo", "dapo"))
    assert grpo["reward"] < grpo["accuracy"]  # punished for length, beside the verdict
    assert dapo["generations"] > 1 and dapo["advantage"] != 0


def test_dynamic_sampling_fills_the_rollout_with_mixed_groups(world, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(ppo, "add_weights", lambda batch, settings, add=ppo.add_weights: seen.append(batch) or add(batch, settings))
    vapo_run(world, tmp_path, "--preset=dapo", "--steps=1", "--mini_batch=24")
    (batch,) = seen
    assert len(batch["correct_B"]) == 24
    by_problem = {}
    for problem, correct in zip(batch["problem_B"].tolist(), batch["correct_B"].tolist()):
        by_problem.setdefault(problem, []).append(correct)
    assert all(0 < sum(verdicts) < len(verdicts) for verdicts in by_problem.values())


def test_a_resumed_dapo_run_equals_the_uninterrupted_one(world, tmp_path):
    vapo_run(world, tmp_path / "whole", "--preset=dapo", "--steps=2", "--eval_every=1")
    vapo_run(world, tmp_path / "part", "--preset=dapo", "--steps=1", "--eval_every=1")
    train_vapo.main([f"--resume={tmp_path}/part", "--steps=2"])
    assert without_clock(metrics_of(tmp_path / "part")) == without_clock(metrics_of(tmp_path / "whole"))


def test_a_flag_beside_a_preset_counts_more(world, tmp_path):
    vapo_run(world, tmp_path, "--preset=grpo", "--steps=1", "--clip_higher=True")
    settings = json.loads((tmp_path / "config.json").read_text())["settings"]
    assert "--clip_higher=True" in settings and "--token_level_loss=False" in settings and "--preset=grpo" in settings


def test_resuming_with_other_settings_or_a_damaged_checkpoint_is_refused(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train_vapo.main([f"--resume={run}", "--alpha=0.1"])
    assert stop.value.code == 2 and "--alpha cannot change" in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "damaged")
    for rest in (tmp_path / "damaged" / "checkpoint").glob("*/rest.pt"):
        rest.write_bytes(rest.read_bytes()[:-1])
    with pytest.raises(SystemExit) as stop:
        train_vapo.main([f"--resume={tmp_path}/damaged"])
    assert stop.value.code == 2 and "all checkpoints" in capsys.readouterr().err


def test_a_run_directory_is_not_overwritten(world, run, capsys):
    with pytest.raises(SystemExit) as stop:
        vapo_run(world, run)
    assert stop.value.code == 2 and "holds a run" in capsys.readouterr().err


def test_zero_steps_save_the_base_model_as_it_was(world, tmp_path):
    vapo_run(world, tmp_path / "none", "--steps=0", "--no_value_pretraining")
    base = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32).state_dict()
    saved = weights_of(tmp_path / "none")
    assert all(torch.equal(saved[name], base[name]) for name in base)


def test_saved_models_load_as_ordinary_ones_and_agree(run):
    policy = AutoModelForCausalLM.from_pretrained(run / "policy", dtype=torch.float32).eval()
    critic = AutoModelForTokenClassification.from_pretrained(run / "critic", dtype=torch.float32).eval()
    ours = model.load_policy(str(run / "policy"), torch.device("cpu"))
    ours.load_state_dict(saved_network(run, "policy"))
    our_critic = model.load_critic(str(run / "critic"), torch.device("cpu"))
    our_critic.load_state_dict(saved_network(run, "critic"))
    tokenizer = model.load_tokenizer(str(run / "policy"))
    prompt, response = tokenizer("a3:")["input_ids"], tokenizer("b2c1d0####d")["input_ids"]
    rows = {
        "token_BL": torch.tensor([prompt + response]), "prompt_length_B": torch.tensor([len(prompt)]), "length_B": torch.tensor([len(response)])
    }  # fmt: skip
    before = slice(len(prompt) - 1, -1)
    expected_T = policy(rows["token_BL"]).logits.log_softmax(-1)[0, before].gather(1, torch.tensor(response)[:, None])[:, 0]
    torch.testing.assert_close(model.policy_logprobs(ours, rows, 1.0)[0][0], expected_T, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.critic_values(our_critic, rows)[0], critic(rows["token_BL"]).logits[0, before, 0], rtol=0, atol=1e-5)
    # training mode too: no dropout stands between a critic and its values
    torch.testing.assert_close(
        critic.train()(rows["token_BL"]).logits[0, before, 0], model.critic_values(our_critic, rows)[0], rtol=0, atol=1e-5
    )


def test_tensorboard_holds_the_numbers_of_metrics_jsonl(run):
    events = EventAccumulator(str(run / "tb"))
    events.Reload()
    lines = metrics_of(run)
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            expected = lines[event.step][name]
            assert expected is None or event.value == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert set(events.Tags()["scalars"]) == {name for line in lines for name in line} - {"step"}


def test_every_logged_metric_is_in_the_glossary(run):
    readme = (Path(train_vapo.__file__).parent / "README.md").read_text()
    glossary = set(re.findall(r"`(\w+)`", readme[readme.index("## Glossary") :]))
    logged = {name for line in metrics_of(run) + metrics_of(run / "value") for name in line}
    assert logged - glossary == set()


def test_samples_show_prompt_answer_verdict_and_values(run):
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert sorted({sample["step"] for sample in samples}) == [0, 2, 4] and len(samples) == 3 * 8
    for sample in samples:
        assert {"problem", "answer", "response", "correct", "finish", "values"} <= sample.keys()
        assert len(sample["values"]) >= 2 and sample["finish"] in ("stop", "length")


def test_next_problems_goes_through_all_of_them_before_any_comes_again():
    order = {"generator": torch.Generator().manual_seed(0), "queue": []}
    drawn = [rollout.next_problems(list(range(10)), 4, order) for _ in range(5)]
    drawn = sum(drawn, [])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]


def test_a_summary_says_where_a_metric_stood_and_what_went_wrong():
    lines = [
        {"step": 0, "test_accuracy": 0.25, "seconds_eval": 3.0},
        {"step": 1, "entropy": 0.5, "seconds_sample": 6.0, "gradient_steps": 8, "answers": 64, "bad_steps": 2},
        {"step": 3, "entropy": 0.125, "test_accuracy": 0.75, "seconds_sample": 3.0, "gradient_steps": 24, "answers": 192},
    ]
    text = summary.summarise(lines, "mine")
    assert text.startswith("mine: 3 rollouts, 24 optimiser steps, 192 answers\n")
    assert "test_accuracy               0.25            0.25 (0)            0.75 (3)      0.75" in text
    assert "entropy                      0.5           0.125 (3)             0.5 (1)     0.125" in text
    assert "0.2 minutes: sample 75%" in text and "2 optimiser steps were not finite" in text and "steps are missing" in text
    assert "warning" not in summary.summarise(lines[:1], "mine")
