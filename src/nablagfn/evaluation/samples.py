"""Draw fixed-seed samples from the policy and measure each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from ..core.kernels import KernelTable
from ..core.path_kl import path_kl
from ..core.types import Metadata, Policy, Recogniser, Reward, View
from ..runtime.distributed import gather
from .drawing import decoded, draw_paths


@dataclass(frozen=True)
class Sample:
    """One measured picture. recognised is None where nobody can tell.

    path_kl: the KL of its path's steps against the pretrained model's, in nats; 0 for the latter.
    held_out: rewards that were not trained on, by name.
    """

    index: int
    prompt: str
    reward: float
    feature: Tensor
    image: Tensor
    recognised: bool | None
    path_kl: float
    held_out: Mapping[str, float] = field(default_factory=dict)


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
        on_done: Callable[[int], object] = lambda count: None,
        keep: Callable[[Tensor], Tensor] = lambda images: images,
    ) -> list[Sample]:
        """One sample per entry of `prompts`, seed i for entry i, in order, on every process.

        reference: draw from the frozen model. on_done: told how many pictures were just made. keep:
        what becomes of the images [B, ...] once they are measured.
        """
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        share = -(-len(prompts) // world)
        mine: list[Sample] = []
        last = min(len(prompts), (rank + 1) * share)
        for start in range(rank * share, (rank + 1) * share, self.batch_size):
            rows = range(start, min(start + self.batch_size, last))
            asked = rows or range(1)  # out of samples: the first one again, for the others' sake
            if rows or self.policy.together:
                with self.policy.reference() if reference else nullcontext():
                    found = self._measure([prompts[i] for i in asked], asked, reference, keep)
                mine += found[: len(rows)]
            on_done(len(rows) * world)
        return sorted(gather(self.accelerator, mine), key=lambda sample: sample.index)

    def _measure(
        self, prompts: list[str], rows: range, reference: bool, keep: Callable[[Tensor], Tensor]
    ) -> list[Sample]:
        paths = draw_paths(self.policy, self.table, prompts, rows, seed=self.seed)
        images = decoded(self.policy, paths.clean)
        rewards = self._scores(self.reward, images, prompts)
        held_out = {
            name: self._scores(reward, images, prompts) for name, reward in self.held_out.items()
        }
        kl = [0.0] * len(rows)
        if not reference:
            kl = path_kl(self.policy, self.table, paths).sum(1).tolist()
        features, kept = self.view.features(images).cpu(), keep(images).cpu()
        recognised: list[bool | None] = [None] * len(prompts)
        if self.recogniser is not None:
            recognised = self.recogniser.recognise(images, prompts)
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
            )
            for i, index in enumerate(rows)
        ]

    def _scores(self, reward: Reward, images: Tensor, prompts: list[str]) -> list[float]:
        metadata = [self.about.get(prompt, {}) for prompt in prompts]
        with torch.no_grad():
            found: list[float] = reward(images, prompts, metadata).tolist()
        return found
