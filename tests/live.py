"""The memory of tensors, counted: what several tests measure with."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors made under it: `now`, those alive, and `peak`, the most."""

    def __init__(self, known=()):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tensors = (leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor))
        for storage in map(torch.Tensor.untyped_storage, tensors):
            if storage not in self.seen:
                self.seen.add(storage)
                self.count(storage.nbytes())
                weakref.finalize(storage, self.count, -storage.nbytes())
        return made

    def count(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)
