"""Reward gradients: seconds and memory by resolution, through the decoder and through the guess.

For one picture: β∇r(decode(z)) with respect to the latent z, and ∇_x r(decode(x̂(x))), which passes
the U-Net too. SD1.5's U-Net and decoder, and each of the original rewards at full width, random
weights.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from one_update import memory as peak
from torch import Tensor

from nablagfn.core.log_reward import LogReward, terminal_gradient
from nablagfn.core.lookahead import guess
from nablagfn.training.trainer import Trainer

from .child import Case, Setup, free
from .subject import ORIGINAL, Stopwatch, paths, reset, trainer_of

SIDES = (256, 512, 768, 1024)  # pixels
REPEATS = 3
SPARE = 15.0  # seconds that one resolution may take


def timed(device: torch.device, run: Callable[[], Tensor]) -> dict[str, Any]:
    """Median seconds of `run` and its peak above what was there; the first call is not counted."""
    finite = bool(run().isfinite().all())
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    reset(device)
    watch, seconds = Stopwatch(device), []
    for _ in range(REPEATS):
        run()
        seconds.append(watch.lap())
    return {
        "seconds": statistics.median(seconds),
        "peak above": peak(device) - held,
        "finite": finite,
    }


def resolution(trainer: Trainer, latent: int, rows: int) -> dict[str, Any]:
    """Both gradients at latents of latent × latent."""
    policy, config = trainer.policy, trainer.config
    log_reward = LogReward(policy, trainer.reward, config.model.reward_scale)
    x = torch.randn(rows, policy.sample_shape[0], latent, latent, device=policy.device)
    where = policy.condition([trainer.prompts.prompts[0]] * rows, ())
    k = trainer.table.at(torch.full((rows,), trainer.table.num_steps // 2), x)
    mode = config.model.reward_adaptive_mode
    decoded = timed(policy.device, lambda: terminal_gradient(log_reward, x, where))
    guessed = timed(policy.device, lambda: guess(log_reward, policy, x, k, where, mode).gradient)
    return {"decode": decoded, "guess": guessed}


def cell(setup: Setup, trainer: Trainer, latent: int, count: int) -> dict[str, Any]:
    """`resolution`, or why there is none."""
    if setup.left < SPARE:
        return {"error": "no time left"}
    try:
        return resolution(trainer, latent, count)
    except RuntimeError as error:  # cuDNN and cuBLAS have words of their own for a full memory
        text = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
    free()  # outside of `except`, whose traceback keeps tensors alive
    return {"error": text.splitlines()[0]}


def table(setup: Setup, *, name: str) -> dict[str, Any]:
    """One row a resolution; a resolution that does not fit says so, and the next is tried."""
    trainer = trainer_of(setup, paths(1), name)
    smallest = trainer.policy.sample_shape[-1]
    sizes = {side: side // 8 for side in SIDES}
    if setup.small:
        sizes = {64: smallest}
    rows = []
    for side, latent in sizes.items():
        for count in (1, 4):
            rows.append({"pixels": side, "pictures": count, **cell(setup, trainer, latent, count)})
            setup.note({"reward": name, "rows": rows})
    return {"reward": name, "rows": rows}


CASES: dict[str, Case] = {name: partial(table, name=name) for name in ORIGINAL}
