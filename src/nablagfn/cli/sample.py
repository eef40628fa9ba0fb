"""`nablagfn sample RUN`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .common import command


def add(commands: Any) -> None:
    parser = command(
        commands, "sample", sample, help="draw base and finetuned pictures side by side"
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--prompts", nargs="+", default=[], help="default: some of the run's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--checkpoint", default="", help="a folder name in RUN/checkpoints")
    parser.add_argument(
        "--resample",
        type=int,
        default=0,
        metavar="K",
        help="draw K paths for each finetuned picture and keep those that the target "
        "p_pretrained·exp(βr) would have drawn; default: 0, off",
    )
    parser.add_argument("--out", type=Path, default=None, help="default: RUN/samples/….png")


def sample(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Base and finetuned pictures from the same seeds, one row of each per prompt."""
    from ..commands.assemble import side_by_side
    from ..runs.runfolder import RunFolder

    target = side_by_side(
        RunFolder(arguments.run),
        prompts=arguments.prompts,
        seeds=arguments.seeds,
        checkpoint=arguments.checkpoint,
        out=arguments.out,
        resample=arguments.resample,
    )
    print(f"pictures: {target} (for each prompt: base above, finetuned below)")
