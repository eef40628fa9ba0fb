"""Prompt files: .txt, .json and .csv."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..core.types import Metadata
from .sets import PromptSet

NAMES = ("prompts", "prompt")  # of the column, or the key, that holds the prompt


@dataclass(frozen=True)
class Entry:
    """One entry of a file: a prompt, and what stands beside it."""

    prompt: Any
    about: Metadata


def read_prompts(path: Path) -> PromptSet:
    """The prompts of a .txt (one a line), .json or .csv file.

    JSON is a list of strings, or of objects with the key `prompt`. A CSV has a column `Prompts` or
    `prompt`, else the first is taken. What else an object or a row has is told to the reward as the
    prompt's metadata. Raises ConfigError, one line, when the file cannot be read as such, when a
    row has not a cell for each of several columns, or when a prompt occurs twice with different
    metadata.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = PARSERS[path.suffix.lower()](text)
    except KeyError:
        raise ConfigError(f"prompt file {path}: use a .txt, .json or .csv file") from None
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise ConfigError(f"prompt file {path}: cannot be read ({error})") from None
    if not rows or not all(isinstance(row.prompt, str) and row.prompt.strip() for row in rows):
        raise ConfigError(f"prompt file {path}: every entry must be a non-empty string")
    about: dict[str, Metadata] = {}
    for row in rows:
        known = about.setdefault(row.prompt.strip(), row.about)
        if known != row.about:
            raise ConfigError(
                f"prompt file {path}: {row.prompt.strip()!r} occurs twice and says different "
                "things beside it: keep one"
            )
    told = {prompt: values for prompt, values in about.items() if values}
    return PromptSet(tuple(row.prompt.strip() for row in rows), about=told)


def _from_text(text: str) -> Sequence[Entry]:
    return [Entry(line, {}) for line in text.splitlines() if line.strip()]


def _from_json(text: str) -> Sequence[Entry]:
    data = json.loads(text)
    return [_entry(item) for item in data] if isinstance(data, list) else []


def _entry(item: Any) -> Entry:
    if not isinstance(item, dict):
        return Entry(item, {})
    name = next((name for name in reversed(NAMES) if name in item), "")
    return Entry(item.get(name), {key: value for key, value in item.items() if key != name})


def _from_csv(text: str) -> Sequence[Entry]:
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    if not rows:
        return []
    header = [cell.strip().lower() for cell in rows[0]]
    for name in NAMES:
        if name in header:
            column = header.index(name)
            others = {i: cell.strip() for i, cell in enumerate(rows[0]) if i != column}
            others = {i: key for i, key in others.items() if key}
            if others:
                _check_table(rows, others)
            return [
                Entry(row[column], {key: row[i] for i, key in others.items()})
                for row in rows[1:]
                if len(row) > column
            ]
    return [Entry(row[0], {}) for row in rows]


def _check_table(rows: Sequence[Sequence[str]], others: Mapping[int, str]) -> None:
    """Raises ValueError when a cell may stand in the wrong column."""
    twice = [key for key, count in Counter(others.values()).items() if count > 1]
    if twice:
        raise ValueError(f"two columns are called {twice[0]!r}: rename one")
    for row in rows[1:]:
        if len(row) <= max(others) or any(cell.strip() for cell in row[len(rows[0]) :]):
            raise ValueError(
                f"the row {','.join(row)[:60]!r} has {len(row)} cells, the header {len(rows[0])}: "
                "put a prompt that has commas in quotes"
            )


PARSERS: dict[str, Callable[[str], Sequence[Entry]]] = {
    ".txt": _from_text,
    ".json": _from_json,
    ".csv": _from_csv,
}
