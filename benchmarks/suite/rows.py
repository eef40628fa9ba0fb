"""The suite's results: one JSON line a case, written when it is known. Imports no torch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

RESULTS = "results.jsonl"
LOG = "suite.log"
MOST_FILES, MOST_BYTES = 8, 16 * 2**20  # what a lender of machines may carry back

Status = Literal["done", "failed", "timeout", "unavailable", "skipped"]


class Unavailable(Exception):
    """What a case needs is not on this machine; says what."""


@dataclass(frozen=True)
class Row:
    """What became of one case.

    seconds: of the case alone. figures: what it found. error: the traceback, or one line. on: the
    card, or "cpu". small: the rehearsal's settings. at: date and time, UTC.
    """

    step: str
    case: str
    status: Status
    seconds: float
    on: str
    small: bool
    figures: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    at: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.step, self.case


def append(folder: Path, row: Row) -> None:
    """Write the row and see that it is on the disk."""
    stamped = {**asdict(row), "at": row.at or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    with (folder / RESULTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(stamped) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(file: Path) -> list[Row]:
    """All whole rows; a line that was cut off is left out."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            found.append(Row(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            continue
    return found


def shown(rows: Iterable[Row], on: str, small: bool) -> set[tuple[str, str]]:
    """(step, case) of what is done already, on this card and with these settings."""
    return {row.key for row in rows if row.status == "done" and (row.on, row.small) == (on, small)}


def keep_within_limits(folder: Path) -> list[str]:
    """Cut the log to its end and take away what nobody would carry back; says what was taken."""
    log = folder / LOG
    if log.is_file() and log.stat().st_size > MOST_BYTES // 2:
        log.write_bytes(log.read_bytes()[-MOST_BYTES // 4 :])
    said = []
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    for place, path in enumerate(files):
        if place >= MOST_FILES or path.stat().st_size > MOST_BYTES:
            said.append(f"{path.name} was taken away: {path.stat().st_size / 2**20:.1f} MiB")
            path.unlink()
    return said
