"""train_vapo.py: the mini-batch, the seven flags, the run, its artefacts and its resumption."""

import functools
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, GPT2Config

import evaluate
import losses
import model
import problems as problem_files
import rollout
import table
import toy
import train_value
import train_vapo
from system import checkpoint, files, loading, metrics as step_metrics, run as run_file
from system.settings import parse

SETTINGS = train_vapo.Settings(train="t", test="t", alpha=0.5, compile=False)
SMALL = ["--device=cpu", "--prompts=6", "--samples=4", "--mini_batch=8",
         "--micro_batch_tokens=256", "--eval_samples=2", "--save_every=2", "--eval_every=2",
         "--pretrain_answers=64", "--pretrain_passes=1"]  # fmt: skip
PIECES = ["value_pretraining", "decoupled_gae", "length_adaptive_gae", "token_level_loss",
          "clip_higher", "positive_nll", "group_sampling"]  # fmt: skip
FAST = ["--steps=1", "--no_value_pretraining"]


def vapo_run(world, out, *flags):
    return train_vapo.main([f"@{world}/train_vapo.args", *SMALL, f"--out={out}", *flags])


def metrics_of(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def without_clock(lines):
    return [{name: v for name, v in line.items() if "second" not in name} for line in lines]


def rest_of(run_dir):
    """What else the run's last checkpoint holds, beside tensors."""
    return checkpoint.read(checkpoint.newest(run_dir) / "rest.pt")


def tensors_of(run_dir):
    """All tensors of the run's last checkpoint, by name."""
    directory = checkpoint.newest(run_dir)
    known = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    known = {n: kind for n, kind in known.items() if hasattr(kind, "properties")}  # no numbers
    tensors = {n: torch.empty(kind.size, dtype=kind.properties.dtype) for n, kind in known.items()}
    dcp.load(tensors, checkpoint_id=directory, no_dist=True)
    return tensors


def saved_network(run_dir, name):
    """The state dict of `policy` or `critic` in the run's last checkpoint."""
    start, tensors = f"{name}.", tensors_of(run_dir)
    return {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}


def loaded(kind, directory):
    """An exported model by transformers' own class, float32."""
    return kind.from_pretrained(directory, dtype=torch.float32).eval()


def weights_of(run_dir):
    return loaded(AutoModelForCausalLM, Path(run_dir) / "policy").state_dict()


def asked(world, tokenizer, count):
    """The first problems of the world, with prompts."""
    problems = files.load_problems(world / "train.jsonl")[:count]
    return problem_files.encode_prompts(problems, tokenizer, "{problem}:", 8)


@pytest.fixture
def rows(world, pair, device):
    """A judged rollout of 24 answers, some right and some wrong, with advantages."""
    policy, critic, tokenizer = pair
    problems = asked(world, tokenizer, 6)
    source = torch.Generator(device).manual_seed(0)
    rows = rollout.sample(policy, tokenizer, problems, 4, 24, 1.0, source)
    rollout.judge(rows, tokenizer, problems)
    assert 0 < rows["correct_B"].float().mean() < 1 and len(rows["length_B"].unique()) > 3
    train_vapo.score(policy, critic, rows, SETTINGS)
    return with_advantages(rows, SETTINGS)


def with_advantages(rows, settings):
    rows = dict(rows)
    train_vapo.advantages(rows, settings)
    return rows


def with_weights(rows, settings):
    rows = dict(rows)
    train_vapo.weights(rows, settings)
    return rows


def gradients(pair, rows, settings):
    """(policy's, critic's, metrics) of one mini-batch, the gradients as one vector each."""
    policy, critic, _ = pair
    policy.zero_grad(), critic.zero_grad()
    batch = with_weights(rows, settings)
    sums = {"value_loss": train_value.value_gradients(critic, batch, settings)}
    sums |= train_vapo.policy_gradients(policy, batch, settings)
    vectors = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (policy, critic)]
    return *vectors, step_metrics.of_mini_batch(sums, batch)


# Zero advantages leave only the NLL in the policy's gradient; μ = 0 leaves only the clipped loss.
@pytest.mark.parametrize("only", ["policy and value", "nll", "sample-level"])
def test_gradients_do_not_depend_on_the_micro_batch_split(pair, rows, only):
    by_token = only != "sample-level"
    settings = replace(SETTINGS, positive_nll=only == "nll", mu=1.0, token_level_loss=by_token)
    old_logp_BT = rows["old_logp_BT"]
    if only == "nll":
        rows = rows | {"adv_BT": torch.zeros_like(rows["adv_BT"])}
    else:  # ratios away from 1, some of them clipped
        rows = rows | {"old_logp_BT": old_logp_BT + torch.randn_like(old_logp_BT) * 0.3}
    splits = [replace(settings, micro_batch_tokens=tokens) for tokens in (10_000, 60, 1)]
    (*whole, expected), *others = (gradients(pair, rows, split) for split in splits)
    assert expected.pop("padding") > 0  # all rows side by side; one by one there is none
    tolerance = 1e-5 if pair[0].device.type == "cpu" else 2e-2  # bf16 on CUDA
    for *vectors, metrics in others:
        for vector, at_once in zip(vectors, whole):
            near = {"rtol": 0, "atol": tolerance * at_once.abs().max().item()}
            torch.testing.assert_close(vector, at_once, **near)
        assert 0 <= metrics.pop("padding") <= 1
        assert metrics == pytest.approx(expected, rel=10 * tolerance, abs=10 * tolerance)
    assert all(vector.abs().max() > 1e-3 for vector in whole)


def test_gradient_checkpointing_runs_the_layers_twice_and_changes_no_gradient(pair, rows):
    layers = [pair[0].model.layers[0], pair[1].model.layers[0]]
    runs = {layer: [] for layer in layers}
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda *_, layer=layer: runs[layer].append(1))
    expected = gradients(pair, rows, SETTINGS)
    once = [len(runs[layer]) for layer in layers]
    for network in pair[:2]:
        loading.checkpoint_gradients(network, True)
    again = gradients(pair, rows, SETTINGS)
    # one pass more, and its repetition
    assert [len(runs[layer]) for layer in layers] == [3 * count for count in once]
    for ours, theirs in zip(again[:2], expected):
        torch.testing.assert_close(ours, theirs)
    training = [part.training for network in pair[:2] for part in network.modules()]
    assert not any(training)  # a sampler would lose its cache


def test_rows_one_by_one_have_no_padding(pair, rows):
    length_B = rows["prompt_length_B"] + rows["length_B"]
    at_once = 1 - length_B.sum().item() / (len(length_B) * length_B.max().item())
    for tokens, padding in ((1, 0), (10_000, at_once)):
        metrics = gradients(pair, rows, replace(SETTINGS, micro_batch_tokens=tokens))[2]
        assert metrics["padding"] == pytest.approx(padding)


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
    outcome_BT = rows["reward_B"][:, None] * table.response_mask(rows)
    torch.testing.assert_close(rows["target_BT"], outcome_BT, rtol=0, atol=1e-5)
    torch.testing.assert_close(rows["lam_B"], (1 - 2 / rows["length_B"].float()).clamp(min=0))


def test_decoupled_gae_off_gives_the_critic_the_policys_lambda(rows):
    coupled = with_advantages(rows, replace(SETTINGS, decoupled_gae=False))
    assert torch.equal(coupled["adv_BT"], rows["adv_BT"])
    expected_BT = (rows["adv_BT"] + rows["old_value_BT"]) * table.response_mask(rows)
    torch.testing.assert_close(coupled["target_BT"], expected_BT)
    assert not torch.allclose(coupled["target_BT"], rows["target_BT"], atol=1e-2)


def test_length_adaptive_gae_off_gives_one_lambda(rows):
    fixed = with_advantages(rows, replace(SETTINGS, length_adaptive_gae=False, lam_policy=0.9))
    assert (fixed["lam_B"] == 0.9).all() and torch.equal(fixed["target_BT"], rows["target_BT"])
    assert not torch.allclose(fixed["adv_BT"], rows["adv_BT"], atol=1e-2)


def test_token_level_loss_off_weighs_answers(rows):
    by_token_B = rows["length_B"] / rows["length_B"].sum()
    by_answer_B = torch.full_like(rows["reward_B"], 1 / 24)
    answers = replace(SETTINGS, token_level_loss=False)
    for settings, expected_B in ((SETTINGS, by_token_B), (answers, by_answer_B)):
        batch = with_weights(rows, settings)
        torch.testing.assert_close(batch["policy_weight_BT"].sum(dim=1), expected_B)
        torch.testing.assert_close(batch["critic_weight_BT"].sum(dim=1), by_token_B)


def test_clip_higher_lets_good_tokens_rise_between_the_two_limits(pair, rows):
    # Every ratio is 1.25, every advantage positive: beyond 1 + ε_low, within 1 + ε_high.
    ones_BT, lower_BT = torch.ones_like(rows["adv_BT"]), rows["old_logp_BT"] - 0.2231
    risen = rows | {"old_logp_BT": lower_BT, "adv_BT": ones_BT}
    settings = replace(SETTINGS, positive_nll=False)
    policy_gradient, _, metrics = gradients(pair, risen, settings)
    assert policy_gradient.abs().max() > 1e-3 and metrics["clip_high"] == 0
    policy_gradient, _, metrics = gradients(pair, risen, replace(settings, clip_higher=False))
    assert policy_gradient.abs().max() == 0 and metrics["clip_high"] == 1


def test_positive_nll_pulls_towards_correct_answers_by_the_verdict(pair, rows):
    shaped = {"reward_B": 1 - rows["reward_B"]}
    still = rows | shaped | {"adv_BT": torch.zeros_like(rows["adv_BT"])}
    on, _, metrics = gradients(pair, still, SETTINGS)
    off, _, _ = gradients(pair, still, replace(SETTINGS, positive_nll=False))
    correct = table.take(rows, rows["correct_B"].nonzero()[:, 0])
    mask_BT = table.response_mask(correct)
    nll = -(correct["old_logp_BT"] * mask_BT).sum() / mask_BT.sum()
    assert metrics["nll_loss"] == pytest.approx(nll.item(), rel=1e-2)
    assert on.abs().max() > 1e-3 and off.abs().max() == 0
    none_right = still | {"correct_B": torch.zeros_like(rows["correct_B"])}
    none, _, metrics = gradients(pair, none_right, SETTINGS)
    assert none.abs().max() == 0 and metrics["nll_loss"] == 0


def test_every_piece_has_a_flag_that_turns_it_off(world):
    args = [f"@{world}/train_vapo.args"]
    on = parse(train_vapo.Settings, args, "")
    for piece in PIECES:
        off = parse(train_vapo.Settings, [*args, f"--no_{piece}"], "")
        assert getattr(on, piece) and off == replace(on, **{piece: False})


def test_the_presets_are_those_of_their_papers():
    off = dict.fromkeys(PIECES, False)
    assert train_vapo.PRESETS == {
        "vapo": {},
        "vc_ppo": {"length_adaptive_gae": False, "token_level_loss": False, "clip_higher": False,
                   "positive_nll": False, "group_sampling": False},
        "ppo": off | {"reward_model": "fit"},
        "grpo": {"critic_free": True, "token_level_loss": False, "clip_higher": False,
                 "positive_nll": False},
        "dapo": {"critic_free": True, "positive_nll": False, "dynamic_sampling": 10,
                 "overlong": 0.2, "reward_wrong": -1.0},
    }  # fmt: skip


def settings_of(*flags):
    flags = ["--model=m", "--train=t", "--test=t", "--out=no/such/dir", *flags]
    return train_vapo.settings_of(flags)[0]


#                   pieces 1 to 7                                    critic_free, dynamic_sampling,
@pytest.mark.parametrize("preset, pieces, others", [               # overlong, reward_model
    ("vapo", [True, True, True, True, True, True, True], (False, 0, 0.0, "")),
    ("vc_ppo", [True, True, False, False, False, False, False], (False, 0, 0.0, "")),
    ("ppo", [False, False, False, False, False, False, False], (False, 0, 0.0, "fit")),
    # pieces 1 to 3 are a critic's
    ("grpo", [True, True, True, False, False, False, True], (True, 0, 0.0, "")),
    ("dapo", [True, True, True, True, True, False, True], (True, 10, 0.2, "")),
])  # fmt: skip
def test_each_preset_as_a_line_of_literals(preset, pieces, others):
    settings = settings_of(f"--preset={preset}")
    assert [getattr(settings, name) for name in PIECES] == pieces
    names = ("critic_free", "dynamic_sampling", "overlong", "reward_model")
    assert tuple(getattr(settings, name) for name in names) == others


def test_the_numbers_of_the_paper_are_the_defaults():
    settings = settings_of()
    paper = {
        "lr": 1e-6, "critic_lr": 2e-6, "alpha": 0.05, "lam_policy": 0.95, "lam_critic": 1.0,
        "eps_low": 0.2, "eps_high": 0.28, "mu": 0.1, "samples": 16, "reward_correct": 1.0,
        "reward_wrong": 0.0, "temperature": 1.0, "max_grad_norm": 1.0, "warmup": 10,
        "is_clip": None, "eval_top_p": 1.0,
    }  # fmt: skip
    assert {name: getattr(settings, name) for name in paper} == paper
    assert settings.rollout_shape() == (32, 16)
    assert settings_of("--no_group_sampling").rollout_shape() == (512, 1)


def test_group_sampling_off_asks_as_many_prompts_once(world, tmp_path, monkeypatch):
    asked, sample = [], rollout.sample

    def spy(policy, tokenizer, problems, samples, *rest, **options):
        asked.append((len(problems), samples))
        return sample(policy, tokenizer, problems, samples, *rest, **options)

    monkeypatch.setattr(rollout, "sample", spy)
    for name, flags in (("on", []), ("off", ["--no_group_sampling"])):
        vapo_run(world, tmp_path / name, *FAST, *flags)
    assert (6, 4) in asked and (24, 1) in asked


def test_value_pretraining_off_starts_from_an_ignorant_critic(world, run, tmp_path):
    vapo_run(world, tmp_path / "off", *FAST)
    assert not (tmp_path / "off" / "value").exists()
    assert metrics_of(tmp_path / "off")[1]["value_first"] == 0
    assert metrics_of(run)[1]["value_first"] > 0.05
    # the critic that the run started from is the pretrained one
    pretrained = loaded(AutoModelForTokenClassification, run / "value" / "critic").state_dict()
    saved = saved_network(run, "critic")
    assert pretrained.keys() == saved.keys()
    assert not torch.equal(pretrained["score.weight"], saved["score.weight"])


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """The directory of a whole run of 4 rollouts with 3 optimiser steps each."""
    out = tmp_path_factory.mktemp("run") / "vapo"
    returned = vapo_run(world, out, "--steps=4")
    assert returned["run_dir"] == str(out)
    names = {"accuracy", "before_accuracy", "greedy_accuracy", "length", "truncated"}
    assert names <= returned.keys()
    return out


def test_the_ratio_is_one_at_the_first_update_and_moves_later(world, tmp_path):
    for name, mini_batch in (("one", 24), ("several", 6)):
        vapo_run(world, tmp_path / name, *FAST, f"--mini_batch={mini_batch}", "--warmup=0")
    one, several = metrics_of(tmp_path / "one")[1], metrics_of(tmp_path / "several")[1]
    assert one["ratio_max"] == pytest.approx(1, abs=1e-4) and one["gradient_steps"] == 1
    assert one["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert several["ratio_max"] > 1.001 and several["gradient_steps"] == 4
    assert several["approx_kl"] > 1e-6


@pytest.mark.slow
def test_a_compiled_run_equals_an_eager_one(world, tmp_path, monkeypatch):
    names, compiled = [], run_file.compiled

    def spy(function):
        names.append(function.__name__)
        return compiled(function)

    compiled.cache_clear()
    monkeypatch.setattr(run_file, "compiled", spy)
    for name, flags in (("eager", []), ("compiled", ["--compile"])):
        vapo_run(world, tmp_path / name, *FAST, *flags)
    eager, fast = (without_clock(metrics_of(tmp_path / name))[1] for name in ("eager", "compiled"))
    assert set(names) == {"add_slice", "policy_loss", "slice_gradient", "value_loss"}
    assert compiled.cache_info().misses == 4  # each once
    assert fast == pytest.approx(eager, rel=1e-3, abs=1e-5)


def test_without_a_compiler_kernels_run_uncompiled_and_one_line_says_so(monkeypatch, capsys):
    def no_compiler(function, dynamic):
        def fails(*_):
            raise torch._dynamo.exc.TorchDynamoException("No working C++ compiler found\nDetails")

        return fails

    monkeypatch.setattr(torch, "compile", no_compiler)
    for cached in (run_file.compiled, run_file.say_once):
        cached.cache_clear()
    for kernel in (losses.nll_loss, losses.ratio):
        fast, logp = run_file.kernel(kernel, True, torch.device("cpu")), torch.tensor([-1.0])
        given = (logp,) if kernel is losses.nll_loss else (logp, logp)
        assert fast(*given) == fast(*given) == 1
    run_file.compiled.cache_clear()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].endswith("without it: No working C++ compiler found")


@pytest.mark.parametrize("able, said", [(False, "more slowly than float32"), (True, "")])
def test_a_cpu_without_instructions_for_bfloat16_is_warned_of(able, said, monkeypatch, capsys):
    known = {"architecture": "x86_64", "avx512_bf16": able, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    run_file.say_once.cache_clear()
    for _ in range(2):  # policy and critic
        assert loading.compute_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    out = capsys.readouterr().out
    assert said in out and out.count("\n") == bool(said)


def test_a_run_on_every_device(world, device, tmp_path):
    vapo_run(world, tmp_path, "--steps=2", f"--device={device}")
    gap = metrics_of(tmp_path)[2]["sampler_gap"]
    assert gap < (1e-5 if device.type == "cpu" else 0.1)


def test_the_temperature_is_that_of_the_sampler_and_of_training(world, tmp_path):
    vapo_run(world, tmp_path, *FAST, "--temperature=0.6", "--mini_batch=24")
    line = metrics_of(tmp_path)[1]
    assert line["sampler_gap"] < 1e-5 and line["ratio_max"] == pytest.approx(1, abs=1e-4)


def test_rewards_reach_the_pretrained_critic(world, tmp_path):
    vapo_run(world, tmp_path, "--steps=1", "--reward_correct=0", "--reward_wrong=-2")
    assert metrics_of(tmp_path)[1]["value_first"] < -0.5


def test_without_a_model_the_embedded_world_is_built_and_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = {"layers": 1, "width": 32, "updates": 20, "update_rows": 16, "test_problems": 4}
    small = functools.partial(toy.World, min_steps=1, max_steps=4, **size)
    monkeypatch.setattr(toy, "World", small)
    returned = train_vapo.main([*SMALL, "--steps=1"])
    assert returned["run_dir"].startswith("runs/vapo-")
    assert (Path(returned["run_dir"]) / "policy" / "model.safetensors").exists()
    flags = ["--device=cpu", "--answers=64", "--passes=1", "--out=runs/value"]
    critic = train_value.main(flags)["critic"]
    assert (Path(critic) / "model.safetensors").exists()
    evaluated = evaluate.main(["--device=cpu", "--samples=2"])
    assert evaluated["run_dir"].startswith("runs/eval-")
    assert (tmp_path / "runs" / "toy" / "base").exists()


def test_another_model_and_other_problems_take_the_same_path(tokenizer, tmp_path):
    size = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 512}
    config = GPT2Config(
        vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=1, **size
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    path = tmp_path / "problems.jsonl"
    lines = [{"problem": f"What is {n} plus 1?", "answer": n + 1} for n in range(9)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = [f"--model={tmp_path}/model", f"--train={path}", f"--test={path}"]
    lengths = ["--prompt_length=400", "--response_length=16"]
    train_vapo.main([*files, *SMALL, *lengths, "--steps=1", f"--out={tmp_path}/run"])
    line = metrics_of(tmp_path / "run")[1]
    assert line["accuracy"] == 0 and line["explained_variance"] is None
    assert line["sampler_gap"] < 1e-5
    critic = AutoModelForTokenClassification.from_pretrained(tmp_path / "run" / "critic")
    assert critic.config.num_labels == 1 and critic.config.classifier_dropout == 0


def test_a_sampler_that_is_not_the_policy_is_reported(world, tmp_path, monkeypatch, capsys):
    sample = rollout.sample

    def another(*args, **options):
        rows = sample(*args, **options)
        return rows | {"sampled_logp_BT": rows["sampled_logp_BT"] * 3}

    monkeypatch.setattr(rollout, "sample", another)
    vapo_run(world, tmp_path, *FAST)
    said = "warning: the sampler draws from another distribution than is trained, since rollout 1"
    assert said in capsys.readouterr().out


def test_the_policy_loss_is_corrected_by_need():
    """π_old / π_sampler = e^0.5 = 1.65 and e^1 = 2.72, capped at 2; a gap of 1e-4 is rounding."""
    rows = {"length_B": torch.tensor([2]), "old_logp_BT": torch.tensor([[-1.0, -1.0]]),
            "reward_B": torch.ones(1), "prompt_length_B": torch.ones(1)}  # fmt: skip
    settings = train_vapo.Settings(critic_free=True, samples=1)
    for sampled, cap, expected in (
        ([-1.5, -2.0], None, [math.exp(0.5), 2.0]), ([-1.0001, -1.0], None, [1.0, 1.0]),
        ([-1.5, -2.0], 0.0, [1.0, 1.0]), ([-1.5, -2.0], 3.0, [math.exp(0.5), math.e]),
    ):  # fmt: skip
        rows["sampled_logp_BT"] = torch.tensor([sampled])
        train_vapo.advantages(rows, replace(settings, is_clip=cap))
        assert rows["importance_BT"].tolist() == [pytest.approx(expected)]


def test_masked_truncated_answers_have_no_weight_for_the_policy_and_all_for_the_critic():
    """Answers of 1 and 3 tokens, the second cut: by tokens ¼ each; masked, the first alone."""
    rows = {"length_B": torch.tensor([1, 3]), "stop_B": torch.tensor([True, False]),
            "correct_B": torch.tensor([True, False])}  # fmt: skip
    for masked, expected in ((False, [[0.25, 0, 0], [0.25, 0.25, 0.25]]),
                             (True, [[1, 0, 0], [0, 0, 0]])):  # fmt: skip
        train_vapo.weights(rows, train_vapo.Settings(mask_truncated=masked))
        assert rows["policy_weight_BT"].tolist() == expected
        assert rows["critic_weight_BT"].tolist() == [[0.25, 0, 0], [0.25, 0.25, 0.25]]


def test_a_run_stopped_before_its_first_checkpoint_starts_again(world, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_vapo, "train", stopped)
        with pytest.raises(SystemExit):
            vapo_run(world, tmp_path, "--steps=1")
    critic = tmp_path / "value" / "critic" / "model.safetensors"
    pretrained = critic.stat().st_mtime_ns
    train_vapo.main([f"--resume={tmp_path}"])
    assert [line["step"] for line in metrics_of(tmp_path)] == [0, 1]
    assert critic.stat().st_mtime_ns == pretrained


def test_a_run_is_deterministic(world, run, tmp_path):
    vapo_run(world, tmp_path / "again", "--steps=4")
    assert without_clock(metrics_of(tmp_path / "again")) == without_clock(metrics_of(run))
    again, first = weights_of(tmp_path / "again"), weights_of(run)
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(world, run, tmp_path):
    out = tmp_path / "part"
    vapo_run(world, out, "--steps=2")
    with open(out / "metrics.jsonl", "a") as file:  # logged, and lost before its checkpoint
        file.write('{"step": 3, "reward": 9.9}\n{"step": 4, "rew')
    train_vapo.main([f"--resume={out}", "--steps=4"])
    assert without_clock(metrics_of(out)) == without_clock(metrics_of(run))
    assert [line["step"] for line in metrics_of(out)] == [0, 1, 2, 3, 4]
    for name in ("policy", "critic"):
        part, whole = (where / name / "model.safetensors" for where in (out, run))
        assert part.read_bytes() == whole.read_bytes()
    tensors, whole = tensors_of(out), tensors_of(run)
    assert tensors.keys() == whole.keys()
    assert all(torch.equal(tensors[name], whole[name]) for name in whole)
    kinds = {"policy", "critic", "policy_optimizer", "critic_optimizer"}
    assert {name.split(".")[0] for name in whole} == kinds
    rest, expected = rest_of(out), rest_of(run)
    assert rest["progress"]["queue"] == expected["progress"]["queue"]
    assert rest["generators"].keys() == {"order", "sample", "mini_batch"}
    for name, state in rest["generators"].items():
        assert torch.equal(state, expected["generators"][name])


def test_the_rivals_run_from_start_to_saved_policy_each_in_its_own_way(world, tmp_path):
    with_critic = {"value", "policy", "critic"}
    expected = {"vapo": with_critic, "vc_ppo": with_critic, "grpo": {"policy"}, "dapo": {"policy"},
                "ppo": {"reward_model", "policy", "critic"}}  # fmt: skip
    for preset in train_vapo.PRESETS:
        vapo_run(world, tmp_path / preset, f"--preset={preset}", "--steps=1", "--overlong=0.5")
        saved = {path.name for path in (tmp_path / preset).iterdir() if path.is_dir()}
        assert saved - {"tb", "checkpoint"} == expected[preset]
        line, has_critic = metrics_of(tmp_path / preset)[1], preset not in ("grpo", "dapo")
        for name in ("value_loss", "explained_variance", "lambda"):
            assert (name in line) == has_critic
        assert line["answers"] == 24 * line["generations"]
        assert line["generations"] == 1 or preset == "dapo"
    grpo, dapo = (metrics_of(tmp_path / preset)[1] for preset in ("grpo", "dapo"))
    assert grpo["reward"] < grpo["accuracy"]  # punished for length, beside the verdict
    assert dapo["generations"] > 1 and dapo["advantage"] != 0


def test_dynamic_sampling_fills_the_rollout_with_mixed_groups(world, tmp_path, monkeypatch):
    seen, weights = [], train_vapo.weights

    def spy(batch, settings):
        seen.append(batch)
        weights(batch, settings)

    monkeypatch.setattr(train_vapo, "weights", spy)
    vapo_run(world, tmp_path, "--preset=dapo", "--steps=1", "--mini_batch=24")
    (batch,) = seen
    assert len(batch["correct_B"]) == 24
    by_problem = {}
    for problem, correct in zip(batch["problem_B"].tolist(), batch["correct_B"].tolist()):
        by_problem.setdefault(problem, []).append(correct)
    assert all(0 < sum(verdicts) < len(verdicts) for verdicts in by_problem.values())


def two_rollouts(world, out, *flags):
    """Metrics of a run of two rollouts, which is in OUT/whole. One that is stopped after the first
    and resumed has the same."""
    flags = [*flags, "--eval_every=1"]
    vapo_run(world, out / "whole", *flags, "--steps=2")
    vapo_run(world, out / "part", *flags, "--steps=1")
    train_vapo.main([f"--resume={out}/part", "--steps=2"])
    part, whole = (without_clock(metrics_of(out / name)) for name in ("part", "whole"))
    assert part == whole
    return whole


def test_a_resumed_dapo_run_equals_the_uninterrupted_one(world, tmp_path):
    two_rollouts(world, tmp_path, "--preset=dapo")


def test_a_perfect_critic_knows_the_rollout_before_and_its_run_resumes_exactly(
    world, tmp_path, monkeypatch
):
    seen, perfect = [], train_vapo.toy.perfect_values

    def spy(*how):
        *_, before, rows = how
        seen.append((before, dict(rows)))
        return perfect(*how)

    monkeypatch.setattr(train_vapo.toy, "perfect_values", spy)
    whole = two_rollouts(world, tmp_path, "--critic=truth")
    (none, first), _, (before, second), *_ = seen  # `score_critic` counts for itself each time
    assert none is None and torch.equal(before["token_BL"], first["token_BL"])
    assert not torch.equal(before["reward_B"], second["reward_B"])
    assert whole[2]["explained_variance"] > 0.2 and "value_loss" not in whole[2]
    assert not (tmp_path / "whole" / "critic").exists()


def test_a_perfect_critic_needs_a_world_whose_truth_is_known(world, tmp_path, capsys):
    lines = (world / "train.jsonl").read_text()
    (tmp_path / "other.jsonl").write_text(lines)
    with pytest.raises(SystemExit) as error:
        vapo_run(world, tmp_path / "run", "--critic=truth", f"--train={tmp_path}/other.jsonl")
    assert error.value.code == 2 and "truth: it is not known here" in capsys.readouterr().err


def test_a_critic_that_reads_how_unlikely_tokens_were_learns_to_use_it(world, tmp_path):
    two_rollouts(world, tmp_path, "--critic_surprise")
    first, last = (load_file(tmp_path / "whole" / critic / "model.safetensors")["surprise.weight"]
                   for critic in ("value/critic", "critic"))  # fmt: skip
    assert first.shape == last.shape and not torch.equal(first, last)


def test_a_flag_beside_a_preset_counts_more(world, tmp_path):
    vapo_run(world, tmp_path, "--preset=grpo", "--steps=1", "--clip_higher=True")
    settings = json.loads((tmp_path / "config.json").read_text())["settings"]
    assert settings["clip_higher"] is True and settings["token_level_loss"] is False
    assert settings["preset"] == "grpo"


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


def test_a_run_that_began_on_another_kind_of_device_is_refused(run, tmp_path, capsys):
    """A generator's state on CUDA is of 16 bytes, on a CPU of 5,056."""
    shutil.copytree(run / "checkpoint", tmp_path / "checkpoint")
    directory = checkpoint.newest(tmp_path)
    rest = checkpoint.read(directory / "rest.pt")
    rest["generators"]["sample"] = torch.zeros(16, dtype=torch.uint8)
    torch.save(rest, directory / "rest.pt")
    sums = json.loads((directory / "checksums.json").read_text())
    sums["rest.pt"] = checkpoint.checksum(directory / "rest.pt")
    (directory / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(SystemExit) as error:
        config = (run / "config.json").read_text()
        (tmp_path / "config.json").write_text(config)
        train_vapo.main([f"--resume={tmp_path}", "--steps=5"])
    assert error.value.code == 2 and "another kind of device" in capsys.readouterr().err


def test_a_run_directory_is_not_overwritten(world, run, capsys):
    with pytest.raises(SystemExit) as stop:
        vapo_run(world, run)
    assert stop.value.code == 2 and "holds a run" in capsys.readouterr().err


def test_zero_steps_save_the_base_model_as_it_was(world, tmp_path):
    vapo_run(world, tmp_path / "none", "--steps=0", "--no_value_pretraining")
    base = loaded(AutoModelForCausalLM, world / "base").state_dict()
    saved = weights_of(tmp_path / "none")
    assert all(torch.equal(saved[name], base[name]) for name in base)


def test_saved_models_load_as_ordinary_ones_and_agree(run):
    policy = loaded(AutoModelForCausalLM, run / "policy")
    critic = loaded(AutoModelForTokenClassification, run / "critic")
    ours = loading.load_policy(str(run / "policy"), torch.device("cpu"))
    ours.load_state_dict(saved_network(run, "policy"))
    our_critic = loading.load_critic(str(run / "critic"), torch.device("cpu"))
    our_critic.load_state_dict(saved_network(run, "critic"))
    tokenizer = loading.load_tokenizer(str(run / "policy"))
    prompt, response = (tokenizer(text)["input_ids"] for text in ("a3:", "b2c1d0####d"))
    token_BL = torch.tensor([prompt + response])
    rows = {
        "token_BL": token_BL, "prompt_length_B": torch.tensor([len(prompt)]),
        "length_B": torch.tensor([len(response)]),
    }  # fmt: skip
    before, near = slice(len(prompt) - 1, -1), {"rtol": 0, "atol": 1e-5}
    logp_TV = policy(token_BL).logits.log_softmax(-1)[0, before]
    expected_T = logp_TV.gather(1, torch.tensor(response)[:, None])[:, 0]
    torch.testing.assert_close(model.policy_logprobs(ours, rows, 1.0)[0][0], expected_T, **near)
    value_T = model.critic_values(our_critic, rows)[0]
    torch.testing.assert_close(value_T, critic(token_BL).logits[0, before, 0], **near)
    # training mode too: no dropout stands between a critic and its values
    torch.testing.assert_close(critic.train()(token_BL).logits[0, before, 0], value_T, **near)


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
    glossary = (Path(train_vapo.__file__).parent / "docs" / "metrics.md").read_text()
    known = set(re.findall(r"`(\w+)`", glossary))
    logged = {name for line in metrics_of(run) + metrics_of(run / "value") for name in line}
    assert logged - known == set()


def test_samples_show_prompt_answer_verdict_and_values(run):
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert sorted({sample["step"] for sample in samples}) == [0, 2, 4] and len(samples) == 3 * 8
    for sample in samples:
        assert {"problem", "answer", "response", "correct", "finish", "values"} <= sample.keys()
        assert len(sample["values"]) >= 2 and sample["finish"] in ("stop", "length")
        words = [token for token in sample["tokens"] if token not in ("<eos>", "<unk>", "<pad>")]
        assert "".join(words) == sample["response"]
        assert len(sample["tokens"]) == len(sample["values"]) == len(sample["true"])
        assert all(0 <= chance <= 1 for chance in sample["true"])


def test_next_problems_goes_through_all_of_them_before_any_comes_again():
    progress, source = {"queue": []}, torch.Generator().manual_seed(0)
    drawn = sum([rollout.next_problems(10, 4, progress, source) for _ in range(5)], [])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]
