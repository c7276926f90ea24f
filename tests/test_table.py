"""table.py: the columns that its docstring promises, mini-batches and micro-batches."""

import re
from types import SimpleNamespace

import pytest
import torch
from test_vapo import SETTINGS, asked, with_weights

import rollout
import table
import train_vapo
from lab.dryrun import Live
from lab.plan import table_bytes

LINE = re.compile(r"^(\w+_B\w*) +(.+?) {2,}([\w.]+) +(rollout|mini-batch)$", re.MULTILINE)


def promised(stage, with_critic):
    """The columns that, by the docstring, a function writes."""
    lines = [line for line in LINE.findall(table.__doc__) if line[2] == stage]
    return {name for name, what, *_ in lines if with_critic or "(with a critic)" not in what}


@pytest.mark.parametrize("with_critic", [True, False])
def test_every_column_of_the_docstring_is_written_where_it_says_and_no_other(
    world, pair, with_critic
):
    policy, critic, tokenizer = pair
    critic = critic if with_critic else None
    settings = train_vapo.Settings(critic_free=not with_critic, samples=4, compile=False)
    problems, source = asked(world, tokenizer, 3), torch.Generator(policy.device).manual_seed(0)
    known, rows = set(), {}

    def sample():
        rows.update(rollout.sample(policy, tokenizer, problems, 4, 24, 1.0, source))

    for stage, write in (
        ("rollout.sample", sample),
        ("rollout.judge", lambda: rollout.judge(rows, tokenizer, problems)),
        ("train_vapo.score", lambda: train_vapo.score(policy, critic, rows, settings)),
        ("train_vapo.advantages", lambda: train_vapo.advantages(rows, settings)),
        ("train_vapo.weights", lambda: train_vapo.weights(rows, settings)),
    ):
        write()
        assert rows.keys() - known == promised(stage, with_critic), stage
        known |= rows.keys()
    lines = LINE.findall(table.__doc__)
    assert len(lines) == len({name for name, *_ in lines}) == 18
    assert not with_critic or known == {name for name, *_ in lines}
    off_BT = table.response_mask(rows) == 0
    for name in rows:
        assert rows[name].shape[0] == 12
        if name.endswith("_BT"):  # what they hold beyond a row's end is 0
            assert off_BT.any() and (rows[name][off_BT] == 0).all(), name


@pytest.mark.parametrize(
    "size, sizes", [(8, [8, 7, 7]), (7, [6, 6, 5, 5]), (22, [22]), (99, [22]), (1, [1] * 22)]
)
def test_mini_batches_are_as_even_as_can_be_and_hold_every_row_once(size, sizes):
    length_B = torch.arange(1, 23)
    rows = {"length_B": length_B, "prompt_length_B": torch.ones_like(length_B),
            "problem_B": torch.arange(22), "adv_BT": torch.ones(22, 22)}  # fmt: skip

    def cut(seed):
        return list(table.mini_batches(rows, size, torch.Generator().manual_seed(seed)))

    batches = cut(0)
    assert [len(batch["length_B"]) for batch in batches] == sizes
    order = torch.cat([batch["problem_B"] for batch in batches])
    assert order.sort().values.tolist() == list(range(22)) != order.tolist()  # shuffled
    assert all(batch["adv_BT"].shape[1] == batch["length_B"].max() for batch in batches)
    same, other = (torch.cat([b["problem_B"] for b in cut(seed)]) for seed in (0, 1))
    assert torch.equal(order, same) and not torch.equal(order, other)


def test_weights_of_a_mini_batch_sum_to_one_each_and_not_those_of_its_parts():
    length_B = torch.tensor([1, 3, 4])
    rows = {"length_B": length_B, "prompt_length_B": torch.ones_like(length_B),
            "correct_B": torch.tensor([True, False, True])}  # fmt: skip
    batch = with_weights(rows, SETTINGS)
    for name in ("policy_weight_BT", "nll_weight_BT", "critic_weight_BT"):
        assert batch[name].sum().item() == pytest.approx(1)
    part = table.take(batch, torch.tensor([0]))
    assert part["policy_weight_BT"].tolist() == [[1 / 8]]
    torch.testing.assert_close(part["nll_weight_BT"], torch.tensor([[1 / 5]]))


def test_a_rollout_of_long_answers_is_in_memory_twice_at_most():
    """16 prompts × 16 answers × 20,480 tokens: ids of 8 bytes, seven columns of 4, 191 MB. What
    sampling, advantages and metrics need beside it is less than that again."""
    prompts, samples, width, longest = 16, 16, 1024, 20_480
    answers = prompts * samples

    class Engine:  # as vLLM's
        device, generation_config = torch.device("cpu"), SimpleNamespace(eos_token_id=1)

        def answers(self, *_):
            length_B = torch.linspace(longest / 2, longest, answers).long()
            token_BT = torch.ones(answers, longest, dtype=torch.long)
            return token_BT, -torch.rand(answers, longest), length_B, length_B < longest

    tokenizer = SimpleNamespace(eos_token_id=1, added_tokens_decoder={})
    problems, settings = [{"prompt": [5] * width}] * prompts, train_vapo.Settings()
    how = (samples, longest, 1.0, torch.Generator())
    with Live() as sampling:
        rows = rollout.sample(Engine(), tokenizer, problems, *how, engine="vllm")
    rows["correct_B"] = torch.arange(answers) % 3 == 0
    rows["reward_B"] = rows["correct_B"].float()
    for name in ("old_logp_BT", "entropy_BT", "old_value_BT"):
        rows[name] = torch.zeros(answers, longest)
    with Live(rows.values()) as scoring:
        train_vapo.advantages(rows, settings)
    with Live(rows.values()) as measuring:
        table.rollout_metrics(rows)
    size = table_bytes(answers, width, longest)
    assert sum(column.nbytes for column in rows.values()) == pytest.approx(size, rel=1e-3)
    new = sum(rows[name].nbytes for name in ("importance_BT", "adv_BT", "target_BT"))
    for live, known in ((sampling, 0), (scoring, new), (measuring, 0)):
        assert live.peak - known < size
