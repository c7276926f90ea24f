"""Sampling with transformers' `generate` (--engine hf): the plain reference for slots.py."""

import torch

from system.loading import autocast
from system.slots import left_padded


def sample_with_generate(
    policy, prompts, samples, max_tokens, temperature, top_p, generator, eos_N, slots, bar
):
    """As `slots.sample_in_slots`, a batch of prompts at a time, from a seed of the generator's.

    Returns no log-probs: `generate` would hold the logits of all tokens to tell.
    """
    device, count = policy.device, max(1, slots // samples)
    token_BT, length_B, stop_B = [], [], []
    how = {"do_sample": temperature > 0}
    if temperature:
        how |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    for start in range(0, len(prompts), count):
        prompt_PL, length_P = left_padded(prompts[start : start + count], device)
        prompt_BL = prompt_PL.repeat_interleave(samples, dim=0)
        prompt_length_B = length_P.repeat_interleave(samples)
        width = prompt_BL.shape[1]
        mask_BL = (torch.arange(width, device=device) >= width - prompt_length_B[:, None]).long()
        cuda = [device] if device.type == "cuda" else []
        with autocast(policy), torch.random.fork_rng(cuda):
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator, device=device)))
            both_BL = policy.generate(
                prompt_BL, attention_mask=mask_BL, max_new_tokens=max_tokens,
                eos_token_id=eos_N.tolist(), pad_token_id=0, **how,
            )  # fmt: skip
        missing = max_tokens + width - both_BL.shape[1]
        answer_BT = torch.nn.functional.pad(both_BL[:, width:], (0, missing))
        ends_BT = torch.isin(answer_BT, eos_N)
        stop_B.append(ends_BT.any(dim=1))
        first_B = ends_BT.long().argmax(dim=1)
        length_B.append(torch.where(stop_B[-1], first_B + 1, max_tokens))
        token_BT.append(answer_BT)
        bar.update(len(answer_BT))
    return torch.cat(token_BT), None, torch.cat(length_B), torch.cat(stop_B)
