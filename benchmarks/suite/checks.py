"""`pytest -m gpu` with every test's outcome written as it is known."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

from .child import Failed, Setup
from .runner import ROOT

FILE = "tests.jsonl"
QUICK = "not whole_runs and not precision and not 16"  # for a rehearsal


def run(setup: Setup) -> dict[str, Any]:
    """Counts, failures with their tracebacks and skips with their reasons.

    Raises Failed when one failed, or when the time ran out.
    """
    file = setup.work / FILE
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
    command += ["-p", "suite.outcomes", "-p", "no:cacheprovider"]
    if setup.small:
        command += ["-k", QUICK]
    elif importlib.util.find_spec("xdist") is not None:
        command += ["-n", "4", "--dist", "loadfile"]
    env = {**os.environ, "NABLAGFN_OUTCOMES": str(file), "NABLAGFN_GPU": setup.device}
    try:
        done = subprocess.run(command, env=env, cwd=ROOT, timeout=setup.left - 3, check=False)
        code: int | None = done.returncode
    except subprocess.TimeoutExpired:
        code = None
    figures = counted(file.read_text("utf-8").splitlines() if file.is_file() else [])
    if code is None:
        raise Failed(f"the time was over after {sum(figures['counts'].values())} tests", figures)
    if code:
        text = "; ".join(figures["failures"]) or f"pytest ended with exit code {code}"
        raise Failed(text[:2000], figures)
    return figures


def counted(lines: list[str]) -> dict[str, Any]:
    """What suite/outcomes.py wrote."""
    rows = [json.loads(line) for line in lines]
    return {
        "counts": dict(Counter(row["outcome"] for row in rows)),
        "failures": {row["test"]: row["text"] for row in rows if row["outcome"] == "failed"},
        "skips": {row["test"]: row["text"] for row in rows if row["outcome"] == "skipped"},
        "seconds": {row["test"]: row["seconds"] for row in rows},
    }


CASES = {"pytest": run}
