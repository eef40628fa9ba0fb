"""`nablagfn doctor`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..recipes.options import apply_overrides, load_config
from .common import UNUSABLE, command

if TYPE_CHECKING:
    from ..commands.doctor import Line

COLOURS = {"ok": "green", "warning": "yellow", "failure": "red", "skipped": "dim"}


def add(commands: Any) -> None:
    command(
        commands,
        "doctor",
        doctor,
        help="can this run work on this machine? a table with fixes; exit code 1 when not",
        options=True,
    )


def doctor(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print the table; exit code 1 on a failure."""
    config = load_config(arguments.config) if arguments.config else Config()
    apply_overrides(config, rest)
    from ..commands.doctor import CHECKS, examine
    from ..runs.progress import Bar
    from ..runtime.distributed import process_state

    state, rows = process_state(), []
    with Bar("examining", len(CHECKS), show=state.is_main_process) as bar:
        for row in examine(config, state.device):
            rows.append(row)
            bar.note(row.name)
            bar.advance()
    if state.is_main_process:
        show(rows)
    if any(row.finding.status == "failure" for row in rows):
        sys.exit(UNUSABLE)


def show(rows: Sequence[Line]) -> None:
    """One row a check: what was seen and, below it, the fix."""
    from rich.table import Table
    from rich.text import Text

    from ..runs.progress import console

    table = Table("check", "", "found", "fix", show_lines=True)
    for row in rows:
        found = row.finding
        status = Text(found.status, COLOURS[found.status])
        table.add_row(row.name, status, Text(found.text), Text(found.fix))
    console.print(table)
