"""Seconds of one row in each part: timed on this machine, or from a rate that is given."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ...config import Config, ConfigError
from ...runtime.distributed import weight_dtype
from .parts import Runnable, build_subject
from .plan import RunPlan
from .work import Price

ROWS = 40  # at most, of a pass that is timed
REPEATS, BUDGET = 3, 2.0  # of each part; seconds after which it is not repeated
PATIENCE = 120.0  # seconds; what would take longer at this machine's best rate is not timed

Clock = Callable[[], float]


@dataclass(frozen=True)
class Seconds:
    """What one row takes forward and back, in seconds."""

    forward: float
    backward: float


def parse_rate(text: str) -> float:
    """'150' (TFLOP/s) -> FLOP/s. Raises ConfigError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:TFLOP/s)?\s*", text, flags=re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"--rate={text}: give TFLOP/s, a number above 0: --rate=60")
    return float(found[1]) * 1e12


def at_rate(flops: Mapping[str, Price], rate: float) -> dict[str, Seconds]:
    """Every part at `rate` FLOP/s."""
    return {part: Seconds(p.forward / rate, p.backward / rate) for part, p in flops.items()}


def matmul_rate(where: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """FLOP/s of square matrix products, the best of many: what this machine can do at most."""
    size = 8192 if where.type == "cuda" else 1024
    a = torch.randn(size, size, device=where).to(dtype)  # of ones, a GPU is faster
    best, until = 0.0, time.perf_counter() + seconds
    while not best or time.perf_counter() < until:
        synchronise(where)
        started = time.perf_counter()
        a @ a
        synchronise(where)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def synchronise(where: torch.device) -> None:
    """Wait until the device has done its work."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def too_long(found: RunPlan, rate: float) -> bool:
    """Whether timing the parts on a device of this rate would try anyone's patience."""
    once = at_rate(found.prices, rate).values()
    rows = max(_rows(found).values())
    return REPEATS * rows * sum(s.forward + s.backward for s in once) > PATIENCE


def _rows(found: RunPlan) -> dict[str, int]:
    """Return how many rows the run takes at a time: what a row costs depends on it."""
    s = found.setting
    if s is None:
        return dict.fromkeys(found.prices, 1)
    decoded = s.vae_slice or s.micro_batch
    rows = {"drawing": s.sampling_batch, "decoder": decoded, "reward": decoded}
    return {part: min(rows.get(part, s.micro_batch), ROWS) for part in found.prices}


def timed(
    config: Config, device: torch.device, found: RunPlan, clock: Clock = time.perf_counter
) -> dict[str, Seconds]:
    """Each part run on this device with random weights, some rows at a time, at its best.

    Raises torch.OutOfMemoryError where there is no room for it, and ConfigError like `measure`.
    """
    rows, setting = _rows(found), found.setting
    checkpointing = setting is not None and setting.gradient_checkpointing

    def of(part: str, make: Callable[[int, bool], Runnable], gradient: bool = True) -> Seconds:
        with torch.set_grad_enabled(gradient):
            best = _best(make(rows[part], gradient), device, clock)
        return Seconds(best.forward / rows[part], best.backward / rows[part])

    with torch.random.fork_rng(), device:
        subject = build_subject(config, weight_dtype(config, device), device)
        with subject.checkpointing(checkpointing):
            unet = of("U-Net", subject.eps)
        return {
            "drawing": of("drawing", subject.eps, gradient=False),
            "U-Net": unet,
            "decoder": of("decoder", subject.decode),
            "reward": of("reward", subject.score),
            "flow network": Seconds(0, 0)
            if subject.flow is None
            else of("flow network", subject.guess),
        }


def _best(made: Runnable, device: torch.device, clock: Clock) -> Seconds:
    """The least of some repetitions; the first of which is a warm-up, unless it is the only one."""
    found: list[Seconds] = []
    until = time.perf_counter() + BUDGET
    while len(found) < REPEATS and (not found or time.perf_counter() < until):
        marks = [_now(device, clock)]
        out = made.run()
        marks.append(_now(device, clock))
        if made.gradient:
            out.backward(torch.ones_like(out))
        marks.append(_now(device, clock))
        made.clear()
        found.append(Seconds(marks[1] - marks[0], marks[2] - marks[1]))
    return Seconds(min(s.forward for s in found), min(s.backward for s in found))


def _now(device: torch.device, clock: Clock) -> float:
    synchronise(device)
    return clock()
