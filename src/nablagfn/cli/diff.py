"""`nablagfn diff RUN_A RUN_B`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .common import command


def add(commands: Any) -> None:
    parser = command(commands, "diff", diff, help="settings and outcomes in which two runs differ")
    parser.add_argument("a", type=Path, help="a run folder")
    parser.add_argument("b", type=Path, help="another")


def diff(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print what differs between the runs as a table."""
    from ..report.diff import diff
    from ..runs.progress import console
    from ..runs.runfolder import RunFolder

    console.print(diff(RunFolder(arguments.a), RunFolder(arguments.b)))
