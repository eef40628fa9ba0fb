"""nablagfn: finetune diffusion models with a differentiable reward, keeping diversity and prior.

from nablagfn import Config, PromptSet, StableDiffusionPolicy, Trainer, resolve_reward
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import Config, ConfigError
    from .models.stable_diffusion import StableDiffusionPolicy
    from .options import load_config
    from .prompts import PromptSet
    from .rewards import resolve as resolve_reward
    from .trainer import RunResult, Trainer, TrainingError

_HOMES = {
    "Config": (".config", "Config"),
    "ConfigError": (".config", "ConfigError"),
    "PromptSet": (".prompts", "PromptSet"),
    "RunResult": (".trainer", "RunResult"),
    "StableDiffusionPolicy": (".models.stable_diffusion", "StableDiffusionPolicy"),
    "Trainer": (".trainer", "Trainer"),
    "TrainingError": (".trainer", "TrainingError"),
    "load_config": (".options", "load_config"),
    "resolve_reward": (".rewards", "resolve"),
}
__all__ = [
    "Config",
    "ConfigError",
    "PromptSet",
    "RunResult",
    "StableDiffusionPolicy",
    "Trainer",
    "TrainingError",
    "load_config",
    "resolve_reward",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that the CLI and the report start without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'nablagfn' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module, __name__), attribute)
