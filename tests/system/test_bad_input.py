"""Whatever a person gets wrong: one line with the cause, exit code 2, nothing half-written."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTConfig

import evaluate
import toy
import train_value
import train_vapo
from system import checkpoint, settings
from system.files import load_problems
from system.loading import load_tokenizer
from system.run import BadInput


def fails_with(capsys, main, argv, *fragments):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1, error
    for fragment in fragments:
        assert fragment in lines[0]


# fmt: off
BAD_FLAGS = [
    (["--no_such_flag"], "--no_such_flag"),
    (["--step=3"], "--step"),  # no guessing from abbreviations
    (["--lr=fast"], "--lr"),
    (["--lr=0"], "--lr must be positive"),
    (["--alpha=-1"], "--alpha must be positive"),
    (["--prompts=0"], "--prompts must be at least 1"),
    (["--lam_policy=1.5"], "--lam_policy must be between 0 and 1"),
    (["--eps_low=1"], "--eps_low must be above 0 and below 1"),
    (["--temperature=0"], "--temperature must be positive"),
    (["--device=tpu9"], "--device tpu9"),
    (["--prompt_template=Solve it."], "{problem}"),
    (["--model=nowhere"], "no model directory at nowhere"),
    (["--critic=nowhere"], "no model directory at nowhere"),
    (["--reward_model=nowhere"], "no model directory at nowhere"),
    (["--preset=trpo"], "trpo"),
    (["--verifier=sympy"], "sympy"),
    (["--dtype=float16"], "float16"),
    (["--eval_top_p=0"], "--eval_top_p must be above 0 and at most 1"),
    (["--preset=dapo", "--samples=1"], "--samples above 1"),
    (["--dynamic_sampling=9", "--no_group_sampling"],
     "--dynamic_sampling compares the answers of a group: it needs group sampling"),
    (["--dynamic_sampling=-1"], "--dynamic_sampling must not be negative"),
    (["--dynamic_sampling"], "--dynamic_sampling"),  # how many batches at most?
    (["--preset=grpo", "--critic=nowhere"], "--critic_free has no use for --critic"),
    (["--preset=grpo", "--critic=truth"], "--critic_free has no use for --critic"),
    (["--preset=grpo", "--no_decoupled_gae"], "no use for --no_decoupled_gae"),
    (["--preset=dapo", "--critic_surprise"], "no use for --critic_surprise"),
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
    (["--pretrain_passes=0"], "--pretrain_passes must be at least 1"),
    (["--max_grad_norm=0"], "--max_grad_norm must be positive"),
    (["--vllm_memory=2"], "--vllm_memory must be above 0 and at most 1"),
    (["--tensor_parallel=0"], "--tensor_parallel must be at least 1"),
    (["--tensor_parallel=2"], "--tensor_parallel is for --engine vllm"),
    (["--engine=vllm", "--tensor_parallel=2"],
     "the number of processes (torchrun), 1, is no multiple of it"),
    (["--is_clip=0.5"], "--is_clip is 0 or at least 1"),
    (["--engine=tgi"], "tgi"),
    (["--model=/dev/null"], "no model directory at /dev/null"),
    (["--train="], "--train FILE"),
    (["--test=/"], "cannot read the problems"),
    (["--prompt_length=4", "--drop_long_prompts",
      "--prompt_template=far too long a prompt {problem}"], "longer"),
    (["@nowhere.args"], "nowhere.args"),
    # of an older revision
    (["--keep=3"], "--keep"), (["--max_bad_steps=3"], "--max_bad_steps"),
    (["--rank_timeout=1"], "--rank_timeout"), (["--trust_remote_code"], "--trust_remote_code"),
    (["--compile_decode"], "--compile_decode"), (["--cpu_offload"], "--cpu_offload"),
]
BAD_LINES = [
    ("{not json", "not JSON"),
    ('["a", "b"]', "is no object"),
    ('{"answer": "b"}', "wants the fields problem and answer, or"),
    ('{"problem": "a1"}', "has problem"),
    ('{"problem": " ", "answer": "b"}', '"problem" must be a text'),
    ('{"question": 3, "answer": "b"}', '"question" must be a text'),
    ('{"question": "a1", "answer": "so ####"}', '"answer" must be'),
    ('{"input": "a1", "target": NaN}', '"target" must be'),
    ('{"prompt": "a1", "reward_model": {"ground_truth": "b"}}',
     '"prompt" must be a list of chat messages'),
    ('{"prompt": [{"role": "user", "content": "a1"}], "reward_model": {}}',
     '"reward_model.ground_truth" must be'),
    ('{"problem": "a1", "answer": ["b"]}', '"answer" must be'),
    ('{"problem": "a1", "answer": true}', '"answer" must be'),
]
# fmt: on


@pytest.mark.parametrize("flags, fragment", BAD_FLAGS)
def test_bad_flags(flags, fragment, world, tmp_path, capsys):
    small = ["--steps=0", "--pretrain_answers=16", f"--out={tmp_path}/run"]
    argv = [f"@{world}/train_vapo.args", *small, *flags]
    fails_with(capsys, train_vapo.main, argv, fragment)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, fragment",
    [
        (["--objective=both"], "both"),
        (["--held_out=1"], "--held_out"),
        (["--passes=0"], "--passes"),
    ],
)
def test_bad_value_flags(flags, fragment, world, tmp_path, capsys):
    argv = [f"@{world}/train_value.args", f"--out={tmp_path}", *flags]
    fails_with(capsys, train_value.main, argv, fragment)


@pytest.mark.parametrize(
    "flags, fragment",
    [
        (["--test="], "--test FILE"),
        (["--temperature=0"], "--temperature must be positive"),
        (["--eval_top_p=2"], "--eval_top_p must be above 0 and at most 1"),
        (["--samples=0"], "--samples must be at least 1"),
        (["--train=x.jsonl"], "--train"),
    ],
)
def test_bad_evaluation_flags(flags, fragment, world, tmp_path, capsys):
    argv = [f"@{world}/evaluate.args", f"--out={tmp_path}/run", *flags]
    fails_with(capsys, evaluate.main, argv, fragment)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("line, fragment", BAD_LINES)
def test_a_bad_line_is_named_by_file_and_line(line, fragment, world, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"problem": "a1", "answer": "b"}}\n\n{line}\n')
    argv = [f"@{world}/train_vapo.args", f"--train={path}"]
    fails_with(capsys, train_vapo.main, argv, f"{path}, line 3", fragment)


def test_lines_end_at_newlines_only_and_huge_numbers_are_no_traceback(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text('{"problem": "a\u2028b\x85c", "answer": "1"}\n', encoding="utf-8")
    assert load_problems(path)[0]["problem"] == "a\u2028b\x85c"
    path.write_text('{"problem": "a", "answer": ' + "9" * 5000 + "}")
    with pytest.raises(BadInput, match="line 1: not JSON"):
        load_problems(path)


@pytest.mark.parametrize(
    "main, args", [(train_vapo.main, "train_vapo"), (evaluate.main, "evaluate")]
)
def test_a_verifier_that_is_not_installed(world, tmp_path, capsys, monkeypatch, main, args):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    argv = [f"@{world}/{args}.args", "--verifier=math_verify", f"--out={tmp_path}/run"]
    fails_with(capsys, main, argv, "pip install math-verify")
    assert not (tmp_path / "run").exists()


def test_an_empty_file_and_a_binary_one(world, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, said in (("empty", "holds no problems"), ("binary", "cannot read the problems")):
        argv = [f"@{world}/train_vapo.args", f"--test={tmp_path}/{name}.jsonl"]
        fails_with(capsys, train_vapo.main, argv, said)


def copied(world, tmp_path, **config):
    """A copy of the base model with other settings in its config.json."""
    directory = tmp_path / "model"
    shutil.copytree(world / "base", directory)
    known = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(known | config))
    return directory


def run_fails(capsys, world, out, flags, *fragments):
    small = ["--steps=0", "--pretrain_answers=16", f"--out={out}"]
    argv = [f"@{world}/train_vapo.args", *small, *flags]
    fails_with(capsys, train_vapo.main, argv, *fragments)


def test_a_tokenizer_without_eos(world, tmp_path, capsys):
    directory = copied(world, tmp_path)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["eos_token"]
    path.write_text(json.dumps(config))
    run_fails(capsys, world, tmp_path / "run", [f"--model={directory}"], "no EOS token")


def test_weights_that_could_hold_code_are_not_read(world, tmp_path, capsys):
    directory = copied(world, tmp_path)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    said = (f"cannot load {directory}", "safetensors")
    run_fails(capsys, world, tmp_path / "run", [f"--model={directory}"], *said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["model", "critic", "reward_model"])
@pytest.mark.parametrize("of", ["the model", "the tokenizer"])
def test_code_that_a_model_brings_is_never_run(world, tmp_path, capsys, monkeypatch, flag, of):
    """Nor is the person at the terminal asked whether it may be."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hub"))
    code = {"auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine",
                         "AutoModelForTokenClassification": "mine.Mine"}}  # fmt: skip
    directory = copied(
        world, tmp_path, **({"model_type": "mine"} | code if of == "the model" else {})
    )
    if of == "the tokenizer":
        path = directory / "tokenizer_config.json"
        config = json.loads(path.read_text()) | {"tokenizer_class": "Mine"}
        path.write_text(json.dumps(config | {"auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}))
    (directory / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    said = (f"cannot load {directory}", "it brings code of its own")
    run_fails(capsys, world, tmp_path / "run", [f"--{flag}={directory}"], *said)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_model(world, tmp_path, capsys):
    directory = copied(world, tmp_path)
    tokenizer = load_tokenizer(str(directory))
    tokenizer.add_tokens([f"<word{i}>" for i in range(50)])
    tokenizer.save_pretrained(directory)
    said = ("the policy's tokenizer", "they are not of one kind")
    run_fails(capsys, world, tmp_path / "run", [f"--model={directory}"], *said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["critic", "reward_model"])
def test_a_critic_that_does_not_fit_the_policy(world, tmp_path, capsys, flag):
    two = {"architectures": ["LlamaForSequenceClassification"],
           "id2label": {"0": "bad", "1": "good"}}  # fmt: skip
    for name, config, fragment in (
        ("labels", two, "has 2 labels"), ("words", {"vocab_size": 7}, "has 7 words"),
        ("short", {"max_position_embeddings": 9}, "has 9 positions"),
    ):  # fmt: skip
        directory = copied(world, tmp_path / name, **config)
        run_fails(capsys, world, tmp_path / "run", [f"--{flag}={directory}"], fragment)
    ViTConfig().save_pretrained(tmp_path / "picture")
    run_fails(capsys, world, tmp_path / "run", [f"--{flag}={tmp_path}/picture"], "has 0 words")
    directory = copied(world, tmp_path / "other")
    other = toy.make_tokenizer(toy.World(max_steps=3))
    other.add_tokens(["<odd>"])
    other.save_pretrained(directory)
    said = ("another tokenizer", "words")
    run_fails(capsys, world, tmp_path / "run", [f"--{flag}={directory}"], *said)
    assert not (tmp_path / "run").exists()


def test_a_damaged_model(world, tmp_path, capsys):
    for name, content in (
        ("config.json", b"{"), ("model.safetensors", b"x" * 100), ("tokenizer.json", b"{"),
    ):  # fmt: skip
        directory = copied(world, tmp_path / name)
        (directory / name).write_bytes(content)
        run_fails(capsys, world, tmp_path / "run", [f"--model={directory}"], "cannot load")
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written(world, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    said = ("Not a directory", "give another --out")
    run_fails(capsys, world, tmp_path / "file" / "run", [], *said)
    argv = [f"@{world}/train_value.args", f"--out={tmp_path}/file/run", "--answers=16"]
    fails_with(capsys, train_value.main, argv, *said)
    if os.geteuid():  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        run_fails(capsys, world, tmp_path / "closed" / "run", [], "Permission denied")


def test_files_without_a_problem_that_is_left(world, tmp_path, capsys):
    line = {"problem": "a" * 400, "answer": "b"}
    (tmp_path / "long.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n")
    (tmp_path / "what.xml").write_text("<a/>")
    for name, flags, said in (
        ("long.jsonl", ["--drop_long_prompts"], ""), ("wrong.csv", [], ", line 2"),
        ("what.xml", [], ""),
    ):  # fmt: skip
        flags = [f"--train={tmp_path}/{name}", *flags]
        run_fails(capsys, world, tmp_path / "run", flags, name + said)
    assert not (tmp_path / "run").exists()


def test_value_pretraining_that_was_stopped_with_other_settings(world, tmp_path, capsys):
    save = checkpoint.save

    def save_and_stop(*args):
        save(*args)
        raise KeyboardInterrupt

    small = ["--device=cpu", f"--out={tmp_path}", "--answers=64", "--passes=2"]
    argv = [f"@{world}/train_value.args", *small]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_stop)
        with pytest.raises(SystemExit):
            train_value.main(argv)
    fails_with(capsys, train_value.main, [*argv, "--lr=1e-5"], "was stopped, with another lr")
    same_place = f"--out={tmp_path}/../{tmp_path.name}"
    assert train_value.main([*argv, same_place])["step"] >= 0


@pytest.mark.parametrize(
    "config",
    [
        {"settings": ["--lr=1e-6", "--seed=0"], "on": {}},  # flags, not an object
        {"settings": {"lr": 1e-6, "keep": 2}, "on": {}},  # a setting that is gone
        {"on": {}},
        [],
    ],
)
def test_a_run_directory_of_an_older_revision_is_refused(world, tmp_path, capsys, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = (f"{tmp_path}/config.json", "was written by another revision", "another --out")
    fails_with(capsys, train_vapo.main, [f"--resume={tmp_path}"], *said)
    argv = [f"@{world}/train_value.args", f"--out={tmp_path}", "--answers=16"]
    fails_with(capsys, train_value.main, argv, *said)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_half_a_config_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"settings": {"lr"')
    fails_with(capsys, train_vapo.main, [f"--resume={tmp_path}"], "was written by another revision")


def test_what_a_run_was_told_comes_back_from_its_config(tmp_path):
    told = train_vapo.Settings(lr=3e-5, is_clip=2.0, prompt_template="«{problem}»")
    settings.save_config(tmp_path, told, torch.device("cpu"))
    assert settings.load_config(train_vapo.Settings, tmp_path) == told
    on = json.loads((tmp_path / "config.json").read_text())["on"]
    assert {"revision", "python", "torch", "transformers", "device"} <= on.keys()
