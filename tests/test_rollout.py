"""rollout.py, model.py and slots.py: what the sampler says is what training sees, whatever the
padding."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Qwen2Config,
)

import model
import rollout
import table
import train_vapo
from system import loading, slots


def draw_answers(
    policy, tokenizer, problems, samples=8, max_tokens=12, temperature=1.0, sample_rows=16,
    engine="slots",
):  # fmt: skip
    source = torch.Generator(policy.device).manual_seed(0)
    how = (samples, max_tokens, temperature, source, sample_rows)
    return rollout.sample(policy, tokenizer, problems, *how, engine=engine)


def near(policy, tolerance=1e-4):
    return {"rtol": 0, "atol": tolerance if policy.device.type == "cpu" else 0.1}  # bf16 on CUDA


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_sampler_log_probs_are_training_log_probs(
    policy, tokenizer, problems, temperature, pad_is_eos
):
    # Prompts of three lengths: left-padded when sampling, right-padded when training; id 0 pads,
    # and may be an EOS too.
    if pad_is_eos:
        policy.generation_config.eos_token_id = [*policy.generation_config.eos_token_id, 0]
    rows = draw_answers(policy, tokenizer, problems, temperature=temperature, sample_rows=24)
    assert len(rows["length_B"].unique()) > 5
    assert rows["stop_B"].any() and not rows["stop_B"].all()  # rows left the cache
    logp_BT, _ = model.all_logprobs(policy, rows, temperature, 10_000)
    on_BT = table.response_mask(rows).bool()
    torch.testing.assert_close(logp_BT[on_BT], rows["sampled_logp_BT"][on_BT], **near(policy))
    # and the last token of an answer is its only EOS
    eos_N = torch.tensor(loading.eos_ids(policy, tokenizer))
    ends_BT = torch.isin(table.response_tokens(rows), eos_N) & on_BT
    assert torch.equal(ends_BT.sum(dim=1).bool(), rows["stop_B"]) and ends_BT.sum(dim=1).max() == 1


@pytest.mark.parametrize("engine", ["slots", "hf"])
def test_top_p_and_the_log_probs_of_both_engines(policy, tokenizer, problems, engine):
    source = torch.Generator(policy.device).manual_seed(0)
    asked = (policy, tokenizer, problems, 4, 12)
    rows = rollout.sample(*asked, 0.6, source, top_p=1e-6, engine=engine)
    greedy = rollout.sample(*asked, 0.0, source, engine=engine)
    assert torch.equal(rows["token_BL"], greedy["token_BL"])  # one word is left
    rows = rollout.sample(*asked, 0.6, source, engine=engine)
    logp_BT, _ = model.all_logprobs(policy, rows, 0.6, 10_000)
    torch.testing.assert_close(rows["sampled_logp_BT"], logp_BT, **near(policy))


def test_the_temperature_by_hand():
    # π ∝ (1, 2, 4); at T = ½ the squares: (1, 4, 16) / 21
    logit_RV = torch.tensor([1.0, 2.0, 4.0]).log().repeat(1000, 1)
    source = torch.Generator().manual_seed(0)
    for temperature, weights in ((1.0, [1, 2, 4]), (0.5, [1, 4, 16]), (0.0, [0, 0, 7])):
        token_R, logp_R = slots.draw(logit_RV, source, temperature)
        shares = [weight / sum(weights) for weight in weights]
        counts = torch.bincount(token_R, minlength=3).tolist()
        assert counts == pytest.approx([1000 * share for share in shares], abs=50)
        if temperature:
            expected_R = torch.tensor(shares).log()[token_R]
            torch.testing.assert_close(logp_R, expected_R)


def test_answers_are_judged_by_the_problem_that_was_asked(tokenizer, monkeypatch):
    ids = [tokenizer(text)["input_ids"] for text in ("####c", "####a", "####a", "####c")]

    def sample(policy, tokenizer, problems, *_, **__):
        assert [problem["answer"] for problem in problems] == ["c", "a"]
        two_B = torch.full((4,), 2)
        return {"token_BL": torch.tensor([[5, *answer] for answer in ids]), "length_B": two_B,
                "prompt_length_B": two_B // 2, "stop_B": two_B > 0,
                "problem_B": torch.tensor([0, 0, 1, 1])}  # fmt: skip

    monkeypatch.setattr(rollout, "sample", sample)
    problems = [{"answer": letter} for letter in "abc"]
    how = (rollout.verify, 2, train_vapo.Settings(reward_wrong=-1.0), None, "")
    rows = rollout.judged(None, tokenizer, problems, [2, 0], *how)
    assert rows["problem_B"].tolist() == [2, 2, 0, 0]
    assert rows["correct_B"].tolist() == [True, False, True, False]
    assert rows["reward_B"].tolist() == [1, -1, 1, -1]


def test_a_token_is_the_inverse_of_the_distribution_function():
    # π = (1/10, 2/10, 3/10, 4/10): the first token below u = 0.1, the second below 0.3, the third
    # below 0.6
    logit_RV = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).log().repeat(7, 1) + 5
    uniform_R = torch.tensor([0, 0.09, 0.11, 0.29, 0.31, 0.59, 0.99], dtype=torch.float64)
    token_R, logp_R = slots.inverse_distribution(logit_RV, uniform_R)
    assert token_R.tolist() == [0, 0, 1, 1, 2, 2, 3]
    torch.testing.assert_close(logp_R.exp(), torch.tensor([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4]))


def test_no_word_of_probability_zero_is_drawn_and_every_other_one_is():
    # 1,000 words in eight blocks, of which every third has weight 0, the last among them; u from 0
    # to as near to 1 as numbers go
    logit_RV = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    logit_RV[:, ::3] = -torch.inf
    uniform_R = torch.linspace(0, 1, 100_000, dtype=torch.float64)
    uniform_R[-1] = 1 - 2**-53
    token_R, logp_R = slots.inverse_distribution(logit_RV.expand(len(uniform_R), -1), uniform_R)
    assert logp_R.isfinite().all()
    share_V = torch.bincount(token_R, minlength=1000) / len(token_R)
    torch.testing.assert_close(share_V, logit_RV.softmax(-1)[0], rtol=0, atol=3e-5)
    torch.testing.assert_close(logp_R, logit_RV.log_softmax(-1)[0][token_R])


@pytest.mark.parametrize("engine", ["slots", "hf"])
def test_both_engines_draw_from_the_distribution_of_the_model(policy, tokenizer, problems, engine):
    source = torch.Generator(policy.device).manual_seed(1)
    how = (6_000, 2, 1.0, source, 500)
    rows = rollout.sample(policy, tokenizer, problems[1:2], *how, engine=engine)
    assert deviation(rows, policy, tokenizer, problems[1]["prompt"]) < 5


def deviation(rows, policy, tokenizer, prompt):
    """Chi-square of many answers of at most two tokens against the probabilities that the model
    itself gives each pair, in standard deviations of its normal limit."""
    pairs = zip(table.response_tokens(rows).tolist(), rows["length_B"].tolist())
    answers = [tuple(token_T[:length]) for token_T, length in pairs]
    words, ends = range(policy.config.vocab_size), set(loading.eos_ids(policy, tokenizer))
    with torch.no_grad(), loading.autocast(policy):
        first_BLV = policy(torch.tensor([prompt], device=policy.device)).logits
        followed = torch.tensor([[*prompt, word] for word in words], device=policy.device)
        second_VV = policy(followed).logits[:, -1].float().softmax(-1).tolist()
    first_V = first_BLV[0, -1].float().softmax(-1).tolist()
    expected = {(word,): first_V[word] for word in ends}
    going_on = [word for word in words if word not in ends]
    expected |= {(a, b): first_V[a] * second_VV[a][b] for a in going_on for b in words}
    assert sum(expected.values()) == pytest.approx(1, abs=1e-3) and set(answers) <= set(expected)
    seen, count = Counter(answers), len(answers)
    common = [answer for answer, chance in expected.items() if chance * count >= 5]
    cells = [(seen[answer], expected[answer]) for answer in common]
    observed, chances = map(sum, zip(*cells))
    cells.append((count - observed, 1 - chances))  # all others
    square = sum((n - count * chance) ** 2 / (count * chance) for n, chance in cells)
    freedom = len(cells) - 1
    assert freedom > 20
    return (square - freedom) / (2 * freedom) ** 0.5


def test_greedy_answers_are_the_same_whatever_the_engine_the_slots_and_the_room_in_them(
    policy, tokenizer, problems, monkeypatch
):
    asked = (policy, tokenizer, [problems[i % 3] for i in range(20)])
    how = {"samples": 1, "max_tokens": 60, "temperature": 0.0}
    expected = draw_answers(*asked, **how, engine="hf")
    # one column more than the prompt: rows move and the table grows
    for columns, count in ((64, 20), (1, 1), (1, 7), (16, 3)):
        monkeypatch.setattr(slots, "FIRST_COLUMNS", columns)
        rows = draw_answers(*asked, **how, sample_rows=count)
        for name in ("token_BL", "length_B", "stop_B", "problem_B"):
            assert torch.equal(rows[name], expected[name]), (columns, count, name)


def test_the_host_reads_from_the_device_every_eighth_token(
    policy, tokenizer, problems, monkeypatch
):
    """Four looks at what has ended (free slots, how many are alive), each after 8 tokens, and a few
    reads at the start; 24 answers of up to 32 tokens, on this CPU as on a GPU."""
    how = {"max_tokens": 32, "sample_rows": 24, "temperature": 0.0}
    plain, reads = draw_answers(policy, tokenizer, problems, **how), []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "is_nonzero"):
                reads.append(function)
            return function(*args, **(kwargs or {}))

    monkeypatch.setitem(slots.STEPS_UNSEEN, policy.device.type, 8)
    monkeypatch.setattr(slots.Slots, "is_compileable", True)
    with Reads():
        rows = draw_answers(policy, tokenizer, problems, **how)
    assert torch.equal(rows["token_BL"], plain["token_BL"])
    assert len(reads) < 2 * 5 + 6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("engine", ["slots", "hf"])
def test_the_models_own_generation_config_changes_no_distribution(
    policy, tokenizer, problems, engine, temperature
):
    plain = draw_answers(policy, tokenizer, problems, temperature=temperature, engine=engine)
    own = {"repetition_penalty": 1.3, "min_p": 0.4, "no_repeat_ngram_size": 1, "top_k": 2}
    policy.generation_config.update(**own)
    rows = draw_answers(policy, tokenizer, problems, temperature=temperature, engine=engine)
    assert torch.equal(rows["token_BL"], plain["token_BL"])
    assert policy.generation_config.repetition_penalty == 1.3  # and it is still the model's


def test_a_slot_is_free_again_as_soon_as_its_answer_ends(policy, tokenizer, problems, monkeypatch):
    # Two slots, three answers of 5, 1 and 3 tokens: the third takes the second's slot, and five
    # steps do for all nine tokens.
    z, eos = tokenizer.convert_tokens_to_ids("z"), tokenizer.eos_token_id
    script, steps = iter([[z, eos], [z, z], [z, z], [z, eos], [eos, z]]), []

    def scripted(logit_RV, generator, temperature, top_p):
        steps.append(len(logit_RV))
        token_R = torch.tensor(next(script)[: len(logit_RV)], device=logit_RV.device)
        return token_R, torch.zeros(len(token_R), device=logit_RV.device)

    monkeypatch.setattr(slots, "draw", scripted)
    monkeypatch.setattr(slots, "STEPS_UNSEEN", {"cpu": 1, "cuda": 1})
    rows = draw_answers(policy, tokenizer, problems, samples=1, max_tokens=9, sample_rows=2)
    assert rows["length_B"].tolist() == [5, 1, 3] and rows["stop_B"].all() and len(steps) == 5
    assert steps == [2, 2, 2, 2, 1]  # and with none waiting, the slot is given up


def test_a_slot_whose_answer_has_ended_stands_still(policy, tokenizer, problems, monkeypatch):
    # Slots that nobody gives up, answers up to the model's last position: one that ran on would
    # leave its table of positions.
    monkeypatch.setattr(slots, "COMPACT_BELOW", 0.0)
    policy.generation_config.eos_token_id = tokenizer.eos_token_id
    longest = 128 - max(len(problem["prompt"]) for problem in problems)
    how = {"samples": 3, "max_tokens": longest, "sample_rows": 4}
    rows = draw_answers(policy, tokenizer, problems, **how)
    assert rows["length_B"].max() == longest and not rows["stop_B"].all()


def test_greedy_sampling_equals_generate(policy, tokenizer, problems):
    rows = draw_answers(policy, tokenizer, problems, samples=1, temperature=0.0)
    for i, problem in enumerate(problems):
        prompt_BL = torch.tensor([problem["prompt"]], device=policy.device)
        how = {"attention_mask": torch.ones_like(prompt_BL), "do_sample": False}
        with loading.autocast(policy):
            expected_BL = policy.generate(prompt_BL, max_new_tokens=12, **how)
        start, length = int(rows["prompt_length_B"][i]), int(rows["length_B"][i])
        assert start == len(problem["prompt"])
        assert rows["token_BL"][i, : start + length].tolist() == expected_BL[0].tolist()


def test_samples_of_a_prompt_stand_side_by_side_and_batches_do_not_show(
    policy, tokenizer, problems
):
    for sample_rows in (1, 4, 100):
        rows = draw_answers(policy, tokenizer, problems, samples=3, sample_rows=sample_rows)
        assert rows["problem_B"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        for i, problem in enumerate(rows["problem_B"].tolist()):
            start = int(rows["prompt_length_B"][i])
            assert rows["token_BL"][i, :start].tolist() == problems[problem]["prompt"]


def test_a_row_that_ends_at_the_limit_and_one_that_is_cut_there(
    policy, tokenizer, problems, monkeypatch
):
    z, eos = tokenizer.convert_tokens_to_ids("z"), tokenizer.eos_token_id
    script = iter([[z, z, eos], [z, z], [z, eos]])  # the third row ends at once and leaves

    def scripted(logit_RV, generator, temperature, top_p):
        token_R = torch.tensor(next(script), device=logit_RV.device)
        return token_R, torch.zeros(len(token_R), device=logit_RV.device)

    monkeypatch.setattr(slots, "draw", scripted)
    rows = draw_answers(policy, tokenizer, problems, samples=1, max_tokens=3)
    assert rows["length_B"].tolist() == [3, 3, 1]
    assert rows["stop_B"].tolist() == [False, True, True]
    assert table.response_tokens(rows).tolist()[:2] == [[z, z, z], [z, z, eos]]


def test_all_eos_ids_of_the_model_end_an_answer(policy, tokenizer):
    policy.generation_config.eos_token_id = [7, 3]
    assert loading.eos_ids(policy, tokenizer) == sorted({3, 7, tokenizer.eos_token_id})


def test_a_truncated_answer_is_never_right(policy, tokenizer, problems):
    ids = [tokenizer(text)["input_ids"] for text in ("k1####a", "k1k1k1k")]
    prompt = problems[0]["prompt"]
    rows = {
        "token_BL": torch.tensor([prompt + answer + [0] * (7 - len(answer)) for answer in ids]),
        "prompt_length_B": torch.tensor([3, 3]), "length_B": torch.tensor([4, 7]),
        "problem_B": torch.tensor([0, 0]),
    }  # fmt: skip
    for stop_B, correct_B in (([True, True], [True, False]), ([False, True], [False, False])):
        rows["stop_B"] = torch.tensor(stop_B)
        settings = SimpleNamespace(reward_correct=2.0, reward_wrong=-1.0, reward="")
        rollout.judge(rows, tokenizer, problems, settings=settings)
        assert rows["correct_B"].tolist() == correct_B
        assert rows["reward_B"].tolist() == [2.0 if correct else -1.0 for correct in correct_B]


def test_micro_batches_hold_every_row_once_and_taking_them_loses_no_token(
    policy, tokenizer, problems
):
    rows = draw_answers(policy, tokenizer, problems)
    index = table.micro_batches(rows, 60)
    assert torch.cat(index).sort().values.tolist() == list(range(24))
    widths = [table.take(rows, i)["token_BL"].shape[1] for i in index]
    assert max(len(i) * width for i, width in zip(index, widths)) <= 60 and len(index) < 12
    assert widths == sorted(widths)
    # a row longer than that is one by itself
    assert [len(i) for i in table.micro_batches(rows, 1)] == [1] * 24
    tokens = sum(int(table.response_mask(table.take(rows, i)).sum()) for i in index)
    assert tokens == int(rows["length_B"].sum())
    short = table.take(rows, rows["length_B"].argmin()[None])
    assert short["sampled_logp_BT"].shape[1] == int(short["length_B"][0])


def test_a_tokenizer_that_says_so_is_loaded_as_it_stands(tokenizer, tmp_path):
    # AutoTokenizer gives every model of type qwen2 Qwen's own splitting, "1" "7": this once cost
    # half the accuracy.
    Qwen2Config(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = loading.load_tokenizer(str(tmp_path))
    assert loaded("c17:")["input_ids"] == tokenizer("c17:")["input_ids"]
    assert len(loaded("17")["input_ids"]) == 1


def test_logit_scale_and_cap_are_measured(tokenizer):
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                 num_attention_heads=2, num_key_value_heads=1, head_dim=16, bos_token_id=None,
                 eos_token_id=1, pad_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    cohere = CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.125)).eval()
    assert loading.measure_logits(cohere) == (pytest.approx(0.125), None)
    caps = {"final_logit_softcapping": 3.0, "initializer_range": 0.5}
    gemma = Gemma2ForCausalLM(Gemma2Config(**sizes, **caps)).eval()
    assert loading.measure_logits(gemma) == (pytest.approx(1.0, abs=1e-3), 3.0)
    gemma.logit_transform, gemma.compute_dtype = loading.measure_logits(gemma), torch.float32
    prompts = {"x": [3, 4, 5], "y": [6]}
    problems = [{"problem": x, "answer": x, "prompt": ids} for x, ids in prompts.items()]
    rows = draw_answers(gemma, tokenizer, problems)
    logp_BT, _ = model.policy_logprobs(gemma, rows, 1.0)
    expected_BT = rows["sampled_logp_BT"]
    torch.testing.assert_close(
        logp_BT * table.response_mask(rows), expected_BT, rtol=0, atol=1e-4
    )  # fmt: skip
