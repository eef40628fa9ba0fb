"""Immutable prompt sets; draws are a function of a generator, never of hidden state."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..config import ConfigError
from ..core.types import Metadata


@dataclass(frozen=True)
class PromptSet:
    """A fixed list of prompts to train on, and others held out for measuring (may be none).

    about: what a prompt file says beside a prompt (its other columns), which rewards are given as
    metadata: JSON values, since the run folder keeps them. Raises ConfigError when the set is
    empty, when an entry is blank, or when a value is not JSON.
    """

    prompts: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    about: Mapping[str, Metadata] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("prompts", "held_out"):  # a list given would stay open to changes
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.prompts:
            raise ConfigError("the prompt set is empty: give at least one prompt")
        if not all(isinstance(p, str) and p.strip() for p in (*self.prompts, *self.held_out)):
            raise ConfigError("every prompt must be a non-empty string")
        try:  # a copy, as whoever reads the run folder will see it
            object.__setattr__(self, "about", json.loads(json.dumps(dict(self.about))))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"the metadata of a prompt must be JSON, as the run folder keeps it: {error}"
            ) from None

    def __len__(self) -> int:
        return len(self.prompts)

    def draw(self, generator: torch.Generator) -> str:
        """One prompt, uniformly; never one that is held out."""
        return self.prompts[int(torch.randint(len(self.prompts), (1,), generator=generator))]

    def spread(self, count: int) -> tuple[str, ...]:
        """`count` prompts evenly spaced over the set (repeating when the set is smaller)."""
        stride = max(1.0, len(self) / count)
        return tuple(self.prompts[int(i * stride) % len(self)] for i in range(count))

    def metadata(self, prompts: Sequence[str]) -> list[Metadata]:
        """What is known about each of these prompts; empty mappings for the others."""
        return [self.about.get(prompt, {}) for prompt in prompts]

    @property
    def evaluation(self) -> PromptSet:
        """What is measured: the held-out prompts, or the set itself where none are held out."""
        return PromptSet(self.held_out, about=self.about) if self.held_out else self
