"""nablagfn: finetune diffusion models with a differentiable reward, keeping diversity and prior.

from nablagfn import finetune   # all that `nablagfn train` does
from nablagfn import state_target, TargetRequest   # what a run would aim at
from nablagfn import evaluate_run, EvaluationRequest   # how far from it the run has ended
from nablagfn import Config, PromptSet, StableDiffusionPolicy, Trainer, resolve_reward   # its parts
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import moved

__version__ = "0.1.0"
moved.install()

if TYPE_CHECKING:
    from .commands.evaluate import EvaluationRequest, evaluate_run
    from .commands.finetune import finetune
    from .commands.target import TargetRequest, TargetResult, state_target
    from .config import Config, ConfigError
    from .models.stable_diffusion import StableDiffusionPolicy
    from .prompts import PromptSet
    from .recipes.options import load_config
    from .rewards import resolve as resolve_reward
    from .training.trainer import RunResult, Trainer, TrainingError

_HOMES = {
    "Config": (".config", "Config"),
    "ConfigError": (".config", "ConfigError"),
    "EvaluationRequest": (".commands.evaluate", "EvaluationRequest"),
    "PromptSet": (".prompts", "PromptSet"),
    "RunResult": (".training.trainer", "RunResult"),
    "TargetRequest": (".commands.target", "TargetRequest"),
    "TargetResult": (".commands.target", "TargetResult"),
    "state_target": (".commands.target", "state_target"),
    "StableDiffusionPolicy": (".models.stable_diffusion", "StableDiffusionPolicy"),
    "Trainer": (".training.trainer", "Trainer"),
    "TrainingError": (".training.trainer", "TrainingError"),
    "evaluate_run": (".commands.evaluate", "evaluate_run"),
    "finetune": (".commands.finetune", "finetune"),
    "load_config": (".recipes.options", "load_config"),
    "resolve_reward": (".rewards", "resolve"),
}
__all__ = [
    "Config",
    "ConfigError",
    "EvaluationRequest",
    "PromptSet",
    "RunResult",
    "StableDiffusionPolicy",
    "TargetRequest",
    "TargetResult",
    "Trainer",
    "TrainingError",
    "evaluate_run",
    "finetune",
    "load_config",
    "resolve_reward",
    "state_target",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that the CLI and the report start without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'nablagfn' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module, __name__), attribute)
