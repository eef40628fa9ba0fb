"""What a part of an update costs in memory and arithmetic, counted without computing.

Parts are run on PyTorch's meta device: shapes and dtypes are true, nothing is stored or computed,
so that Stable Diffusion is counted in seconds on any machine. The same tracker works on real
tensors, where it says what was really alive.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

COLLECT_EVERY = 200  # operations; updates of the tests are predicted above the truth with it


class Tracker(TorchDispatchMode):
    """Inside it, `live` and `peak` count the bytes of all storages that torch makes.

    known: tensors that are there already and are not counted, nor their views. collect_every:
    operations between two garbage collections, 0 for Python's own times.
    """

    def __init__(self, known: Iterable[Tensor] = (), *, collect_every: int = 0) -> None:
        super().__init__()
        self.live = self.peak = self._operations = 0
        self._collect_every = collect_every
        self._seen: dict[int, Any] = {}
        for tensor in known:
            self._add(tensor, count=False)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._operations += 1
        if self._collect_every and self._operations % self._collect_every == 0:
            gc.collect()
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    def _add(self, tensor: Tensor, *, count: bool = True) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if count else 0
        if key in self._seen:
            return
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone(_: object) -> None:
            self.live -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)


@dataclass(frozen=True)
class Cost:
    """What a forward and a backward pass over some rows cost.

    held: bytes kept between the two. peak: bytes at most while both run. forward, backward: FLOPs
    (a multiplication and an addition are two).
    """

    held: float
    peak: float
    forward: float
    backward: float

    @property
    def passing(self) -> float:
        """The bytes that come and go beside what is held."""
        return self.peak - self.held


def cost(run: Callable[[], Tensor], known: Iterable[Tensor], *, gradient: bool = True) -> Cost:
    """Count what `run()` costs; its result is differentiated if `gradient`.

    known: weights and inputs.
    """
    tracker = Tracker(known, collect_every=COLLECT_EVERY)
    with (
        collected_by_count(),
        _memory_saving_attention(),
        torch.set_grad_enabled(gradient),
        FlopCounterMode(display=False) as counter,
        tracker,
    ):
        out = run()
        held, forward = tracker.live, counter.get_total_flops()
        if gradient:
            out.backward(torch.ones_like(out))
        backward = counter.get_total_flops() - forward
    return Cost(held, tracker.peak, forward, backward)


def per_row(run: Callable[[int], Cost]) -> Cost:
    """What one row adds: the cost of two rows less that of one.

    The peak is at least what is held: where gradients of weights are the larger part, it is theirs,
    which no row adds to.
    """
    one, two = run(1), run(2)
    held = two.held - one.held
    return Cost(
        held,
        max(held, two.peak - one.peak),
        two.forward - one.forward,
        two.backward - one.backward,
    )


@contextlib.contextmanager
def collected_by_count() -> Iterator[None]:
    """Recomputed blocks leave reference cycles that hold tensors. Python would collect them when it
    comes by; inside this only the tracker does, so that a count is the same every time. Around
    several counts it saves each of them a look at all that is there."""
    was = gc.isenabled()
    gc.collect()
    if gc.get_freeze_count() and not was:  # inside another
        yield
        return
    gc.disable()
    gc.freeze()  # what is there already need not be looked at
    try:
        yield
    finally:
        gc.unfreeze()
        if was:
            gc.enable()


@contextlib.contextmanager
def _memory_saving_attention() -> Iterator[None]:
    """On the meta device PyTorch would take the attention that stores all products. GPUs and CPUs
    have kernels that keep the inputs, the output and a number per query; this counts like them."""
    plain = F.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.device.type != "meta" or attn_mask is not None:
            return plain(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        return kernel(query, key, value, dropout_p, is_causal)[0]

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """All their parameters and buffers."""
    return [t for module in modules for t in (*module.parameters(), *module.buffers())]


def size_of(tensors: Iterable[Tensor]) -> int:
    """Count the bytes of all these tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)
