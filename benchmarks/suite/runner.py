"""The suite's parent process: begins each step, watches its time, records what became of it.

It imports no torch, so that nothing of a step's trouble reaches it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from .rows import LOG, RESULTS, Row, Status, append, keep_within_limits, read
from .steps import Step, narrowed

BENCHMARKS = Path(__file__).resolve().parent.parent
ROOT = BENCHMARKS.parent
RUNNING = "running.json"  # of the case at hand: since when, and what it has found so far
SPARE = 3.0  # seconds of the budget that are kept for the end
Launch = Callable[[Step, float, Path], list[str]]


@dataclass(frozen=True)
class Suite:
    """One run of the suite.

    out: where results go. work: a folder for what need not be kept, emptied at the end. on: card,
    or "cpu". budget: seconds. launch: the command of (step, seconds, work).
    """

    out: Path
    work: Path
    on: str
    small: bool
    budget: float
    launch: Launch
    say: Callable[[str], None] = print

    def run(self, steps: Sequence[Step], done: Iterable[tuple[str, str]] = ()) -> Counter[str]:
        """Every step in turn; how many cases ended how."""
        started, known, before = time.monotonic(), set(done), len(self.rows())
        for step in steps:
            left = self.budget - SPARE - (time.monotonic() - started)
            todo = narrowed(step, [c for c in step.cases if (step.name, c) not in known])
            if not todo.cases:
                self.say(f"{step.name}: shown already")
            elif left < step.least:
                self._leave_out(todo, f"{max(left, 0):.0f} s are left of the budget")
            else:
                self.run_step(todo, min(step.limit, left))
        for text in keep_within_limits(self.out):
            self.say(text)
        return Counter(row.status for row in self.rows()[before:])

    def run_step(self, step: Step, seconds: float) -> None:
        """A process; begun again without a case that killed it."""
        until, before = time.monotonic() + seconds, len(self.rows())
        self.say(f"{step.name}: {step.why} (at most {seconds:.0f} s)")
        rest = step
        while rest.cases:
            left = until - time.monotonic()
            if left < 1:
                self._leave_out(rest, "the step's time was over")
                break
            code = self._process(rest, left)
            answered = {row.case for row in self.rows()[before:] if row.step == step.name}
            asked, rest = rest, narrowed(rest, [c for c in rest.cases if c not in answered])
            if rest.cases and code is None:
                rest = self._blame(rest, "timeout", f"ended after {seconds:.0f} s")
            elif rest.cases and (rest == asked or self._running().get("case") in rest.cases):
                rest = self._blame(rest, "failed", f"the process ended with exit code {code}")
            # else it died between two cases, of what an answered one left behind: begun again
        self._tell([row for row in self.rows()[before:] if row.step == step.name])

    def rows(self) -> list[Row]:
        file = self.out / RESULTS
        return read(file) if file.is_file() else []

    def _process(self, step: Step, seconds: float) -> int | None:
        """Its exit code; None when it ran out of time and was killed with all its children."""
        (self.work / RUNNING).unlink(missing_ok=True)
        with (self.out / LOG).open("ab") as log:
            log.write(f"\n===== {step.name}: {' '.join(step.cases)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                self.launch(step, seconds, self.work),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment(self.on),
                cwd=ROOT,
            )
            try:
                return process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                end(process)

    def _blame(self, step: Step, status: Status, error: str) -> Step:
        """Record the case that was running, with what it had found, or all when none had begun;
        the step without them."""
        running = self._running()
        case = running.get("case")
        blamed = [case] if case in step.cases else list(step.cases)
        seconds = round(max(0.0, time.time() - running.get("since", time.time())), 1)
        log = (self.out / LOG).read_bytes()[-3000:].decode("utf-8", "replace")
        for name in blamed:
            found = running.get("figures", {})
            append(
                self.out,
                Row(
                    step.name, name, status, seconds, self.on, self.small, found, f"{error}\n{log}"
                ),
            )
        return narrowed(step, [other for other in step.cases if other not in blamed])

    def _running(self) -> dict[str, Any]:
        """What the last process wrote of the case it was at; nothing when it never began one."""
        file = self.work / RUNNING
        return json.loads(file.read_text("utf-8")) if file.is_file() else {}

    def _leave_out(self, step: Step, why: str) -> None:
        self.say(f"{step.name}: left out, {why}")
        for case in step.cases:
            append(self.out, Row(step.name, case, "skipped", 0.0, self.on, self.small, error=why))

    def _tell(self, rows: Sequence[Row]) -> None:
        for row in rows:
            text = f"  {row.case}: {row.status}, {row.seconds:.1f} s"
            if row.error:
                text += f": {row.error.strip().splitlines()[-1][:160]}"
            self.say(text)


def environment(on: str) -> dict[str, str]:
    """Of every step: this checkout's nablagfn, no hub, output as it comes; on a CPU no GPU."""
    paths = [str(ROOT / "src"), str(ROOT), str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        **({"CUDA_VISIBLE_DEVICES": ""} if on == "cpu" else {}),
    }


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started, in whatever group or session they are."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for one in (*parent.children(recursive=True), parent):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def child_command(device: str, on: str, small: bool, out: Path) -> Launch:
    """How a step is begun: suite/child.py in a fresh Python."""

    def command(step: Step, seconds: float, work: Path) -> list[str]:
        job = {
            "step": step.name,
            "module": step.module,
            "cases": step.cases,
            "seconds": seconds,
            "device": device,
            "on": on,
            "small": small,
            "out": str(out),
            "work": str(work),
        }
        return [sys.executable, "-m", "suite.child", json.dumps(job)]

    return command


def temporary() -> tempfile.TemporaryDirectory[str]:
    """In memory where the machine has room for it there: SD1.5 is written and read once."""
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and os.statvfs(shared).f_bavail * os.statvfs(shared).f_frsize > 16e9
    return tempfile.TemporaryDirectory(prefix="gpu-suite-", dir=shared if roomy else None)
