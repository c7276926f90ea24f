"""Policy and critic: loading them, and what they say about rows of tokens.

The policy is any causal language model. The critic is a separate trunk with a linear head, `AutoModelForTokenClassification`
with one label: an ordinary Hugging Face directory, into which a reward model's head loads as it is. Weights are float32;
the arithmetic is bfloat16 where --dtype says so (by default on CUDA), and so is the copy of the policy that samples.

Shapes: B rows; L prompt + response tokens, padded on the right; T response tokens; V vocabulary; D width.
Rows are right-padded and attention is causal, so a token never sees the padding after it: no attention mask, and no
mask is ever derived from a pad id. Both models stay in eval mode: dropout would move the ratio without an update.
"""

import copy
import re
from contextlib import contextmanager
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
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, MODEL_MAPPING
from transformers.models.auto.tokenization_auto import get_tokenizer_config

import distributed
import logprobs
from distributed import gathers
from run import BadInput, require

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load_tokenizer(path, trust_remote_code=False):
    """The model's tokenizer. Raises: BadInput if it cannot be read or has no EOS.

    A directory that says "the fast tokenizer in tokenizer.json, as it stands" is taken at its word: AutoTokenizer puts
    the model family's own in its place for some (any model of type qwen2), which splits texts otherwise, silently.
    """
    as_it_stands = loaded(get_tokenizer_config, path).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    kind = PreTrainedTokenizerFast if as_it_stands else AutoTokenizer
    tokenizer = loaded(kind.from_pretrained, path, trust_remote_code=trust_remote_code)
    require(tokenizer.eos_token_id is not None, f"the tokenizer in {path} has no EOS token: set its eos_token, answers end with it")
    return tokenizer


def load_policy(path, device, dtype="auto", length=0, trust_remote_code=False):
    """The causal LM in `path`, float32 weights, eval mode, with `logit_treatment` measured (see `measure_logits`).

    Weights are read from safetensors only, which can hold no code; under torchrun by rank 0, from which `ready` deals them out.
    Raises: BadInput if it cannot be loaded, or has positions for fewer than `length` tokens of prompt and response.
    """

    def read():
        trust = {"use_safetensors": True, "trust_remote_code": trust_remote_code}
        policy = loaded(AutoModelForCausalLM.from_pretrained, path, dtype=torch.float32, **trust).eval()
        policy = policy if distributed.world() > 1 else policy.to(device)
        longest = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
        said = f"{path} has {longest} positions: lower --prompt_length + --response_length from {length}"
        require(not longest or length <= longest, said)
        policy.logit_treatment = measure_logits(policy)
        return policy

    policy = distributed.on_rank_0(read)
    found = distributed.from_rank_0(policy is not None and (policy.logit_treatment, policy.generation_config))
    if policy is None:
        config = loaded(AutoConfig.from_pretrained, path, trust_remote_code=trust_remote_code)
        policy = without_memory(AutoModelForCausalLM.from_config, config, trust_remote_code=trust_remote_code)
    policy.logit_treatment, policy.generation_config = found
    policy.arithmetic = arithmetic(dtype, device)
    return policy


def without_memory(make, config, **options):
    """make(config), float32, with shapes and no numbers: what a rank has of a model before rank 0 gives it a share of the weights."""
    with torch.device("meta"):
        return make(config, dtype=torch.float32, **options).eval()


def sampling_copy(policy):
    """The policy, to sample from: itself, or a copy with bfloat16 weights, which would otherwise be cast for every token.
    Of a policy whose weights are shared out over processes: a whole copy."""
    if distributed.world() > 1:
        with torch.device(device_of(policy)):
            config = copy.deepcopy(policy.config)
            sampler = AutoModelForCausalLM.from_config(config, dtype=policy.arithmetic, trust_remote_code=True).eval()  # it runs already
        sampler.generation_config, sampler.logit_treatment, sampler.arithmetic = (
            policy.generation_config,
            policy.logit_treatment,
            policy.arithmetic,
        )
        refresh(sampler, policy)
        for (_, copied), (_, buffer) in zip(sampler.named_buffers(), policy.named_buffers(), strict=True):
            copied.copy_(buffer)
        return sampler.requires_grad_(False)
    if policy.arithmetic == torch.float32:
        return policy
    sampler = copy.deepcopy(policy)
    for parameter in sampler.parameters():  # not the buffers: positions need float32
        parameter.requires_grad_(False).data = parameter.data.to(policy.arithmetic)
    return sampler


@contextmanager
def at_work(sampler, device, cpu_offload):
    """With --cpu_offload, the copy that samples takes the device's memory only while it does."""
    away = cpu_offload and distributed.world() > 1 and isinstance(sampler, torch.nn.Module)
    if away:
        sampler.to(device)
    yield
    if away:
        sampler.to("cpu")


@torch.no_grad()
def refresh(sampler, policy):
    """Gives a copy made by `sampling_copy` the policy's weights of now."""
    if sampler is not policy:
        for copied, parameter in zip(sampler.parameters(), policy.parameters()):
            copied.copy_(distributed.whole(parameter.to(copied.dtype)))  # the smaller ones travel


def checkpoint_gradients(network, wanted):
    """Under --gradient_checkpointing, has the layers of policy or critic made again in the backward pass.

    Raises: BadInput if the architecture cannot.
    """
    if wanted:
        able = network.supports_gradient_checkpointing and any(isinstance(part, GradientCheckpointingLayer) for part in network.modules())
        require(able, f"{type(network).__name__} has no gradient checkpointing: leave --gradient_checkpointing out")
        enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable  # the older name
        enable({"use_reentrant": False})
    return network


def ready(network, device, settings):
    """A loaded policy or critic (or None) ready to be trained: its layers' activations made again if asked, its weights shared out
    over the processes."""
    if network is None:
        return None
    checkpoint_gradients(network, settings.gradient_checkpointing)
    head = value_head(network) if hasattr(network, "score") or hasattr(network, "classifier") else None
    return distributed.shard(network, device, network.arithmetic == torch.bfloat16, settings.cpu_offload, head)


def require_same_words(policy, tokenizer, path):
    """Raises: BadInput if the tokenizer has words that the policy in `path` has no embedding for."""
    words, rows = max(tokenizer.get_vocab().values()) + 1, policy.get_input_embeddings().num_embeddings
    require(words <= rows, f"the tokenizer in {path} has {words} words, its model {rows}: they are not of one kind")


def require_critic(path, tokenizer, length, trust_remote_code=False):
    """Raises: BadInput unless `path` holds what `load_critic` can make a critic for this tokenizer of. Reads no weights."""
    config = loaded(AutoConfig.from_pretrained, path, trust_remote_code=trust_remote_code)
    require_one_label(config, path)
    critic_class(config)
    text = config.get_text_config()
    words, known = max(tokenizer.get_vocab().values()) + 1, getattr(text, "vocab_size", 0)
    longest = getattr(text, "max_position_embeddings", None)
    require(words <= known, f"{path} has {known} words, the policy's tokenizer {words}: take a critic of the same family")
    require(not longest or length <= longest, f"{path} has {longest} positions: lower --prompt_length + --response_length from {length}")
    if (Path(path) / "tokenizer.json").is_file():
        same = load_tokenizer(path, trust_remote_code).get_vocab() == tokenizer.get_vocab()
        require(same, f"{path} has another tokenizer than the policy: its values would be of other words")


def require_one_label(config, path):
    """Whether the config is of a critic or reward model. Raises: BadInput if it is, and has another number of labels than one."""
    kind = (config.architectures or [""])[0]
    is_scorer = kind.endswith(("ForTokenClassification", "ForSequenceClassification"))
    require(not is_scorer or config.num_labels == 1, f"{path} has {config.num_labels} labels: a critic or reward model has one")
    return is_scorer


def load_critic(path, device, mean_reward=0.0, dtype="auto", trust_remote_code=False):
    """A critic from a policy, a reward model or a critic directory (its config.json says which).

    From a policy: its trunk with a zero head and bias = the mean reward, so V is that constant at first.
    From a reward model (`AutoModelForSequenceClassification`, one label): trunk and head, bias 0.
    From a critic: as it is. Raises: BadInput if the model has another number of labels.
    """
    config = loaded(AutoConfig.from_pretrained, path, trust_remote_code=trust_remote_code)
    kind, is_scorer = (config.architectures or [""])[0], require_one_label(config, path)
    config.num_labels, config.classifier_dropout = 1, 0.0  # the class's own default is 0.1
    made_by = critic_class(config)

    def read():
        trust = {"use_safetensors": True, "trust_remote_code": trust_remote_code}
        critic = loaded(made_by.from_pretrained, path, config=config, dtype=torch.float32, **trust).eval()
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
        auto = {"trust_remote_code": trust_remote_code} if hasattr(made_by, "from_config") else {}
        critic = without_memory(getattr(made_by, "from_config", None) or made_by._from_config, config, **auto)
    critic.arithmetic = arithmetic(dtype, device)
    return critic


def critic_class(config):
    """AutoModelForTokenClassification or, for an architecture that has no such class, the same of its trunk and a linear head.

    Gemma 3 and OLMo 2 are such. A critic of that kind saves and loads as any other, but only by this function.
    """
    if type(config) in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        return AutoModelForTokenClassification
    require(
        type(config) in MODEL_MAPPING, f"transformers has no trunk for a model of type {config.model_type}: no critic can be made of it"
    )
    trunk = MODEL_MAPPING[type(config)]
    family = next(base for base in trunk.__mro__ if PreTrainedModel in base.__bases__)
    name = family.__name__.removesuffix("PreTrainedModel") + "ForTokenClassification"
    print(f"note: transformers has no {name}: the critic is {trunk.__name__} with a linear head")
    return type(name, (GenericForTokenClassification, family), {"base_model_prefix": family.base_model_prefix})


def value_head(critic):
    """The critic's linear head [D → 1]: `score` in most classes, `classifier` in a few older ones."""
    return critic.score if hasattr(critic, "score") else critic.classifier


def can_be_loaded(path):
    """Whether it is a directory, or may be a name on the hub."""
    return Path(path).is_dir() or HUB_NAME.fullmatch(str(path)) is not None


def loaded(from_pretrained, path, **options):
    """`from_pretrained(path)` of a directory or a name on the hub, with BadInput in place of a page of traceback."""
    require(can_be_loaded(path), f"no model directory at {path}, and no name on the hub (OWNER/NAME)")
    transformers.logging.set_verbosity_error()  # a new head is meant to be missing from the file: no report of it
    transformers.logging.disable_progress_bar()
    try:
        return from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        kind = "" if Path(path).is_dir() else " (no such directory here; tried as a name on the hub)"
        code = "; --trust_remote_code runs the code that it brings" if "trust_remote_code" in str(error) else ""
        raise BadInput(f"cannot load {path}{kind}: {str(error).strip().splitlines()[0]}{code}") from None


def arithmetic(dtype, device):
    """torch.dtype of the arithmetic for --dtype: auto is bfloat16 on CUDA, float32 elsewhere."""
    return torch.bfloat16 if dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda") else torch.float32


def device_of(network):
    """Where it computes; with --cpu_offload its weights are elsewhere."""
    return getattr(network, "computes_on", network.device)


def autocast(network):
    """The network's arithmetic over its float32 weights."""
    return torch.autocast(device_of(network).type, torch.bfloat16, enabled=network.arithmetic == torch.bfloat16)


@torch.no_grad()
def measure_logits(policy):
    """What the model does to its logits after the output matrix: (scale, softcap), z = c tanh(scale · (W h + b) / c).

    Some models scale (Cohere, Granite), some cap (Gemma 2). `logprobs.py` needs to know, and measures it on a few
    tokens rather than trusting names in configs. Raises: BadInput if the logits are something else still.
    """
    token_BL = torch.arange(8, device=policy.device)[None] % policy.config.get_text_config().vocab_size
    output = policy(input_ids=token_BL, output_hidden_states=True, use_cache=False)
    logit_N = output.logits.flatten().double()
    raw_N = policy.get_output_embeddings()(output.hidden_states[-1]).flatten().double()
    softcap = getattr(policy.config.get_text_config(), "final_logit_softcapping", None)
    uncapped_N = logit_N if softcap is None else softcap * torch.atanh((logit_N / softcap).clamp(-0.999999, 0.999999))
    scale = ((uncapped_N * raw_N).sum() / (raw_N * raw_N).sum().clamp(min=1e-30)).item()
    scale = round(scale, 4) if abs(scale - round(scale, 4)) < 1e-5 else scale
    ours_N = raw_N * scale if softcap is None else softcap * torch.tanh(raw_N * scale / softcap)
    if not torch.allclose(ours_N, logit_N, rtol=1e-3, atol=1e-3 * logit_N.abs().max().item()):
        raise BadInput(f"{type(policy).__name__} computes its logits in a way that logprobs.py does not know")
    return scale, softcap


def response_hidden(trunk, rows, shift=0):
    """Hidden states [B, T, D] at the position before each response token (`shift=1`: at the token itself).

    rows: token_BL, prompt_length_B and length_B, as `rollout.sample` returns them; T = the longest response here.
    Positions past a row's end repeat its last one; they are padding, and weightless.
    """
    layers = [layer for layer in trunk.modules() if getattr(layer, "gradient_checkpointing", False) and torch.is_grad_enabled()]
    for layer in layers:  # transformers makes a layer again only in train mode, which nothing inside it gets: no dropout
        layer.training = True
    hidden_BLD = trunk(input_ids=rows["token_BL"], use_cache=False).last_hidden_state
    for layer in layers:
        layer.training = False
    width = int(rows["length_B"].max())
    position_BT = rows["prompt_length_B"][:, None] - 1 + shift + torch.arange(width, device=hidden_BLD.device)
    position_BT = position_BT.clamp(max=hidden_BLD.shape[1] - 1)
    return hidden_BLD.gather(1, position_BT[..., None].expand(-1, -1, hidden_BLD.shape[2]))


@gathers
def policy_logprobs(policy, rows, temperature, kernels=(logprobs.add_slice, logprobs.slice_gradient)):
    """(logp_BT, entropy_BT) of the response tokens under the policy, float32, 0 on padding."""
    with autocast(policy):
        hidden_BTD = response_hidden(policy.base_model, rows)
        head = policy.get_output_embeddings()
        on_BT = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device) < rows["length_B"][:, None]
        of_tokens = logprobs.token_logprobs(  # of no padding: the output matrix is most of a small model's work
            hidden_BTD[on_BT], head.weight, response_tokens(rows)[on_BT], getattr(head, "bias", None), temperature,
            *policy.logit_treatment, kernels=kernels,
        )  # fmt: skip
    return tuple(torch.zeros(on_BT.shape, device=on_BT.device).masked_scatter(on_BT, column_N) for column_N in of_tokens)


@gathers
def critic_values(critic, rows, shift=0):
    """value_BT: V of the state before each response token, float32 (`shift=1`: after it, where a reward model scores)."""
    with autocast(critic):
        hidden_BTD = response_hidden(critic.base_model, rows, shift)
    value_N1 = value_head(critic)(hidden_BTD.float().flatten(0, 1))
    return value_N1.view(hidden_BTD.shape[:2]).clone()  # no view: FSDP hangs its hooks on what is returned, here and by the head


def response_tokens(rows):
    """token_BT: the response tokens of right-padded rows, moved to the left edge."""
    width = int(rows["length_B"].max())
    position_BT = rows["prompt_length_B"][:, None] + torch.arange(width, device=rows["token_BL"].device)
    return rows["token_BL"].gather(1, position_BT.clamp(max=rows["token_BL"].shape[1] - 1))
