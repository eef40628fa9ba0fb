"""`nablagfn export RUN`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .common import command

FORMATS = ("diffusers", "kohya", "fused", "all")


def add(commands: Any) -> None:
    parser = command(
        commands, "export", export, help="the LoRA or the whole model for other programs, proved"
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument(
        "--checkpoint",
        default="",
        help="a folder name in RUN/checkpoints; default: the guard's best, else the newest",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="diffusers",
        help="diffusers: LoRA (default); kohya: LoRA for ComfyUI and AUTOMATIC1111; fused: the "
        "whole pipeline; all",
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="a new folder; default: RUN/export/CHECKPOINT"
    )


def export(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Write the forms, and print how each was proved."""
    from ..commands.export import export
    from ..runs.runfolder import RunFolder

    done = export(
        RunFolder(arguments.run),
        checkpoint=arguments.checkpoint,
        form=arguments.format,
        out=arguments.out,
    )
    for proof in done.proofs:
        print(proof)
    print(f"exported: {done.folder}")
