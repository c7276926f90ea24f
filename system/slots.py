"""The sampler: a fixed number of slots, which answers enter and leave.

Prompts are read once and their cache copied for the samples; an answer that ends leaves its slot to
one that waits, so short answers never wait for long ones. All slots write at one common column of
the cache, `now`; a row that enters finds its prompt just before. Its tokens stand side by side, as
with left padding: one copy serves all rows, and the model's masks, sliding windows too, are right.

Shapes: P prompts with G samples each, B = P·G rows; R slots, K columns of the cache; H heads, D
width of a head; L prompt tokens, T response tokens, V vocabulary.
"""

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache, TopPLogitsWarper, __version__
from transformers.cache_utils import DynamicLayer

from system.loading import autocast
from system.run import require

FIRST_COLUMNS = 64  # of the cache, beyond the longest prompt; the table doubles as answers need it
COMPACT_BELOW = 0.75  # with no answer waiting, slots are given up when fewer than this are in use
CACHED = 2**20  # numbers that `draw` works on at a time on a CPU
BLOCK = 128  # words that `draw` counts together
# What transformers calls its cache.
CACHE = "cache" if tuple(map(int, __version__.split(".")[:2])) >= (5, 24) else "past_key_values"
STEPS_UNSEEN = {"cpu": 1, "cuda": 8}  # tokens until the host looks at what has ended


def sample_in_slots(
    policy, prompts, samples, max_tokens, temperature, top_p, generator, eos_N, slots, bar
):
    """`samples` answers to each prompt (token ids), each token as `draw` has it.
    Args: eos_N, what ends an answer; slots, answers side by side; bar, a tqdm bar.
    Returns: (token_BT, logp_BT, length_B, stop_B), columns past an answer's end undefined."""
    device, answers = policy.device, len(prompts) * samples
    slots = min(slots, answers)
    # One row more than there are answers: what slots without an answer write goes there.
    logp_BT = torch.zeros(answers + 1, max_tokens, device=device)
    token_BT, length_B, stop_B = logp_BT.long(), logp_BT[:, 0].long(), logp_BT[:, 0].bool()
    row_R = torch.full((slots,), answers, device=device)  # which answer a slot writes
    last_R, position_R = torch.zeros(2, slots, dtype=torch.long, device=device)  # of its last token
    longest_prompt = max(map(len, prompts))
    cache, entered, read_from, read_to = None, 0, 0, 0
    while True:
        free_R = (row_R == answers).nonzero()[:, 0]
        while entered < answers and len(free_R):
            if entered == read_to * samples:  # the next prompts, as many as could fill all slots
                read_from, read_to = read_to, min(len(prompts), read_to + max(1, slots // samples))
                read, prompt_PL, prompt_length_P = read_prompts(policy, prompts[read_from:read_to])
                cache = cache or Slots(read, slots, longest_prompt - 1)
            count = min(len(free_R), read_to * samples - entered)
            enter_R, free_R = free_R[:count], free_R[count:]
            row_R[enter_R] = torch.arange(entered, entered + count, device=device)
            prompt_R = row_R[enter_R] // samples - read_from
            last_R[enter_R] = prompt_PL[prompt_R, -1]
            position_R[enter_R] = prompt_length_P[prompt_R] - 1
            cache.enter(enter_R, read, prompt_R, prompt_length_P[prompt_R] - 1)
            entered += count
        for _ in range(STEPS_UNSEEN[device.type]):
            cache.make_room(row_R < answers, longest_prompt)
            with autocast(policy):
                logit_RV = policy(
                    input_ids=last_R[:, None], attention_mask=cache.mask(),
                    position_ids=position_R[:, None], use_cache=True, **{CACHE: cache},
                ).logits[:, -1]  # fmt: skip
            cache.move_to(cache.now + 1)
            last_R, logp_R = draw(logit_RV, generator, temperature, top_p)
            t_R = length_B[row_R].clamp(max=max_tokens - 1)
            token_BT[row_R, t_R], logp_BT[row_R, t_R] = last_R, logp_R
            length_B[row_R] = t_R + 1
            stop_B[row_R] = torch.isin(last_R, eos_N)
            row_R = torch.where(stop_B[row_R] | (t_R + 1 == max_tokens), answers, row_R)
            position_R = position_R + (row_R < answers)  # there may be no next position
            length_B[answers] = 0
        alive = int((row_R < answers).sum())
        bar.update(entered - alive - bar.n)
        if alive == 0 and entered == answers:
            return token_BT[:-1], logp_BT[:-1], length_B[:-1], stop_B[:-1]
        if entered == answers and alive < COMPACT_BELOW * len(row_R):
            keep = (row_R < answers).nonzero()[:, 0]
            row_R, last_R, position_R = row_R[keep], last_R[keep], position_R[keep]
            cache.keep(keep)


def read_prompts(policy, prompts):
    """(cache, prompt_PL, prompt_length_P): the prompts, read by the policy's trunk."""
    prompt_PL, length_P = left_padded(prompts, policy.device)
    width = prompt_PL.shape[1]
    mask_PL = torch.arange(width, device=policy.device) >= width - length_P[:, None]
    position_PL = (mask_PL.cumsum(dim=1) - 1).clamp(min=0)
    read = DynamicCache()
    how = {"position_ids": position_PL, CACHE: read, "use_cache": True}
    with autocast(policy):
        policy.base_model(input_ids=prompt_PL, attention_mask=mask_PL.long(), **how)
    said = f"{type(policy).__name__} keeps more than keys and values: sample with --engine hf"
    require(all(type(layer) is DynamicLayer for layer in read.layers), said)
    return read, prompt_PL, length_P


def left_padded(prompts, device):
    """(prompt_PL, prompt_length_P): all end in the last column; the padding's id is masked."""
    prompt_PL = pad_sequence(list(map(torch.tensor, prompts)), True, padding_side="left")
    length_P = torch.tensor(list(map(len, prompts)), device=device)
    return prompt_PL.to(device), length_P


def draw(logit_RV, generator, temperature=1.0, top_p=1.0):
    """One token a row, and its log-prob at that temperature and top-p; 0: the most likely one.
    The smallest token a with Σ_{v ≤ a} π_v > u,  u uniform in [0, 1): the inverse of the
    distribution function, first over blocks of words, then within one. (`torch.multinomial` draws
    a number for every word: 5 to 10 times slower at 50,000.) Returns: (token_R, logp_R)."""
    uniform_R = torch.zeros(len(logit_RV), dtype=torch.float64, device=logit_RV.device)
    if temperature > 0:
        uniform_R.uniform_(generator=generator)

    def some(logit_RV, uniform_R):
        logit_RV = logit_RV.float() if temperature in (0, 1) else logit_RV.float() / temperature
        if top_p < 1:
            logit_RV = TopPLogitsWarper(top_p)(None, logit_RV)
        if temperature == 0:
            return torch.log_softmax(logit_RV, dim=-1).max(dim=-1)[::-1]
        return inverse_distribution(logit_RV, uniform_R)

    # On a CPU a few rows at a time: what fits into its cache is three times as fast.
    parts = max(1, logit_RV.numel() // CACHED) if logit_RV.device.type == "cpu" else 1
    pairs = zip(logit_RV.tensor_split(parts), uniform_R.tensor_split(parts))
    return tuple(torch.cat(column_R) for column_R in zip(*[some(*pair) for pair in pairs]))


def inverse_distribution(logit_RV, uniform_R):
    """(token_R, logp_R): see `draw`; uniform_R float64."""
    # In place where it can be: new memory costs more than exp.
    weight_RV = (logit_RV - logit_RV.amax(dim=-1, keepdim=True)).exp_()
    if missing := -weight_RV.shape[1] % BLOCK:
        weight_RV = torch.nn.functional.pad(weight_RV, (0, missing))
    weight_RNB = weight_RV.unflatten(1, (-1, BLOCK))
    block_RN = weight_RNB.sum(dim=-1).double()
    until_RN = block_RN.cumsum(dim=-1)
    at_R1 = uniform_R[:, None] * until_RN[:, -1:]
    chosen_R1 = torch.searchsorted(until_RN, at_R1, right=True).clamp(max=block_RN.shape[1] - 1)
    # Within the block. Sums round, so the share is kept below 1: no word of weight 0 is taken.
    left_R1 = (until_RN.gather(1, chosen_R1) - at_R1) / block_RN.gather(1, chosen_R1)
    share_R1 = (1 - left_R1).clamp(0, 1 - 1e-12)
    chosen_R1B = chosen_R1[..., None].expand(-1, -1, BLOCK)
    inner_RB = weight_RNB.gather(1, chosen_R1B)[:, 0].double().cumsum(dim=-1)
    inner_R1 = torch.searchsorted(inner_RB, share_R1 * inner_RB[:, -1:], right=True)
    token_R1 = chosen_R1 * BLOCK + inner_R1
    logp_R1 = weight_RV.gather(1, token_R1).double().log() - until_RN[:, -1:].log()
    return token_R1[:, 0], logp_R1[:, 0].float()


class Slots(Cache):
    """Keys and values of R slots in K columns, written in place; column `now` is the next.
    A slot's tokens stand in columns start_R to now. When the columns run out, all rows move left to
    where the longest begins; when that is not enough, the table doubles."""

    def __init__(self, read, slots, now):
        how = (slots, now + FIRST_COLUMNS)
        super().__init__(layers=[SlotLayer(layer, *how) for layer in read.layers])
        self.start_R = torch.full((slots,), now, device=read.layers[0].keys.device)
        self.move_to(now)

    @property
    def is_compileable(self):
        """On a GPU: then transformers does not look, at every token, whether a mask is needed."""
        return self.start_R.is_cuda

    def move_to(self, now):
        for part in (self, *self.layers):
            part.now = now

    def enter(self, enter_R, read, prompt_R, length_R):
        """Copies `length` tokens of prompts `prompt_R` of the cache `read` to before `now`."""
        for layer, source in zip(self.layers, read.layers):
            width = source.keys.shape[2] - 1  # a row reads the last token of its prompt itself
            columns = slice(self.now - width, self.now)
            layer.keys[enter_R, :, columns] = source.keys[prompt_R, :, :width]
            layer.values[enter_R, :, columns] = source.values[prompt_R, :, :width]
        self.start_R[enter_R] = self.now - length_R

    def mask(self):
        """mask_RK: 1 on the columns that a slot may see, `now` included."""
        column_K = torch.arange(self.now + 1, device=self.start_R.device)
        return (column_K >= self.start_R[:, None]).long()

    def make_room(self, alive_R, longest_prompt):
        """Sees to it that there is a column `now`, and that a prompt would fit before it."""
        columns = self.layers[0].keys.shape[2]
        if self.now < columns:
            return
        first = int(self.start_R[alive_R].min()) if alive_R.any() else self.now
        unused = min(first, self.now - longest_prompt)
        if unused >= max(1, columns // 4):
            for layer in self.layers:
                for table in (layer.keys, layer.values):
                    table[:, :, :-unused] = table[:, :, unused:].clone()
            self.start_R = (self.start_R - unused).clamp(min=0)
            self.move_to(self.now - unused)
        else:
            for layer in self.layers:
                layer.keys = torch.cat([layer.keys, torch.zeros_like(layer.keys)], dim=2)
                layer.values = torch.cat([layer.values, torch.zeros_like(layer.values)], dim=2)

    def keep(self, keep_R):
        """Gives up all other slots."""
        self.start_R = self.start_R[keep_R]
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[keep_R], layer.values[keep_R]


class SlotLayer(DynamicLayer):
    """A layer of `Slots`: keys and values [R, H, K, D]. Sliding windows are the mask's business."""

    def __init__(self, like, slots, columns):
        super().__init__()
        both = (like.keys, like.values)
        self.keys, self.values = (x.new_zeros(slots, x.size(1), columns, x.size(3)) for x in both)
        self.is_initialized = True

    def update(self, key_RH1D, value_RH1D, *args, **kwargs):
        both = ((self.keys, key_RH1D), (self.values, value_RH1D))
        for table, new in both:
            table[:, :, self.now] = new[:, :, 0]
        return tuple(table[:, :, : self.now + 1] for table, _ in both)

    def get_mask_sizes(self, query_length):
        return self.now + 1, 0

    def get_seq_length(self):
        return self.now
