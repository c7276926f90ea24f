"""Policy and critic: loading them, and what they say about rows of tokens.

The policy is any causal language model. The critic is a separate trunk with a linear head, `AutoModelForTokenClassification`
with one label: an ordinary Hugging Face directory, into which a reward model's head loads as it is.

Shapes: B rows; L prompt + response tokens, padded on the right; T response tokens; V vocabulary; D width.
Rows are right-padded and attention is causal, so a token never sees the padding after it: no attention mask, and no
mask is ever derived from a pad id. Both models stay in eval mode: dropout would move the ratio without an update.
"""

import contextlib
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

import logprobs
from run import BadInput, require


def load_tokenizer(path):
    """The model's tokenizer. Raises: BadInput if it cannot be read or has no EOS.

    A directory that says "the fast tokenizer in tokenizer.json, as it stands" is taken at its word: AutoTokenizer puts
    the model family's own in its place for some (any model of type qwen2), which splits texts otherwise, silently.
    """
    as_it_stands = loaded(get_tokenizer_config, path).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    tokenizer = loaded((PreTrainedTokenizerFast if as_it_stands else AutoTokenizer).from_pretrained, path)
    require(tokenizer.eos_token_id is not None, f"the tokenizer in {path} has no EOS token: set its eos_token, answers end with it")
    return tokenizer


def load_policy(path, device):
    """The causal LM in `path`, float32, eval mode, with `logit_treatment` measured (see `measure_logits`)."""
    policy = loaded(AutoModelForCausalLM.from_pretrained, path, dtype=torch.float32).to(device).eval()
    policy.logit_treatment = measure_logits(policy)
    return policy


def load_critic(path, device, mean_reward=0.0):
    """A critic from a policy, a reward model or a critic directory (its config.json says which).

    From a policy: its trunk with a zero head and bias = the mean reward, so V is that constant at first.
    From a reward model (`AutoModelForSequenceClassification`, one label): trunk and head, bias 0.
    From a critic: as it is. Raises: BadInput if the model has another number of labels or no such class exists.
    """
    config = loaded(AutoConfig.from_pretrained, path)
    kind = (config.architectures or [""])[0]
    is_scorer = kind.endswith(("ForTokenClassification", "ForSequenceClassification"))
    require(not is_scorer or config.num_labels == 1, f"{path} has {config.num_labels} labels: a critic or reward model has one")
    config.num_labels, config.classifier_dropout = 1, 0.0  # the class's own default is 0.1
    critic = loaded(AutoModelForTokenClassification.from_pretrained, path, config=config, dtype=torch.float32)
    head = value_head(critic)
    with torch.no_grad():
        if not is_scorer:
            head.weight.zero_()
            head.bias.fill_(mean_reward)
        elif not kind.endswith("ForTokenClassification"):
            head.bias.zero_()
    return critic.to(device).eval()


def value_head(critic):
    """The critic's linear head [D → 1]: `score` in most classes, `classifier` in a few older ones."""
    return critic.score if hasattr(critic, "score") else critic.classifier


def loaded(from_pretrained, path, **options):
    """`from_pretrained(path)` with BadInput in place of a page of traceback."""
    require(Path(path).is_dir(), f"no model directory at {path}")
    transformers.logging.set_verbosity_error()  # a new head is meant to be missing from the file: no report of it
    transformers.logging.disable_progress_bar()
    try:
        return from_pretrained(path, **options)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"cannot load {path}: {str(error).splitlines()[0]}") from None


def autocast(device):
    """bf16 arithmetic over float32 weights on CUDA; plain float32 on the CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


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
    hidden_BLD = trunk(input_ids=rows["token_BL"], use_cache=False).last_hidden_state
    width = int(rows["length_B"].max())
    position_BT = rows["prompt_length_B"][:, None] - 1 + shift + torch.arange(width, device=hidden_BLD.device)
    position_BT = position_BT.clamp(max=hidden_BLD.shape[1] - 1)
    return hidden_BLD.gather(1, position_BT[..., None].expand(-1, -1, hidden_BLD.shape[2]))


def policy_logprobs(policy, rows, temperature, kernel=logprobs.chunk_logprobs):
    """(logp_BT, entropy_BT) of the response tokens under the policy, float32."""
    with autocast(policy.device):
        hidden_BTD = response_hidden(policy.base_model, rows)
        head = policy.get_output_embeddings()
        return logprobs.token_logprobs(
            hidden_BTD, head.weight, response_tokens(rows), getattr(head, "bias", None), temperature,
            *policy.logit_treatment, kernel=kernel,
        )  # fmt: skip


def critic_values(critic, rows, shift=0):
    """value_BT: V of the state before each response token, float32 (`shift=1`: after it, where a reward model scores)."""
    with autocast(critic.device):
        hidden_BTD = response_hidden(critic.base_model, rows, shift)
    return value_head(critic)(hidden_BTD.float())[..., 0]


def response_tokens(rows):
    """token_BT: the response tokens of right-padded rows, moved to the left edge."""
    width = int(rows["length_B"].max())
    position_BT = rows["prompt_length_B"][:, None] + torch.arange(width, device=rows["token_BL"].device)
    return rows["token_BL"].gather(1, position_BT.clamp(max=rows["token_BL"].shape[1] - 1))
