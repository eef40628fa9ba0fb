"""What a check finds, and what is examined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from ...config import Config
from ...core.types import Policy
from ...prompts import PromptSet
from ...rewards import NamedReward
from ..assemble import build_policy, build_prompts, build_reward, check_names

Status = Literal["ok", "warning", "failure", "skipped"]


@dataclass(frozen=True)
class Finding:
    """text: what was seen. fix: what to do about it, in words; empty when nothing."""

    status: Status
    text: str
    fix: str = ""


class Patient:
    """A run's settings, with its parts loaded when a check first asks for them.

    Asking raises ConfigError where a part cannot be had.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config = config
        self.device = device

    @cached_property
    def policy(self) -> Policy:
        check_names(self.config)
        return build_policy(self.config, self.device)

    @cached_property
    def reward(self) -> NamedReward:
        return build_reward(self.config, self.device)

    @cached_property
    def prompts(self) -> PromptSet:
        return build_prompts(self.config)


@dataclass(frozen=True)
class Exam:
    """needs: names of checks without which this one is skipped when they fail."""

    name: str
    run: Callable[[Patient], Finding]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    name: str
    finding: Finding
