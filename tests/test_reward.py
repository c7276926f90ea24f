"""--reward FILE.py:FUNCTION: what it is given, what is correct, what is refused; the recipes."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from test_bad_input import fails_with
from test_distributed import ONE_THREAD, command, vapo_flags
from test_vapo import FAST, SMALL, metrics_of, vapo_run, without_clock

import evaluate
import rollout
import train_value
import train_vapo
from recipes import countdown, judge
from system import base_model, checkpoint, distributed, loading, reward, run
from system.run import BadInput, write_lines

ROOT = Path(__file__).parent.parent
ANSWERED = {"problem": "a3", "answer": "c", "where": "f.jsonl, line 1", "columns": {"level": 1}}
OPEN = {"problem": "b3", "answer": "", "where": "f.jsonl, line 2", "columns": {"topic": "x"}}


def own(tmp_path, body, head="prompts, completions, **columns"):
    """--reward of a function with that body, which stands in line 3."""
    path = tmp_path / "own.py"
    path.write_text(f"import json, os, sys, time\ndef mine({head}):\n    {body}\n")
    return f"{path}:mine"


def asked(name, *problems, seconds=60):
    """What the function says of "####c", a whole answer to each of the problems."""
    settings = train_vapo.Settings(reward=name, reward_seconds=seconds)
    return reward.ask(settings, [(problem, "####c", True) for problem in problems])


def test_it_is_given_lists_of_prompts_completions_and_columns(tmp_path):
    name = own(tmp_path, "open(__file__ + '.json', 'w').write(json.dumps("
               "[prompts, completions, columns])); return [1] * len(prompts)")  # fmt: skip
    odd = ANSWERED | {"columns": {"level": 2, "prompts": 5, None: 6}}
    reward.ask(train_vapo.Settings(reward=name), [(ANSWERED, "x", True), (odd, "y", False)])
    assert json.loads((tmp_path / "own.py.json").read_text()) == [
        ["a3", "a3"], ["x", "y"], {"level": [1, 2], "truncated": [False, True]}
    ]  # fmt: skip
    assert asked(own(tmp_path / "..", "return [0]"), ANSWERED | {"columns": {}}) == [(0, None)]


def test_the_bool_decides_then_the_verifier_and_a_cut_answer_is_wrong(
    tokenizer, tmp_path, capsys, monkeypatch
):
    ids = [tokenizer(text)["input_ids"] for text in 5 * ["a:####c"]]
    length_B, five_B = torch.full((5,), 2), torch.arange(5)
    rows = {"token_BL": torch.tensor(ids), "length_B": length_B, "prompt_length_B": length_B,
            "stop_B": five_B != 4, "problem_B": five_B}  # fmt: skip
    answers, says = ["c", "a", "c", "", "c"], [-1, 2, (0.5, False), (-3, True), (9, True)]
    problems = [ANSWERED | {"answer": a, "columns": {"says": s}} for a, s in zip(answers, says)]
    settings = train_vapo.Settings(reward=own(tmp_path, "return columns['says']"))
    run.say_once.cache_clear()
    rollout.judge(rows, tokenizer, problems, rollout.verify, settings)
    assert rows["correct_B"].tolist() == [True, False, False, True, False]
    assert rows["reward_B"].tolist() == [-1, 2, 0.5, -3, 9]
    out = capsys.readouterr().out
    assert "whether an answer is correct, the function's bool says" in out
    assert "whether an answer is correct, the verifier says" in out
    expected, parts = torch.stack([rows["reward_B"], rows["correct_B"].float()]), []
    monkeypatch.setattr(distributed, "add_up", lambda tensor: parts.append(tensor) or tensor)
    monkeypatch.setattr(distributed, "all_ranks", lambda value: [value])
    for rank in range(7):  # some have no answer, and do not ask
        monkeypatch.setattr(distributed, "STATE", {"world": 7, "rank": rank})
        rollout.judge(rows, tokenizer, problems, rollout.verify, settings)
    assert torch.equal(sum(parts), expected)


@pytest.mark.parametrize(
    "body, said",
    [
        ("return [1.0, float('nan')]", "own.py:2 returned nan, asked about f.jsonl, line 2"),
        ("return [(float('inf'), True)] * 2", "own.py:2 returned (inf, True), asked about f.jsonl"),
        ("return [1, (1e300, True)]", "returned (1e+300, True), asked about f.jsonl, line 2"),
        ("return [True, True]", "returned True, asked about f.jsonl, line 1: wants a finite"),
        ("return [1, (1, 'yes')]", "returned (1, 'yes'), asked about f.jsonl, line 2"),
        ("return [1, (1, 1)]", "returned (1, 1), asked about f.jsonl, line 2"),
        ("return [1, None]", "returned None, asked about f.jsonl, line 2"),
        ("return [1, 1]", "returned 1, asked about f.jsonl, line 2: wants a finite number, or that "
         "and a bool: is it correct? (a must where there is no answer)"),
        ("return [1]", "own.py:2 returned a list of 1, asked about 2 answers, the "
         "first to f.jsonl, line 1"),
        ("return 1.0", "own.py:2 returned no list but 1.0, asked about 2 answers"),
        ("return {'b3': 1}['a' * len(prompts) + '3']", "own.py:3: KeyError: 'aa3', asked about 2"),
        ("return [{'a3': 1}[prompt] for prompt in prompts]",
         "own.py:3: KeyError: 'b3', asked about f.jsonl, line 2"),
        ("sys.exit('no')", "own.py:3: SystemExit: no, asked about f.jsonl, line 1"),
    ],
)  # fmt: skip
def test_what_a_reward_may_not_return_is_named_by_problem_file_and_line(tmp_path, body, said):
    with pytest.raises(BadInput) as error:
        asked(own(tmp_path, body), ANSWERED, OPEN)
    assert f"{tmp_path}/{said}" in str(error.value) or said in str(error.value)


def test_a_column_that_is_missing_is_named(tmp_path):
    name = own(tmp_path, "return [1]", "prompts, completions, numbers, **columns")
    with pytest.raises(BadInput, match="own.py:2: TypeError.*'numbers', asked about f.jsonl, li"):
        asked(name, ANSWERED)


def test_a_file_is_read_once_so_that_a_run_has_one_function_and_the_copy_is_of_that(tmp_path):
    (name, before), after = (own(tmp_path, "return [1]"), [(1.0, None)]), "return [2]"
    assert asked(name, ANSWERED) == before
    assert asked(own(tmp_path, after), ANSWERED) == before
    reward.keep_source(name, tmp_path)
    assert "return [1]" in (tmp_path / "reward.py").read_text()


def test_a_file_that_cannot_be_loaded_is_refused_before_anything_is_done(
    world, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(loading, "load_policy", lambda *_: pytest.fail("loaded"))
    (tmp_path / "odd.py").write_text("def f(:\n")
    (tmp_path / "one.py").write_text("f = 1\ndef g(): pass\n")
    for name, said in (
        ("nowhere.py:f", "FileNotFoundError"), ("own", "FileNotFoundError"),
        ("odd.py:f", "SyntaxError"), ("one.py:f", "no such func"), ("one.py:h", "no such func"),
    ):  # fmt: skip
        argv = [f"@{world}/train_vapo.args", f"--reward={tmp_path}/{name}", f"--out={tmp_path}/run"]
        fails_with(capsys, train_vapo.main, argv, "--reward", said)
    argv = [f"@{world}/train_vapo.args", f"--reward={tmp_path}/one.py:g", "--reward_wrong=-1"]
    fails_with(capsys, train_vapo.main, argv, "--reward has no use for --reward_correct and")
    assert not (tmp_path / "run").exists()


def test_the_dapo_preset_has_no_reward_of_its_own_beside_it(world, tmp_path):
    name = own(tmp_path, "return [1] * len(prompts)")
    argv = [f"@{world}/train_vapo.args", "--preset=dapo", f"--out={tmp_path}/run"]
    settings, _ = train_vapo.settings_of([*argv, f"--reward={name}"])
    settings.check()
    assert settings.overlong == 0.2 and settings.dynamic_sampling == 10
    assert train_vapo.settings_of(argv)[0].reward_wrong == -1


# The second rollout goes wrong while there is a file `fault`; the verifier decides what is correct.
FAULTY = """
import json, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent


def mine(prompts, completions, level, truncated, **columns):
    with open(HERE / "calls", "a") as file:
        print(len(prompts), file=file)
    assert [f"level {prompt}" for prompt in prompts] == level
    rewards = [len(text) / 10 for text in completions]
    fault, log = HERE / "fault", HERE / "run" / "metrics.jsonl"
    if fault.exists() and len(log.read_text().splitlines()) == 2:
        if fault.read_text() == "slow":
            with ThreadPoolExecutor(1) as threads:
                threads.submit(time.sleep, 100).result()  # line 18
        elif fault.read_text() == "raises":
            raise OSError("the server is down")  # line 20
        rewards = {"nan": [float("nan"), *rewards[1:]], "short": rewards[1:]}[fault.read_text()]
    return rewards
"""


def faulty(world, tmp_path):
    """Flags of a short run with that reward, and with problems that have another column."""
    (tmp_path / "own.py").write_text(FAULTY)
    for name in ("train", "test"):
        lines = map(json.loads, (world / f"{name}.jsonl").read_text().splitlines())
        lines = [line | {"level": f"level {line['problem']}"} for line in lines]
        write_lines(tmp_path / f"{name}.jsonl", lines)
    files = [f"--{name}={tmp_path}/{name}.jsonl" for name in ("train", "test")]
    return [*FAST, "--steps=2", "--save_every=1", *files, f"--reward={tmp_path}/own.py:mine"]


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    vapo_run(world, directory / "run", *faulty(world, directory))
    return directory


def test_a_run_asks_once_a_rollout_and_optimises_what_it_is_told(undisturbed):
    # 24 answers a rollout; an evaluation has 2 to each of 8 problems, and a greedy one
    calls = list(map(int, (undisturbed / "calls").read_text().split()))
    assert calls == [16, 8, 24, 24, 16, 8]
    first, *_, last = metrics_of(undisturbed / "run")
    assert last["reward"] > 0.2 and last["reward"] != last["accuracy"]
    assert 0 < first["test_accuracy"] < 1 and first["test_reward"] > 0.2
    samples = (undisturbed / "run" / "samples.jsonl").read_text().splitlines()
    for sample in map(json.loads, samples):
        assert sample["reward"] == pytest.approx(len(sample["response"]) / 10)
    assert (undisturbed / "run" / "reward.py").read_text() == FAULTY


@pytest.mark.parametrize(
    "fault, said",
    [
        ("raises", "own.py:20: OSError: the server is down, asked about"),
        ("nan", "own.py:9 returned nan, asked about"),
        ("short", "own.py:9 returned a list of 23, asked about 24 answers, the first"),
        ("slow", "own.py:18 took longer than --reward_seconds 3, asked about 24 answers"),
    ],
)
def test_a_fault_is_one_line_and_the_run_goes_on_as_if_it_had_not_been(
    world, undisturbed, tmp_path, capsys, fault, said
):
    flags = [*faulty(world, tmp_path), "--reward_seconds=3"]
    (tmp_path / "fault").write_text(fault)
    if fault == "slow":  # it ends the process, though a thread of the function's own is not done
        words = [sys.executable, "train_vapo.py", f"@{world}/train_vapo.args", *SMALL, *flags]
        pipes = {"capture_output": True, "text": True, "timeout": 90}
        done = subprocess.run([*words, f"--out={tmp_path}/run"], cwd=ROOT, env=ONE_THREAD, **pipes)
        assert done.returncode == 2
        (line,) = [ln for ln in done.stderr.splitlines() if ln.startswith("error: ")]
        assert said in line and ".jsonl, line " in line
    else:
        with pytest.raises(SystemExit) as stop:
            vapo_run(world, tmp_path / "run", *flags)
        (line,) = [ln for ln in capsys.readouterr().err.splitlines() if ln.startswith("error: ")]
        assert stop.value.code == 2 and said in line and ".jsonl, line " in line
    assert len(metrics_of(tmp_path / "run")) == 2
    (tmp_path / "fault").unlink()
    train_vapo.main([f"--resume={tmp_path}/run", "--reward_seconds=50"])
    expected = without_clock(metrics_of(undisturbed / "run"))
    assert without_clock(metrics_of(tmp_path / "run")) == expected


def test_a_function_that_has_changed_is_noticed_on_resume(world, tmp_path, capsys):
    flags, out, file = faulty(world, tmp_path), tmp_path / "run", tmp_path / "own.py"
    vapo_run(world, out, *flags, "--steps=1")
    for text in (FAULTY.replace("/ 10", "/ 5"), FAULTY):
        file.write_text(text)
        reward.load.cache_clear()
        argv = [f"--resume={out}", "--steps=2"]
        if text != FAULTY:
            config = (out / "config.json").read_text()
            fails_with(capsys, train_vapo.main, argv, f"{file}:mine", f"was, {out}/reward.py: put")
            assert (out / "config.json").read_text() == config and len(metrics_of(out)) == 2
    train_vapo.main(argv)
    file.write_text(FAULTY + "# new\n")
    reward.load.cache_clear()
    (out / "reward.py").unlink()  # to go on with the new one
    train_vapo.main([f"--resume={out}", "--steps=3"])
    assert len(metrics_of(out)) == 4 and (out / "reward.py").read_text().endswith("# new\n")


def test_value_pretraining_has_the_same_reward_and_its_answers_are_for_it_alone(
    world, tmp_path, capsys
):
    name = own(tmp_path, "return [5 + len(text) / 100 for text in completions]")
    argv = [f"@{world}/train_value.args", "--device=cpu", "--answers=64", "--passes=1", "--lr=1e-9"]
    flags = [f"--out={tmp_path}/value", f"--reward={name}"]
    assert 5 < train_value.main([*argv, *flags])["value_first"] < 6
    assert checkpoint.read(tmp_path / "value" / "answers.pt")["rows"]["reward_B"].min() > 5
    (tmp_path / "other").mkdir()
    other = f"--reward={own(tmp_path / 'other', 'return [1] * len(prompts)')}"
    for flag in ("--patience=9", other):  # without --reward, with another function
        flags = [f"--out={tmp_path}/again", f"--reuse_answers={tmp_path}/value/answers.pt", flag]
        fails_with(capsys, train_value.main, [*argv, *flags], "answers with another reward")


def test_an_evaluation_of_problems_without_answers(world, tmp_path):
    write_lines(tmp_path / "test.jsonl", [{"problem": f"{c}3", "wanted": c} for c in "abcd"])
    name = own(tmp_path, "return [(3 * (w in t), w in t) for w, t in zip(wanted, completions)]",
               "prompts, completions, wanted, **columns")  # fmt: skip
    flags = [f"--test={tmp_path}/test.jsonl", f"--reward={name}", f"--out={tmp_path}/eval"]
    argv = [f"@{world}/evaluate.args", "--device=cpu", "--samples=4"]
    said = evaluate.main([*argv, *flags])
    lines = (tmp_path / "eval" / "results.jsonl").read_text().splitlines()
    results = list(map(json.loads, lines))
    assert [result["answer"] for result in results] == 4 * [""]
    assert said["accuracy"] == sum(result["correct"] for result in results) / 16
    assert said["reward"] >= 3 * said["accuracy"] > 0  # cut answers have a reward, too
    assert (tmp_path / "eval" / "reward.py").read_text() == (tmp_path / "own.py").read_text()


def test_the_time_limit_is_for_the_call_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("ended"))
    before = signal.getsignal(signal.SIGALRM)
    asked(own(tmp_path, "return [1]"), ANSWERED, seconds=0.5)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) is before


def test_while_it_is_looked_for_the_problem_the_limit_hides_no_exception(
    tmp_path, monkeypatch, capfd
):
    def interrupt(code):
        assert code == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "_exit", interrupt)
    name = own(tmp_path, "return [time.sleep(9) if len(prompts) < 2 else 1 / 0]")
    with pytest.raises(KeyboardInterrupt):
        asked(name, ANSWERED, OPEN, seconds=0.5)
    said = "own.py:3: ZeroDivisionError: division by zero, asked about 2 answers, the first to f.js"
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    "how, said",
    [("raise ValueError('odd')", "error: --reward"), ("time.sleep(100)", "error on rank 1: ")],
)
def test_what_fails_on_one_rank_ends_them_all(world, tmp_path, how, said):
    body = f"if os.environ['RANK'] == '1': {how}\n    return [1] * len(prompts)"
    flags = [f"--reward={own(tmp_path, body)}", "--reward_seconds=3", "--steps=0"]
    words = vapo_flags(world, tmp_path / "run", *flags)
    pipes = {"capture_output": True, "text": True, "timeout": 150}
    done = subprocess.run(command(2, *words), cwd=ROOT, env=ONE_THREAD, **pipes)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode != 0 and "own.py:3" in lines[0], done.stderr[-3000:]
    assert lines[0].startswith(said)
    # On a busy machine torchrun ends rank 1 too late: then both say the same.
    assert "sleep" in how or len({line.replace(" on rank 1", "") for line in lines}) == 1


@pytest.mark.parametrize(
    "text, expected",
    [
        ("####(3 + 5) * 2", (1.0, True)), ("Answer: 2 * (5 + 3) = 16", (1.0, True)),
        ("\\boxed{5 * 2 + 6 / 1}", (0.0, False)), ("####3 * 5 + 2", (0.1, False)),
        ("####16", (0.0, False)), ("(3 + 5) * 2", (0.0, False)), ("####2 ** 5 - 3", (0.0, False)),
        ("####3 / (5 - 5) * 2", (0.0, False)), ("####__import__('os')", (0.0, False)),
        ("####" + "(" * 90 + "3", (0.0, False)), ("####3.0 + 5 * 2", (0.0, False)),
    ],
)  # fmt: skip
def test_countdown_by_hand(text, expected):
    how = {"numbers": [[5, 2, 3]], "target": [16], "problem": ["…"]}
    assert countdown.reward(["…"], [text], truncated=[False], **how) == [expected]
    assert countdown.reward(["…"], [text], truncated=[True], **how) == [(0.0, False)]


def test_countdown_problems_can_be_solved():
    problem = countdown.draw_problem(random.Random(0))
    assert all(str(number) in problem["problem"] for number in problem["numbers"])
    assert 0 < problem["target"] < 1000


def test_a_run_of_countdown(tmp_path):
    """A base model that puts any sign between two numbers, which is right at a third of them."""
    numbers, signs = range(2, 10), ["+", "-", "*"]
    tokenizer = base_model.word_tokenizer([":", "####", *signs, *map(str, numbers)], "####|.")
    rng = random.Random(0)

    def draw():
        pairs = [f"{rng.choice(numbers)}{rng.choice(numbers)}:" for _ in range(32)]
        return [(pair, f"####{pair[0]}{rng.choice(signs)}{pair[1]}") for pair in pairs]

    policy = base_model.train(tokenizer, draw, 0, 1, 32, 32, 150, 1e-2, progress=False)
    checkpoint.export(policy, tokenizer, tmp_path / "base")
    problems = [{"problem": f"{a}{b}", "numbers": [a, b], "target": a * b}
                for a in numbers for b in numbers if a * b > a + b]  # fmt: skip
    write_lines(tmp_path / "problems.jsonl", problems)
    files = [f"--{name}={tmp_path}/problems.jsonl" for name in ("train", "test")]
    flags = ["--prompts=16", "--samples=8", "--mini_batch=32", "--lr=3e-3", "--response_length=8",
             "--pretrain_answers=64", "--pretrain_passes=1", "--steps=3", "--eval_samples=4",
             "--prompt_template={problem}:", "--prompt_length=8", "--device=cpu"]  # fmt: skip
    flags += [
        f"--model={tmp_path}/base",
        f"--out={tmp_path}/run",
        "--reward=recipes/countdown.py:reward",
    ]
    said = train_vapo.main([*files, *flags])
    assert 0.15 < said["before_accuracy"] < 0.6 < said["accuracy"] and said["reward"] > 0.6


class Judge(BaseHTTPRequestHandler):
    """Grades an answer "7" with 7; each first request to an answer with a fault has that fault."""

    seen, now, most, lock, sixteen = [], 0, 0, threading.Lock(), threading.Event()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions" and body["model"] == "grader"
        assert self.headers["Authorization"] == "Bearer secret"
        answer = body["messages"][0]["content"].rpartition("Answer:\n")[2]
        with self.lock:
            Judge.now, first = Judge.now + 1, answer not in self.seen
            Judge.most = max(self.most, self.now)
            self.seen.append(answer)
            if self.most >= 16:
                self.sixteen.set()
        if "number" in answer:
            self.sixteen.wait(3)  # the first ones, for the others
        time.sleep(6 if first and "slow" in answer else 0.01)
        status = 503 if first and "busy" in answer else 400 if "refused" in answer else 200
        grade = "well …" if first and "vague" in answer else f"{answer.split()[0]} / 10"
        reply = json.dumps({"choices": [{"message": {"content": grade}}]}).encode()
        with self.lock:
            Judge.now -= 1
        self.send_response(status)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """Its address; it is a real one, in threads of this process."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.daemon_threads, server.request_queue_size = True, 64
    server.handle_error = lambda *_: None  # a client that has gone away
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    settings = {"JUDGE_URL": url, "JUDGE_MODEL": "grader", "JUDGE_KEY": "secret", "no_proxy": "*"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Judge, "seen", [])
    monkeypatch.setattr(judge, "PAUSE", 0.01)
    yield server
    server.shutdown()
    server.server_close()


def test_the_judge_is_asked_sixteen_at_once_with_time_outs_and_retries(server, monkeypatch):
    monkeypatch.setattr(judge, "TIMEOUT", 5)
    answers = [f"{i % 11} number {i}" for i in range(61)]
    answers += ["8 slow", "7 busy", "10 vague"]
    cut = [i == 5 for i in range(64)]
    values = judge.reward(64 * ["1 + 1?"], answers, truncated=cut, level=64 * [1])
    grades = [0 if i == 5 else int(answer.split()[0]) for i, answer in enumerate(answers)]
    assert values == [(grade / 10, grade >= 8) for grade in grades]
    assert Judge.most == 16 and len(Judge.seen) == 63 + 3


def test_a_judge_that_does_not_answer_is_one_line(server, monkeypatch):
    problems = [ANSWERED | {"where": f"line {i}"} for i in range(20)]

    def asked(*texts):
        name = f"{ROOT}/recipes/judge.py:reward"
        reward.load(name)[0].__globals__["PAUSE"] = 0.01
        answers = [(problem, text, True) for problem, text in zip(problems, texts)]
        return reward.ask(train_vapo.Settings(reward=name, reward_seconds=60), answers)

    assert asked("7", "9 busy") == [(0.7, False), (0.9, True)]
    with pytest.raises(BadInput, match="judge.py:.*HTTP Error 400.*, asked about line 2"):
        asked("7", "8", "9 refused", "6")
    assert Judge.seen.count("9 refused") == 3  # at first, in its half, and alone: never sent again
    server.shutdown()
    server.server_close()
    with pytest.raises(BadInput, match="URLError: .*refused.*, asked about line 0"):
        asked(*20 * ["7"])
