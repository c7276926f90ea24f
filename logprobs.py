"""Log-probability and entropy of the taken tokens, never holding the logits of all tokens.

A model's last step multiplies hidden states [N, D] by the output matrix [V, D]. For 2,048 tokens
and 150,000 words that product is 1.2 GB in float32, and autograd keeps several of its size. Here it
is made a slice of the vocabulary at a time: the log-sum-exp runs along, and the backward pass makes
a slice of logits again, turns it into its gradient, and multiplies it away. The first slices, up to
KEEP numbers or the size of the output matrix, are kept instead of made again: the matrix's gradient
takes their place as it grows.

Shapes: B rows, T response tokens, N = B·T tokens, V vocabulary, S words of a slice, D width.
"""

import torch

SLICE = 2**21  # numbers in one slice of logits on a CPU: 8 MB in float32, which its caches hold
KEEP = 2**26  # numbers kept for the backward pass: 256 MB in float32


def slice_on_gpu(memory):
    """Numbers in one slice of logits, float32, for 1/160 of a GPU's memory (bytes). Every slice is
    eighty kernels, and reads all hidden states: a GPU, unlike a CPU's caches, wants large ones."""
    return int(memory) // 640


def logits(hidden_ND, weight_SD, bias_S, temperature, scale, softcap):
    """The logits of a slice of words, float32; the product takes the dtype of its arguments.

    z = scale · (W h + b),   z ← c tanh(z / c) if the model caps at c,   z ← z / temperature

    In bfloat16 the sum of a product is float32: a GPU gives it unrounded (0.02 nats, at most 0.14).
    """
    low = weight_SD.is_cuda and weight_SD.dtype != torch.float32  # a CPU has no such product
    logit_SN = torch.mm(weight_SD, hidden_ND.T, **{"out_dtype": torch.float32} if low else {})
    logit_SN = logit_SN.float() if bias_S is None else logit_SN.float() + bias_S[:, None]
    if scale != 1.0:
        logit_SN = logit_SN * scale
    if softcap is not None:
        logit_SN = softcap * torch.tanh(logit_SN / softcap)
    return logit_SN / temperature if temperature != 1.0 else logit_SN


def add_slice(logit_SN, highest_N, sum_N, product_N):
    """One step of the running sums: highest z so far m, Σ e^(z−m), and Σ e^(z−m) z.
    Returns: the three, of the words so far and those of the slice."""
    now_highest_N = torch.maximum(highest_N, logit_SN.amax(dim=0))
    weight_SN = (logit_SN - now_highest_N).exp()
    fade_N = (highest_N - now_highest_N).exp()
    sum_N = sum_N * fade_N + weight_SN.sum(dim=0)
    product_N = product_N * fade_N + (weight_SN * logit_SN).sum(dim=0)
    return now_highest_N, sum_N, product_N


def slice_gradient(
    logit_SN, logsumexp_N, entropy_N, grad_logp_N, grad_entropy_N, temperature, scale, softcap
):
    """The gradient of a slice of W h + b from those of log π and H, without the 1[v = a].

    ∂ log π(a|s) / ∂z_v = 1[v = a] − π_v,    ∂H / ∂z_v = −π_v (log π_v + H);
    then back through temperature, cap, and scale
    """
    logp_SN = logit_SN - logsumexp_N
    grad_SN = -grad_logp_N
    if grad_entropy_N is not None:
        grad_SN = grad_SN - grad_entropy_N * (logp_SN + entropy_N)
    return logp_SN.exp() * grad_SN * transform_slope(logit_SN, temperature, scale, softcap)


def transform_slope(logit_SN, temperature, scale, softcap):
    """∂z / ∂(W h + b), from z."""
    slope = scale / temperature
    return slope if softcap is None else slope * (1 - (logit_SN * temperature / softcap) ** 2)


class TokenLogprobs(torch.autograd.Function):
    """(logp_N, entropy_N) of `token_logprobs`, with gradients to hidden states, matrix and bias."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, token_N, transform, kernels, words, keep):
        device, count = hidden_ND.device, len(token_N)
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else weight_VD.dtype
        cast_ND = hidden_ND.to(dtype)
        highest_N = torch.full((count,), -torch.inf, device=device)
        sum_N, product_N, taken_N = torch.zeros(3, count, device=device)
        kept = []
        for start in range(0, len(weight_VD), words):
            part = slice(start, start + words)
            bias_S = None if bias_V is None else bias_V[part]
            logit_SN = logits(cast_ND, weight_VD[part].to(dtype), bias_S, *transform)
            highest_N, sum_N, product_N = kernels[0](logit_SN, highest_N, sum_N, product_N)
            inside_N, index_1N = where_taken(token_N, start, len(logit_SN))
            taken_N = torch.where(inside_N, logit_SN.gather(0, index_1N)[0], taken_N)
            kept.append(logit_SN if (len(kept) + 1) * words * count <= keep else None)
        logsumexp_N = highest_N + sum_N.log()
        entropy_N = logsumexp_N - product_N / sum_N
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, token_N, logsumexp_N, entropy_N)
        ctx.rest = dtype, transform, kernels, words, kept
        ctx.set_materialize_grads(False)  # no gradient of an entropy that is only looked at
        return taken_N - logsumexp_N, entropy_N

    @staticmethod
    def backward(ctx, grad_logp_N, grad_entropy_N):
        hidden_ND, weight_VD, bias_V, token_N, logsumexp_N, entropy_N = ctx.saved_tensors
        dtype, transform, kernels, words, kept = ctx.rest
        grad_logp_N = torch.zeros_like(logsumexp_N) if grad_logp_N is None else grad_logp_N
        cast_ND = hidden_ND.to(dtype)
        grad_hidden_ND = torch.zeros_like(hidden_ND, dtype=torch.float32)
        grad_weight_VD = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
        grad_bias_V = torch.empty_like(bias_V) if ctx.needs_input_grad[2] else None
        for i, start in enumerate(range(0, len(weight_VD), words)):
            part = slice(start, start + words)
            weight_SD = weight_VD[part].to(dtype)
            logit_SN, kept[i] = kept[i], None
            if logit_SN is None:
                bias_S = None if bias_V is None else bias_V[part]
                logit_SN = logits(cast_ND, weight_SD, bias_S, *transform)
            inside_N, index_1N = where_taken(token_N, start, len(logit_SN))
            slope_1N = transform_slope(logit_SN.gather(0, index_1N), *transform)
            taken_1N = slope_1N * (grad_logp_N * inside_N)[None]  # the part of 1[v = a]
            known = (logsumexp_N, entropy_N, grad_logp_N, grad_entropy_N)
            grad_SN = kernels[1](logit_SN, *known, *transform)
            grad_SN = grad_SN.scatter_add_(0, index_1N, taken_1N).to(dtype)
            grad_hidden_ND += grad_SN.T @ weight_SD
            if grad_weight_VD is not None:
                grad_weight_VD[part] = grad_SN @ cast_ND
            if grad_bias_V is not None:
                grad_bias_V[part] = grad_SN.float().sum(dim=1)
        return grad_hidden_ND.to(hidden_ND.dtype), grad_weight_VD, grad_bias_V, *[None] * 5


def where_taken(token_N, start, words):
    """(inside_N, index_1N): whether the words from `start` hold the taken token, and where."""
    inside_N = (token_N >= start) & (token_N < start + words)
    return inside_N, torch.where(inside_N, token_N - start, 0)[None]


def token_logprobs(
    hidden_BTD, weight_VD, token_BT, bias_V=None, temperature=1.0, scale=1.0, softcap=None,
    kernels=(add_slice, slice_gradient), words=None, keep=None,
):  # fmt: skip
    """log π(a|s) of the taken tokens and the entropy of π(·|s), with the gradient of both.

    π = softmax(z),    log π(a|s) = z_a − logsumexp z,    H = logsumexp z − Σ_v π_v z_v

    Args: hidden_BTD, the states that predict token_BT; weight_VD and bias_V, the output matrix;
        temperature, the sampler's; scale and softcap, the model's own transform of its logits;
        kernels, `add_slice` and `slice_gradient` or their compiled forms; words, of a slice (by
        default as many as the device likes); keep, logits kept for the backward pass (see above).
    Returns: (logp_BT, entropy_BT), float32, in nats. The product takes the dtype of autocast.
    """
    hidden_ND, token_N = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), token_BT.reshape(-1)
    cuda = token_N.is_cuda and torch.cuda.get_device_properties(token_N.device)
    numbers = slice_on_gpu(cuda.total_memory) if cuda else SLICE
    words = min(len(weight_VD), words or max(1, numbers // max(1, len(token_N))))
    keep = max(KEEP, weight_VD.numel()) if keep is None else keep
    how = ((temperature, scale, softcap), kernels, words, keep if torch.is_grad_enabled() else 0)
    logp_N, entropy_N = TokenLogprobs.apply(hidden_ND, weight_VD, bias_V, token_N, *how)
    return logp_N.view_as(token_BT), entropy_N.view_as(token_BT)
