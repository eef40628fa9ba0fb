"""`nablagfn plan`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..methods.registry import check_settings
from ..recipes.options import apply_overrides, load_config
from .common import UNUSABLE, command

if TYPE_CHECKING:
    import torch

    from ..commands.planner import RunPlan, Seconds

GB = 1e9


def add(commands: Any) -> None:
    parser = command(
        commands,
        "plan",
        plan,
        help="which settings fit into a device's memory, and what a run takes in memory and time; "
        "exit code 1: none",
        options=True,
    )
    parser.add_argument(
        "--memory",
        default="",
        help="of the GPU to plan for, as 24GB; default: what is free on this machine's device",
    )
    parser.add_argument(
        "--rate",
        default="",
        help="TFLOP/s that the device reaches in matrix products, for the time; default: each part "
        "is timed on this machine's device, and nothing is said of another",
    )


def plan(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print the prediction and the options to add."""
    config = load_config(arguments.config) if arguments.config else Config()
    apply_overrides(config, rest)
    check_settings(config)
    import torch

    from ..commands import planner
    from ..runs.progress import console
    from ..runtime.distributed import process_state

    rate = planner.parse_rate(arguments.rate) if arguments.rate else None
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
    if rate is None and arguments.memory:
        console.print(
            "how long: run this on the machine with that card and without --memory, or add "
            "--rate=TFLOP/S, what its matrix products reach"
        )
        return
    if rate is None:
        return show_time(config, found, prices(config, device, found))
    console.print(f"at {rate / 1e12:.3g} TFLOP/s throughout, the least is")
    show_time(config, found, planner.at_rate(found.prices, rate))


def prices(config: Config, device: torch.device, found: RunPlan) -> dict[str, Seconds]:
    """Price each part: timed here, or by the rate of matrix products where that is too slow."""
    import torch

    from ..commands import planner
    from ..runs.progress import console
    from ..runtime.distributed import weight_dtype

    rate = planner.matmul_rate(device, weight_dtype(config, device), 0.3)
    if not planner.too_long(found, rate):
        console.print("timing the parts here, with random weights")
        try:
            return planner.timed(config, device, found)
        except torch.OutOfMemoryError:
            console.print("they do not fit beside what else this device holds")
    console.print(
        "not timed, that would take minutes: at the rate of this machine's matrix products, "
        f"{rate / 1e12:.2g} TFLOP/s, the least is"
    )
    return planner.at_rate(found.prices, rate)


def show_time(config: Config, found: RunPlan, prices: Mapping[str, Seconds]) -> None:
    """Print the time of an update and of the run."""
    from ..commands import planner
    from ..runs.progress import console

    update = planner.total(found.passes, prices)
    inner = config.updates_per_epoch() * config.training.num_inner_epochs
    count = config.training.num_epochs * inner
    measuring = planner.total(planner.measuring_passes(config), prices)
    console.print(f"one update: {_duration(update)}")
    console.print(
        f"the run: {count} updates, {_duration(count * update)}; measuring its samples, "
        f"{_duration(measuring)}"
    )


def show(found: RunPlan, config: Config) -> None:
    """Two tables, and the options as they are typed."""
    from rich.table import Table

    from ..runs.progress import console

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


def _duration(seconds: float) -> str:
    """'4.2 s', '13 min' or '7.5 h'."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _typed(options: dict[str, Any]) -> str:
    return " ".join(f"--config.{key}={value}" for key, value in options.items())
