"""Sampling with transformers' `generate` (--engine hf): the plain reference for slots.py."""

import torch
from transformers import GenerationConfig

from system.loading import autocast
from system.slots import left_padded


def sample_with_generate(
    policy, prompts, samples, max_tokens, temperature, top_p, generator, eos_N, slots, bar
):
    """As `slots.sample_in_slots`, a batch of prompts at a time, from a seed of the generator's.
    The model's own generation_config (a penalty of repetitions, min-p, …) is laid aside: π is what
    the flags say. Returns no log-probs: `generate` would hold the logits of all tokens to tell."""
    device, count, parts = policy.device, max(1, slots // samples), []
    own, policy.generation_config = policy.generation_config, GenerationConfig()
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    how = drawn if temperature else {"do_sample": False}
    for start in range(0, len(prompts), count):
        prompt_PL, length_P = left_padded(prompts[start : start + count], device)
        width = prompt_PL.shape[1]
        mask_PL = (torch.arange(width, device=device) >= width - length_P[:, None]).long()
        cuda = [device] if device.type == "cuda" else []
        with autocast(policy), torch.random.fork_rng(cuda):
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator, device=device)))
            both_BL = policy.generate(
                prompt_PL.repeat_interleave(samples, dim=0), max_new_tokens=max_tokens,
                attention_mask=mask_PL.repeat_interleave(samples, dim=0),
                eos_token_id=eos_N.tolist(), pad_token_id=0, **how,
            )  # fmt: skip
        missing = max_tokens + width - both_BL.shape[1]
        parts.append(torch.nn.functional.pad(both_BL[:, width:], (0, missing)))
        bar.update(len(both_BL))
    policy.generation_config = own
    token_BT = torch.cat(parts)
    ends_BT = torch.isin(token_BT, eos_N)
    stop_B = ends_BT.any(dim=1)
    length_B = torch.where(stop_B, ends_BT.long().argmax(dim=1) + 1, max_tokens)
    return token_BT, None, length_B, stop_B
