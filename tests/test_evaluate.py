"""evaluate.py: pass@k and majority votes by hand, top-p, and the script from end to end."""

import inspect
import itertools
import json

import pytest
import torch
from test_vapo import FAST, vapo_run

import evaluate
import rollout
import table
from system import slots


@pytest.mark.parametrize(
    "correct, samples, k, chance",
    [
        (1, 4, 1, 0.25),
        (1, 4, 2, 0.5),
        (2, 4, 2, 5 / 6),
        (0, 4, 4, 0.0),
        (1, 4, 4, 1.0),
        (3, 4, 2, 1.0),
    ],
)
def test_pass_at_k_by_hand(correct, samples, k, chance):
    assert evaluate.pass_at_k(correct, samples, k) == pytest.approx(chance)


def test_pass_at_k_is_the_share_of_draws_without_replacement():
    verdicts = [True, True, False, False, False, False, False]
    draws = list(itertools.combinations(verdicts, 3))
    assert evaluate.pass_at_k(2, 7, 3) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert evaluate.pass_at_k(2, 7, 3) > 1 - (1 - 2 / 7) ** 3  # what the biased estimate says


@pytest.mark.parametrize("answers, chosen", [
    (["5", "7", "5"], 0), (["7", "0.5", "1/2", "50%"], 1), (["7", "5"], 0),
    ([None, "5", None, None], 1), ([None, None], None), ([], None),
    (["b+a", "c", "a + b"], 0),
])  # fmt: skip
def test_the_majority_is_of_meanings_not_of_texts(answers, chosen):
    assert evaluate.majority(answers) == chosen


def test_how_each_problem_went_by_hand(monkeypatch):
    """Two problems with three answers each. Two answers to the second are cut: they do not vote."""
    texts = ["#### 7", "#### 5", "it is #### 5.0", "none", "#### 1", "#### 1"]
    monkeypatch.setattr(table, "texts", lambda *_: texts)
    rows = {"stop_B": torch.tensor([1, 1, 1, 1, 0, 0]).bool(),
            "correct_B": torch.tensor([0, 1, 1, 0, 0, 0]).bool(),
            "length_B": torch.tensor([1, 2, 3, 4, 5, 9])}  # fmt: skip
    problems = [{"problem": "2 + 3?", "answer": "5"}, {"problem": "0 + 1?", "answer": "1"}]
    first, second = evaluate.problem_results(rows, None, problems, 3)
    assert first["stated"] == ["7", "5", "5.0"] and second["stated"] == [None, None, None]
    assert (first["correct"], first["majority"], first["majority_correct"]) == (2, "5", True)
    assert (second["correct"], second["majority"], second["majority_correct"]) == (0, None, False)
    assert (first["length"], first["truncated"]) == (2, 0)
    assert (second["length"], second["truncated"]) == (6, pytest.approx(2 / 3))


def test_top_p_cuts_the_tail_and_keeps_at_least_one():
    logit_RV = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(2_000, 1)
    generator = torch.Generator().manual_seed(0)
    for top_p, kept in ((1.0, {0, 1, 2, 3}), (0.7, {0, 1}), (0.9, {0, 1, 2}), (0.01, {0})):
        token_R, logp_R = slots.draw(logit_RV, generator, 1.0, top_p)
        assert set(token_R.tolist()) == kept
        assert logp_R.exp().unique().sum().item() == pytest.approx(1.0, abs=1e-4)  # of what is left


def test_evaluation_trains_nothing_and_says_how_each_problem_went(world, tmp_path, capsys):
    out, args = tmp_path / "eval", f"@{world}/evaluate.args"
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    flags = ["--samples=6", "--eval_top_p=0.9", "--device=cpu", f"--out={out}"]
    said = evaluate.main([args, *flags])
    assert before == {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    assert not (out / "policy").exists() and not (out / "critic").exists()
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(results) == 8
    assert all(len(result["verdicts"]) == result["samples"] == 6 for result in results)
    assert said["accuracy"] == pytest.approx(sum(result["correct"] for result in results) / 48)
    for name, share in (
        ("pass_at_k", [result["correct"] > 0 for result in results]),
        ("majority", [result["majority_correct"] for result in results]),
        ("greedy_accuracy", [result["greedy_correct"] for result in results]),
    ):
        assert said[name] == pytest.approx(sum(share) / 8)
    for result in results:  # of letters: equal texts
        assert result["correct"] == sum(text == result["answer"] for text in result["stated"])
    table = capsys.readouterr().out
    for name in ("avg@6 at T = 1, top-p = 0.9", "pass@2", "pass@4", "pass@6", "maj@6"):
        assert name in table
    numbers = json.loads((out / "metrics.jsonl").read_text())
    assert numbers["test_accuracy"] == pytest.approx(said["accuracy"])
    assert numbers["test_majority"] == pytest.approx(said["majority"])


def test_the_truth_beside_an_answer_is_counted_on_other_answers(world, pair):
    """All shown answers are wrong and all others right: the truth is 1 everywhere.
    Without other answers, or without a world, none is known."""
    policy, _, tokenizer = pair
    prompts = tokenizer(["a1:", "b2:"])["input_ids"]
    asked = [{"problem": p, "answer": "a", "prompt": i} for p, i in zip(("a1", "b2"), prompts)]
    source = torch.Generator(policy.device).manual_seed(0)
    rows = rollout.sample(policy, tokenizer, asked, 4, 16, 1.0, source)
    rows["correct_B"] = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1]).bool()
    rows["reward_B"] = rows["correct_B"].float()
    shown = evaluate.describe_samples(None, tokenizer, asked, rows, 4, world=world)
    assert len(shown) == 4 and all(set(sample["true"]) == {1.0} for sample in shown)
    few = table.take(rows, torch.tensor([0, 1]))
    for known in (
        evaluate.describe_samples(None, tokenizer, asked, rows, 4),
        evaluate.describe_samples(None, tokenizer, asked[:1], few, 2, world=world),
    ):
        assert all(sample["true"] == [] for sample in known)


def test_temperature_and_top_p_of_evaluations_are_their_own(world, tmp_path, monkeypatch):
    """In a run T is 1, whatever is trained at, and top-p --eval_top_p, which training has not; the
    script's are its flags. The greedy answer has neither."""
    args = [f"@{world}/evaluate.args", "--samples=4", "--device=cpu", "--temperature=0.01"]
    cold = evaluate.main([*args, f"--out={tmp_path / 'cold'}"])
    assert cold["accuracy"] == pytest.approx(cold["greedy_accuracy"])
    asked, sample = [], rollout.sample

    def spy(*arguments, **options):
        given = inspect.signature(sample).bind(*arguments, **options).arguments
        asked.append((given["temperature"], given.get("top_p", 1.0)))
        return sample(*arguments, **options)

    monkeypatch.setattr(rollout, "sample", spy)
    vapo_run(world, tmp_path / "run", *FAST, "--temperature=5", "--eval_top_p=0.7")
    evaluation = [(1.0, 0.7), (0.0, 1.0)]
    assert asked == [*evaluation, (5.0, 1.0), *evaluation]
