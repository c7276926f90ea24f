"""problems.py and files.py: the files and fields in use, prompts, and what is refused."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import problems
from system import files
from system.run import BadInput
from system.settings import SamplingSettings

GSM8K = {"question": "2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}
MAWPS = {"input": "2 + 3?", "target": 5.0}
MESSAGES = [{"role": "user", "content": "Solve: 2 + 3?"}]
DAPO = {
    "data_source": "math_dapo",
    "prompt": MESSAGES,
    "reward_model": {"ground_truth": "5", "style": "rule"},
}
WANTED = [
    ({"problem": "2 + 3?", "answer": 5}, {"problem": "2 + 3?", "answer": "5"}),
    (GSM8K, {"problem": "2 + 3?", "answer": "5"}),
    (MAWPS, {"problem": "2 + 3?", "answer": "5.0"}),
    (DAPO, {"problem": "Solve: 2 + 3?", "answer": "5", "messages": MESSAGES}),
]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def without_where(loaded):
    return [
        {name: v for name, v in problem.items() if name not in ("where", "columns")}
        for problem in loaded
    ]


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_all_fields_in_use_are_read_alike_from_jsonl_and_json(kind, tmp_path):
    rows, path = [row for row, _ in WANTED], tmp_path / f"data.{kind}"
    path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    assert without_where(files.load_problems(path)) == [wanted for _, wanted in WANTED]


def test_whole_rows_are_kept_and_only_a_reward_of_ones_own_does_without_answers(tmp_path):
    rows = [{"problem": "a", "numbers": [1, 2]}, {"question": "b", "answer": None},
            {"problem": "c", "answer": 3, "input": "d"}]  # fmt: skip
    rows += [{"prompt": MESSAGES, "reward_model": {}}, {"problem": "e", "answer": ""}]
    (path := tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded = files.load_problems(path, answers=False)
    assert [problem["answer"] for problem in loaded] == ["", "", "3", "", ""]
    assert [problem["columns"] for problem in loaded] == rows
    for row in rows[:2] + rows[3:]:
        path.write_text(json.dumps(row))
        with pytest.raises(BadInput, match="line 1"):
            files.load_problems(path)
    path.write_text('{"text": "a"}')
    with pytest.raises(BadInput, match="wants the fields problem, or question, or input, or promp"):
        files.load_problems(path, answers=False)
    path.write_text('{"problem": "a", "answer": ["b"]}')
    with pytest.raises(BadInput, match='"answer" must be'):
        files.load_problems(path, answers=False)


def test_csv_with_commas_quotes_and_line_breaks(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text(
        'question,answer,level\n"What is 1,000\n+ ""1""?",#### 1001,2\nb,7,1\n',
        encoding="utf-8-sig",
    )
    loaded = files.load_problems(path)
    assert without_where(loaded) == [
        {"problem": 'What is 1,000\n+ "1"?', "answer": "1001"},
        {"problem": "b", "answer": "7"},
    ]
    assert loaded[1]["where"] == f"{path}, line 4"
    path.write_text("question,answer\na,1\nb\n")
    with pytest.raises(BadInput, match='data.csv, line 3: "answer" must be'):
        files.load_problems(path)
    path.write_text('question,answer\n"a,1\n')
    with pytest.raises(BadInput, match="not CSV"):
        files.load_problems(path)


def test_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([DAPO]).to_parquet(tmp_path / "data.parquet")
    assert without_where(files.load_problems(tmp_path / "data.parquet")) == [WANTED[3][1]]
    (tmp_path / "data.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(BadInput, match="cannot read the problems .*data.parquet"):
        files.load_problems(tmp_path / "data.parquet")


def test_a_missing_package_and_a_missing_file_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "data.parquet").write_bytes(b"")
    with pytest.raises(
        BadInput, match="data.parquet is read by the package datasets: pip install datasets"
    ):
        files.load_problems(tmp_path / "data.parquet")
    with pytest.raises(
        BadInput,
        match="openai/gsm8k:main@test is no file; if it is a name on the hub.*pip install datasets",
    ):
        files.load_problems("openai/gsm8k:main@test")
    with pytest.raises(BadInput, match="no such file"):
        files.load_problems("nowhere")
    for kind in files.KINDS:
        with pytest.raises(BadInput, match=f"{tmp_path}/none{kind}: [Nn]o such file"):
            files.load_problems(tmp_path / f"none{kind}")


@pytest.fixture
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world / "base")


def test_the_models_own_chat_format_is_used_where_it_has_one(tokenizer, monkeypatch):
    said = []

    def call(self, text, **flags):
        said.append((text, flags))
        return {"input_ids": [1]}

    monkeypatch.setattr(type(tokenizer), "__call__", call)
    rows = [
        {"problem": "2 + 3?", "answer": "5"},
        {"problem": "Solve: 2 + 3?", "answer": "5", "messages": MESSAGES},
    ]
    problems.encode_prompts(rows, tokenizer, "Now {problem}!", 9)
    tokenizer.chat_template = CHAT
    problems.encode_prompts(rows, tokenizer, "Now {problem}!", 9)
    problems.encode_prompts(rows, tokenizer, "Now {problem}!", 9, chat_template=False)
    plain = [("Now 2 + 3?!", {}), ("Solve: 2 + 3?", {})]
    no_second_bos = {"add_special_tokens": False}
    chat = [
        ("<user>Now 2 + 3?!<assistant>", no_second_bos),
        ("<user>Solve: 2 + 3?<assistant>", no_second_bos),
    ]
    assert said == [*plain, *chat, *plain]


def test_long_prompts_are_counted_and_refused_or_dropped(tokenizer, capsys):
    rows = [{"problem": "a" * n, "answer": "b", "where": f"line {n}"} for n in (1, 5, 2, 6)]
    said = "2 of 4 prompts are longer than --prompt_length 4 .* of 5 tokens: line 5"
    with pytest.raises(BadInput, match=said):
        problems.encode_prompts(rows, tokenizer, "{problem}", 4)
    kept = problems.encode_prompts(rows, tokenizer, "{problem}", 4, drop_long=True)
    assert [len(row["prompt"]) for row in kept] == [1, 2]
    assert "warning: 2 of 4 prompts" in (out := capsys.readouterr().out) and "dropped" in out
    with pytest.raises(BadInput, match="4 of 4 prompts"):
        problems.encode_prompts(rows, tokenizer, 5 * "{problem}", 4, drop_long=True)


@pytest.mark.parametrize("verifier, said", [("exact", "1 answers are LaTeX"), ("math_verify", "")])
def test_answers_that_need_math_verify_are_counted(verifier, said, tmp_path, tokenizer, capsys):
    rows = [{"problem": "a", "answer": a} for a in (3, "\\frac{1}{2}", "1 + \\sqrt{2}", "b")]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = SamplingSettings(verifier=verifier)
    assert len(problems.prompted_problems(tmp_path / "f.jsonl", tokenizer, settings)) == 4
    assert said in (out := capsys.readouterr().out) and bool(said) == bool(out)


def test_problems_of_train_and_test_are_counted_once_each():
    train = [{"problem": "2 +  3?"}, {"problem": "b"}]
    test = [{"problem": "2 + 3? "}, {"problem": "2 + 3?"}, {"problem": "c"}]
    assert problems.repeated(test, train) == 2


def test_what_the_prompt_asks_for_is_what_the_verifier_reads():
    from verifier import verify

    template = SamplingSettings().prompt_template
    assert "last line of your response should be of the form Answer: $Answer" in template
    assert verify("so it is\nAnswer: $34$", "34") and verify("so it is\nAnswer: 34", "34")


def script(words):
    """The script in docs/models.md that has these words."""
    text = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    (found,) = [part for part in re.findall(r"```python\n(.*?)```", text, re.S) if words in part]
    assert len(found.splitlines()) <= 11
    return found


def loaded(path):
    return without_where(files.load_problems(path))


def test_the_scripts_that_make_problem_files_of_common_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "questions.csv").write_text('\ufeffQuestion,Final answer,Source\n"1, 2?",3,a\n')
    exec(script("questions.csv"), {})
    assert loaded("train.jsonl") == [{"problem": "1, 2?", "answer": "3"}]
    assert files.load_problems("train.jsonl")[0]["columns"]["source"] == "a"

    ask = {"role": "user", "content": "2 + 3?"}
    chats = [[ask, {"role": "assistant", "content": text}] for text in (r"So \boxed{5}.", "Five.")]
    lines = [json.dumps({"messages": chat}) + "\n" for chat in chats]
    (tmp_path / "chats.jsonl").write_text("".join(lines))
    exec(script("chats.jsonl"), {})
    assert loaded("train.jsonl") == [{"problem": "2 + 3?", "answer": "5", "messages": [ask]}]

    datasets = pytest.importorskip("datasets")
    rows = [{"question": f"{i}?", "final": str(i), "level": i % 5} for i in range(25)]
    datasets.Dataset.from_list(rows).to_parquet("questions.parquet")
    exec(script("questions.parquet"), {})
    train, test = loaded("train.jsonl"), loaded("test.jsonl")
    assert len(train) == 9 and len(test) == 1
    assert all(row["problem"] == row["answer"] + "?" for row in train + test)
    assert {int(row["answer"]) % 5 for row in train + test} == {3, 4}
