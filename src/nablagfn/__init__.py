"""nablagfn: finetune diffusion models with a differentiable reward, keeping diversity and prior.

from nablagfn import finetune   # all that `nablagfn train` does
from nablagfn import Config, PromptSet, StableDiffusionPolicy, Trainer, resolve_reward   # its parts
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import moved

__version__ = "0.1.0"
moved.install()

if TYPE_CHECKING:
    from .commands.finetune import finetune
    from .config import Config, ConfigError
    from .models.stable_diffusion import StableDiffusionPolicy
    from .prompts import PromptSet
    from .recipes.options import load_config
    from .rewards import resolve as resolve_reward
    from .training.trainer import RunResult, Trainer, TrainingError

_HOMES = {
    "Config": (".config", "Config"),
    "ConfigError": (".config", "ConfigError"),
    "PromptSet": (".prompts", "PromptSet"),
    "RunResult": (".training.trainer", "RunResult"),
    "StableDiffusionPolicy": (".models.stable_diffusion", "StableDiffusionPolicy"),
    "Trainer": (".training.trainer", "Trainer"),
    "TrainingError": (".training.trainer", "TrainingError"),
    "finetune": (".commands.finetune", "finetune"),
    "load_config": (".recipes.options", "load_config"),
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
    "finetune",
    "load_config",
    "resolve_reward",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that the CLI and the report start without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'nablagfn' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module, __name__), attribute)
