"""`nablagfn check-reward NAME`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ..config import set_option
from ..methods.registry import check_settings
from ..recipes.options import apply_overrides, load_config
from .common import UNUSABLE, command


def add(commands: Any) -> None:
    parser = command(
        commands,
        "check-reward",
        check_reward,
        help="is a reward fit for training? a table; exit code 1 when not",
        options=True,
    )
    parser.add_argument("reward", nargs="?", default="", help="default: experiment.reward_fn")
    parser.add_argument(
        "--samples",
        type=int,
        default=32,
        help="pictures of the base model to try it on, 8 of each prompt; 0: none",
    )


def check_reward(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print the table; exit code 1 when the reward is unusable. The default model is the shipped
    one."""
    config = load_config(arguments.config) if arguments.config else load_config("demo")
    apply_overrides(config, rest)
    if arguments.reward:
        set_option(config, "experiment.reward_fn", arguments.reward)
    check_settings(config)
    from ..commands.check_reward import check

    found = check(config, arguments.samples)
    print(found.table())
    if not found.usable:
        sys.exit(UNUSABLE)
