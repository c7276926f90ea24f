"""Sampling with vLLM (--engine vllm), in this process, for large models.

Its log-probs are not quite the training's: the difference is logged (`sampler_gap`), and --is_clip
corrects the policy loss for it (losses.importance_weight). It has weights of its own, handed over
after every update, when the prompts that it has read with the old ones are forgotten.

Under torchrun every rank has an engine; --tensor_parallel N neighbours, on one machine, hold one
copy of the weights between them and sample as one: each is given the prompts of all N, draws the
same tokens, and keeps its part of the answers. vLLM cannot share a device with another of its kind.
"""

import os
import random
from contextlib import contextmanager

import numpy as np
import torch

from system import distributed, lora
from system.run import BadInput, require

ENGINES = {}  # by what it was loaded for
# Its worker in this process, so that weights are handed over as they are; errors only; a CPU cache.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
               "VLLM_CPU_KVCACHE_SPACE": "2"}  # fmt: skip


def engine(settings, policy):
    """The process's engine for this model, with the policy's weights of now. Raises: BadInput."""
    length = settings.prompt_length + settings.response_length
    key = (settings.model, length, policy.compute_dtype, settings.sample_rows)
    others = ", ".join(model for model, *_ in ENGINES.keys() - {key})
    require(not others, f"--engine vllm: this process samples from {others}, and cannot from two")
    if key not in ENGINES:
        ENGINES[key] = Engine(settings, policy, length)
    ENGINES[key].update(policy)
    return ENGINES[key]


@contextmanager
def random_numbers_of_its_own(device, seed=None):
    """vLLM seeds and uses Python's, torch's and numpy's generators; they come back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if seed is not None:
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
        yield
    random.setstate(python)
    np.random.set_state(numpy)


class Engine:
    """vLLM with a policy's weights; `rollout.sample` calls `answers`."""

    def __init__(self, settings, policy, length):
        said = "--engine vllm takes weights of three dimensions (experts) wrongly: leave it out"
        require(all(parameter.dim() < 3 for parameter in policy.parameters()), said)
        os.environ.update(ENVIRONMENT | os.environ)  # before the import
        self.device, self.generation_config = policy.device, policy.generation_config
        self.tensor_parallel = settings.tensor_parallel
        backend = "external_launcher" if distributed.world() > 1 else None
        try:
            import vllm

            with random_numbers_of_its_own(self.device):
                self.llm = vllm.LLM(
                    settings.model, dtype=str(policy.compute_dtype).removeprefix("torch."),
                    max_num_seqs=settings.sample_rows, max_model_len=length, seed=settings.seed,
                    gpu_memory_utilization=settings.vllm_memory, generation_config="vllm",
                    enforce_eager=self.device.type == "cpu", logprobs_mode="processed_logprobs",
                    tensor_parallel_size=settings.tensor_parallel, disable_log_stats=True,
                    distributed_executor_backend=backend, skip_tokenizer_init=True,
                    disable_custom_all_reduce=True,  # cannot share expandable segments (loading.py)
                )  # fmt: skip
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            by_pydantic = hasattr(error, "errors")
            said = error.errors()[0]["msg"] if by_pydantic else str(error).strip().splitlines()[-1]
            raise BadInput(f"--engine vllm cannot load {settings.model}: {said}") from None
        self.params = vllm.SamplingParams

    def update(self, policy):
        """Hands over the policy's weights, and throws away the prompts read with others."""
        buffers, dtype = dict(policy.named_buffers()), policy.compute_dtype
        cast = ((n, w if n in buffers else w.to(dtype)) for n, w in lora.merged(policy))
        whole = ((name, distributed.unsharded(weight)) for name, weight in cast)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": whole})
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache, read with the weights before")

    def answers(self, prompts, samples, max_tokens, temperature, top_p, generator, eos_N, bar):
        """As `slots.sample_in_slots`, the log-probs those after temperature and top-p. Of ranks
        that sample as one, each gives all their prompts and gets its part of the answers."""
        how = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": 0}
        how |= {"logprobs": 0, "flat_logprobs": True, "detokenize": False}
        params = self.params(n=samples, stop_token_ids=eos_N.tolist(), **how)
        seed = int(torch.randint(2**62, (1,), generator=generator, device=self.device))
        with random_numbers_of_its_own(self.device, seed):
            asked = [{"prompt_token_ids": prompt} for prompt in prompts]
            outputs = self.llm.generate(asked, params, use_tqdm=not bar.disable) if asked else []
        answers = [a for one in outputs for a in sorted(one.outputs, key=lambda a: a.index)]
        if len(answers) != len(prompts) * samples:
            raise RuntimeError(f"vLLM returned {len(answers)} of {len(prompts) * samples} answers")
        together = self.tensor_parallel
        group, number = divmod(distributed.rank(), together)
        drawn = distributed.all_ranks(hash(tuple(tuple(answer.token_ids) for answer in answers)))
        if len(set(drawn[group * together : (group + 1) * together])) > 1:
            raise RuntimeError(f"vLLM drew other tokens on the {together} ranks of one copy")
        answers = distributed.part(answers, number, together)
        token_BT = torch.zeros(len(answers), max_tokens, dtype=torch.long)
        logp_BT = torch.zeros(len(answers), max_tokens)
        length_B = torch.tensor([len(answer.token_ids) for answer in answers], dtype=torch.long)
        for token_T, logp_T, length, answer in zip(token_BT, logp_BT, length_B, answers):
            token_T[:length] = torch.tensor(answer.token_ids)
            logp_T[:length] = torch.tensor(answer.logprobs.logprobs)
        stop_B = torch.tensor([a.finish_reason == "stop" for a in answers], dtype=torch.bool)
        bar.update(len(answers))
        return tuple(column.to(self.device) for column in (token_BT, logp_BT, length_B, stop_B))
