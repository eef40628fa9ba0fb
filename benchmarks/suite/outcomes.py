"""A pytest plugin: each test's outcome as a JSON line of the file $NABLAGFN_OUTCOMES, at once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def text_of(report: Any) -> str:
    """The reason of a skip, or the end of a traceback."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    return report.longreprtext[-3000:]


def pytest_runtest_logreport(report: Any) -> None:
    """A test counts once: by its call, or by what kept it from being called."""
    if "PYTEST_XDIST_WORKER" in os.environ or not (report.when == "call" or not report.passed):
        return
    row = {
        "test": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(report.duration, 2),
        "text": "" if report.passed else text_of(report),
    }
    with Path(os.environ["NABLAGFN_OUTCOMES"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
