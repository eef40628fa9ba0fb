"""Draw fixed-seed samples from the policy and measure each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from ..core.kernels import KernelTable
from ..core.path_kl import PathRatio, path_ratio
from ..core.transport import transport_cost
from ..core.types import Metadata, Policy, Recogniser, Reward, View
from ..runtime.distributed import gather
from .drawing import decoded, draw_paths


@dataclass(frozen=True)
class Sample:
    """One measured picture. recognised is None where nobody can tell.

    path_kl: the KL of its path's steps against the pretrained model's, in nats. log_ratio: log
    p_θ/p_# of its path, nats. Both are 0 for samples of the pretrained model, unless they were
    compared. log_ratio_base: log p_θ/p_# of the pretrained model's path of the same noise, NaN
    where nobody asked. held_out: rewards that were not trained on, by name. step_kl: [N] what
    path_kl is the sum of. labels: what the recogniser sees, by kind, if somebody asked.
    transport_cost: of its path without noise (`core.transport`), 0 for the pretrained model's; it
    is NaN where the path has noise, and path_kl and log_ratio are where it has none.
    """

    index: int
    prompt: str
    reward: float
    feature: Tensor
    image: Tensor
    recognised: bool | None
    path_kl: float
    held_out: Mapping[str, float] = field(default_factory=dict)
    log_ratio: float = 0.0
    log_ratio_base: float = math.nan
    step_kl: Tensor = field(default_factory=lambda: torch.zeros(0))
    labels: Mapping[str, str] = field(default_factory=dict)
    transport_cost: float = math.nan


@dataclass(frozen=True, eq=False)
class DrawnPaths:
    """Clean samples [B, ...], their paths against the other model's, and log p_θ/p_# [B] of the
    pretrained model's paths of the same noise (NaN where it was not asked for). transport_cost:
    [B], NaN where the paths have noise; without noise the ratio has no step."""

    clean: Tensor
    ratio: PathRatio
    log_ratio_base: Tensor
    transport_cost: Tensor


class Evaluator:
    """Measures a policy on fixed prompts and seeds; the work is shared by all processes.

    recogniser: who tells what the pictures show, if somebody does. held_out: rewards to measure
    beside `reward`, by name. about: the metadata of prompts that have some.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        policy: Policy,
        reward: Reward,
        table: KernelTable,
        *,
        batch_size: int,
        seed: int,
        view: View,
        recogniser: Recogniser | None = None,
        held_out: Mapping[str, Reward] | None = None,
        about: Mapping[str, Metadata] | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.policy = policy
        self.reward = reward
        self.table = table
        self.batch_size = batch_size
        self.seed = seed
        self.view = view
        self.held_out = dict(held_out or {})
        self.recogniser = recogniser
        self.about = about or {}

    def samples(
        self,
        prompts: Sequence[str],
        *,
        reference: bool = False,
        compared: bool | None = None,
        both: bool = False,
        labelled: bool = False,
        first: int = 0,
        on_done: Callable[[int], object] = lambda count: None,
        keep: Callable[[Tensor], Tensor] = lambda images: images,
    ) -> list[Sample]:
        """One sample per entry of `prompts`, seed first + i for entry i; in order, everywhere.

        reference: draw from the frozen model. compared: whether the other model runs along the
        paths, for path_kl and log_ratio; by default along the policy's only. both: whether the
        pretrained model's paths of the same noise are compared, too, for log_ratio_base: 2N
        evaluations a sample more. labelled: whether the recogniser also says what it sees.
        on_done: told how many pictures were just made. keep: what becomes of the images [B, ...]
        once they are measured.
        """
        compared = not reference if compared is None else compared
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        share = -(-len(prompts) // world)
        mine: list[Sample] = []
        last = min(len(prompts), (rank + 1) * share)
        for start in range(rank * share, (rank + 1) * share, self.batch_size):
            rows = range(start, min(start + self.batch_size, last))
            asked = rows or range(1)  # out of samples: the first one again, for the others' sake
            if rows or self.policy.together:
                wanted, seeds = [prompts[i] for i in asked], [first + i for i in asked]
                drawn = self._draw(wanted, seeds, reference, compared, both)
                mine += self._measure(wanted, seeds, drawn, keep, labelled)[: len(rows)]
            on_done(len(rows) * world)
        return sorted(gather(self.accelerator, mine), key=lambda sample: sample.index)

    def _draw(
        self,
        prompts: list[str],
        seeds: Sequence[int],
        reference: bool,
        compared: bool,
        both: bool,
    ) -> DrawnPaths:
        if self.table.ode:
            return self._draw_ode(prompts, seeds, reference, compared)
        none = torch.zeros(len(prompts), self.table.num_steps)
        clean, ratio = self._paths(prompts, seeds, reference, compared)
        base = torch.full((len(prompts),), math.nan)
        if both:
            _, of_base = self._paths(prompts, seeds, reference=True, compared=True)
            assert of_base is not None
            base = of_base.log_ratio.sum(1)
        unknown = torch.full((len(prompts),), math.nan)
        return DrawnPaths(clean, ratio or PathRatio(none, none), base, unknown)

    def _draw_ode(
        self, prompts: list[str], seeds: Sequence[int], reference: bool, compared: bool
    ) -> DrawnPaths:
        """Paths without noise, with the transport cost of the policy's."""
        paths = draw_paths(
            self.policy, self.table, prompts, seeds, seed=self.seed, reference=reference
        )
        cost = torch.zeros(len(prompts))
        if compared and not reference:
            cost = transport_cost(self.policy, self.table, paths).sum(1)
        unknown = torch.zeros(len(prompts), 0)
        nothing = torch.full((len(prompts),), math.nan)
        return DrawnPaths(paths.clean, PathRatio(unknown, unknown), nothing, cost)

    def _paths(
        self, prompts: list[str], seeds: Sequence[int], reference: bool, compared: bool
    ) -> tuple[Tensor, PathRatio | None]:
        """Where paths of one of the models end, and, compared, their ratio."""
        paths = draw_paths(
            self.policy, self.table, prompts, seeds, seed=self.seed, reference=reference
        )
        if not compared:
            return paths.clean, None
        ratio = path_ratio(self.policy, self.table, paths, of_reference=reference)
        return paths.clean, ratio

    def _measure(
        self,
        prompts: list[str],
        seeds: Sequence[int],
        drawn: DrawnPaths,
        keep: Callable[[Tensor], Tensor],
        labelled: bool,
    ) -> list[Sample]:
        images, ratio = decoded(self.policy, drawn.clean), drawn.ratio
        rewards = self._scores(self.reward, images, prompts)
        held_out = {
            name: self._scores(reward, images, prompts) for name, reward in self.held_out.items()
        }
        kl, moved = _sums(ratio.kl), _sums(ratio.log_ratio)
        base = drawn.log_ratio_base.tolist()
        cost = drawn.transport_cost.tolist()
        features, kept = self.view.features(images).cpu(), keep(images).cpu()
        recognised: list[bool | None] = [None] * len(prompts)
        labels: Mapping[str, list[str]] = {}
        if self.recogniser is not None:
            recognised = self.recogniser.recognise(images, prompts)
            labels = self.recogniser.predict(images) if labelled else {}
        return [
            Sample(
                index=index,
                prompt=prompts[i],
                reward=rewards[i],
                feature=features[i],
                image=kept[i],
                recognised=recognised[i],
                path_kl=kl[i],
                held_out={name: values[i] for name, values in held_out.items()},
                log_ratio=moved[i],
                log_ratio_base=base[i],
                step_kl=ratio.kl[i].cpu(),
                labels={kind: seen[i] for kind, seen in labels.items()},
                transport_cost=cost[i],
            )
            for i, index in enumerate(seeds)
        ]

    def _scores(self, reward: Reward, images: Tensor, prompts: list[str]) -> list[float]:
        metadata = [self.about.get(prompt, {}) for prompt in prompts]
        with torch.no_grad():
            found: list[float] = reward(images, prompts, metadata).tolist()
        return found


def _sums(of_steps: Tensor) -> list[float]:
    """Of each path's steps, [B, N]; NaN where it has none that are known."""
    found: list[float] = of_steps.sum(1).tolist()
    return found if of_steps.shape[1] else [math.nan] * len(found)
