"""rollout.py and model.py: what the sampler says is what training sees, whatever the padding."""

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, Qwen2Config

import model
import rollout
import table


def draw_answers(policy, tokenizer, problems, samples=8, max_tokens=12, temperature=1.0, sample_rows=16):
    generator = torch.Generator(policy.device).manual_seed(0)
    return rollout.sample(policy, tokenizer, problems, samples, max_tokens, temperature, generator, sample_rows)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_sampler_log_probs_are_training_log_probs(policy, tokenizer, problems, temperature, pad_is_eos):
    # Prompts of three lengths: left-padded when sampling, right-padded when training; id 0 pads, and may be an EOS too.
    if pad_is_eos:
        policy.generation_config.eos_token_id = [*policy.generation_config.eos_token_id, 0]
    rows = draw_answers(policy, tokenizer, problems, temperature=temperature, sample_rows=24)
    assert len(rows["length_B"].unique()) > 5 and rows["stop_B"].any() and not rows["stop_B"].all()  # rows left the cache
    logp_BT, _ = model.policy_logprobs(policy, rows, temperature)
    on_BT = table.response_mask(rows).bool()
    tolerance = 1e-4 if policy.device.type == "cpu" else 0.1  # bf16 on CUDA
    torch.testing.assert_close(logp_BT[on_BT], rows["sampled_logp_BT"][on_BT], rtol=0, atol=tolerance)
    # and the last token of an answer is its only EOS
    ends_BT = torch.isin(model.response_tokens(rows), torch.tensor(rollout.eos_ids(policy, tokenizer), device=policy.device)) & on_BT
    assert torch.equal(ends_BT.sum(dim=1).bool(), rows["stop_B"]) and ends_BT.sum(dim=1).max() == 1


def test_greedy_sampling_equals_generate(policy, tokenizer, problems):
    rows = draw_answers(policy, tokenizer, problems, samples=1, temperature=0.0)
    for i, problem in enumerate(problems):
        prompt_BL = torch.tensor([problem["prompt"]], device=policy.device)
        with model.autocast(policy):
            expected_L = policy.generate(prompt_BL, attention_mask=torch.ones_like(prompt_BL), max_new_tokens=12, do_sample=False)[0]
        start, length = int(rows["prompt_length_B"][i]), int(rows["length_B"][i])
        assert start == len(problem["prompt"])
        assert rows["token_BL"][i, : start + length].tolist() == expected_L.tolist()


def test_samples_of_a_prompt_stand_side_by_side_and_batches_do_not_show(policy, tokenizer, problems):
    for sample_rows in (1, 4, 100):
        rows = draw_answers(policy, tokenizer, problems, samples=3, sample_rows=sample_rows)
        assert rows["problem_B"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        for i, problem in enumerate(rows["problem_B"].tolist()):
            start = int(rows["prompt_length_B"][i])
            assert rows["token_BL"][i, :start].tolist() == problems[problem]["prompt"]


def test_a_row_that_ends_at_the_limit_and_one_that_is_cut_there(policy, tokenizer, problems, monkeypatch):
    letter, eos = tokenizer.convert_tokens_to_ids("z"), tokenizer.eos_token_id
    script = iter([[letter, letter, eos], [letter, letter], [letter, eos]])  # the third row ends at once and leaves

    def scripted(logit_RV, generator, temperature, top_p):
        token_R = torch.tensor(next(script), device=logit_RV.device)
        return token_R, torch.zeros(len(token_R), device=logit_RV.device)

    monkeypatch.setattr(rollout, "draw", scripted)
    rows = draw_answers(policy, tokenizer, problems, samples=1, max_tokens=3)
    assert rows["length_B"].tolist() == [3, 3, 1]
    assert rows["stop_B"].tolist() == [False, True, True]
    assert model.response_tokens(rows).tolist()[0] == [letter] * 3
    assert model.response_tokens(rows).tolist()[1] == [letter, letter, eos]


def test_all_eos_ids_of_the_model_end_an_answer(policy, tokenizer):
    policy.generation_config.eos_token_id = [7, 3]
    assert rollout.eos_ids(policy, tokenizer) == sorted({3, 7, tokenizer.eos_token_id})


def test_a_truncated_answer_is_never_right(policy, tokenizer, problems):
    ids = [tokenizer("k1####a")["input_ids"], tokenizer("k1k1k1k")["input_ids"]]
    rows = {
        "token_BL": torch.tensor([problems[0]["prompt"] + response + [0] * (7 - len(response)) for response in ids]),
        "prompt_length_B": torch.tensor([3, 3]), "length_B": torch.tensor([4, 7]), "stop_B": torch.tensor([False, False]),
        "problem_B": torch.tensor([0, 0]),
    }  # fmt: skip
    for stop_B, correct_B in (([True, True], [True, False]), ([False, True], [False, False])):
        rows["stop_B"] = torch.tensor(stop_B)
        rollout.judge(rows, tokenizer, problems, reward_correct=2.0, reward_wrong=-1.0)
        assert rows["correct_B"].tolist() == correct_B
        assert rows["reward_B"].tolist() == [2.0 if correct else -1.0 for correct in correct_B]


def test_micro_batches_hold_every_row_once_and_taking_them_loses_no_token(policy, tokenizer, problems):
    rows = draw_answers(policy, tokenizer, problems)
    index = list(table.micro_batches(rows, 5))
    assert torch.cat(index).sort().values.tolist() == list(range(24)) and max(map(len, index)) == 5
    tokens = sum(int(table.response_mask(table.take(rows, i)).sum()) for i in index)
    assert tokens == int(rows["length_B"].sum())
    short = table.take(rows, rows["length_B"].argmin()[None])
    assert short["sampled_logp_BT"].shape[1] == int(short["length_B"][0])


def test_a_tokenizer_that_says_so_is_loaded_as_it_stands(tokenizer, tmp_path):
    # AutoTokenizer gives every model of type qwen2 Qwen's own splitting, "1" "7": this once cost half the accuracy.
    Qwen2Config(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = model.load_tokenizer(str(tmp_path))
    assert loaded("c17:")["input_ids"] == tokenizer("c17:")["input_ids"] and len(loaded("17")["input_ids"]) == 1


def test_logit_scale_and_cap_are_measured(tokenizer):
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=16, bos_token_id=None, eos_token_id=1, pad_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    cohere = CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.125)).eval()
    assert model.measure_logits(cohere) == (pytest.approx(0.125), None)
    gemma = Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=3.0, initializer_range=0.5)).eval()
    assert model.measure_logits(gemma) == (pytest.approx(1.0, abs=1e-3), 3.0)
    gemma.logit_treatment, gemma.arithmetic = model.measure_logits(gemma), torch.float32
    problems = [{"problem": "x", "answer": "x", "prompt": [3, 4, 5]}, {"problem": "y", "answer": "y", "prompt": [6]}]
    rows = draw_answers(gemma, tokenizer, problems)
    logp_BT, _ = model.policy_logprobs(gemma, rows, 1.0)
    torch.testing.assert_close(logp_BT * table.response_mask(rows), rows["sampled_logp_BT"], rtol=0, atol=1e-4)
