"""Log-probability and entropy of the taken tokens, without ever holding the logits of all tokens.

A model's last step multiplies hidden states [B, T, D] by the output matrix [V, D]. For 2,048 tokens and 150,000 words
that product is 1.2 GB in float32, and autograd keeps several copies. Here it is made a chunk of tokens at a time, at most
LOGITS_AT_ONCE numbers, and made again in the backward pass where there is more than one chunk.

Shapes: B rows, T response tokens, N = tokens of a chunk, V vocabulary, D width.
"""

import torch
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**26  # 256 MB in float32


def chunk_logprobs(hidden_ND, weight_VD, bias_V, token_N, temperature, scale, softcap):
    """log π(a|s) and the entropy of π(·|s) for N tokens.

    z = scale · (W h + b),   z ← c tanh(z / c) if the model caps its logits at c,   π = softmax(z / temperature)
    log π(a|s) = z_a − logsumexp z,    H = logsumexp z − Σ_v π_v z_v

    Returns: (logp_N, entropy_N), float32, in nats. The product takes the dtype of autocast; the rest is float32.
    """
    logit_NV = torch.nn.functional.linear(hidden_ND, weight_VD, bias_V).float() * scale
    if softcap is not None:
        logit_NV = softcap * torch.tanh(logit_NV / softcap)
    logit_NV = logit_NV / temperature
    logsumexp_N = logit_NV.logsumexp(dim=-1)
    logp_N = logit_NV.gather(1, token_N[:, None])[:, 0] - logsumexp_N
    entropy_N = logsumexp_N - ((logit_NV - logsumexp_N[:, None]).exp() * logit_NV).sum(dim=-1)
    return logp_N, entropy_N


def token_logprobs(
    hidden_BTD, weight_VD, token_BT, bias_V=None, temperature=1.0, scale=1.0, softcap=None,
    chunk=None, kernel=chunk_logprobs,
):  # fmt: skip
    """`chunk_logprobs` over [B, T], `chunk` tokens at a time (default: as many as LOGITS_AT_ONCE allows).

    Args: hidden_BTD, the states that predict token_BT; weight_VD and bias_V, the output matrix; temperature, the
        sampler's; scale and softcap, the model's own treatment of its logits; kernel, `chunk_logprobs` or its
        compiled form.
    Returns: (logp_BT, entropy_BT), float32.
    """
    hidden_ND, token_N = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), token_BT.reshape(-1)
    chunk = chunk or max(1, LOGITS_AT_ONCE // len(weight_VD))
    recompute = torch.is_grad_enabled() and len(token_N) > chunk
    parts = []
    for start in range(0, len(token_N), chunk):
        part = slice(start, start + chunk)
        arguments = (hidden_ND[part], weight_VD, bias_V, token_N[part], temperature, scale, softcap)
        parts.append(checkpoint(kernel, *arguments, use_reentrant=False) if recompute else kernel(*arguments))
    logp_N, entropy_N = (torch.cat(column) for column in zip(*parts))
    return logp_N.view_as(token_BT), entropy_N.view_as(token_BT)
