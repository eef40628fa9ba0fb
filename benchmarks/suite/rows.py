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
TESTS, PICTURE = "tests.jsonl", "demo.png"
WEIGHTS, ANIMALS = "more.safetensors", "before-after.png"  # tools/tiny_animals/continue_unet.py's
MADE = (RESULTS, LOG, TESTS, PICTURE, WEIGHTS, ANIMALS)  # all that a folder of results may hold
MOST_BYTES = 16 * 2**20  # of each: what a lender of machines may carry back

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
    path = folder / RESULTS
    cut = path.is_file() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * cut + json.dumps(stamped, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(file: Path) -> list[Row]:
    """All whole rows; a line that was cut off, or that is no row, is left out."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return [row for row in map(_parsed, lines) if row is not None]


def _parsed(line: str) -> Row | None:
    try:
        row = Row(**json.loads(line))
    except (ValueError, TypeError):
        return None
    texts = (row.step, row.case, row.status, row.on, row.error, row.at)
    return row if all(isinstance(text, str) for text in texts) else None


def shown(rows: Iterable[Row], on: str, small: bool) -> set[tuple[str, str]]:
    """(step, case) of what is done already, on this card and with these settings."""
    return {row.key for row in rows if row.status == "done" and (row.on, row.small) == (on, small)}


def keep_within_limits(folder: Path) -> list[str]:
    """Cut the log to its end; says which other file of the suite's own is too large to carry."""
    log = folder / LOG
    if log.is_file() and log.stat().st_size > MOST_BYTES // 2:
        log.write_bytes(log.read_bytes()[-MOST_BYTES // 4 :])
    sizes = {name: (folder / name).stat().st_size for name in MADE if (folder / name).is_file()}
    return [
        f"{name} has {size / 2**20:.1f} MiB, more than {MOST_BYTES / 2**20:.0f}"
        for name, size in sizes.items()
        if size > MOST_BYTES
    ]
