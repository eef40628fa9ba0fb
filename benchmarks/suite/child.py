"""One step of the suite in a process of its own: python -m suite.child JOB (JSON)."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .rows import Row, Status, Unavailable, append
from .runner import RUNNING

Figures = Mapping[str, Any]
Case = Callable[["Setup"], Figures]


@dataclass(frozen=True)
class Setup:
    """What a case is told.

    device: "cuda" or "cpu". small: tiny-animals in place of SD1.5, and less of everything. out:
    for what is kept, work: for what is not; both exist. deadline: of time.monotonic().
    """

    device: str
    small: bool
    out: Path
    work: Path
    deadline: float
    running: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def begin(self, case: str) -> None:
        """From now on this case is at work."""
        self.running.clear()
        self.running.update(case=case, since=time.time())
        self.note({})

    def note(self, figures: Figures) -> None:
        """What the case has found so far: recorded if it is cut off."""
        text = json.dumps({**self.running, "figures": figures})
        partial = self.work / f"{RUNNING}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.work / RUNNING)


def main(job: Mapping[str, Any]) -> None:
    """Every case of the job; a case that raises is recorded and the next begins."""
    setup = Setup(
        job["device"],
        job["small"],
        Path(job["out"]),
        Path(job["work"]),
        time.monotonic() + job["seconds"],
    )
    cases: Mapping[str, Case] = importlib.import_module(f"suite.{job['module']}").CASES
    for name in job["cases"]:
        setup.begin(name)
        started = time.monotonic()
        status, figures, error = attempt(cases[name], setup)
        seconds = round(time.monotonic() - started, 2)
        append(
            setup.out,
            Row(job["step"], name, status, seconds, job["on"], setup.small, figures, error),
        )
        print(f"{job['step']}, {name}: {status}, {seconds} s\n{error}", flush=True)
        free()


def attempt(case: Case, setup: Setup) -> tuple[Status, Figures, str]:
    try:
        return "done", case(setup), ""
    except Unavailable as lacking:
        return "unavailable", {}, str(lacking)
    except Failed as found:
        return "failed", found.figures, str(found)
    except BaseException:  # a SystemExit of the command line, too, is a result
        return "failed", {}, traceback.format_exc()[-6000:]


class Failed(Exception):
    """A case that ended with figures, and not as it should."""

    def __init__(self, text: str, figures: Figures) -> None:
        super().__init__(text)
        self.figures = figures


def free() -> None:
    """Nothing of one case lies in the next one's memory."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    from suite.child import main as run  # as a module, so that its exceptions are the steps' own

    run(json.loads(sys.argv[1]))
