"""What policy and critic say about rows: log-probs, entropies and values of the response tokens.

Rows are right-padded and attention is causal, so a token never sees the padding after it: no
attention mask is needed. How networks are loaded is in system/loading.py.

Shapes: B rows; L prompt + response tokens; T response tokens; N tokens of all rows; V vocabulary;
D width.
"""

from functools import partial

import torch

import logprobs
from problems import prompted_problems, repeated
from system import loading
from system.distributed import add_up, deal, gathers, world
from system.loading import autocast, surprise_of, value_head
from system.run import kernel, pick_device
from table import micro_batches, response_mask, response_tokens, take


def set_up(settings, files, critics=(), policy=None):
    """What every script begins with; bad input is found before any long work.
    Args: files, of problems; critics, directories to check; policy, where the caller has it.
    Returns: (policy, tokenizer, [the problems of each file])."""
    device = pick_device(settings.device)
    torch.manual_seed(settings.seed)
    tokenizer = loading.load_tokenizer(settings.model)
    length = settings.prompt_length + settings.response_length
    for path in set(critics) - {"", "fit", "truth"}:
        loading.require_critic(path, tokenizer, length)
    problems = [prompted_problems(path, tokenizer, settings) for path in files]
    if len(problems) == 2 and (twice := repeated(*problems[::-1])):
        said = f"{twice} of the {len(problems[1])} test problems are training problems too"
        print(f"warning: {said}")
    if policy is None:
        policy = loading.load_policy(settings.model, device, settings.dtype, length)
        known = policy.get_input_embeddings().num_embeddings
        loading.require_words(known, tokenizer, settings.model)
        policy = loading.shard(policy, device, settings)
    return policy, tokenizer, problems


def response_hidden(trunk, rows, shift=0, surprise=None):
    """Hidden states [B, T, D] at the position before each response token (shift=1: at it).
    Args: rows, with token_BL, prompt_length_B and length_B; T = the longest response here;
        surprise, a critic's weight for how unlikely each token was (`loading.with_surprise`).
    Positions past a row's end repeat its last one; they are padding, and weightless."""
    again = torch.is_grad_enabled()  # gradient checkpointing
    layers = [m for m in trunk.modules() if again and getattr(m, "gradient_checkpointing", False)]
    for layer in layers:  # transformers looks for train mode; nothing inside gets it: no dropout
        layer.training = True
    told = {"input_ids": rows["token_BL"]}
    if surprise is not None:
        embedding_BLD = trunk.get_input_embeddings()(rows["token_BL"])
        told = {"inputs_embeds": embedding_BLD + surprise(surprise_of(rows)[..., None])}
    hidden_BLD = trunk(**told, use_cache=False).last_hidden_state
    for layer in layers:
        layer.training = False
    t_T = torch.arange(int(rows["length_B"].max()), device=hidden_BLD.device)
    position_BT = rows["prompt_length_B"][:, None] - 1 + shift + t_T
    position_BT = position_BT.clamp(max=hidden_BLD.shape[1] - 1)
    return hidden_BLD.gather(1, position_BT[..., None].expand(-1, -1, hidden_BLD.shape[2]))


@gathers
def policy_logprobs(policy, rows, temperature, compile=False):
    """(logp_BT, entropy_BT) of the response tokens under the policy, float32, 0 on padding.
    Args: temperature, the sampler's; compile, of the kernels (see `system.run.kernel`)."""
    functions = (logprobs.add_slice, logprobs.slice_gradient)
    kernels = tuple(kernel(function, compile, policy.device) for function in functions)
    with autocast(policy):
        hidden_BTD = response_hidden(policy.base_model, rows)
        head = policy.get_output_embeddings()
        on_BT = response_mask(rows).bool()
        # Of no padding: the output matrix is most of a small model's work.
        columns_N = logprobs.token_logprobs(
            hidden_BTD[on_BT], head.weight, response_tokens(rows)[on_BT],
            getattr(head, "bias", None), temperature, *policy.logit_transform, kernels=kernels,
        )  # fmt: skip
    zero_BT = torch.zeros(on_BT.shape, device=on_BT.device)
    return tuple(zero_BT.masked_scatter(on_BT, column_N) for column_N in columns_N)


@gathers
def critic_values(critic, rows, shift=0):
    """value_BT: V of the state before each response token, float32.
    shift=1: V after it, where a reward model scores."""
    with autocast(critic):
        surprise = getattr(critic, "surprise", None)
        hidden_BTD = response_hidden(critic.base_model, rows, shift, surprise)
    value_N1 = value_head(critic)(hidden_BTD.float().flatten(0, 1))
    return value_N1.view(hidden_BTD.shape[:2]).clone()  # no view: FSDP hooks what is returned


@torch.no_grad()
def all_values(critic, rows, tokens, shift=0):
    """value_BT of all rows, `tokens` at a time, on all ranks; 0 on padding."""
    return over_rows(partial(critic_values, critic, shift=shift), rows, tokens, critic.device)[0]


@torch.no_grad()
def all_logprobs(policy, rows, temperature, tokens, compile=False):
    """(logp_BT, entropy_BT) of all rows, `tokens` at a time, on all ranks; 0 on padding."""
    of_part = partial(policy_logprobs, policy, temperature=temperature, compile=compile)
    return over_rows(of_part, rows, tokens, policy.device)


def over_rows(function, rows, tokens, device):
    """Columns [B, T] of all rows from those of function(part), dealt out to the ranks; of fewer
    rows than ranks each makes them all."""
    columns_BT, parts, few = [], micro_batches(rows, tokens), len(rows["length_B"]) < world()
    for index in parts if few else deal(parts):
        part = take(rows, index, device)
        mask_BT = response_mask(part)
        found_BT = function(part)
        found_BT = found_BT if isinstance(found_BT, tuple) else (found_BT,)
        columns_BT = columns_BT or [torch.zeros_like(response_mask(rows)) for _ in found_BT]
        for column_BT, own_BT in zip(columns_BT, found_BT):
            column_BT[index, : mask_BT.shape[1]] = (own_BT * mask_BT).to(column_BT.device)
    if not few:
        add_up(*columns_BT)
    return columns_BT
