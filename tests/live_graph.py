"""How much an autograd graph holds on to, in bytes: counted, so the same on every machine."""

from __future__ import annotations

import weakref
from collections import Counter

import torch
from torch import Tensor, nn


class _Saved:
    """A saved tensor, alive as long as the graph holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class LiveGraph:
    """Inside it, `now` are the bytes that graphs hold beside parameters, and `peak` their most.

    A storage that is saved several times counts once.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._held: Counter[int] = Counter()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda box: box.tensor)

    def _pack(self, tensor: Tensor) -> _Saved:
        box = _Saved(tensor)
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            place, size = storage.data_ptr(), storage.nbytes()
            self._held[place] += 1
            self.now += size if self._held[place] == 1 else 0
            self.peak = max(self.peak, self.now)
            weakref.finalize(box, self._drop, place, size)
        return box

    def _drop(self, place: int, size: int) -> None:
        self._held[place] -= 1
        self.now -= size if self._held[place] == 0 else 0

    def __enter__(self) -> LiveGraph:
        self._hooks.__enter__()
        return self

    def __exit__(self, *arguments: object) -> None:
        self._hooks.__exit__(*arguments)
