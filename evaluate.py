"""Evaluation: avg@k, pass@k and maj@k on held-out problems, at the evaluation's own temperature and top-p.

    python train_vapo.py --eval_only --model DIR --test FILE --samples 32 --eval_top_p 0.7      # as the paper evaluates

k answers to each problem, and a greedy one. A problem of n judged answers with c correct ones has
    avg@n   c/n                                                             one answer's chance
    pass@k  1 − C(n−c, k) / C(n, k)                                         k answers' chance to hold a correct one, unbiased
    maj@n   whether the answer that most of them state is correct           (arXiv 2203.11171); of a tie, the one stated first
and each is averaged over problems. An answer that states none, or is truncated, has no vote.
"""

import json
from collections import Counter
from math import comb
from pathlib import Path

import distributed
from equality import canonical
from rollout import judge, sample, sampler_of, verifier_of
from run import Log, describe, seeded_generator, to_argv, write_json
from table import describe_samples, texts
from verifier import extract_answer


def pass_at_k(correct, samples, k):
    """1 − C(n−c, k)/C(n, k): the chance that k of n answers, of which c are correct, hold a correct one (arXiv 2107.03374).

    Unbiased over the draws of n answers, unlike 1 − (1 − c/n)^k. Raises: AssertionError unless 1 ≤ k ≤ n and 0 ≤ c ≤ n.
    """
    assert 1 <= k <= samples and 0 <= correct <= samples
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def majority(answers):
    """The position of the first answer that means what most of them mean, or None. None among the answers has no vote."""
    votes = [None if answer is None else canonical(answer) for answer in answers]
    counted = Counter(vote for vote in votes if vote is not None)  # the most common first, of equals the first seen
    return votes.index(counted.most_common(1)[0][0]) if counted else None


def evaluate(policy, tokenizer, problems, samples, settings, verify, progress=None):
    """`samples` answers to each problem at --eval_temperature and --eval_top_p, and a greedy one.

    Returns: (metrics, rows, results): accuracy (avg@samples), pass_at_k and majority (k = samples), greedy_accuracy, length
        (mean response tokens), truncated (share cut at the limit); the judged rows; a dict for each problem, to look at.
    """
    source = seeded_generator(settings.seed, "evaluation", policy.device)
    common = {"max_tokens": settings.response_length, "generator": source, "sample_rows": settings.sample_rows, "engine": settings.engine}
    rows = sample(
        policy, tokenizer, problems, samples, temperature=settings.eval_temperature, top_p=settings.eval_top_p, progress=progress, **common
    )
    greedy = sample(policy, tokenizer, problems, 1, temperature=0.0, progress=progress and progress + " (greedy)", **common)
    judge(rows, tokenizer, problems, verify)
    judge(greedy, tokenizer, problems, verify)
    results = problem_results(rows, tokenizer, problems, samples, settings.bare_number)
    for result, correct in zip(results, greedy["correct_B"].tolist()):
        result["greedy_correct"] = correct
    return {
        "accuracy": rows["correct_B"].float().mean().item(),
        "pass_at_k": mean(result["correct"] > 0 for result in results),
        "majority": mean(result["majority_correct"] for result in results),
        "greedy_accuracy": greedy["correct_B"].float().mean().item(),
        "length": rows["length_B"].float().mean().item(),
        "truncated": 1.0 - rows["stop_B"].float().mean().item(),
    }, rows, results  # fmt: skip


def problem_results(rows, tokenizer, problems, samples, bare_number=False):
    """For each problem: how many answers are correct, what each states and how long it is, and the majority's answer."""
    stated = [extract_answer(text, bare_number) if whole else None for text, whole in zip(texts(rows, tokenizer), rows["stop_B"].tolist())]
    correct, lengths, stops = rows["correct_B"].tolist(), rows["length_B"].tolist(), rows["stop_B"].tolist()
    results = []
    for i, problem in enumerate(problems):
        own = slice(i * samples, (i + 1) * samples)
        chosen = majority(stated[own])
        results.append({
            "problem": problem["problem"], "answer": problem["answer"], "samples": samples, "correct": sum(correct[own]),
            "majority": None if chosen is None else stated[own][chosen], "majority_correct": chosen is not None and correct[own][chosen],
            "length": mean(lengths[own]), "truncated": 1.0 - mean(stops[own]), "stated": stated[own], "verdicts": correct[own],
        })  # fmt: skip
    return results


def evaluate_only(settings, run_dir, policy, tokenizer, problems):
    """--eval_only: the table with pass@k for k = 1, 2, 4 … --samples on the screen, the numbers in metrics.jsonl, each problem's
    in results.jsonl, a few answers in samples.jsonl. Returns: the metrics of `evaluate`, and run_dir."""
    samples, run_dir, sampler = settings.samples, Path(run_dir), sampler_of(policy, settings)
    metrics, rows, results = evaluate(sampler, tokenizer, problems, samples, settings, verifier_of(settings), progress="evaluation")
    write_json(run_dir / "config.json", {"settings": to_argv(settings), "on": describe(sampler.device)})
    log = Log(run_dir)
    log.metrics(0, {f"test_{name}": value for name, value in metrics.items()})
    log.samples(0, describe_samples(None, tokenizer, problems, rows, samples))
    log.close()
    if not distributed.rank():
        (run_dir / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))

    lines = [(f"avg@{samples} at T = {settings.eval_temperature:g}, top-p = {settings.eval_top_p:g}", metrics["accuracy"])]
    for k in sorted({2**i for i in range(1, samples.bit_length())} | {samples} - {1}):
        lines.append((f"pass@{k}", mean(pass_at_k(result["correct"], samples, k) for result in results)))
    lines += [(f"maj@{samples}", metrics["majority"]), ("greedy accuracy", metrics["greedy_accuracy"])]
    lines += [("mean response length (tokens)", metrics["length"]), ("share of truncated answers", metrics["truncated"])]
    print(f"\n{len(results)} problems")
    for title, value in lines:
        print(f"{title:36s} {value:8.3f}")
    print(f"\nrun directory: {run_dir}   (each problem: results.jsonl)")
    return metrics | {"run_dir": str(run_dir)}


def print_before_and_after(before, after, problems, settings):
    """A run's closing table."""
    names = {
        "accuracy": f"accuracy, avg@{settings.eval_samples} at T = {settings.eval_temperature:g}", "greedy_accuracy": "greedy accuracy",
        "length": "mean response length (tokens)", "truncated": "share of truncated answers",
    }  # fmt: skip
    print(f"\n{f'{problems} test problems':36s} {'before':>8s} {'after':>8s}")
    for name, title in names.items():
        print(f"{title:36s} {before[name]:8.3f} {after[name]:8.3f}")


def mean(values):
    values = list(values)
    return sum(values) / len(values)
