"""Whatever a person gets wrong: one line that names the cause, exit code 2, nothing half-written."""

import json

import pytest

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
