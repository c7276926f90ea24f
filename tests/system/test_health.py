"""health.py: each rule by hand, and on the runs of docs/health.md, good and bad on purpose."""

from pathlib import Path

import pytest
from test_vapo import vapo_run

from system import health
from system.jobs import lines_of

RUNS = Path(__file__).parent.parent.parent / "results" / "health"
WELL = {"bad_steps": 0, "truncated": 0.5, "accuracy": 0.4, "approx_kl": 0.02,
        "explained_variance": -0.25, "sampler_gap": 1e-3, "importance": 1.0}  # fmt: skip
FIRST = WELL | {"accuracy": 0.8, "explained_variance": 0.05}
SKIPPED, CUT, FELL, FAR, CRITIC, UNTRAINED, UNCORRECTED, OTHER = health.RULES


def broken(lines):
    """{rule: first rollout} of the metrics of a run's rollouts."""
    progress = {}
    for step, numbers in enumerate(lines, 1):
        health.watch(step, numbers, progress)
    return progress["health"]


@pytest.mark.parametrize("changed, rule", [
    ({"bad_steps": 1}, SKIPPED), ({"truncated": 0.51}, CUT), ({"accuracy": 0.39}, FELL),
    ({"approx_kl": 0.021}, FAR), ({"explained_variance": -0.26}, CRITIC),
    ({"sampler_gap": 0.002}, UNCORRECTED), ({"sampler_gap": 0.21, "importance": 1.01}, OTHER),
], ids=str)  # fmt: skip
def test_each_rule_by_hand(changed, rule):
    """At its limit none is broken: the best accuracy before was 0.8, and now is half of it."""
    assert broken([FIRST, WELL]) == {}
    assert broken([FIRST, WELL, WELL | changed, FIRST | changed]) == {rule: 3}


def test_at_its_first_rollout_the_critic_has_learned_something():
    assert broken([FIRST | {"explained_variance": 0.049}, FIRST]) == {UNTRAINED: 1}


def test_without_a_critic_and_with_rewards_all_alike_no_rule_is_broken():
    assert broken([{n: v for n, v in WELL.items() if n != "explained_variance"}]) == {}
    assert broken([WELL | {"explained_variance": float("nan")}]) == {}


def test_a_rule_is_said_once_and_again_in_the_end(capsys):
    progress = {}
    for step in (1, 2, 3):
        health.watch(step, FIRST | {"truncated": 0.9 * (step > 1)}, progress)
    health.summary(progress)
    health.summary({})
    said = "most answers are cut at --response_length, since rollout 2: raise it"
    once, again, well = capsys.readouterr().out.splitlines()
    assert once.startswith(f"warning: {said}") and again.startswith(said)
    assert well == "no rule of docs/health.md was broken"


@pytest.mark.parametrize("name, rules", [
    ("well-0", set()), ("well-1", set()), ("well-2", set()),
    ("cut", {CUT}), ("lr4", {FAR}), ("gap", {UNCORRECTED}), ("unpretrained", {UNTRAINED}),
])  # fmt: skip
def test_the_runs_of_the_page_break_the_rules_that_it_says(name, rules):
    lines = lines_of(RUNS / f"{name}.jsonl")[2:]  # after the config and the first evaluation
    lines = [{n: float("nan") if v is None else v for n, v in line.items()} for line in lines]
    assert set(broken(lines)) == rules


def test_a_run_says_it(world, tmp_path, capsys):
    vapo_run(world, tmp_path, "--steps=1", "--response_length=2")
    said = capsys.readouterr().out
    assert said.count("most answers are cut at --response_length, since rollout 1: raise it") == 2
