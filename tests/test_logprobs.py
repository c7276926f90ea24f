"""logprobs.py: equal to log_softmax and its gradient, whatever the chunks, compiled or not."""

import math
from collections import Counter

import pytest
import torch
from live import Live
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import logprobs
from logprobs import add_slice, logits, slice_gradient, slice_on_gpu, token_logprobs
from losses import policy_loss, value_loss


def plain(hidden_BTD, weight_VD, token_BT, bias_V, temperature, scale, softcap):
    logit_BTV = (
        hidden_BTD.double() @ weight_VD.double().T + (0 if bias_V is None else bias_V.double())
    ) * scale
    if softcap:
        logit_BTV = softcap * torch.tanh(logit_BTV / softcap)
    logp_BTV = (logit_BTV / temperature).log_softmax(-1)
    return logp_BTV.gather(2, token_BT[..., None])[..., 0], -(logp_BTV.exp() * logp_BTV).sum(-1)


@pytest.mark.parametrize(
    "words, keep", [(1, 0), (4, 0), (4, 2 * 4 * 15), (1000, 1000)]
)  # the third keeps two slices of three
@pytest.mark.parametrize(
    "bias, temperature, scale, softcap",
    [(False, 1.0, 1.0, None), (True, 0.7, 0.25, None), (False, 2.0, 2.0, 5.0)],
)
def test_log_probs_entropy_and_gradients_equal_the_plain_ones(
    device, words, keep, bias, temperature, scale, softcap
):
    torch.manual_seed(0)
    hidden_BTD = torch.randn(3, 5, 8, device=device, requires_grad=True)
    weight_VD = torch.randn(11, 8, device=device, requires_grad=True)
    bias_V = torch.randn(11, device=device, requires_grad=True) if bias else None
    token_BT = torch.randint(0, 11, (3, 5), device=device)
    pull_BT, pull_entropy_BT = torch.randn(3, 5, device=device), torch.randn(3, 5, device=device)
    results = []
    for function, options in ((plain, {}), (token_logprobs, {"words": words, "keep": keep})):
        logp_BT, entropy_BT = function(
            hidden_BTD, weight_VD, token_BT, bias_V, temperature, scale, softcap, **options
        )
        leaves = (hidden_BTD, weight_VD) + ((bias_V,) if bias else ())
        gradients = torch.autograd.grad(
            (logp_BT * pull_BT + entropy_BT * pull_entropy_BT).sum(), leaves, retain_graph=True
        )
        of_logp = (
            torch.autograd.grad((logp_BT * pull_BT).sum(), leaves) if not keep else ()
        )  # a kept slice is used once
        results.append([x.float() for x in (logp_BT, entropy_BT, *gradients, *of_logp)])
    for expected, ours in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_the_entropy_alone_and_of_a_policy_that_is_fixed():
    torch.manual_seed(0)
    hidden_BTD, weight_VD = torch.randn(2, 3, 8, requires_grad=True), torch.randn(11, 8)
    token_BT, how = torch.randint(0, 11, (2, 3)), (None, 1.0, 1.0, None)
    expected_BTD, ours_BTD = (
        torch.autograd.grad(function(hidden_BTD, weight_VD, token_BT, *rest)[1].sum(), hidden_BTD)[
            0
        ]
        for function, rest in ((plain, how), (token_logprobs, ()))
    )
    torch.testing.assert_close(ours_BTD, expected_BTD, rtol=1e-4, atol=1e-5)


def test_tokens_with_very_large_and_very_small_logits_stand_side_by_side():
    # z = (200, 199) and (−200, −199): e^200 and e^−400 are no float32
    hidden_BTD = torch.tensor([[[200.0, -1], [-200, 1]]])
    weight_VD = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    logp_BT, entropy_BT = token_logprobs(hidden_BTD, weight_VD, torch.tensor([[0, 0]]))
    likely, unlikely = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))
    expected = torch.tensor([[likely, unlikely]])
    torch.testing.assert_close(logp_BT.exp(), expected, rtol=1e-4, atol=0)
    entropy = -likely * math.log(likely) - unlikely * math.log(unlikely)
    torch.testing.assert_close(entropy_BT, torch.full((1, 2), entropy), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_under_autocast_the_product_is_in_bfloat16_and_the_rest_in_float32(bias):
    torch.manual_seed(0)
    leaves = [torch.randn(2, 3, 64), torch.randn(11, 64) / 8] + [torch.randn(11)] * bias
    token_BT = torch.randint(0, 11, (2, 3))
    rounded = [leaf.bfloat16() for leaf in leaves]
    product_BTV = torch.nn.functional.linear(*rounded[:2]).float()
    logp_BTV = (product_BTV + (leaves[2] if bias else 0)).log_softmax(-1)
    expected_BT = logp_BTV.gather(2, token_BT[..., None])[..., 0]
    for kind in (torch.float32, torch.bfloat16):  # of the hidden states
        own = [leaves[0].to(kind).requires_grad_(), *(w.requires_grad_() for w in leaves[1:])]
        with torch.autocast("cpu", torch.bfloat16):
            logp_BT, _ = token_logprobs(own[0], own[1], token_BT, *own[2:], words=4, keep=0)
        assert logp_BT.dtype == torch.float32
        torch.testing.assert_close(logp_BT, expected_BT, rtol=0, atol=1e-5)
        reference = [leaf.detach().to(kind).float().requires_grad_() for leaf in leaves]
        plain_BT, _ = plain(*reference[:2], token_BT, *(reference[2:] or [None]), 1.0, 1.0, None)
        ours_and_plain = (
            torch.autograd.grad(log_probs_BT.sum(), of)
            for log_probs_BT, of in ((logp_BT, own), (plain_BT, reference))
        )
        for ours, expected in zip(*ours_and_plain):
            torch.testing.assert_close(ours.float(), expected, rtol=0, atol=0.03)


# 15 tokens and 11 words, and the calls of `logits`: forward, and backward for what was not kept.
@pytest.mark.parametrize("options, limits, calls", [
    ({"words": 4, "keep": 0}, {}, 3 + 3),
    ({"words": 4, "keep": 2 * 4 * 15 - 1}, {}, 3 + 2),  # a number too few to keep two
    ({"words": 4, "keep": 2 * 4 * 15}, {}, 3 + 1),
    ({"words": 4, "keep": 3 * 4 * 15}, {}, 3 + 0),
    ({"words": 4}, {"KEEP": 0}, 3 + 2),  # 11 · 8 numbers, as the matrix has: one slice
    ({"words": 4}, {"KEEP": 2 * 4 * 15}, 3 + 1),
    ({"keep": 0}, {"SLICE": 4 * 15 + 14}, 3 + 3),  # four words a slice
    ({"keep": 0}, {"SLICE": 1}, 11 + 11),  # one at least
    ({"keep": 0}, {}, 1 + 1),
])  # fmt: skip
def test_slices_are_as_large_as_allowed_and_the_first_are_kept(monkeypatch, options, limits, calls):
    made, logits = [], logprobs.logits
    monkeypatch.setattr(logprobs, "logits", lambda *x: made.append(1) or logits(*x))
    for name, value in limits.items():
        monkeypatch.setattr(logprobs, name, value)
    leaves = torch.randn(3, 5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    logp_BT, _ = token_logprobs(*leaves, torch.zeros(3, 5, dtype=torch.long), **options)
    logp_BT.sum().backward()
    assert len(made) == calls


def test_a_single_token_may_have_a_whole_slice(monkeypatch):
    made, logits = [], logprobs.logits
    monkeypatch.setattr(logprobs, "logits", lambda *x: made.append(1) or logits(*x))
    monkeypatch.setattr(logprobs, "SLICE", 11)
    token_logprobs(torch.randn(1, 1, 8), torch.randn(11, 8), torch.zeros(1, 1).long())
    assert len(made) == 1


def test_compiled_kernels_equal_eager_ones(device):
    torch.manual_seed(0)
    for rows, width in ((4, 6), (3, 9)):  # two shapes: the compiled kernels are dynamic
        hidden_BTD, weight_VD = (
            torch.randn(rows, width, 8, device=device),
            torch.randn(11, 8, device=device),
        )
        token_BT = torch.randint(0, 11, (rows, width), device=device)
        logp_BT, old_BT, adv_BT = (torch.randn(rows, width, device=device) for _ in range(3))
        compiled = tuple(
            torch.compile(kernel, dynamic=True) for kernel in (add_slice, slice_gradient)
        )
        sides = []
        for kernels in ((add_slice, slice_gradient), compiled):
            leaves = hidden_BTD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
            pair = token_logprobs(*leaves, token_BT, kernels=kernels, words=4)
            sides.append([*pair, *torch.autograd.grad((pair[0] * adv_BT + pair[1]).sum(), leaves)])
        for eager, fast in zip(*sides):
            torch.testing.assert_close(fast, eager, rtol=1e-5, atol=1e-5)
        for loss, arguments in (
            (policy_loss, (logp_BT, old_BT, adv_BT, 0.2, 0.28)),
            (value_loss, (logp_BT, old_BT)),
        ):
            torch.testing.assert_close(
                torch.compile(loss, dynamic=True)(*arguments),
                loss(*arguments),
                rtol=1e-5,
                atol=1e-5,
            )


def test_a_kernel_is_compiled_for_four_shapes_at_most():
    """For one row or several, one token (word) or several; torch gives up beyond eight."""
    sizes = [(b, t) for b in (1, 2, 7, 64) for t in (1, 2, 33, 512)]
    for kernel, columns in ((policy_loss, 3), (value_loss, 2), (add_slice, 4), (slice_gradient, 4)):
        counter = CompileCounter()
        fast = torch.compile(kernel, backend=counter, dynamic=True)
        for size in sizes:
            flat = [torch.rand(size[1]) for _ in range(columns - 1)]
            same = [torch.rand(size) for _ in range(columns - 1)]
            rest = {policy_loss: (*same, 0.2, 0.28), value_loss: same, add_slice: flat,
                    slice_gradient: (*flat, None, 1.0, 1.0, None)}[kernel]  # fmt: skip
            fast(torch.rand(size), *rest)
        assert counter.frame_count <= 4, kernel.__name__


class Count(TorchDispatchMode):
    """Counts the kernels called under it."""

    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counted[str(function)] += 1
        return function(*args, **(kwargs or {}))


def test_with_a_gpus_slices_a_micro_batch_takes_hundreds_of_kernels():
    """16,384 tokens, 151,936 words, width 896 on a GPU of 80 GB: 80e9 / 640 = 125,000,000 numbers a
    slice, 7,629 words, 20 slices (a CPU's slice: 1,187 of 128 words, 100,000 kernels)."""
    tokens, vocabulary, width = 16_384, 151_936, 896
    words = slice_on_gpu(80e9) // tokens
    assert -(-vocabulary // words) == 20
    with FakeTensorMode():  # imagined: no numbers, no memory
        hidden = torch.empty(1, tokens, width, requires_grad=True)
        weight = torch.empty(vocabulary, width, requires_grad=True)
        token = torch.empty(1, tokens, dtype=torch.long)
        with Count() as count, Live() as live:
            logp, _ = token_logprobs(hidden, weight, token, words=words)
            logp.sum().backward()
    # A slice: 1 product forward, 2 back, and 1 again for the 19 that are not kept (one is: it has
    # 7,629 · 16,384 numbers, the output matrix 151,936 · 896, which is a little more).
    assert count.counted["aten.mm.default"] == 20 * 3 + 19
    views = ("slice", "view", "transpose", "t.", "unsqueeze", "select", "expand", "detach")
    kernels = sum(n for name, n in count.counted.items() if not any(v in name for v in views))
    assert kernels < 1700  # uncompiled
    # Alive at once: five slices, the kept one, the matrix's gradient, three times hidden states.
    assert live.peak < 4 * (6 * words * tokens + vocabulary * width + 3 * tokens * width)


def test_on_a_gpu_the_product_of_bfloat16_numbers_is_float32():
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad(), Count() as count:
        states = torch.empty(4, 8, dtype=torch.bfloat16)
        z = logits(states, torch.empty(100, 8, dtype=torch.bfloat16), None, 1.0, 1.0, None)
    assert z.dtype == torch.float32 and z.shape == (100, 4)
    assert count.counted["aten.mm.dtype"] == 1
