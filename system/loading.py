"""Policies, critics and tokenizers, from directories and hub names.

The policy is any causal language model. The critic is a separate trunk with a linear head,
`AutoModelForTokenClassification` with one label: an ordinary Hugging Face directory, into which a
reward model's head loads as it is. Weights are float32 and read from safetensors only, which can
hold no code; code that a model brings is never run. The compute dtype is bfloat16 where --dtype
says so (by default on CUDA), and so is the copy of the policy that samples.

A loaded network is in eval mode, for good: dropout would move the ratio without an update. It has
`compute_dtype`, and a policy also `logit_transform`, what `measure_logits` returns.
"""

import copy
import hashlib
import json
import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_layers import GenericForTokenClassification, GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from system import distributed
from system.run import BadInput, pick_device, require

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
END_OF_TURN = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>",
               "<end_of_turn>")  # fmt: skip


def load_tokenizer(path):
    """The model's tokenizer. Raises: BadInput if it cannot be read or has no EOS.

    A directory that says "the fast tokenizer in tokenizer.json, as it stands" is taken at its word:
    AutoTokenizer puts the model family's own in its place for some (any model of type qwen2),
    which splits texts otherwise, silently.
    """
    kind = loaded(get_tokenizer_config, path).get("tokenizer_class")
    as_it_stands = kind in ("TokenizersBackend", "PreTrainedTokenizerFast")
    kind = PreTrainedTokenizerFast if as_it_stands else AutoTokenizer
    tokenizer = loaded(kind.from_pretrained, path)
    said = f"the tokenizer in {path} has no EOS token: set its eos_token, answers end with it"
    require(tokenizer.eos_token_id is not None, said)
    return tokenizer


def load_policy(path, device, dtype="auto", length=0):
    """The causal LM in `path`; under torchrun rank 0 reads it, the others have its shape only.

    Raises: BadInput if it cannot be loaded, or has positions for fewer than `length` tokens.
    """

    def read():
        weights = {"use_safetensors": True, "dtype": torch.float32}
        policy = loaded(AutoModelForCausalLM.from_pretrained, path, **weights).eval()
        policy = policy if distributed.world() > 1 else policy.to(device)
        require_positions(policy.config.get_text_config(), length, path)
        policy.logit_transform = measure_logits(policy)
        return policy

    policy = distributed.on_rank_0(read)
    found = policy is not None and (policy.logit_transform, policy.generation_config)
    found = distributed.from_rank_0(found)
    if policy is None:
        config = loaded(AutoConfig.from_pretrained, path)
        policy = without_memory(AutoModelForCausalLM.from_config, config)
    policy.logit_transform, policy.generation_config = found
    policy.compute_dtype = compute_dtype(dtype, device)
    return policy


def load_critic(path, device, mean_reward=0.0, dtype="auto"):
    """A critic from a policy, a reward model or a critic directory (its config.json says which).

    From a policy: its trunk with a zero head and bias = the mean reward, V at first.
    From a reward model (`AutoModelForSequenceClassification`, one label): trunk and head, bias 0.
    From a critic: as it is. Raises: BadInput if the model has another number of labels.
    """
    config = loaded(AutoConfig.from_pretrained, path)
    kind, is_scorer = (config.architectures or [""])[0], require_one_label(config, path)
    config.num_labels, config.classifier_dropout = 1, 0.0  # the class's own default is 0.1
    made_by = critic_class(config)

    def read():
        weights = {"use_safetensors": True, "dtype": torch.float32}
        critic = loaded(made_by.from_pretrained, path, config=config, **weights).eval()
        head = value_head(critic)
        with torch.no_grad():
            if not is_scorer:
                head.weight.zero_()
                head.bias.fill_(mean_reward)
            elif not kind.endswith("ForTokenClassification"):
                head.bias.zero_()
        return critic if distributed.world() > 1 else critic.to(device)

    critic = distributed.on_rank_0(read)
    if critic is None:
        critic = without_memory(getattr(made_by, "from_config", made_by._from_config), config)
    critic.compute_dtype = compute_dtype(dtype, device)
    return critic


def without_memory(make, config):
    """make(config) with shapes and no numbers: what a rank has before rank 0 gives it a share."""
    with torch.device("meta"):
        return make(config, dtype=torch.float32).eval()


def loaded(from_pretrained, path, **options):
    """`from_pretrained(path)` of a directory or hub name; BadInput in place of a traceback."""
    said = f"no model directory at {path}, and no name on the hub (OWNER/NAME)"
    require(Path(path).is_dir() or HUB_NAME.fullmatch(str(path)) is not None, said)
    transformers.logging.set_verbosity_error()  # no report that a new head is not in the file
    transformers.logging.disable_progress_bar()
    try:
        return from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        where = "" if Path(path).is_dir() else " (no such directory here; tried the hub)"
        brings_code = "trust_remote_code" in str(error)
        why = "it brings code of its own" if brings_code else str(error).strip().splitlines()[0]
        raise BadInput(f"cannot load {path}{where}: {why}") from None


def critic_class(config):
    """AutoModelForTokenClassification or, for an architecture without one, its trunk and a head.

    Gemma 3 and OLMo 2 are such. A critic of that kind loads again by `load_critic` only.
    """
    if type(config) in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        return AutoModelForTokenClassification
    said = f"transformers has no trunk for a model of type {config.model_type}"
    require(type(config) in MODEL_MAPPING, f"{said}: no critic can be made of it")
    trunk = MODEL_MAPPING[type(config)]
    family = next(base for base in trunk.__mro__ if PreTrainedModel in base.__bases__)
    name = family.__name__.removesuffix("PreTrainedModel") + "ForTokenClassification"
    said = f"the critic is {trunk.__name__} with a linear head"
    print(f"note: transformers has no {name}: {said}")
    prefix = {"base_model_prefix": family.base_model_prefix}
    return type(name, (GenericForTokenClassification, family), prefix)


def value_head(critic):
    """The critic's linear head [D → 1]: `score` in most classes, `classifier` in older ones."""
    return critic.score if hasattr(critic, "score") else critic.classifier


def require_positions(config, length, path):
    """Raises: BadInput if the model has fewer positions than `length`."""
    longest = getattr(config, "max_position_embeddings", None)
    said = f"lower --prompt_length + --response_length from {length}"
    fits = not longest or length <= longest
    require(fits, f"{path} has {longest} positions: {said}")


def require_same_words(policy, tokenizer, path):
    """Raises: BadInput if the tokenizer has words that the policy has no embedding for."""
    words = max(tokenizer.get_vocab().values()) + 1
    rows = policy.get_input_embeddings().num_embeddings
    said = f"the tokenizer in {path} has {words} words, its model {rows}: they are not of one kind"
    require(words <= rows, said)


def require_critic(path, tokenizer, length):
    """Raises: BadInput unless `load_critic` can make a critic for this tokenizer of `path`.

    Reads no weights.
    """
    config = loaded(AutoConfig.from_pretrained, path)
    require_one_label(config, path)
    critic_class(config)
    text = config.get_text_config()
    words, known = max(tokenizer.get_vocab().values()) + 1, getattr(text, "vocab_size", 0)
    said = f"{path} has {known} words, the policy's tokenizer {words}"
    require(words <= known, f"{said}: take a critic of the same family")
    require_positions(text, length, path)
    if (Path(path) / "tokenizer.json").is_file():
        same = load_tokenizer(path).get_vocab() == tokenizer.get_vocab()
        require(same, f"{path} has another tokenizer than the policy: its values are of other words")


def require_one_label(config, path):
    """Whether the config is a critic's or reward model's. Raises: BadInput if not of one label."""
    kind = (config.architectures or [""])[0]
    is_scorer = kind.endswith(("ForTokenClassification", "ForSequenceClassification"))
    said = f"{path} has {config.num_labels} labels: a critic or reward model has one"
    require(not is_scorer or config.num_labels == 1, said)
    return is_scorer


@torch.no_grad()
def measure_logits(policy):
    """What the model does to its logits: (scale, softcap) of z = c tanh(scale · (W h + b) / c).

    Some models scale (Cohere, Granite), some cap (Gemma 2). `logprobs.py` needs to know, and it is
    measured on a few tokens rather than read from names in configs.
    Raises: BadInput if the logits are something else still.
    """
    config = policy.config.get_text_config()
    token_BL = torch.arange(8, device=policy.device)[None] % config.vocab_size
    output = policy(input_ids=token_BL, output_hidden_states=True, use_cache=False)
    logit_N = output.logits.flatten().double()
    raw_N = policy.get_output_embeddings()(output.hidden_states[-1]).flatten().double()
    softcap = getattr(config, "final_logit_softcapping", None)
    uncapped_N = logit_N
    if softcap is not None:
        uncapped_N = softcap * torch.atanh((logit_N / softcap).clamp(-0.999999, 0.999999))
    scale = ((uncapped_N * raw_N).sum() / (raw_N * raw_N).sum().clamp(min=1e-30)).item()
    scale = round(scale, 4) if abs(scale - round(scale, 4)) < 1e-5 else scale
    ours_N = raw_N * scale
    if softcap is not None:
        ours_N = softcap * torch.tanh(ours_N / softcap)
    near = 1e-3 * logit_N.abs().max().item()
    same = torch.allclose(ours_N, logit_N, rtol=1e-3, atol=near)
    kind = type(policy).__name__
    require(same, f"{kind} computes its logits in a way that logprobs.py does not know")
    return scale, softcap


def compute_dtype(dtype, device):
    """torch.dtype for --dtype: auto is bfloat16 on CUDA, float32 elsewhere."""
    low_precision = dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda")
    return torch.bfloat16 if low_precision else torch.float32


def device_of(network):
    """Where it computes; with --cpu_offload its weights are elsewhere."""
    return getattr(network, "computes_on", network.device)


def autocast(network):
    """The network's compute dtype over its float32 weights."""
    enabled = network.compute_dtype == torch.bfloat16
    return torch.autocast(device_of(network).type, torch.bfloat16, enabled=enabled)


def shard(network, device, settings):
    """A loaded policy or critic ready to be trained: gradient checkpointing, if asked, and its
    weights shared out over the processes. Returns: the network."""
    checkpoint_gradients(network, getattr(settings, "gradient_checkpointing", False))
    is_critic = hasattr(network, "score") or hasattr(network, "classifier")
    head = value_head(network) if is_critic else None
    bfloat16 = network.compute_dtype == torch.bfloat16
    offload = getattr(settings, "cpu_offload", False)  # evaluate.py has neither flag
    return distributed.shard(network, device, bfloat16, offload, head)


def checkpoint_gradients(network, wanted):
    """Under --gradient_checkpointing: the layers run again in the backward pass.

    Raises: BadInput if the architecture cannot.
    """
    if wanted:
        layers = [p for p in network.modules() if isinstance(p, GradientCheckpointingLayer)]
        able = network.supports_gradient_checkpointing and layers
        said = "has no gradient checkpointing: leave --gradient_checkpointing out"
        require(bool(able), f"{type(network).__name__} {said}")
        enable = getattr(network, "activation_checkpointing_enable", None)  # the newer name
        (enable or network.gradient_checkpointing_enable)({"use_reentrant": False})
    return network


def sampling_copy(policy):
    """The policy, to sample from: itself; or a copy with bfloat16 weights, which would otherwise be
    cast for every token; of a policy that is sharded, a copy with all weights on every GPU."""
    if distributed.world() > 1:
        with torch.device(device_of(policy)):
            config = copy.deepcopy(policy.config)
            make = AutoModelForCausalLM.from_config
            sampler = make(config, dtype=policy.compute_dtype).eval()
        for name in ("generation_config", "logit_transform", "compute_dtype"):
            setattr(sampler, name, getattr(policy, name))
        update_sampler(sampler, policy)
        buffers = zip(sampler.named_buffers(), policy.named_buffers(), strict=True)
        for (_, copied), (_, buffer) in buffers:
            copied.copy_(buffer)
        return sampler.requires_grad_(False)
    if policy.compute_dtype == torch.float32:
        return policy
    sampler = copy.deepcopy(policy)
    for parameter in sampler.parameters():  # not the buffers: positions need float32
        parameter.requires_grad_(False).data = parameter.data.to(policy.compute_dtype)
    return sampler


def sampler_of(policy, settings):
    """What samples for --engine: the policy or its copy (`sampling_copy`), or vLLM."""
    if settings.engine == "vllm":
        from system.vllm_engine import engine

        return engine(settings, policy)
    sampler = sampling_copy(policy)
    if settings.compile_decode:  # its weights are updated in place: once is enough
        compile = partial(torch.compile, mode="reduce-overhead", dynamic=False)
        sampler.compiled = compile(sampler.forward)
    return sampler


@torch.no_grad()
def update_sampler(sampler, policy):
    """Gives what `sampler_of` made the policy's weights of now."""
    if hasattr(sampler, "llm"):  # vLLM
        sampler.update(policy)
    elif sampler is not policy:
        for copied, parameter in zip(sampler.parameters(), policy.parameters()):
            cast = parameter.to(copied.dtype)  # the smaller ones travel
            copied.copy_(distributed.unsharded(cast))


def eos_ids(policy, tokenizer):
    """All token ids that end an answer: the tokenizer's EOS, those of the model's generation
    config, and the special tokens that end a turn in the chat formats in use."""
    listed = policy.generation_config.eos_token_id
    listed = listed if isinstance(listed, (list, tuple)) else [listed]
    added = tokenizer.added_tokens_decoder.items()
    turns = [i for i, token in added if token.special and token.content in END_OF_TURN]
    return sorted({tokenizer.eos_token_id, *(i for i in listed if i is not None), *turns})


@contextmanager
def on_device(sampler, settings):
    """With --cpu_offload, the copy that samples has the device's memory only while it does."""
    is_network = isinstance(sampler, torch.nn.Module)  # vLLM keeps its own
    moves = getattr(settings, "cpu_offload", False) and distributed.world() > 1 and is_network
    if moves:
        sampler.to(pick_device(settings.device))
    yield
    if moves:
        sampler.to("cpu")


def fingerprint(policy, texts):
    """Tells one policy and list of texts from another: a hash of one number of every weight, and
    of the texts. The first numbers are rank 0's."""
    if distributed.rank():
        return distributed.from_rank_0(None)
    weights = (distributed.local(weight).detach() for weight in policy.parameters())
    firsts = torch.stack([weight.flatten()[0].float().cpu() for weight in weights])
    digest = hashlib.sha256(firsts.numpy().tobytes() + json.dumps(texts).encode()).hexdigest()
    return distributed.from_rank_0(digest[:16])
