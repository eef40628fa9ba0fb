"""Fewer rows per forward pass when a device's memory runs out, instead of the end of the run."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

SAVE_MEMORY = (
    "set config.training.gradient_checkpointing=True or config.model.no_flow=True, lower "
    "config.sampling.batch_size, or see `nablagfn plan`"
)


@dataclass(frozen=True)
class Fitted(Generic[T]):
    """What `attempt` returned, and the rows per forward pass that it fitted with."""

    value: T
    rows: int


def fit(attempt: Callable[[int], T], rows: int, say: Callable[[str], None]) -> Fitted[T]:
    """`attempt(rows)`, repeated from its start with half the rows while memory runs out.

    `attempt` must leave nothing behind that a repetition would count twice, and must not talk to
    other processes: each backs off on its own. Raises torch.OutOfMemoryError when one row is too
    many.
    """
    while True:
        try:
            return Fitted(attempt(rows), rows)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        # outside of `except`, whose traceback keeps the tensors of the failed attempt alive
        rows = rows // 2
        release()
        say(f"out of memory: going on with config.training.micro_batch={rows}, same results")


def release() -> None:
    """Give unused memory back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
