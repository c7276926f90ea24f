"""The sampler's cache: keys and values of a fixed number of slots, which answers enter and leave, in columns that all share.

Shapes: R slots, K columns of the cache; H heads, D width of a head.
"""

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

STATIC_COLUMNS = 256  # the fewest that a compiled step looks at
FIRST_COLUMNS = 64  # of the cache, beyond the longest prompt; the table doubles as answers need it


def static_columns(longest):
    """Columns for a compiled step, for prompt and answer of `longest` tokens together: a power of two, a quarter of which is free
    when the longest has ended. That is enough to move rows left, so the table never doubles."""
    return max(STATIC_COLUMNS, 1 << (4 * longest // 3).bit_length())


class Slots(Cache):
    """Keys and values of R slots in K columns, written in place; the columns in use are 0 to `now`, which is next.

    A slot's tokens stand in columns start_R to now. When the columns run out, all rows move left to where the longest
    begins; when that is not enough, the table doubles. With `static` columns, as many as can ever be needed, for a compiled
    model: nothing of the table but its contents changes.
    """

    def __init__(self, read, slots, now, static=0):
        columns = static or now + FIRST_COLUMNS
        self.at_1 = torch.zeros(1, dtype=torch.long, device=read.layers[0].keys.device)
        super().__init__(layers=[SlotLayer(layer, slots, columns, self.at_1, static) for layer in read.layers])
        self.start_R, self.static = torch.full((slots,), now, device=self.at_1.device), static
        self.move_to(now)

    def move_to(self, now):
        self.now, self.width = now, now + 1
        if self.static:  # powers of two: each width is compiled, and there are few
            self.width = max(STATIC_COLUMNS, 1 << now.bit_length())
        self.at_1.fill_(now)
        for layer in self.layers:
            layer.now, layer.width = self.now, self.width

    def enter(self, enter_R, read, prompt_R, length_R):
        """Copies the first `length` tokens of prompts `prompt_R` of the cache `read` into the columns before `now`."""
        for layer, source in zip(self.layers, read.layers):
            width = source.keys.shape[2] - 1  # the last token of a prompt is the first that the row reads itself
            layer.keys[enter_R, :, self.now - width : self.now] = source.keys[prompt_R, :, :width]
            layer.values[enter_R, :, self.now - width : self.now] = source.values[prompt_R, :, :width]
        self.start_R[enter_R] = self.now - length_R

    def mask(self):
        """mask_RK: 1 on the columns that a slot may see, `now` included."""
        column_K = torch.arange(self.width, device=self.start_R.device)
        return ((column_K >= self.start_R[:, None]) & (column_K <= self.now)).long()

    def advance(self):
        self.move_to(self.now + 1)

    def make_room(self, alive_R, longest_prompt):
        """Sees to it that there is a column `now`, and that a prompt would fit before it."""
        columns = self.layers[0].keys.shape[2]
        if self.now < columns:
            return
        unused = min(int(self.start_R[alive_R].min()) if alive_R.any() else self.now, self.now - longest_prompt)
        if unused >= max(1, columns // 4):
            for layer in self.layers:
                layer.keys[:, :, :-unused] = layer.keys[:, :, unused:].clone()
                layer.values[:, :, :-unused] = layer.values[:, :, unused:].clone()
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


class SlotLayer(CacheLayerMixin):
    """One layer of `Slots`: keys and values [R, H, K, D]."""

    is_sliding = False  # the window is the mask's business; all columns are kept

    def __init__(self, like, slots, columns, at_1, static):
        super().__init__()
        self.keys, self.values = (x.new_zeros(slots, x.shape[1], columns, x.shape[3]) for x in (like.keys, like.values))
        self.at_1, self.static, self.is_initialized = at_1, static, True
        if static:  # a CUDA graph may write to them
            for tensor in (self.keys, self.values, at_1):
                torch._dynamo.mark_static_address(tensor)

    def update(self, key_RH1D, value_RH1D, *args, **kwargs):
        self.keys.index_copy_(2, self.at_1, key_RH1D)
        self.values.index_copy_(2, self.at_1, value_RH1D)
        return self.keys[:, :, : self.width], self.values[:, :, : self.width]

    def get_mask_sizes(self, query_length):
        return self.width, 0

    def get_seq_length(self):
        return self.at_1[0] if self.static else self.now

    def get_max_length(self):
        return -1

    def lazy_initialization(self, key_states, value_states):
        raise NotImplementedError("the columns are there from the start")
