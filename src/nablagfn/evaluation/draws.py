"""Samples of the pretrained model kept in pieces, so that a long drawing goes on where it was cut.

DRAWS/0000-0004.safetensors   images 0 … 3 of every prompt: features, rewards, thumbnails
DRAWS/settings.json           what they depend on
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..config import ConfigError
from ..runs.runfolder import write_atomic
from .figures import Measured, scores_of
from .samples import Sample

PIECE = 256  # samples, about
SETTINGS = "settings.json"


@dataclass(frozen=True)
class DrawnSamples:
    """Samples, and their pictures [n, ...] as they are kept, [0] where they are not. labels: what
    each shows, by kind."""

    measured: Measured
    images: Tensor
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """Images first … last − 1 of every prompt."""

    first: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.first:04}-{self.last:04}.safetensors"

    def asked(self, prompts: Sequence[str]) -> list[str]:
        """The prompt of each sample: every prompt once, then again. Sample i of a piece has the
        seed first·P + i, so that more images per prompt go on from fewer."""
        return [prompt for _ in range(self.first, self.last) for prompt in prompts]


def pieces(prompts: int, images: int) -> Iterator[Piece]:
    """Pieces of about PIECE samples."""
    size = max(1, PIECE // prompts)
    for first in range(0, images, size):
        yield Piece(first, min(first + size, images))


@dataclass(frozen=True)
class Draws:
    """The folder."""

    path: Path

    def check(self, settings: dict[str, Any]) -> None:
        """Is what lies there of the same model, sampler, reward and prompts? Writes nothing.

        Raises ConfigError, naming the first setting that differs.
        """
        file = self.path / SETTINGS
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            before = None if any(self.path.glob("*.safetensors")) else settings
        except (OSError, ValueError):
            before = None
        if not isinstance(before, dict):
            raise ConfigError(
                f"{file} is missing or damaged, so that nobody knows what the draws beside it are "
                "of: give another --out, or remove the folder"
            )
        changed = [key for key in settings if before.get(key) != settings[key]]
        if changed:
            raise ConfigError(
                f"{self.path} holds draws that differ in their {changed[0]}: give another "
                "--out, or remove the folder"
            )

    def open(self, settings: dict[str, Any]) -> None:
        """Make the folder, and write down what its draws depend on."""
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        write_atomic(self.path / SETTINGS, text)

    def has(self, piece: Piece) -> bool:
        return self.read(piece) is not None

    def write(self, piece: Piece, samples: Sequence[Sample]) -> None:
        """The piece appears under its name when it is whole."""
        images = torch.stack([sample.image for sample in samples])
        if images.ndim == 4:
            images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
        tensors = {
            "features": torch.stack([sample.feature for sample in samples]),
            "images": images,
            **{f"score.{name}": value for name, value in scores_of(samples).items()},
        }
        words = {
            "prompts": json.dumps([sample.prompt for sample in samples]),
            "labels": json.dumps(
                {kind: [s.labels[kind] for s in samples] for kind in samples[0].labels}
            ),
        }
        temporary = self.path / f".{piece.name}.partial"
        content = save({k: v.contiguous() for k, v in tensors.items()}, metadata=words)
        temporary.write_bytes(content)
        os.replace(temporary, self.path / piece.name)

    def read(self, piece: Piece) -> DrawnSamples | None:
        """None when it is not there, or damaged: it is drawn again then."""
        try:
            with safe_open(self.path / piece.name, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                words = file.metadata()
            scores = {
                name.removeprefix("score."): value
                for name, value in tensors.items()
                if name.startswith("score.")
            }
            measured = Measured(tuple(json.loads(words["prompts"])), tensors["features"], scores)
            labels = {kind: tuple(seen) for kind, seen in json.loads(words["labels"]).items()}
            return DrawnSamples(measured, tensors["images"], labels)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None

    def together(self, parts: Sequence[Piece]) -> DrawnSamples:
        """All samples of these pieces, which must be there."""
        found = [drawn for part in parts if (drawn := self.read(part)) is not None]
        assert len(found) == len(parts)
        names, kinds = found[0].measured.scores, found[0].labels
        measured = Measured(
            tuple(prompt for drawn in found for prompt in drawn.measured.prompts),
            torch.cat([drawn.measured.features for drawn in found]),
            {name: torch.cat([drawn.measured.scores[name] for drawn in found]) for name in names},
        )
        labels = {kind: tuple(s for drawn in found for s in drawn.labels[kind]) for kind in kinds}
        return DrawnSamples(measured, torch.cat([drawn.images for drawn in found]), labels)
