"""Whatever a person gets wrong: one line that names the cause, exit code 2, nothing half-written."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTConfig

import checkpoint
import toy
import train_value
import train_vapo
from model import load_tokenizer
from problems import load_problems
from run import BadInput


def fails_with(capsys, main, argv, *fragments):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1, error
    for fragment in fragments:
        assert fragment in lines[0]


@pytest.mark.parametrize(
    "flags, fragment",
    [
        (["--no_such_flag"], "--no_such_flag"),
        (["--step=3"], "--step"),  # no guessing from abbreviations
        (["--lr=fast"], "--lr"),
        (["--lr=0"], "--lr must be positive"),
        (["--alpha=-1"], "--alpha must be positive"),
        (["--prompts=0"], "--prompts must be at least 1"),
        (["--lam_policy=1.5"], "--lam_policy must be between 0 and 1"),
        (["--eps_low=1"], "--eps_low"),
        (["--temperature=0"], "--temperature must be positive"),
        (["--device=tpu9"], "--device tpu9"),
        (["--prompt_template=Solve it."], "{problem}"),
        (["--model=nowhere"], "no model directory at nowhere"),
        (["--critic=nowhere"], "no model directory at nowhere"),
        (["--reward_model=nowhere"], "no model directory at nowhere"),
        (["--preset=trpo"], "trpo"),
        (["--verifier=sympy"], "sympy"),
        (["--dtype=float16"], "float16"),
        (["--eval_temperature=0"], "--eval_temperature must be positive"),
        (["--eval_top_p=0"], "--eval_top_p is a probability"),
        (["--eval_only", "--test="], "--test FILE"),
        (["--preset=dapo", "--samples=1"], "--samples above 1"),
        (["--dynamic_sampling", "--no_group_sampling"], "--dynamic_sampling compares the answers of a group"),
        (["--preset=grpo", "--critic=nowhere"], "--critic_free has no use for --critic"),
        (["--preset=grpo", "--no_decoupled_gae"], "no use for --no_decoupled_gae"),
        (["--preset=dapo", "--whiten"], "no use for --whiten"),
        (["--overlong=2"], "--overlong must be between 0 and 1"),
        (["--train=nowhere.jsonl"], "nowhere.jsonl"),
        (["--test="], "--test FILE"),
        (["--prompt_length=2"], "--prompt_length 2"),
        (["--resume=nowhere"], "--resume nowhere"),
        (["--seed=1.5"], "--seed"),
        (["--samples=0"], "--samples must be at least 1"),
        (["--mini_batch=0"], "--mini_batch must be at least 1"),
        (["--micro_batch_tokens=0"], "--micro_batch_tokens must be at least 1"),
        (["--response_length=0"], "--response_length must be at least 1"),
        (["--sample_rows=0"], "--sample_rows must be at least 1"),
        (["--response_length=100000"], "positions: lower --prompt_length + --response_length"),
        (["--steps=-1"], "--steps must not be negative"),
        (["--mu=-1"], "--mu must not be negative"),
        (["--save_every=-1"], "--save_every must not be negative"),
        (["--keep=0"], "--keep must be at least 1"),
        (["--max_bad_steps=0"], "--max_bad_steps must be at least 1"),
        (["--max_grad_norm=0"], "--max_grad_norm must be positive"),
        (["--rank_timeout=0"], "--rank_timeout must be positive"),
        (["--vllm_memory=2"], "--vllm_memory is a share"),
        (["--tensor_parallel=0"], "--tensor_parallel must be at least 1"),
        (["--tensor_parallel=2"], "--tensor_parallel is for --engine vllm"),
        (["--engine=vllm", "--tensor_parallel=2"], "the number of processes (torchrun), 1, is no multiple of it"),
        (["--is_clip=0.5"], "--is_clip is 0 or at least 1"),
        (["--device=cpu", "--cpu_offload"], "--cpu_offload keeps a GPU's memory free"),
        (["--engine=tgi"], "tgi"),
        (["--engine=hf", "--compile_decode"], "--compile_decode is for --engine slots"),
        (["--model=/dev/null"], "no model directory at /dev/null"),
        (["--train="], "--train FILE"),
        (["--test=/"], "cannot read the problems"),
        (["--prompt_length=4", "--drop_long_prompts", "--prompt_template=far too long a prompt {problem}"], "longer"),
        (["@nowhere.args"], "nowhere.args"),
    ],
)
def test_bad_flags(flags, fragment, world, tmp_path, capsys):
    argv = [f"@{world}/train_vapo.args", f"--out={tmp_path}/run", "--steps=0", "--pretrain_answers=16", *flags]
    fails_with(capsys, train_vapo.main, argv, fragment)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, fragment", [(["--objective=both"], "both"), (["--held_out=1"], "--held_out"), (["--passes=0"], "--passes")]
)
def test_bad_value_flags(flags, fragment, world, tmp_path, capsys):
    fails_with(capsys, train_value.main, [f"@{world}/train_value.args", f"--out={tmp_path}", *flags], fragment)


@pytest.mark.parametrize(
    "line, fragment",
    [
        ("{not json", "not JSON"),
        ('["a", "b"]', "is no object"),
        ('{"answer": "b"}', "wants the fields problem and answer, or"),
        ('{"problem": "a1"}', "has problem"),
        ('{"problem": " ", "answer": "b"}', '"problem" must be a text'),
        ('{"question": 3, "answer": "b"}', '"question" must be a text'),
        ('{"question": "a1", "answer": "so ####"}', '"answer" must be'),
        ('{"input": "a1", "target": NaN}', '"target" must be'),
        ('{"prompt": "a1", "reward_model": {"ground_truth": "b"}}', '"prompt" must be a list of chat messages'),
        ('{"prompt": [{"role": "user", "content": "a1"}], "reward_model": {}}', '"reward_model.ground_truth" must be'),
        ('{"problem": "a1", "answer": ["b"]}', '"answer" must be'),
        ('{"problem": "a1", "answer": true}', '"answer" must be'),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(line, fragment, world, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"problem": "a1", "answer": "b"}}\n\n{line}\n')
    fails_with(capsys, train_vapo.main, [f"@{world}/train_vapo.args", f"--train={path}"], f"{path}, line 3", fragment)


def test_lines_end_at_newlines_only_and_huge_numbers_are_no_traceback(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text('{"problem": "a\u2028b\x85c", "answer": "1"}\n', encoding="utf-8")
    assert load_problems(path)[0]["problem"] == "a\u2028b\x85c"
    path.write_text('{"problem": "a", "answer": ' + "9" * 5000 + "}")
    with pytest.raises(BadInput, match="line 1: not JSON"):
        load_problems(path)


def test_a_verifier_that_is_not_installed(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    argv = [f"@{world}/train_vapo.args", "--eval_only", "--verifier=math_verify", f"--out={tmp_path}/run"]
    fails_with(capsys, train_vapo.main, argv, "pip install math-verify")
    assert not (tmp_path / "run").exists()


def test_an_empty_file_and_a_binary_one(world, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("\n")
    fails_with(capsys, train_vapo.main, [f"@{world}/train_vapo.args", f"--test={tmp_path}/empty.jsonl"], "holds no problems")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    fails_with(capsys, train_vapo.main, [f"@{world}/train_vapo.args", f"--test={tmp_path}/binary.jsonl"], "cannot read the problems")


def test_a_tokenizer_without_eos(world, tmp_path, capsys):
    tokenizer = load_tokenizer(str(world / "base"))
    tokenizer.save_pretrained(tmp_path / "model")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_bytes((world / "base" / name).read_bytes())
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "eos_token"}))
    fails_with(capsys, train_vapo.main, [f"@{world}/train_vapo.args", f"--model={tmp_path}/model"], "no EOS token")


def copied(world, tmp_path, **config):
    """A copy of the base model with other settings in its config.json."""
    directory = tmp_path / "model"
    shutil.copytree(world / "base", directory)
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(settings | config))
    return directory


def run_fails(capsys, world, out, *flags_and_fragments):
    flags, fragments = flags_and_fragments[0], flags_and_fragments[1:]
    fails_with(
        capsys, train_vapo.main, [f"@{world}/train_vapo.args", f"--out={out}", "--steps=0", "--pretrain_answers=16", *flags], *fragments
    )


def test_weights_that_could_hold_code_are_not_read(world, tmp_path, capsys):
    directory = copied(world, tmp_path)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    run_fails(capsys, world, tmp_path / "run", [f"--model={directory}"], f"cannot load {directory}", "safetensors")
    assert not (tmp_path / "run").exists()


def test_a_model_that_brings_code_needs_a_flag(world, tmp_path, capsys):
    directory = copied(world, tmp_path, model_type="mine", auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"})
    (directory / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    run_fails(capsys, world, tmp_path / "run", [f"--model={directory}"], f"cannot load {directory}", "trust_remote_code")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_model(world, tmp_path, capsys):
    directory = copied(world, tmp_path)
    tokenizer = load_tokenizer(str(directory))
    tokenizer.add_tokens([f"<word{i}>" for i in range(50)])
    tokenizer.save_pretrained(directory)
    run_fails(capsys, world, tmp_path / "run", [f"--model={directory}"], "the tokenizer in", "they are not of one kind")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["critic", "reward_model"])
def test_a_critic_that_does_not_fit_the_policy(world, tmp_path, capsys, flag):
    for name, config, fragment in (
        ("labels", {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "bad", "1": "good"}}, "has 2 labels"),
        ("words", {"vocab_size": 7}, "has 7 words"), ("short", {"max_position_embeddings": 9}, "has 9 positions"),
    ):  # fmt: skip
        directory = copied(world, tmp_path / name, **config)
        run_fails(capsys, world, tmp_path / "run", [f"--{flag}={directory}"], fragment)
    ViTConfig().save_pretrained(tmp_path / "picture")
    run_fails(capsys, world, tmp_path / "run", [f"--{flag}={tmp_path}/picture"], "has 0 words")
    directory = copied(world, tmp_path / "other")
    other = toy.make_tokenizer(toy.World(max_steps=3))
    other.add_tokens(["<odd>"])
    other.save_pretrained(directory)
    run_fails(capsys, world, tmp_path / "run", [f"--{flag}={directory}"], "another tokenizer", "words")
    assert not (tmp_path / "run").exists()


def test_a_damaged_model(world, tmp_path, capsys):
    for name, content in (("config.json", b"{"), ("model.safetensors", b"x" * 100), ("tokenizer.json", b"{")):
        directory = copied(world, tmp_path / name)
        (directory / name).write_bytes(content)
        run_fails(capsys, world, tmp_path / "run", [f"--model={directory}"], "cannot load")
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written(world, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    run_fails(capsys, world, tmp_path / "file" / "run", [], "Not a directory", "give another --out")
    argv = [f"@{world}/train_value.args", f"--out={tmp_path}/file/run", "--answers=16"]
    fails_with(capsys, train_value.main, argv, "Not a directory", "give another --out")
    if os.geteuid():  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        run_fails(capsys, world, tmp_path / "closed" / "run", [], "Permission denied")


def test_files_without_a_problem_that_is_left(world, tmp_path, capsys):
    (tmp_path / "long.jsonl").write_text(json.dumps({"problem": "a" * 400, "answer": "b"}) + "\n")
    run_fails(capsys, world, tmp_path / "run", [f"--train={tmp_path}/long.jsonl", "--drop_long_prompts"], "long.jsonl")
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n")
    run_fails(capsys, world, tmp_path / "run", [f"--train={tmp_path}/wrong.csv"], "wrong.csv, line 2")
    (tmp_path / "what.xml").write_text("<a/>")
    run_fails(capsys, world, tmp_path / "run", [f"--train={tmp_path}/what.xml"], "what.xml")
    assert not (tmp_path / "run").exists()


def test_value_pretraining_that_was_stopped_with_other_settings(world, tmp_path, capsys):
    save = checkpoint.save
    argv = [f"@{world}/train_value.args", "--device=cpu", f"--out={tmp_path}", "--answers=64", "--passes=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda *args, **options: save(*args, **options) or (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            train_value.main(argv)
    fails_with(capsys, train_value.main, [*argv, "--lr=1e-5"], "was stopped, with other settings")
    assert train_value.main([*argv, f"--out={tmp_path}/../{tmp_path.name}"])["step"] >= 0  # the same place by another name
