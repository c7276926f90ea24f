"""Evaluation: avg@k, pass@k and maj@k on held-out problems, and how each of them went.

    python evaluate.py --model DIR --test FILE --samples 32 --eval_top_p 0.7   # as the paper does

k answers to each problem, and a greedy one. A problem of n judged answers with c correct ones has
    avg@n   c/n                                     one answer's chance
    pass@k  1 − C(n−c, k) / C(n, k)                 that k answers hold a correct one, unbiased
    maj@n   whether the answer that most of them state is correct (arXiv 2203.11171); of a tie, the
            one stated first
and each is averaged over problems. An answer that states none, or is cut, has no vote.
"""

import time
from dataclasses import dataclass
from math import comb
from statistics import fmean, mode

import torch

import model
import rollout
import table
import toy
from system import distributed, loading, settings as flags
from system.equality import canonical
from system.run import Log, exit_on_bad_input, seeded_generator, write_lines
from system.settings import ABOVE_0_SHARE, AT_LEAST_1, PROBLEMS, flag
from verifier import extract_answer

TITLES = {"reward": "mean reward", "greedy_accuracy": "greedy accuracy",
          "length": "mean response length (tokens)",
          "truncated": "share of truncated answers"}  # fmt: skip


@dataclass(frozen=True)
class Settings(flags.SamplingSettings):
    test: str = flag("", "held-out problems: a file or OWNER/NAME:CONFIG@SPLIT", PROBLEMS)
    out: str = flag("", "directory for the numbers; empty: runs/eval-DATE-TIME")
    samples: int = flag(32, "answers to each problem, k", AT_LEAST_1)
    eval_top_p: float = flag(1.0, "top-p of the sampling (the paper: 0.7)", ABOVE_0_SHARE)


def pass_at_k(correct, samples, k):
    """1 − C(n−c, k) / C(n, k), unbiased, unlike 1 − (1 − c/n)^k (arXiv 2107.03374)."""
    assert 1 <= k <= samples and 0 <= correct <= samples
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def majority(answers):
    """The position of the first answer that means what most of them mean, or None.
    Args: answers, texts, or None where no answer is stated; those do not vote."""
    votes = [None if answer is None else canonical(answer) for answer in answers]
    stated = [vote for vote in votes if vote is not None]
    return votes.index(mode(stated)) if stated else None  # of equals, the first


def evaluate(policy, tokenizer, problems, samples, settings, verify, temperature, progress=None):
    """`samples` answers to each problem at a temperature and --eval_top_p, and a greedy one.
    Returns: (metrics, pass_at_k and majority at k = samples; judged rows; a dict a problem)."""
    source = seeded_generator(settings.seed, "evaluation", policy.device)
    how = {"max_tokens": settings.response_length, "generator": source, "engine": settings.engine,
           "sample_rows": settings.sample_rows, "progress": progress}  # fmt: skip
    asked, top_p = (policy, tokenizer, problems), settings.eval_top_p
    rows = rollout.sample(*asked, samples, temperature=temperature, top_p=top_p, **how)
    greedy = rollout.sample(*asked, 1, temperature=0.0, **how)
    for answers in (rows, greedy):
        rollout.judge(answers, tokenizer, problems, verify, settings)
    results = problem_results(rows, tokenizer, problems, samples, settings.bare_number)
    for result, correct in zip(results, greedy["correct_B"].tolist()):
        result["greedy_correct"] = correct
    own = {"reward": rows["reward_B"].mean().item()} if settings.reward else {}
    return own | {
        "accuracy": rows["correct_B"].float().mean().item(),
        "pass_at_k": fmean(result["correct"] > 0 for result in results),
        "majority": fmean(result["majority_correct"] for result in results),
        "greedy_accuracy": greedy["correct_B"].float().mean().item(),
        "length": rows["length_B"].float().mean().item(),
        "truncated": 1.0 - rows["stop_B"].float().mean().item(),
    }, rows, results  # fmt: skip


def problem_results(rows, tokenizer, problems, samples, bare_number=False):
    """For each problem: what its answers state, how many are correct, the majority's answer."""
    texts, stops = table.texts(rows, tokenizer), rows["stop_B"].tolist()
    correct, lengths = rows["correct_B"].tolist(), rows["length_B"].tolist()
    stated = [extract_answer(t, bare_number) if ended else None for t, ended in zip(texts, stops)]
    results = []
    for i, problem in enumerate(problems):
        own = slice(i * samples, (i + 1) * samples)
        chosen = majority(stated[own])
        results.append({
            "problem": problem["problem"], "answer": problem["answer"], "samples": samples,
            "correct": sum(correct[own]),
            "majority": None if chosen is None else stated[own][chosen],
            "majority_correct": chosen is not None and correct[own][chosen],
            "length": fmean(lengths[own]), "truncated": 1.0 - fmean(stops[own]),
            "stated": stated[own], "verdicts": correct[own],
        })  # fmt: skip
    return results


def describe_samples(critic, tokenizer, problems, rows, samples, tokens=0, world=None):
    """Two answers to each of the first four problems, with verdict and, of a critic, V, read
    `tokens` at a time; in an embedded world with the reward that is to be expected there."""
    index = [i for i in range(min(4 * samples, len(rows["length_B"]))) if i % samples < 2]
    part = table.take(rows, torch.tensor(index))
    value_BT = model.all_values(critic, part, tokens) if critic else torch.zeros(len(index), 0)
    if rest := world and [i for i in range(len(rows["length_B"])) if i not in index]:
        others = table.take(rows, torch.tensor(rest))  # no answer's own outcome is in its truth
        true_BT = toy.perfect_values(world, problems, tokenizer, others, part)
    token_BT, described = table.response_tokens(part), []
    for i, text in enumerate(table.texts(part, tokenizer)):
        problem, length = problems[int(part["problem_B"][i])], int(part["length_B"][i])
        described.append({
            "problem": problem["problem"], "answer": problem["answer"], "response": text,
            "correct": bool(part["correct_B"][i]), "reward": round(part["reward_B"][i].item(), 4),
            "finish": "stop" if part["stop_B"][i] else "length",
            "values": [round(value, 4) for value in value_BT[i, :length].tolist()],
            "true": [round(p, 4) for p in true_BT[i, :length].tolist()] if rest else [],
            "tokens": tokenizer.batch_decode(token_BT[i, :length, None]),
        })  # fmt: skip
    return described


def evaluate_in_run(step, sampler, critic, tokenizer, problems, settings, verify, log):
    """An evaluation at T = 1 during training, with a few answers for samples.jsonl.
    Returns: (metrics, the same for the log, each as test_NAME, and seconds_eval)."""
    started, samples = time.time(), settings.eval_samples
    how = (settings, verify, 1.0, f"evaluation {step}")
    metrics, rows, _ = evaluate(sampler, tokenizer, problems, samples, *how)
    world = toy.world_of(settings.test, tokenizer) if critic else None
    how = (samples, settings.micro_batch_tokens, world)
    log.samples(step, describe_samples(critic, tokenizer, problems, rows, *how))
    numbers = {f"test_{name}": value for name, value in metrics.items()}
    return metrics, numbers | {"seconds_eval": time.time() - started}


def print_before_and_after(before, after, problems, settings):
    """A run's closing table."""
    names = {"accuracy": f"accuracy, avg@{settings.eval_samples} at T = 1"}
    print(f"\n{f'{problems} test problems':36s} {'before':>8s} {'after':>8s}")
    for name, title in (names | TITLES).items():
        if name in before:
            print(f"{title:36s} {before[name]:8.3f} {after[name]:8.3f}")


@exit_on_bad_input
def main(argv=None):
    """Runs the script: a table on the screen, the numbers in OUT/metrics.jsonl, each problem's in
    results.jsonl, a few answers in samples.jsonl. Returns: the metrics, and "run_dir"."""
    settings = flags.parse(Settings, argv, __doc__)
    distributed.start()
    defaults = toy.defaults("evaluate", settings.model)
    settings = flags.parse(Settings, argv, __doc__, defaults)
    settings.check()
    run_dir, samples = flags.new_run_dir(settings.out, "eval"), settings.samples
    policy, tokenizer, (problems,) = model.set_up(settings, [settings.test])
    sampler, verify = loading.sampler_of(policy, settings), rollout.verifier_of(settings)
    how = (samples, settings, verify, settings.temperature, "evaluation")
    metrics, rows, results = evaluate(sampler, tokenizer, problems, *how)
    flags.save_config(run_dir, settings, sampler.device)
    log = Log(run_dir)
    log.metrics(0, {f"test_{name}": value for name, value in metrics.items()})
    log.samples(0, describe_samples(None, tokenizer, problems, rows, samples))
    log.close()
    write_lines(run_dir / "results.jsonl", results)

    title = f"avg@{samples} at T = {settings.temperature:g}, top-p = {settings.eval_top_p:g}"
    lines = {title: metrics["accuracy"]}
    for k in sorted({2**i for i in range(1, samples.bit_length())} | {samples} - {1}):
        lines[f"pass@{k}"] = fmean(pass_at_k(result["correct"], samples, k) for result in results)
    lines[f"maj@{samples}"] = metrics["majority"]
    print(f"\n{len(results)} problems")
    lines |= {title: metrics[name] for name, title in TITLES.items() if name in metrics}
    for title, value in lines.items():
        print(f"{title:36s} {value:8.3f}")
    print(f"\nrun directory: {run_dir}   (each problem: results.jsonl)")
    return metrics | {"run_dir": str(run_dir)}


if __name__ == "__main__":
    main()
