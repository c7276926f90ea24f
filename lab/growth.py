"""How a step's time and memory grow with the length and the number of the answers: what `bench.py --scale` prints.

Shapes: as in rollout.py and logprobs.py.
"""

import copy
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import logprobs
import losses
import model
import ppo
import rollout
from run import seeded_generator

SCALE = {  # answers, and tokens of each
    "lengths": [(4, 1024), (4, 2048), (4, 4096), (4, 8192), (4, 16384)],
    "answers": [(64, 256), (256, 256), (1024, 256), (4096, 256)],
    "micro_batch_tokens": 16_400,  # one answer of 16,384, with its prompt
}


def steps(settings, device, seconds, peak_bytes):
    """How the phases of a step grow with the length and with the number of the answers, on a tiny model: microseconds a token
    (in brackets what attention alone takes of it, measured on the same shapes), and the peak memory of the update.

    Attention's share of a token grows with the length; nothing else should, and memory only with --micro_batch_tokens.

    Args: seconds, peak_bytes, bench.py's measures of a function. Yields: a dict of numbers a line, printed as well.
    """
    torch.manual_seed(0)
    heads, width, words, layers = 2, 64, 512, 2
    config = Qwen2Config(
        vocab_size=words, hidden_size=width, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, bos_token_id=None, pad_token_id=None, eos_token_id=None, max_position_embeddings=32768,
    )  # fmt: skip
    policy = AutoModelForCausalLM.from_config(config).to(device).eval()
    policy.logit_treatment, policy.arithmetic = model.measure_logits(policy), model.arithmetic(settings.dtype, device)
    critic = copy.deepcopy(policy)
    critic.score = torch.nn.Linear(width, 1, device=device)
    endless = SimpleNamespace(eos_token_id=words, added_tokens_decoder={})  # a word that is never drawn: all answers are of full length
    asked = SimpleNamespace(
        temperature=1.0, micro_batch_tokens=SCALE["micro_batch_tokens"], clip_higher=True, eps_low=0.2, eps_high=0.28, mu=0.1,
        positive_nll=True, token_level_loss=True, value_clip=0.0, critic_free=False, is_clip=0.0, length_adaptive_gae=True, alpha=0.05,
        decoupled_gae=True, lam_critic=1.0, whiten=False,
    )  # fmt: skip
    kernels = SimpleNamespace(
        logprobs=(logprobs.add_slice, logprobs.slice_gradient), policy_loss=losses.policy_loss, value_loss=losses.value_loss
    )

    def attention(rows, tokens, backward):
        """Seconds of one layer's attention over whole answers."""
        query, key, value = (
            torch.randn(rows, heads, tokens, width // heads, device=device, dtype=policy.arithmetic, requires_grad=backward)
            for _ in range(3)
        )

        def turn():
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            if backward:
                out.sum().backward()

        return min(seconds(turn, device)[0] for _ in range(2))

    def attention_while_sampling(rows, tokens):
        """Seconds of all layers' attention of one step of the sampler, the mean over its steps: the columns it sees grow evenly."""
        tables = [torch.randn(2, rows, heads, tokens, width // heads, device=device, dtype=policy.arithmetic) for _ in range(layers)]
        query = torch.randn(rows, heads, 1, width // heads, device=device, dtype=policy.arithmetic)
        taken = []
        for columns in (tokens * (2 * i + 1) // 16 for i in range(8)):
            mask = torch.ones(rows, 1, 1, columns, dtype=torch.bool, device=device)

            # The layers in turn, as in the model: what one has read has left the CPU's cache when it comes again.
            def turn(columns=columns, mask=mask):
                for key, value in tables * 20:
                    torch.nn.functional.scaled_dot_product_attention(query, key[:, :, :columns], value[:, :, :columns], attn_mask=mask)

            taken.append(min(seconds(turn, device)[0] for _ in range(2)) / 20)
        return sum(taken) / len(taken)

    def step(answers, tokens):
        """The line of one step of so many answers of so many tokens."""
        problems, samples = [{"prompt": [1, 2, 3]}] * (answers // 4), 4
        slots, generator = min(256, answers), seeded_generator(0, "bench", device)

        def sampled():
            return rollout.sample(policy, endless, problems, samples, tokens, 1.0, generator, slots)

        def scored():
            ppo.old_logprobs_and_values(policy, critic, rows, asked, kernels)
            ppo.compute_advantages(rows, asked)

        def updated():
            ppo.backward(policy, critic, ppo.add_weights(dict(rows), asked), asked, kernels)

        taken, alone = {}, {}
        taken["sampling"], rows = seconds(sampled, device)
        rows["correct_B"] = torch.arange(answers, device=device) % 2 == 0
        rows["reward_B"] = rows["correct_B"].float()
        taken["scoring"], _ = seconds(scored, device)
        taken["update"], _ = seconds(updated, device)
        memory = peak_bytes(updated, device)
        micro = max(1, min(answers, asked.micro_batch_tokens // (tokens + 3)))
        more = min(answers, 4 * micro)
        alone["sampling"] = attention_while_sampling(slots, tokens) * tokens * answers / slots
        alone["scoring"] = attention(more, tokens + 3, False) * 2 * layers * answers / more  # of policy and critic
        alone["update"] = attention(micro, tokens + 3, True) * 2 * layers * answers / micro
        line = {"part": "scale", "answers": answers, "tokens": tokens, "update_bytes": memory}
        for phase in taken:
            line[f"{phase}_us"], line[f"{phase}_attention_us"] = (1e6 * x / (answers * tokens) for x in (taken[phase], alone[phase]))
        phases = "   ".join(f"{phase} {line[f'{phase}_us']:7.1f} ({line[f'{phase}_attention_us']:6.1f})" for phase in taken)
        held = f"   update {memory / 1e6:6.0f} MB" if memory else ""  # not measured on every system
        print(f"{answers:5d} answers of {tokens:6d} tokens   {phases} us a token{held}", flush=True)
        return line

    seconds(lambda: step(4, 64), device)  # warm-up, printed like the rest
    for answers, tokens in SCALE["lengths"] + SCALE["answers"]:
        yield step(answers, tokens)
