"""Draw fixed-seed samples from the policy and measure reward, diversity and recognition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from . import pictures, rng
from .critics import AnimalClassifier
from .distributed import gather
from .features import features
from .kernels import KernelTable
from .metrics.diversity import pairwise_distance
from .path_kl import path_kl
from .rollout import rollout
from .types import Policy, Reward, Trajectories, View


@dataclass(frozen=True)
class Sample:
    """One measured picture. recognised is None where no classifier knows the prompt.

    path_kl: the KL of its path's steps against the pretrained model's, in nats; 0 for the latter.
    """

    index: int
    prompt: str
    reward: float
    feature: Tensor
    image: Tensor
    recognised: bool | None
    path_kl: float


@dataclass(frozen=True)
class Measurement:
    """Figures of one set of samples.

    diversity: mean feature distance within prompts, in [0, 2] for pictures. others: those of
    `View.measures`. path_kl: KL(p_θ‖p_#) of the paths, in nats.
    """

    num_samples: int
    reward_mean: float
    reward_std: float
    diversity: float
    recognised: float | None
    others: dict[str, float] = field(default_factory=dict)
    path_kl: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def headline(self) -> dict[str, float]:
        """The figures worth a curve; recognised where it is known."""
        figures = {
            "reward": self.reward_mean,
            "diversity": self.diversity,
            "path_kl": self.path_kl,
            **self.others,
        }
        return figures if self.recognised is None else {**figures, "recognised": self.recognised}


class PictureView(View):
    """Samples that are pictures: embedded features, a grid of pictures."""

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, 1280], unit length."""
        return features(images)

    def measures(self, images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        return {}

    def save(self, images: Tensor, prompts: Sequence[str], path: Path, columns: int) -> None:
        """A grid with `columns` pictures in a row."""
        pictures.save_grid(images, path, columns)


def draw(
    policy: Policy, table: KernelTable, prompts: Sequence[str], seeds: Sequence[int], *, seed: int
) -> Tensor:
    """Decoded samples, [B, 3, H, W]; the noise of row i depends on (seed, seeds[i]) only."""
    return decoded(policy, draw_paths(policy, table, prompts, seeds, seed=seed).clean)


def decoded(policy: Policy, latents: Tensor) -> Tensor:
    """Clean samples [B, ...] as they are looked at: pictures clamped to [0, 1], no graph."""
    with torch.no_grad():
        images = policy.decode(latents).float()
    return images.clamp(0, 1) if images.ndim == 4 else images  # points of a world have no range


def draw_paths(
    policy: Policy, table: KernelTable, prompts: Sequence[str], seeds: Sequence[int], *, seed: int
) -> Trajectories:
    """The whole paths of `draw`."""
    noise = rng.normal(
        (table.num_steps + 1, *policy.sample_shape), seeds, seed=seed, purpose="evaluation"
    )
    return rollout(policy, table, noise, policy.condition(prompts, ()))


class Evaluator:
    """Measures a policy on fixed prompts and seeds; the work is shared by all processes.

    critics: folder with the classifier that came with the pretrained model, if it has one.
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
        critics: Path | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.policy = policy
        self.reward = reward
        self.table = table
        self.batch_size = batch_size
        self.seed = seed
        self.view = view
        self.classifier = (
            None
            if critics is None
            else AnimalClassifier.from_folder(critics).to(policy.device).eval()
        )

    def samples(
        self,
        prompts: Sequence[str],
        *,
        reference: bool = False,
        on_done: Callable[[int], object] = lambda count: None,
    ) -> list[Sample]:
        """One sample per entry of `prompts`, seed i for entry i, in order, on every process.

        reference: draw from the frozen model. on_done: told how many pictures were just made.
        """
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        share = -(-len(prompts) // world)
        mine: list[Sample] = []
        last = min(len(prompts), (rank + 1) * share)
        for start in range(rank * share, last, self.batch_size):
            rows = range(start, min(start + self.batch_size, last))
            with self.policy.reference() if reference else nullcontext():
                mine += self._measure([prompts[i] for i in rows], rows, reference)
            on_done(len(rows) * world)
        return sorted(gather(self.accelerator, mine), key=lambda sample: sample.index)

    def _measure(self, prompts: list[str], rows: range, reference: bool) -> list[Sample]:
        paths = draw_paths(self.policy, self.table, prompts, rows, seed=self.seed)
        images = decoded(self.policy, paths.clean)
        with torch.no_grad():
            rewards = self.reward(images, prompts, [{} for _ in prompts])
        kl = torch.zeros(len(rows))
        if not reference:
            kl = path_kl(self.policy, self.table, paths).sum(1)
        return [
            Sample(i, prompt, float(value), feature.cpu(), image.cpu(), known, float(nats))
            for i, prompt, value, feature, image, known, nats in zip(
                rows,
                prompts,
                rewards,
                self.view.features(images),
                images,
                self._recognised(images, prompts),
                kl,
                strict=True,
            )
        ]

    def _recognised(self, images: Tensor, prompts: list[str]) -> list[bool | None]:
        """Whether the classifier sees the animal that the prompt names (None: it names none)."""
        if self.classifier is None:
            return [None] * len(prompts)
        animals = set(self.classifier.labels["animal"])
        seen = self.classifier.predict(images)["animal"]
        named = [next((w for w in p.lower().split() if w in animals), None) for p in prompts]
        return [None if n is None else n == s for n, s in zip(named, seen, strict=True)]


def summarise(samples: Sequence[Sample], view: View) -> Measurement:
    """The figures of a set of samples with at least two of some prompt."""
    rewards = torch.tensor([s.reward for s in samples], dtype=torch.float64)
    known = [s.recognised for s in samples if s.recognised is not None]
    return Measurement(
        num_samples=len(samples),
        reward_mean=float(rewards.mean()),
        reward_std=float(rewards.std()),
        diversity=float(
            pairwise_distance(
                torch.stack([s.feature for s in samples]), [s.prompt for s in samples]
            )
        ),
        recognised=sum(known) / len(known) if known else None,
        others=view.measures(torch.stack([s.image for s in samples]), [s.prompt for s in samples]),
        path_kl=sum(s.path_kl for s in samples) / len(samples),
    )
