"""metrics.py: sums over micro-batches and means over optimiser steps, by hand."""

import pytest
import torch

from system import metrics


def test_micro_batches_add_up_and_of_a_maximum_the_larger_counts():
    sums = {}
    for loss, largest, columns in ((1.0, 3.0, 4), (2.0, 2.0, 5)):
        found = {"policy_loss": torch.tensor(loss), "ratio_max": torch.tensor(largest)}
        metrics.add(sums, found, {"token_BL": torch.zeros(2, columns)})
    assert sums == {"policy_loss": 3, "ratio_max": 3, "padded_tokens": 18}


def test_counts_become_shares_of_the_tokens_of_the_mini_batch():
    sums = {"clip_low": 2.0, "clip_high": 1.0, "approx_kl": 4.0, "policy_loss": 5.0,
            "padded_tokens": 20.0}  # fmt: skip
    batch = {"length_B": torch.tensor([3, 5]), "prompt_length_B": torch.tensor([1, 1])}
    expected = {"clip_low": 2 / 8, "clip_high": 1 / 8, "approx_kl": 4 / 8, "policy_loss": 5.0}
    assert metrics.of_mini_batch(sums, batch) == expected | {"padding": pytest.approx(10 / 20)}


def test_means_are_over_the_steps_that_were_made():
    first, second, skipped = (
        {"policy_loss": loss, "ratio_max": largest, "bad_steps": bad}
        for loss, largest, bad in ((1.0, 1.5, 0.0), (3.0, 2.5, 0.0), (9.0, 9.0, 1.0))
    )
    mean = {"policy_loss": 2, "ratio_max": 2.5, "bad_steps": 1}
    assert metrics.means([first, skipped, second]) == mean
    assert metrics.means([skipped]) == skipped


def test_speeds_are_response_tokens_by_the_seconds_of_their_phase():
    seconds = {"sample": 2.0, "score": 1.0, "update": 4.0}
    expected = {"seconds_sample": 2, "seconds_score": 1, "seconds_update": 4}
    expected |= {"sample_tokens_per_second": 4, "train_tokens_per_second": 2}
    assert metrics.speeds(seconds, {"length_B": torch.tensor([3, 5])}) == expected
