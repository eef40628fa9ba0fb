"""`pytest -m gpu` with every test's outcome written as it is known."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from typing import Any

from .child import Case, Failed, Setup
from .rows import TESTS, Unavailable
from .runner import ROOT, end

FILES = {  # which tests, in how many processes, for how many seconds at most
    "core": (("records", "precision", "waiting", "memory", "switches"), 6, 140.0),
    "whole_runs": (("whole_runs",), 4, 150.0),
    "compiled": (("compiled",), 2, 150.0),
}
QUICK = "not precision and not 16"  # for a rehearsal


def run(setup: Setup, *, name: str) -> dict[str, Any]:
    """Counts, failures with their tracebacks and skips with their reasons.

    Raises Failed when one failed, or when the time ran out; Unavailable in a rehearsal that would
    take too long.
    """
    files, processes, seconds = FILES[name]
    if setup.small and name == "whole_runs":
        raise Unavailable(
            "left out of a rehearsal: minutes of a CPU, whose own tests have the same"
        )
    file = setup.out / TESTS
    before = len(read(file))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["-p", "suite.outcomes", *(f"tests/gpu/test_{part}.py" for part in files)]
    if setup.small:
        command += ["-k", QUICK]
    elif importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(processes)]
    env = {**os.environ, "NABLAGFN_OUTCOMES": str(file), "NABLAGFN_GPU": setup.device}
    code: int | None = None
    process = subprocess.Popen(command, env=env, cwd=ROOT)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=min(seconds, setup.left - 3))
    finally:
        end(process)  # with what its tests have started
    figures = counted(read(file)[before:])
    if code is None:
        raise Failed(f"the time was over after {sum(figures['counts'].values())} tests", figures)
    if code:
        text = "; ".join(figures["failures"]) or f"pytest ended with exit code {code}"
        raise Failed(text[:2000], figures)
    return figures


def read(file: Any) -> list[dict[str, Any]]:
    """What suite/outcomes.py wrote."""
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines]


def counted(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "counts": dict(Counter(row["outcome"] for row in rows)),
        "failures": {row["test"]: row["text"] for row in rows if row["outcome"] == "failed"},
        "skips": {row["test"]: row["text"] for row in rows if row["outcome"] == "skipped"},
        "seconds": {row["test"]: row["seconds"] for row in rows},
    }


CASES: dict[str, Case] = {name: partial(run, name=name) for name in FILES}
