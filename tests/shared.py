"""Data that is not part of the repository: prompt lists and weights, found where a developer has
them. Tests that need them skip with a reason."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

BESIDE = Path(__file__).resolve().parents[2] / "shared"


def folder(variable: str, name: str) -> Path | None:
    """$variable, or ../shared/NAME beside the checkout."""
    for path in (os.environ.get(variable), BESIDE / name):
        if path and Path(path).is_dir():
            return Path(path)
    return None


PROMPTS = folder("NABLAGFN_PROMPTS", "prompts")
WEIGHTS = folder("NABLAGFN_WEIGHTS", "weights")
needs_prompts = pytest.mark.skipif(
    PROMPTS is None, reason="no prompt lists: set NABLAGFN_PROMPTS (see docs/prompts.md)"
)
needs_weights = pytest.mark.skipif(
    WEIGHTS is None, reason="no weights: set NABLAGFN_WEIGHTS to a folder with the LAION head"
)


def prompt_lists() -> list[str]:
    """Every prompt of DrawBench and HPDv2, as written in the files; empty without the lists."""
    if PROMPTS is None:
        return []
    found: list[str] = []
    for file in sorted(PROMPTS.rglob("*.json")):
        found += json.loads(file.read_text(encoding="utf-8"))
    with (PROMPTS / "DrawBench Prompts.csv").open(encoding="utf-8", newline="") as stream:
        found += [row["Prompts"] for row in csv.DictReader(stream)]
    return found
