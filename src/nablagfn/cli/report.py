"""`nablagfn report RUN`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .common import command


def add(commands: Any) -> None:
    parser = command(commands, "report", write_report, help="write RUN/report.html anew")
    parser.add_argument("run", type=Path, help="a run folder")


def write_report(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """RUN/report.html from the run's files."""
    from ..report import build
    from ..runfolder import RunFolder

    print(f"report: {build(RunFolder(arguments.run))}")
