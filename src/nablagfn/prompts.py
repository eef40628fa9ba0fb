"""Immutable prompt sets; draws are a function of a generator, never of hidden state (layer 3)."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .config import ConfigError, find_file

ASSETS = Path(__file__).parent / "assets"
BUILT_IN = {"simple_animals": ASSETS / "prompts" / "simple_animals.txt"}

NOT_SHIPPED = ("drawbench", "hpd_photo_painting")


@dataclass(frozen=True)
class PromptSet:
    """A fixed list of prompts. Raises ConfigError when empty or when an entry is blank."""

    prompts: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ConfigError("the prompt set is empty: give at least one prompt")
        if not all(isinstance(p, str) and p.strip() for p in self.prompts):
            raise ConfigError("every prompt must be a non-empty string")

    def __len__(self) -> int:
        return len(self.prompts)

    def draw(self, generator: torch.Generator) -> str:
        """One prompt, uniformly."""
        return self.prompts[int(torch.randint(len(self.prompts), (1,), generator=generator))]

    def spread(self, count: int) -> tuple[str, ...]:
        """`count` prompts evenly spaced over the set (repeating when the set is smaller)."""
        stride = max(1.0, len(self) / count)
        return tuple(self.prompts[int(i * stride) % len(self)] for i in range(count))


def read_prompts(path: Path) -> tuple[str, ...]:
    """Prompts of a .txt (one a line), .json (list) or .csv (first column, or `Prompts`/`prompt`).

    Raises ConfigError, one line, when the file cannot be read as such.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = _PARSERS[path.suffix.lower()](text)
    except KeyError:
        raise ConfigError(f"prompt file {path}: use a .txt, .json or .csv file") from None
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise ConfigError(f"prompt file {path}: cannot be read ({error})") from None
    if not rows or not all(isinstance(row, str) and row.strip() for row in rows):
        raise ConfigError(f"prompt file {path}: every entry must be a non-empty string")
    return tuple(row.strip() for row in rows)


def _from_text(text: str) -> Sequence[str]:
    return [line for line in text.splitlines() if line.strip()]


def _from_json(text: str) -> Sequence[str]:
    data = json.loads(text)
    return data if isinstance(data, list) else []


def _from_csv(text: str) -> Sequence[str]:
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    if not rows:
        return []
    header = [cell.strip().lower() for cell in rows[0]]
    for name in ("prompts", "prompt"):
        if name in header:
            column = header.index(name)
            return [row[column] for row in rows[1:] if len(row) > column]
    return [row[0] for row in rows]


_PARSERS = {".txt": _from_text, ".json": _from_json, ".csv": _from_csv}


def load_prompts(spec: str) -> PromptSet:
    """The prompt set named by `experiment.prompt_fn`: a built-in name or a file."""
    if spec in BUILT_IN:
        return PromptSet(read_prompts(BUILT_IN[spec]))
    path = find_file(spec)
    if path is not None:
        return PromptSet(read_prompts(path))
    if spec.lower().endswith(tuple(_PARSERS)):
        raise ConfigError(f"config.experiment.prompt_fn={spec!r}: no such file")
    if spec in NOT_SHIPPED:
        raise ConfigError(
            f"config.experiment.prompt_fn={spec!r}: this list is not shipped; give its prompts as "
            "a .txt, .json or .csv file"
        )
    near = difflib.get_close_matches(spec, BUILT_IN, n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"config.experiment.prompt_fn={spec!r} is unknown: did you mean {near}? "
        "(or give a .txt, .json or .csv file)"
    )
