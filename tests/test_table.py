"""table.py: the columns that its docstring promises, mini-batches and micro-batches."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from live import Live
from test_vapo import SETTINGS, asked, with_weights

import rollout
import table
import train_vapo
from system import loading

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
            "correct_B": torch.tensor([True, False, True]),
            "reward_B": torch.tensor([-1.0, 2.0, -1.0])}  # shaped: of no use here  # fmt: skip
    batch = with_weights(rows, SETTINGS)
    for name in ("policy_weight_BT", "nll_weight_BT", "critic_weight_BT"):
        assert batch[name].sum().item() == pytest.approx(1)
    part = table.take(batch, torch.tensor([0]))
    assert part["policy_weight_BT"].tolist() == [[1 / 8]]
    torch.testing.assert_close(part["nll_weight_BT"], torch.tensor([[1 / 5]]))
    # Piece 4 off: the policy's tokens weigh 1 / (3 answers · length), and nothing else changes.
    answers = with_weights(rows, replace(SETTINGS, token_level_loss=False))
    expected = [[1 / 3, 0, 0, 0], [1 / 9] * 3 + [0], [1 / 12] * 4]
    torch.testing.assert_close(answers["policy_weight_BT"], torch.tensor(expected))
    for name in ("nll_weight_BT", "critic_weight_BT"):
        assert torch.equal(answers[name], batch[name])


def test_what_is_cut_out_of_rows_and_put_together_again():
    rows = {"token_BL": torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]]),
            "prompt_length_B": torch.tensor([2, 1]), "length_B": torch.tensor([3, 2]),
            "adv_BT": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]])}  # fmt: skip
    assert table.response_mask(rows).tolist() == [[1, 1, 1], [1, 1, 0]]
    assert table.response_tokens(rows).tolist()[0] == [3, 4, 5]
    assert table.response_tokens(rows).tolist()[1][:2] == [7, 8]  # then padding
    # a long prompt with a short answer: its padding would lie beyond the table
    wide = rows | {"prompt_length_B": torch.tensor([1, 4]), "length_B": torch.tensor([4, 1])}
    assert table.response_tokens(wide)[:, 0].tolist() == [2, 0]
    short, long = (table.take(rows, torch.tensor([i])) for i in (1, 0))
    assert short["token_BL"].tolist() == [[6, 7, 8]] and short["adv_BT"].tolist() == [[4, 5]]
    together = table.concatenate([short, long])
    assert together["token_BL"].tolist() == [[6, 7, 8, 0, 0], [1, 2, 3, 4, 5]]
    assert together["adv_BT"].tolist() == [[4, 5, 0], [1, 2, 3]]
    assert together["length_B"].tolist() == [2, 3]


def test_only_what_is_cut_out_travels_to_the_device():
    """Short answers of a table with a long one: on a GPU nothing of that width is kept alive."""
    rows = {"token_BL": torch.zeros(3, 1000, dtype=torch.long), "adv_BT": torch.zeros(3, 900)}
    rows["prompt_length_B"] = torch.tensor([100, 4, 5])
    rows["length_B"] = torch.tensor([900, 6, 2])
    part = table.take(rows, torch.tensor([1, 2]), "meta")  # which has no numbers to look at
    found = {name: column.untyped_storage().nbytes() for name, column in part.items()}
    assert found == {"token_BL": 2 * 10 * 8, "adv_BT": 2 * 6 * 4,
                     "prompt_length_B": 16, "length_B": 16}  # fmt: skip


def test_micro_batches_by_hand():
    # Lengths 5, 2, 5, 10, 6: two rows of 5 with padding are 10, with a third 15; 5 and 6 are 12.
    rows = {"prompt_length_B": torch.tensor([3, 1, 2, 1, 5]),
            "length_B": torch.tensor([2, 1, 3, 9, 1])}  # fmt: skip
    for tokens, expected in (
        (12, [[1, 0], [2, 4], [3]]),
        (11, [[1, 0], [2], [4], [3]]),
        (50, [[1, 0, 2, 4, 3]]),
        (1, [[1], [0], [2], [4], [3]]),
    ):
        parts = [index_N.tolist() for index_N in table.micro_batches(rows, tokens)]
        assert parts == expected


def test_the_numbers_of_a_rollout_by_hand():
    """An answer of one token, which is right, and one of three. Both end by themselves."""
    rows = {
        "length_B": torch.tensor([1, 3]), "stop_B": torch.tensor([True, True]),
        "reward_B": torch.tensor([1.0, 0.0]), "lam_B": torch.tensor([0.25, 0.75]),
        "entropy_BT": torch.tensor([[4.0, 0, 0], [1, 1, 2]]),
        "sampled_logp_BT": torch.tensor([[-1.0, 0, 0], [-1, -1, -1]]),
        "old_logp_BT": torch.tensor([[-3.0, 0, 0], [-1, 0, -2]]),
        "importance_BT": torch.tensor([[2.0, 0, 0], [1, 1, 0.5]]),
        "adv_BT": torch.tensor([[1.0, 0, 0], [1, -2, -4]]),
        "old_value_BT": torch.tensor([[0.5, 0, 0], [0.25, 0.5, 0.75]]),
    }  # fmt: skip
    expected = {
        "reward": 1 / 2, "length": 2, "length_max": 3, "truncated": 0, "entropy": 8 / 4,
        "sampler_gap": (2 + 0 + 1 + 1) / 4, "importance": 4.5 / 4, "advantage": -4 / 4,
        "value_first": 0.75 / 2, "value_last": 1.25 / 2, "lambda_min": 0.25, "lambda": 0.5,
        "lambda_max": 0.75,
        # R = 1, 0, 0, 0 has the variance 3/16; R − V = ½, −¼, −½, −¾ the mean −¼, and the variance
        # (9/16 + 0 + 1/16 + 4/16) / 4 = 7/32
        "explained_variance": 1 - (7 / 32) / (3 / 16),
        # Â = 1, 1, −2, −4: the mean −1, and the variance (4 + 4 + 1 + 9) / 4
        "advantage_variance": (18 / 4) / (3 / 16),
    }  # fmt: skip
    numbers = {name: number.item() for name, number in table.rollout_metrics(rows).items()}
    assert numbers == pytest.approx(expected)
    without = {name: rows[name] for name in rows if name not in ("old_value_BT", "lam_B")}
    names = set(expected) - {"explained_variance", "advantage_variance"}
    names -= {"value_first", "value_last"}
    assert table.rollout_metrics(without).keys() == {n for n in names if "lambda" not in n}


def test_surprise_stands_at_its_tokens_and_nowhere_else():
    rows = {
        "token_BL": torch.zeros(2, 5, dtype=torch.long),
        "prompt_length_B": torch.tensor([1, 3]), "length_B": torch.tensor([3, 2]),
        "sampled_logp_BT": torch.tensor([[-1.0, -2, -9], [-0.5, -0.25, 0]]),
    }  # fmt: skip
    expected = [[0.0, 1, 2, 8, 0], [0, 0, 0, 0.5, 0.25]]  # 8 nats at most
    assert loading.surprise_of(rows).tolist() == expected


def test_texts_are_the_responses_alone(tokenizer):
    ids = tokenizer("a3:b2c1")["input_ids"] + [tokenizer.eos_token_id]
    ids += tokenizer("zzz")["input_ids"]  # beyond its end
    rows = {"token_BL": torch.tensor([ids]), "prompt_length_B": torch.tensor([3]),
            "length_B": torch.tensor([5])}  # fmt: skip
    assert table.texts(rows, tokenizer) == ["b2c1"]


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
    # Token ids of 8 bytes, and seven columns of numbers of 4 (table.py).
    size = answers * (8 * (width + longest) + 28 * longest)
    assert sum(column.nbytes for column in rows.values()) == pytest.approx(size, rel=1e-3)
    new = sum(rows[name].nbytes for name in ("importance_BT", "adv_BT", "target_BT"))
    for live, known in ((sampling, 0), (scoring, new), (measuring, 0)):
        assert live.peak - known < size
