"""`nablagfn train`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..config import Config, ConfigError, set_option
from ..methods.registry import check_settings
from ..recipes.options import apply_overrides, load_config
from .common import command, fail

if TYPE_CHECKING:
    from ..runs.runfolder import RunFolder
    from ..training.trainer import RunResult


def add(commands: Any) -> None:
    parser = command(
        commands,
        "train",
        train,
        help="finetune a model (continues the same run when started again)",
        options=True,
    )
    parser.add_argument("--seed", type=int, default=None, help="seed of the run (default 0)")
    parser.add_argument("--exp_name", default="", help="name of the experiment, for the run folder")
    parser.add_argument(
        "--resume",
        choices=("auto", "never", "must"),
        default="auto",
        help="auto: continue the run if its folder exists; never: a new folder; must: or fail",
    )


def resolve_config(arguments: argparse.Namespace, rest: Sequence[str]) -> Config:
    """Config file, then overrides, then --seed."""
    config = load_config(arguments.config) if arguments.config else Config()
    apply_overrides(config, rest)
    if arguments.seed is not None:
        set_option(config, "seed", arguments.seed)
    check_settings(config)
    return config


def choose_folder(config: Config, exp_name: str, resume: str) -> RunFolder:
    """Choose the run folder by the --resume policy. Raises ConfigError for `must` without a run."""
    from ..runs.runfolder import check_same_settings, fresh_folder, run_folder

    folder = run_folder(config, exp_name)
    if resume == "never":
        return fresh_folder(folder)
    if resume == "must" and not folder.exists:
        raise ConfigError(f"--resume=must: there is no run in {folder.path}")
    if folder.exists:
        check_same_settings(folder.config(), config, folder.path)
    return folder


def train(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Everything is checked before the run folder is made."""
    config = resolve_config(arguments, rest)
    folder = choose_folder(config, arguments.exp_name, arguments.resume)
    from ..commands.assemble import build_trainer
    from ..training.trainer import TrainingError

    trainer = build_trainer(config, folder)
    try:
        result = trainer.fit()
    except TrainingError as error:
        fail(str(error), alone=error.alone)
    if trainer.accelerator.is_main_process:
        summarise(result)


def summarise(result: RunResult) -> None:
    """Print before and after in three lines, and where the report is."""
    if not result.finished:
        print(f"stopped after update {result.updates}; the same command continues it")
    before, after = result.before, result.after
    if before and after:
        gain = (after.reward_mean - before.reward_mean) / max(before.reward_std, 1e-12)
        kept = after.diversity / max(before.diversity, 1e-12)
        print(
            f"reward      {before.reward_mean:8.3f} -> {after.reward_mean:8.3f}  "
            f"({gain:+.2f} standard deviations of the base model's rewards)"
        )
        print(f"diversity   {before.diversity:8.3f} -> {after.diversity:8.3f}  ({kept:.0%} kept)")
        if before.recognised is not None and after.recognised is not None:
            print(f"recognised  {before.recognised:8.1%} -> {after.recognised:8.1%}")
        for name, value in after.others.items():
            print(f"{name:<22} {before.others[name]:8.4f} -> {value:8.4f}")
    print(f"report: {result.report}")
