"""`nablagfn report RUN…`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import ConfigError
from .common import command

COMPARISON = Path("comparison.html")


def add(commands: Any) -> None:
    parser = command(
        commands, "report", report, help="write RUN/report.html anew, or compare several runs"
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="run", help="a run folder")
    parser.add_argument(
        "--out", type=Path, default=None, help=f"of several runs; default: ./{COMPARISON}"
    )
    parser.add_argument(
        "--target",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="of several runs: a folder of `nablagfn target`, whose frontier is drawn above them",
    )


def report(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """RUN/report.html from the run's files, or one file about several runs."""
    from ..report import build, compare
    from ..runs.runfolder import RunFolder

    folders = [RunFolder(run) for run in arguments.runs]
    if len(folders) > 1:
        made = compare(folders, arguments.out or COMPARISON, arguments.target)
        print(f"comparison: {made}")
    elif arguments.target is not None:
        raise ConfigError("--target is for several runs; that of one is RUN/target")
    elif arguments.out is not None:
        raise ConfigError("--out is for several runs; the report of one is RUN/report.html")
    else:
        print(f"report: {build(folders[0])}")
