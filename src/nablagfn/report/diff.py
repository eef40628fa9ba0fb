"""`nablagfn diff RUN_A RUN_B`: what differs between two runs, in a table (no torch)."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from ..runs.runfolder import RunFolder
from . import figures, tables
from .read import Record, read


def diff(a: RunFolder, b: RunFolder) -> Table:
    """Outcomes side by side, then settings and versions that differ.

    Raises ConfigError when one is no run folder, or damaged.
    """
    records = (read(a), read(b))
    table = Table(box=None)
    table.add_column("", overflow="fold")
    for record in records:
        table.add_column(Text(record.name), overflow="fold")
    for row in outcomes(*records):
        table.add_row(*map(Text, row))
    for title, rows in (
        ("settings", tables.differences(records)),
        ("versions", differing_versions(*records)),
    ):
        table.add_section()
        table.add_row(Text(title, style="bold"), *(() if rows else ("the same", "the same")))
        for row in rows:
            table.add_row(*map(Text, row))
    return table


def outcomes(a: Record, b: Record) -> list[list[str]]:
    """What each gained, kept and cost; rows that neither has are left out."""
    rows = []
    for name, values in zip(
        ("gain (σ)", "diversity kept", "recognised (points)", "path KL (nats)"),
        zip(*(_outcome(record) for record in (a, b)), strict=True),
        strict=True,
    ):
        if any(value != "–" for value in values):
            rows.append([name, *values])
    costs = [figures.cost(record) for record in (a, b)]
    rows.append(["updates", *(str(cost.updates) for cost in costs)])
    rows.append(["training time", *(cost.time for cost in costs)])
    rows.append(["model evaluations", *(cost.work for cost in costs)])
    return rows


def _outcome(record: Record) -> list[str]:
    found = figures.outcome(record)
    return [
        f"{found.gain.value:+.2f}" if found.gain else "–",
        f"{found.kept.value:.1%}" if found.kept else "–",
        "–" if found.recognised is None else f"{found.recognised:+.1f}",
        figures.number(found.path_kl),
    ]


def differing_versions(a: Record, b: Record) -> list[list[str]]:
    """Packages and machine; not the command line, whose options are settings."""
    keys = dict.fromkeys((*a.versions, *b.versions))
    pairs = ((key, a.versions.get(key, "–"), b.versions.get(key, "–")) for key in keys)
    return [list(row) for row in pairs if row[0] != "command" and row[1] != row[2]]
