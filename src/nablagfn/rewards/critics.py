"""Small neural critics that judge tiny-animals' pictures.

Three convolutional networks, each a JSON configuration and a safetensors file in one folder:

* :class:`AestheticCritic` -- prompt-free: how much a picture looks like the glossy 3-D style;
* :class:`AlignmentCritic` -- contrastive image-text score: how well a picture fits its prompt;
* :class:`AnimalClassifier` -- which animal, style and background a picture shows. It is the
  independent judge of samples and is never a reward.

All take float images [B, 3, H, W] in [0, 1] and are differentiable in the pixels. They use
GroupNorm and no batch statistics, so that a picture's score does not depend on its batch.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core.types import beside

__all__ = ["AestheticCritic", "AlignmentCritic", "AnimalClassifier"]

SIZE = 64  # the side, in pixels, at which all critics look at pictures

CriticT = TypeVar("CriticT", bound="_Critic")


def _prepare(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] -> [B, 3, 64, 64] in [-1, 1]."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have the shape [B, 3, H, W], not {list(images.shape)}")
    if images.shape[-2:] != (SIZE, SIZE):
        images = F.interpolate(
            images, (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True
        )
    return images * 2 - 1


class _Block(nn.Module):
    """Pre-activation residual block, [B, C_in, H, W] -> [B, C_out, H / stride, W / stride]."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride)
        return self.skip(x) + h


class _Trunk(nn.Module):
    """Pictures [B, 3, 64, 64] in [-1, 1] -> features [B, widths[-1]]."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 5, 2, 2)
        pairs = itertools.pairwise(widths)
        self.blocks = nn.ModuleList(_Block(a, b, stride=2) for a, b in pairs)
        self.last = _Block(widths[-1], widths[-1], stride=1)
        self.norm = nn.GroupNorm(8, widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return F.silu(self.norm(self.last(x))).mean((2, 3))


class _Critic(nn.Module):
    """A network that is saved as ``<name>.json`` and ``<name>.safetensors``."""

    name: ClassVar[str]

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_folder(cls: type[CriticT], path: str | Path) -> CriticT:
        """Load a critic, in evaluation mode with frozen weights, from a folder of critics."""
        folder = Path(path)
        for suffix in ("json", "safetensors"):
            if not (folder / f"{cls.name}.{suffix}").is_file():
                raise FileNotFoundError(f"{folder} has no {cls.name}.{suffix}")
        critic = cls(**json.loads((folder / f"{cls.name}.json").read_text(encoding="utf-8")))
        weights = load_file(folder / f"{cls.name}.safetensors")
        critic.load_state_dict({k: v.float() for k, v in weights.items()})
        return critic.requires_grad_(False).eval()

    def to_folder(self, path: str | Path) -> None:
        """Write the configuration and the weights (float32) into a folder."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.config, indent=1) + "\n"
        (folder / f"{self.name}.json").write_text(text, encoding="utf-8")
        weights = {k: v.detach().float().cpu().contiguous() for k, v in self.state_dict().items()}
        save_file(weights, folder / f"{self.name}.safetensors")


class AestheticCritic(_Critic):
    """How much pictures look like the glossy 3-D style, whatever they show.

    The score is linear in the share of glossy in a cross-fade of two styles: about +2 for a
    glossy picture, about -2 for the other three styles. It is not bounded.
    """

    name: ClassVar[str] = "aesthetic"

    def __init__(self, widths: Sequence[int] = (24, 48, 96, 128)) -> None:
        super().__init__(widths=list(widths))
        self.trunk = _Trunk(widths)
        self.head = nn.Linear(widths[-1], 1)

    def forward(self, images: Tensor) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1]."""
        return self.head(self.trunk(_prepare(images))).squeeze(1)


class AlignmentCritic(_Critic):
    """How well pictures fit their prompts: ``scale`` times the cosine of two embeddings.

    The text side reads raw prompts by a small word vocabulary; other words are ignored.
    Scores lie in [-scale, scale].
    """

    name: ClassVar[str] = "alignment"

    def __init__(
        self,
        words: Sequence[str],
        widths: Sequence[int] = (24, 48, 96, 128),
        size: int = 64,
        scale: float = 4.0,
    ) -> None:
        super().__init__(words=list(words), widths=list(widths), size=size, scale=scale)
        self.index = {word: i for i, word in enumerate(words)}
        self.scale = scale
        self.trunk = _Trunk(widths)
        self.image_head = nn.Linear(widths[-1], size)
        self.words = nn.EmbeddingBag(len(words), size, mode="sum")
        self.text_head = nn.Sequential(
            nn.Linear(size, 2 * size), nn.SiLU(), nn.Linear(2 * size, size)
        )

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """What sees tensors only (`rewards.networks_of`)."""
        return (self.trunk,)

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit embeddings [B, size] of images [B, 3, H, W] in [0, 1]."""
        return F.normalize(self.image_head(self.trunk(_prepare(images))), dim=1)

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit embeddings [B, size] of prompts."""
        ids: list[int] = []
        starts: list[int] = []
        for prompt in prompts:
            starts.append(len(ids))
            found = re.findall(r"[a-z]+", prompt.lower())
            ids += [self.index[word] for word in found if word in self.index]
        weight = self.words.weight
        bags = self.words(
            beside(torch.tensor(ids, dtype=torch.long), weight),
            beside(torch.tensor(starts, dtype=torch.long), weight),
        )
        return F.normalize(bags + self.text_head(bags), dim=1)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1], each for its own prompt."""
        if len(prompts) != len(images):
            raise ValueError(f"{len(images)} images, but {len(prompts)} prompts")
        return self.scale * (self.embed_images(images) * self.embed_prompts(prompts)).sum(1)


class AnimalClassifier(_Critic):
    """Which animal, style and background pictures show."""

    name: ClassVar[str] = "classifier"

    def __init__(
        self, labels: Mapping[str, Sequence[str]], widths: Sequence[int] = (24, 48, 96, 160)
    ) -> None:
        super().__init__(labels={k: list(v) for k, v in labels.items()}, widths=list(widths))
        self.labels = {k: tuple(v) for k, v in labels.items()}
        self.trunk = _Trunk(widths)
        self.heads = nn.ModuleDict({k: nn.Linear(widths[-1], len(v)) for k, v in labels.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits {head: [B, labels of that head]} of images [B, 3, H, W] in [0, 1].

        The heads are ``animal``, ``style`` and ``background``.
        """
        features = self.trunk(_prepare(images))
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def predict(self, images: Tensor) -> dict[str, list[str]]:
        """The likeliest label per head and picture, for images [B, 3, H, W] in [0, 1]."""
        logits = self(images)
        return {k: [self.labels[k][i] for i in v.argmax(1).tolist()] for k, v in logits.items()}

    def recognise(self, images: Tensor, prompts: Sequence[str]) -> list[bool | None]:
        """Whether it sees the animal that each prompt names; None where it names none."""
        animals = set(self.labels["animal"])
        seen = self.predict(images)["animal"]
        named = [next((w for w in p.lower().split() if w in animals), None) for p in prompts]
        return [None if n is None else n == s for n, s in zip(named, seen, strict=True)]
