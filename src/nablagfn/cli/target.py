"""`nablagfn target [RUN]`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..recipes.options import apply_overrides, load_config
from .common import command


def add(commands: Any) -> None:
    parser = command(
        commands,
        "target",
        target,
        help="the exact target p_pretrained·exp(βr), before any training: best reward for each KL",
        options=True,
    )
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="of a run; else --config")
    parser.add_argument(
        "--betas",
        nargs="+",
        type=float,
        default=[],
        metavar="β",
        help="default: 0.25, 0.5, 1, 2 and 4 over the standard deviation of the rewards",
    )
    parser.add_argument(
        "--images-per-prompt",
        type=int,
        default=0,
        metavar="M",
        help="default: 64, which shows targets up to log M − 1 = 3.2 nats; in a world those of "
        "evaluation.images_per_prompt",
    )
    parser.add_argument(
        "--num-prompts", type=int, default=0, help="so many of them, evenly spread; default: all"
    )
    parser.add_argument(
        "--kl", type=float, default=None, metavar="NATS", help="which β is so far from the base?"
    )
    parser.add_argument(
        "--gain",
        default="",
        metavar="GAIN",
        help="which β gains so much? in standard deviations of the reward (1sd), or reward (0.4)",
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="default: RUN/target, or target_… beside the runs"
    )


def target(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print the table, and where its files are."""
    from ..commands.target import Budget, TargetRequest, state_target, tables
    from ..methods.registry import target_of
    from ..runs.progress import console, note
    from ..runs.runfolder import RunFolder

    run = None if arguments.run is None else RunFolder(arguments.run)
    if run is not None and arguments.config:
        raise ConfigError("give a RUN or --config, not both")
    config = load_config(arguments.config or "demo") if run is None else run.config()
    apply_overrides(config, rest)
    request = TargetRequest(
        betas=tuple(arguments.betas),
        images_per_prompt=arguments.images_per_prompt,
        num_prompts=arguments.num_prompts,
        budget=Budget.read(arguments.kl, arguments.gain),
        out=arguments.out,
    )
    found = state_target(config, request, run)
    if os.environ.get("RANK", "0") != "0":
        return
    console.print(*tables(found))
    for text in found.warnings:
        note(text)
    if (arguments.kl is not None or arguments.gain) and target_of(config).beta is not None:
        console.print(f"β for this budget: --config.model.reward_scale={found.chosen:.4g}")
    print(f"{found.folder}: {', '.join(found.files)}")
