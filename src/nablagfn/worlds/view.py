"""How samples of a world are looked at: as points, against the target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..core.kernels import KernelTable
from ..metrics.groups import rows_of
from . import plot
from .measure import measure, of_prompt
from .target import COUNT, Target
from .world import World

FEWEST = 100  # samples of a prompt below which nothing is measured


class WorldView:
    """A `View` of the samples that the sampler `table` draws in a world.

    count: base samples behind the target. They are drawn when first needed, on `device`.
    """

    def __init__(
        self,
        world: World,
        table: KernelTable,
        *,
        count: int = COUNT,
        device: torch.device | str = "cpu",
    ) -> None:
        self.world = world
        self.table = table
        self.count = count
        self.device = device
        self._measured: dict[str, tuple[Tensor, dict[str, float]]] = {}

    def target(self, prompt: str) -> Target:
        """The target of one prompt. Raises ConfigError for an unknown prompt."""
        return Target.of(self.world, self.table, prompt, count=self.count, device=self.device)

    def features(self, images: Tensor) -> Tensor:
        """The sample itself, [B, ...] -> [B, D]."""
        return images.flatten(1)

    def measures(self, images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """The figures of `worlds.measure.measure`; none below 100 samples of some prompt.

        images: samples [B, d]; prompts: one each.
        """
        samples = _by_prompt(images, prompts)
        if min(map(len, samples.values())) < FEWEST:
            return {}
        return measure([self._figures(prompt, x) for prompt, x in samples.items()])

    def _figures(self, prompt: str, x: Tensor) -> dict[str, float]:
        """`of_prompt`; the last samples of each prompt are not measured twice."""
        known = self._measured.get(prompt)
        if known is None or not torch.equal(known[0], x):
            known = self._measured[prompt] = (x, of_prompt(self.target(prompt), x))
        return known[1]

    def save(self, images: Tensor, prompts: Sequence[str], path: Path, columns: int) -> None:
        """Target and samples side by side as a PNG; `columns` is for pictures and ignored."""
        samples = _by_prompt(images, prompts)
        targets = {prompt: self.target(prompt) for prompt in samples}
        figures = {p: self._figures(p, x) for p, x in samples.items() if len(x) >= FEWEST}
        plot.side_by_side(targets, samples, figures, path)


def _by_prompt(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """The rows of each prompt, in the order of first appearance."""
    return {
        str(prompt): images[rows.to(images.device)] for prompt, rows in rows_of(prompts).items()
    }
