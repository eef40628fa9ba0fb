"""`nablagfn plan`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..options import apply_overrides, load_config
from .common import UNUSABLE, command

if TYPE_CHECKING:
    from ..planner import Plan

GB = 1e9


def add(commands: Any) -> None:
    parser = command(
        commands,
        "plan",
        plan,
        help="which settings fit into a device's memory, and what a run takes; exit code 1: none",
        options=True,
    )
    parser.add_argument(
        "--memory",
        default="",
        help="of the GPU to plan for, as 24GB; default: what is free on this machine's device",
    )


def plan(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print the prediction and the options to add."""
    config = load_config(arguments.config) if arguments.config else Config()
    apply_overrides(config, rest)
    config.check()
    import torch

    from .. import planner
    from ..distributed import process_state
    from ..progress import console

    if arguments.memory:
        memory, device = planner.parse_memory(arguments.memory), torch.device("cuda")
    else:
        device = process_state().device
        memory = planner.free_memory(device)
    console.print("counting the parts of the run; no weights are loaded")
    found = planner.plan(config, memory, device)
    show(found, config)
    if found.setting is None:
        sys.exit(UNUSABLE)


def show(found: Plan, config: Config) -> None:
    """Two tables, and the options as they are typed."""
    from rich.table import Table

    from ..progress import console

    fixed = Table("always there", "GB")
    for name, value in found.fixed.items():
        fixed.add_row(name, f"{value / GB:.2f}")
    moments = Table("beside it, at its most", "GB")
    for name, value in found.moments.items():
        moments.add_row(name, f"{value / GB:.2f}")
    console.print(fixed, moments)
    work = f"{found.eps:.0f} guided evaluations, {found.flops / 1e12:.1f} TFLOP"
    console.print(f"one update and process: {work}")
    console.print(f"predicted peak {found.peak / GB:.1f} GB of {found.usable / GB:.1f} GB")
    if found.setting is None:
        console.print(
            "this does not fit with one transition at a time: try --config.model.no_flow=True, "
            "another --config.experiment.reward_fn, or a larger card"
        )
        return
    options = found.options(config)
    console.print("fits with: " + (_typed(options) if options else "the settings as they are"))


def _typed(options: dict[str, Any]) -> str:
    return " ".join(f"--config.{key}={value}" for key, value in options.items())
