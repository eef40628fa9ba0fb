"""Proof of an export: the pictures of the model that was trained, drawn again by what was written.

Both are drawn by the pipeline itself, as its users do, from the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...config import Config, ConfigError
from ...core import rng
from ...families import Family
from ...families.family import guidance_of
from ...models.latent import set_sampler
from ...report.loading import stock_of

GREY_LEVEL = 1 / 255  # two pictures that differ by less look alike in any file
ROUNDING = 1e-4  # of float32, over the steps of a sampler
SHARE = 0.1  # of what the finetuning changed: an export that lost a part of it is no export


@dataclass(frozen=True)
class Drawn:
    """Pictures of the pretrained and the trained model, [B, H, W, 3] in [0, 1], one per prompt."""

    prompts: tuple[str, ...]
    before: np.ndarray
    after: np.ndarray


@dataclass(frozen=True)
class Proof:
    """difference: largest one of any pixel, exported against trained, in [0, 1]. change: the same
    of trained against pretrained."""

    form: str
    difference: float
    change: float

    @property
    def bound(self) -> float:
        """What `difference` must not exceed."""
        return max(ROUNDING, min(GREY_LEVEL, SHARE * self.change))

    def check(self) -> None:
        """Raises ConfigError when the difference is beyond its bound."""
        if not self.difference <= self.bound:
            raise ConfigError(
                f"the {self.form} export draws other pictures than the trained model: they differ "
                f"by {self.difference:.2g}, the bound is {self.bound:.2g}; nothing was written"
            )

    def __str__(self) -> str:
        return (
            f"{self.form}: reloaded, pictures differ by at most {self.difference:.2g} of 1 (bound "
            f"{self.bound:.2g}; finetuning changed them by up to {self.change:.2g})"
        )


def draw(
    pipeline: Any,
    family: Family,
    config: Config,
    prompts: Sequence[str],
    times: Sequence[float] = (),
    strengths: Sequence[float] = (),
    mean: Tensor | None = None,
) -> np.ndarray:
    """One picture per prompt as the run's settings say, [B, H, W, 3] in [0, 1].

    times: of the run's steps, for an uneven grid. strengths: of the LoRA in each of them; none: 1
    in all. mean: of the first state; None: 0. Raises ConfigError when no scheduler of diffusers
    draws so.
    """
    stock, sampling = stock_of(family, config, times), config.sampling
    set_sampler(pipeline, stock.scheduler, stock.options, stock.taken, counts=stock.counts)

    names = pipeline.get_active_adapters() if strengths else []

    def act(step: int) -> None:
        pipeline.set_adapters(names, strengths[step % len(strengths)])

    def ended(pipeline: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        act(step + 1)
        return given

    if strengths:
        act(0)
    noise = [rng.generator(0, "export", index=i) for i in range(len(prompts))]
    latents = None
    if mean is not None:  # the noise is what the pipeline itself would draw
        shape = (len(prompts), *mean.shape)
        latents = randn_tensor(shape, generator=noise, device=mean.device) + mean
    with torch.random.fork_rng():
        torch.manual_seed(0)  # some pipelines give their scheduler no generator
        found: np.ndarray = pipeline(
            prompt=list(prompts),
            **guidance_of(stock, config, len(prompts)),
            num_inference_steps=sampling.num_steps,
            generator=noise,
            latents=latents,
            output_type="np",
            callback_on_step_end=ended if strengths else None,
            **stock.call,
        ).images
    if strengths:
        pipeline.set_adapters(names, 1.0)
    return found


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """max |a − b|; NaN where either has one."""
    return float(np.abs(a - b).max())
