"""`nablagfn.finetune`: the whole of `nablagfn train` as one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import Config, merge
from ..core.types import Reward
from ..methods.registry import check_settings
from ..prompts import PromptSet
from ..recipes.options import load_config
from ..rewards import named
from ..runs.runfolder import RunFolder, check_same_settings, run_folder
from ..training.trainer import Callback, RunResult
from .assemble import build_trainer


def finetune(
    config: Config | str | Path | Mapping[str, Any],
    *,
    reward: Reward | Callable[..., Tensor] | str | None = None,
    prompts: PromptSet | Sequence[str] | str | None = None,
    callbacks: Sequence[Callback] = (),
    folder: str | Path | None = None,
    exp_name: str = "",
) -> RunResult:
    """Finetune as `nablagfn train` does, and return what came of it.

    config: options, what --config takes (a name or a file), or a nested mapping. reward: a callable
    (images [B, 3, H, W], prompts, metadata) -> [B], or what `experiment.reward_fn` takes; by
    default that of the config. prompts: a set, a list of strings, or what `experiment.prompt_fn`
    takes. callbacks: called after each update with its number and its row of metrics.jsonl; True
    ends the run after the epoch. folder: the run folder, continued if the run is there; by default
    `saving.output_dir`/REWARD_EXPNAME_seedS.
    Raises ConfigError, one line, before anything is written; TrainingError when training fails.
    """
    settled = _settings(config)
    if isinstance(reward, str):
        settled.experiment.reward_fn = reward
    given = None if reward is None or isinstance(reward, str) else named(reward)
    if given is not None:
        settled.experiment.reward_fn = given.name
    chosen = _prompts(settled, prompts)
    check_settings(settled)
    place = RunFolder(Path(folder)) if folder is not None else run_folder(settled, exp_name)
    if place.exists:
        check_same_settings(place.config(), settled, place.path)
    trainer = build_trainer(settled, place, reward=given, prompts=chosen, callbacks=callbacks)
    return trainer.fit()


def _settings(config: Config | str | Path | Mapping[str, Any]) -> Config:
    """A config of its own, whatever it was given as."""
    if isinstance(config, Config):
        return config.model_copy(deep=True)
    if isinstance(config, Mapping):
        return merge(Config(), dict(config))
    return load_config(os.fspath(config))


def _prompts(config: Config, prompts: PromptSet | Sequence[str] | str | None) -> PromptSet | None:
    if isinstance(prompts, str):
        config.experiment.prompt_fn = prompts
        return None
    if prompts is None or isinstance(prompts, PromptSet):
        return prompts
    return PromptSet(tuple(prompts))
