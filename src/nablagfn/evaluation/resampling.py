"""The correction: of K paths per sample those are kept that the target would have drawn.

Each path has an exact weight against p_pretrained·exp(βr) (`core.path_kl`), so that resampling by
it takes away what training, and the sampler's finite steps, have left over. A quarter of the paths
are the pretrained model's own: where the finetuned model has lost a mode, or wandered off, they
stand in, and no single path can carry all of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import ConfigError
from ..core import rng
from ..core.kernels import KernelTable
from ..core.path_kl import log_weight, path_ratio
from ..core.types import Metadata, Policy, Reward
from ..metrics.groups import rows_of
from ..metrics.tilting import systematic
from .drawing import decoded, draw_paths
from .figures import Measured
from .samples import Evaluator, Sample

APART = 2**20  # between the seeds of the paths of one sample: further than anybody's seeds go


def base_paths(paths: int) -> int:
    """How many of K paths are the pretrained model's: a quarter, and at least one."""
    return max(1, paths // 4)


def weights_of_both(log_ratio: Tensor, reward: Tensor, beta: float, paths: int) -> Tensor:
    """log w, [n], of samples of which a share as `base_paths` has it is the pretrained model's."""
    return log_weight(log_ratio, reward, beta, base_paths(paths) / paths)


def chosen_rows(
    log_w: Tensor, reward: Tensor, prompts: Sequence[str], paths: int, seed: int
) -> Tensor:
    """Of K paths per sample, all of a prompt together, the rows that are kept, 1 in K of each.

    Systematic resampling within each prompt: in expectation a row is taken as often as its weight
    says, and in order of reward, so that no part of its range is missed by chance. What is kept of
    a prompt is in random order. log_w: [n] float64; reward: [n]. Raises ConfigError where some
    weight is not a number.
    """
    if not bool(log_w.isfinite().all()):
        raise ConfigError("some rewards are not finite: there is nothing to resample by")
    generator = rng.generator(seed, "resample")
    found = []
    for rows in rows_of(prompts).values():
        u = float(torch.rand(1, generator=generator, dtype=torch.float64))
        ordered = rows[reward[rows].argsort(stable=True)]
        kept = ordered[systematic(log_w[ordered].softmax(0), len(rows) // paths, u)]
        found.append(kept[torch.randperm(len(kept), generator=generator)])
    return torch.cat(found)


def draw_of_both(
    evaluator: Evaluator,
    asked: Sequence[str],
    paths: int,
    *,
    on_done: Callable[[int], object],
    keep: Callable[[Tensor], Tensor],
) -> list[Sample]:
    """K samples for each entry of `asked`, the finetuned model's and then the pretrained one's.

    on_done, keep: as `Evaluator.samples` has them.
    """
    own = [prompt for prompt in asked for _ in range(paths - base_paths(paths))]
    base = [prompt for prompt in asked for _ in range(base_paths(paths))]
    drawn = evaluator.samples(own, on_done=on_done, keep=keep)
    return drawn + evaluator.samples(
        base, reference=True, compared=True, first=len(own), on_done=on_done, keep=keep
    )


def resample(samples: Sequence[Sample], beta: float, paths: int, seed: int) -> list[Sample]:
    """1 in K of the samples of each prompt, by the weights of their paths; numbered anew.

    samples: as `draw_of_both` draws them, in any order.
    """
    reward = torch.tensor([s.reward for s in samples], dtype=torch.float64)
    log_ratio = torch.tensor([s.log_ratio for s in samples], dtype=torch.float64)
    log_w = weights_of_both(log_ratio, reward, beta, paths)
    rows = chosen_rows(log_w, reward, [s.prompt for s in samples], paths, seed)
    return [replace(samples[row], index=i) for i, row in enumerate(rows.tolist())]


@dataclass(frozen=True)
class Correction:
    """Draws samples of p_pretrained·exp(βr). beta: in force. paths: K of them a sample. about: the
    metadata of prompts that have some. batch: paths at once."""

    policy: Policy
    table: KernelTable
    reward: Reward
    beta: float
    paths: int
    about: Mapping[str, Metadata]
    batch: int
    seed: int

    def draw(self, prompt: str, seeds: Sequence[int]) -> Tensor:
        """len(seeds) decoded samples of one prompt, [B, …]."""
        drawn = [first + APART * k for k in range(self.paths) for first in seeds]
        split = len(drawn) - base_paths(self.paths) * len(seeds)
        parts = [
            self._paths(prompt, own[start : start + self.batch], reference)
            for own, reference in ((drawn[:split], False), (drawn[split:], True))
            for start in range(0, len(own), self.batch)
        ]
        images, ratios, rewards = (torch.cat(column) for column in zip(*parts, strict=True))
        log_w = weights_of_both(ratios, rewards, self.beta, self.paths)
        return images[chosen_rows(log_w, rewards, [prompt] * len(drawn), self.paths, self.seed)]

    def _paths(
        self, prompt: str, seeds: Sequence[int], reference: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decoded samples, log p_θ/p_# of their paths and their rewards, on the CPU."""
        asked = [prompt] * len(seeds)
        paths = draw_paths(
            self.policy, self.table, asked, seeds, seed=self.seed, reference=reference
        )
        ratio = path_ratio(self.policy, self.table, paths, of_reference=reference)
        images = decoded(self.policy, paths.clean)
        with torch.no_grad():
            rewards = self.reward(images, asked, [self.about.get(prompt, {})] * len(asked))
        return images.cpu(), ratio.log_ratio.sum(1).cpu(), rewards.cpu()


def distinct_share(measured: Measured) -> float:
    """How many different ones are among resampled samples, as a share of them, 0..1.

    Repetitions have the features, log-ratio and reward of their path to the last digit.
    """
    scores = [measured.scores[name][:, None] for name in ("log_ratio", "reward")]
    known = torch.cat([measured.features.double(), *scores], 1)
    return len(known.unique(dim=0)) / len(known)
