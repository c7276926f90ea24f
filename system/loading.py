"""Policies, critics and tokenizers, from directories and hub names.

The policy is any causal language model. The critic is a separate trunk with a linear head,
`AutoModelForTokenClassification` with one label, into which a reward model's head loads as it is.
Weights are float32, and read from safetensors only, which can hold no code; code that a model
brings is never run. --dtype is what the models compute in, and the dtype of the copy that samples.

A loaded network is in eval mode, for good: dropout would move the ratio without an update. It has
`compute_dtype`, and a policy also `logit_transform`, what `measure_logits` returns.
"""

import copy
import hashlib
import json
import os
import re
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GenericForTokenClassification, GradientCheckpointingLayer
from transformers.models.auto import modeling_auto
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from system import distributed, lora
from system.run import BadInput, require, say_once

# A GPU's memory falls into pieces with rows of all lengths, unless its segments can grow.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
END_OF_TURN = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>",
               "<end_of_turn>")  # special tokens of the chat formats in use  # fmt: skip


def load_tokenizer(path):
    """The model's tokenizer; "the fast one in tokenizer.json, as it stands" is taken at its word:
    AutoTokenizer puts the family's own in its place for some models (qwen2), which splits texts
    otherwise, silently. Raises: BadInput if it cannot be read or has no EOS."""
    kind = loaded(get_tokenizer_config, path).get("tokenizer_class")
    as_it_stands = kind in ("TokenizersBackend", "PreTrainedTokenizerFast")
    kind = transformers.PreTrainedTokenizerFast if as_it_stands else transformers.AutoTokenizer
    tokenizer = loaded(kind.from_pretrained, path)
    said = f"the tokenizer in {path} has no EOS token: set its eos_token, answers end with it"
    require(tokenizer.eos_token_id is not None, said)
    return tokenizer


def load_policy(path, device, dtype="auto", length=0):
    """The causal LM in `path`. Raises: BadInput, also if it has fewer positions than `length`."""

    def finish(policy):
        policy.logit_transform = measure_logits(policy)

    config = loaded(AutoConfig.from_pretrained, path)
    require_positions(config.get_text_config(), length, path)
    policy = read_by_rank_0(AutoModelForCausalLM, path, config, device, dtype, finish)
    own = (getattr(policy, "logit_transform", None), policy.generation_config)
    policy.logit_transform, policy.generation_config = distributed.from_rank_0(own)
    return policy


def load_critic(path, device, dtype="auto", surprise=False, mean_reward=0.0):
    """A critic, from the model that `path` holds by its config.json. Raises: BadInput.
    From a policy: its trunk with a zero head and bias = the mean reward, V at first.
    From a reward model (`AutoModelForSequenceClassification`, one label): trunk and head, bias 0.
    From a critic: as it is.
    Args: surprise, to give it that input (`with_surprise`); a critic that has it keeps it."""
    config = loaded(AutoConfig.from_pretrained, path)
    new = surprise and not getattr(config, "critic_surprise", False)
    config.critic_surprise = surprise or getattr(config, "critic_surprise", False)
    kind, is_scorer = (config.architectures or [""])[0], require_one_label(config, path)
    config.num_labels, config.classifier_dropout = 1, 0.0  # the class's own default is 0.1

    def finish(critic):
        head = value_head(critic)
        with torch.no_grad():
            if not is_scorer:
                head.weight.zero_()
                head.bias.fill_(mean_reward)
            elif not kind.endswith("ForTokenClassification"):
                head.bias.zero_()
            if new:
                critic.surprise.weight.zero_()  # V is at first what it was

    own_class = critic_class(config)
    own_class = with_surprise(own_class, config) if config.critic_surprise else own_class
    return read_by_rank_0(own_class, path, config, device, dtype, finish)


def read_by_rank_0(kind, path, config, device, dtype, finish):
    """A network of class `kind`, after finish(network). Under torchrun rank 0 alone reads it, onto
    the CPU; on the others it has shapes but no memory."""
    held = "cpu" if distributed.world() > 1 else device

    def read():
        how = {"config": config, "use_safetensors": True, "dtype": torch.float32}
        network = loaded(kind.from_pretrained, path, **how).eval().to(held)
        finish(network)
        return network

    network = distributed.on_rank_0(read)
    if network is None:
        with torch.device("meta"):
            make = getattr(kind, "from_config", None) or kind._from_config
            network = make(config, dtype=torch.float32).eval()
    network.compute_dtype = compute_dtype(dtype, device)
    return network


def loaded(from_pretrained, path, **options):
    """`from_pretrained(path)` of a directory or hub name; BadInput in place of a traceback."""
    said = f"no model directory at {path}, and no name on the hub (OWNER/NAME)"
    require(Path(path).is_dir() or HUB_NAME.fullmatch(str(path)) is not None, said)
    transformers.logging.set_verbosity_error()  # no report that a new head is not in the file
    transformers.logging.disable_progress_bar()
    try:
        return from_pretrained(path, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        where = "" if Path(path).is_dir() else " (no such directory here; tried the hub)"
        brings_code = "trust_remote_code" in str(error)
        why = "it brings code of its own" if brings_code else distributed.first_line(error)
        raise BadInput(f"cannot load {path}{where}: {why}") from None


def critic_class(config):
    """AutoModelForTokenClassification or, for an architecture without one (Gemma 3, OLMo 2), its
    trunk and a head, which load again by `load_critic` only."""
    if type(config) in modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        return transformers.AutoModelForTokenClassification
    trunk = modeling_auto.MODEL_MAPPING.get(type(config), None)
    said = f"transformers has no trunk for a model of type {config.model_type}"
    require(trunk, f"{said}: no critic can be made of it")
    family = next(c for c in trunk.__mro__ if transformers.PreTrainedModel in c.__bases__)
    name = family.__name__.removesuffix("PreTrainedModel") + "ForTokenClassification"
    print(f"note: transformers has no {name}: the critic is {trunk.__name__} with a linear head")
    prefix = {"base_model_prefix": family.base_model_prefix}
    return type(name, (GenericForTokenClassification, family), prefix)


def with_surprise(kind, config):
    """A critic's class with one more weight, `surprise` [D, 1]: what one nat of −log π(token) adds
    to the token's embedding. So V knows which tokens the policy itself held unlikely."""
    kind = modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING.get(type(config), kind)

    def init(self, config):
        kind.__init__(self, config)
        self.surprise = torch.nn.Linear(1, config.get_text_config().hidden_size, bias=False)

    return type(kind.__name__, (kind,), {"__init__": init})


def surprise_of(rows, limit=8.0):
    """surprise_BL: −log π of the response tokens as the sampler has it, at most `limit` nats; 0
    for the prompt and the padding. What comes before a token never depends on it."""
    logp_BT, length_B1 = rows["sampled_logp_BT"], rows["length_B"][:, None]
    t_BL = torch.arange(rows["token_BL"].shape[1], device=logp_BT.device)
    t_BL = t_BL - rows["prompt_length_B"][:, None]
    surprise_BL = -logp_BT.gather(1, t_BL.clamp(0, logp_BT.shape[1] - 1))
    return torch.where((t_BL >= 0) & (t_BL < length_B1), surprise_BL.clamp(max=limit), 0.0)


def value_head(network):
    """The critic's linear head [D → 1]: `score` or, in older classes, `classifier`; or None."""
    return getattr(network, "score", getattr(network, "classifier", None))


def require_positions(config, length, path):
    """Raises: BadInput if the model has fewer positions than `length`."""
    longest = getattr(config, "max_position_embeddings", None)
    said = f"lower --prompt_length + --response_length from {length}"
    require(length <= (longest or length), f"{path} has {longest} positions: {said}")


def require_words(known, tokenizer, path):
    """Raises: BadInput if the tokenizer has words that a model of `known` words does not have."""
    words = max(tokenizer.get_vocab().values()) + 1
    said = f"the model in {path} has {known} words, the policy's tokenizer {words}"
    require(words <= known, f"{said}: they are not of one kind")


def require_critic(path, tokenizer, length):
    """Raises: BadInput unless `load_critic` can make a critic for this tokenizer of `path`."""
    config = loaded(AutoConfig.from_pretrained, path)
    require_one_label(config, path)
    critic_class(config)
    text = config.get_text_config()
    require_words(getattr(text, "vocab_size", 0), tokenizer, path)
    require_positions(text, length, path)
    if (Path(path) / "tokenizer.json").is_file():
        same = load_tokenizer(path).get_vocab() == tokenizer.get_vocab()
        said = "has another tokenizer than the policy: its values are of other words"
        require(same, f"{path} {said}")


def require_one_label(config, path):
    """Whether it is a critic's or reward model's. Raises: BadInput if that is not of one label."""
    kind = (config.architectures or [""])[0]
    is_scorer = kind.endswith(("ForTokenClassification", "ForSequenceClassification"))
    said = f"{path} has {config.num_labels} labels: a critic or reward model has one"
    require(not is_scorer or config.num_labels == 1, said)
    return is_scorer


@torch.no_grad()
def measure_logits(policy):
    """What the model does to its logits: (scale, softcap) of z = c tanh(scale · (W h + b) / c).
    Some models scale (Cohere, Granite), some cap (Gemma 2): measured on a few tokens rather than
    read from names in configs. Raises: BadInput if the logits are something else still."""
    config = policy.config.get_text_config()
    token_BL = torch.arange(8, device=policy.device)[None] % config.vocab_size
    output = policy(input_ids=token_BL, output_hidden_states=True, use_cache=False)
    logit_N = output.logits.flatten().double()
    raw_N = policy.get_output_embeddings()(output.hidden_states[-1]).flatten().double()
    softcap = getattr(config, "final_logit_softcapping", None)
    cap = softcap or 1e9  # as good as none
    uncapped_N = cap * torch.atanh((logit_N / cap).clamp(-0.999999, 0.999999))
    scale = ((uncapped_N * raw_N).sum() / (raw_N * raw_N).sum().clamp(min=1e-30)).item()
    scale = round(scale, 4) if abs(scale - round(scale, 4)) < 1e-5 else scale
    ours_N = cap * torch.tanh(raw_N * scale / cap)
    same = torch.allclose(ours_N, logit_N, rtol=1e-3, atol=1e-3 * logit_N.abs().max().item())
    said = "computes its logits in a way that logprobs.py does not know"
    require(same, f"{type(policy).__name__} {said}")
    return scale, softcap


def compute_dtype(dtype, device):
    """torch.dtype for --dtype: auto is bfloat16 on CUDA, float32 elsewhere."""
    able = getattr(torch.cpu, "get_capabilities", dict)()
    slow = able.get("architecture") == "x86_64" and not (able["avx512_bf16"] or able["amx_bf16"])
    if slow and dtype == "bfloat16" and device.type == "cpu":
        say_once("warning: this CPU computes bfloat16 more slowly than float32: leave --dtype out")
    low_precision = dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda")
    return torch.bfloat16 if low_precision else torch.float32


def autocast(network):
    """The network's compute dtype over its float32 weights."""
    enabled = network.compute_dtype == torch.bfloat16
    return torch.autocast(network.device.type, torch.bfloat16, enabled=enabled)


def shard(network, device, settings):
    """A loaded network ready to be trained: sharded, with gradient checkpointing if asked for."""
    wanted = getattr(settings, "gradient_checkpointing", False)  # evaluate.py has no such flag
    checkpoint_gradients(network, wanted)
    heads = (value_head(network), getattr(network, "surprise", None))
    lora.adapt(network, getattr(settings, "lora", 0), settings.seed, heads)
    bfloat16 = network.compute_dtype == torch.bfloat16
    return distributed.shard(network, device, bfloat16, value_head(network))


def checkpoint_gradients(network, wanted):
    """Has the layers run again in the backward pass. Raises: BadInput if they cannot."""
    if wanted:
        layers = [p for p in network.modules() if isinstance(p, GradientCheckpointingLayer)]
        said = "has no gradient checkpointing: leave --gradient_checkpointing out"
        able = network.supports_gradient_checkpointing and layers
        require(able, f"{type(network).__name__} {said}")
        enable = getattr(network, "activation_checkpointing_enable", None)  # the newer name
        (enable or network.gradient_checkpointing_enable)({"use_reentrant": False})
    return network


def sampling_copy(policy):
    """The policy, to sample from: itself; or a copy with bfloat16 weights, which would otherwise be
    cast for every token; of a policy that is sharded, a copy with all weights on every GPU."""
    held = next(policy.parameters()).dtype  # bfloat16 already where --lora has frozen them
    if distributed.world() == 1 and held == policy.compute_dtype:
        return policy
    config, how = copy.deepcopy(policy.config), {"dtype": policy.compute_dtype}
    with torch.device("meta"):
        sampler = AutoModelForCausalLM.from_config(config, **how).eval().requires_grad_(False)
    sampler.to_empty(device=policy.device).tie_weights()
    for name in ("generation_config", "logit_transform", "compute_dtype"):
        setattr(sampler, name, getattr(policy, name))
    update_sampler(sampler, policy)
    for copied, buffer in zip(sampler.buffers(), policy.buffers(), strict=True):
        copied.data = buffer.clone()  # float32 stays: positions need it
    return sampler


def sampler_of(policy, settings):
    """What samples for --engine: the policy or its copy (`sampling_copy`), or vLLM."""
    if settings.engine == "vllm":
        from system.vllm_engine import engine

        return engine(settings, policy)
    return sampling_copy(policy)


@torch.no_grad()
def update_sampler(sampler, policy):
    """Gives what `sampler_of` made the policy's weights of now."""
    if not isinstance(sampler, torch.nn.Module):  # vLLM
        sampler.update(policy)
    elif sampler is not policy:
        for copied, (_, parameter) in zip(sampler.parameters(), lora.merged(policy)):
            cast = parameter.to(copied.dtype)  # the smaller ones travel
            copied.copy_(distributed.unsharded(cast))


def eos_ids(policy, tokenizer):
    """All token ids that end an answer: the tokenizer's, the generation config's, END_OF_TURN."""
    listed = policy.generation_config.eos_token_id
    listed = listed if isinstance(listed, (list, tuple)) else [listed]
    added = tokenizer.added_tokens_decoder.items()
    turns = [i for i, token in added if token.special and token.content in END_OF_TURN]
    return sorted({tokenizer.eos_token_id, *listed, *turns} - {None})


def fingerprint(policy, texts):
    """A hash of the texts and of one number of every weight (the first of rank 0's share)."""
    weights = (weight for name, weight in policy.named_parameters() if ".lora_" not in name)
    own = (w.to_local() if isinstance(w, DTensor) else w for w in weights)
    firsts = torch.cat([weight.detach().flatten()[:1].float().cpu() for weight in own])
    digest = hashlib.sha256(firsts.numpy().tobytes() + json.dumps(texts).encode()).hexdigest()
    return distributed.from_rank_0(digest[:16])
