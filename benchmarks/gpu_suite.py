"""Everything that a GPU has to show, by one command that needs no hand and loses nothing.

    python benchmarks/gpu_suite.py --budget 480 --out DIR
    python benchmarks/gpu_suite.py --list
    python benchmarks/gpu_suite.py --budget 300 --out DIR2 --skip-done DIR/results.jsonl
    python benchmarks/gpu_suite.py --device cpu --small --budget 240 --out DIR      a rehearsal

An ordered list of steps, the most important first, each a process with a time limit of its own.
Every case is written to DIR/results.jsonl when it is known: a run that is cut off has lost the case
that it was at. What fails is recorded with its traceback, and the next begins. The suite writes at
most six files of 16 MiB to DIR, and touches no other there. `python benchmarks/gpu_report.py` makes
docs/gpu/README.md of the results.
"""

from __future__ import annotations

import argparse
import platform
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from suite.rows import LOG, RESULTS, Row, append, read, shown
from suite.runner import ROOT, Suite, child_command, temporary
from suite.steps import Step, select


def commit() -> str:
    """Of the checkout; with a + where it was changed. Empty without git."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return ""
    return name.stdout.strip()[:12] + ("+" if changed.stdout.strip() else "")


def card(device: str) -> str:
    """The GPU's name, by the driver's own tool: this process needs no torch."""
    if device != "cuda":
        return device
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    ask = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
    for tool in (command, ask):  # the second where the driver's tool is not at hand
        try:
            found = subprocess.run(tool, capture_output=True, text=True, check=True)
            return found.stdout.splitlines()[0].strip()
        except (OSError, subprocess.CalledProcessError, IndexError):
            continue
    sys.exit("gpu_suite: no NVIDIA GPU here; --device cpu --small rehearses")


def listed(steps: list[Step]) -> str:
    rows = [f"{step.name:10} {step.limit:5.0f} s  {step.why}" for step in steps]
    return "\n".join(
        f"{row}\n{'':20}{' '.join(step.cases)}" for row, step in zip(rows, steps, strict=True)
    )


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, help="folder of the results (needed but for --list)")
    p.add_argument("--budget", type=float, default=480, help="seconds for everything")
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    p.add_argument(
        "--small", action="store_true", help="tiny-animals in place of SD1.5; less of all"
    )
    some: dict[str, Any] = {"nargs": "+", "default": [], "action": "extend"}
    p.add_argument("--only", metavar="STEP[:CASE]", **some)
    p.add_argument("--skip-done", type=Path, metavar="FILE", **some)
    p.add_argument("--commit", default=commit(), help="of this checkout, where git is not at hand")
    p.add_argument("--list", action="store_true")
    given = p.parse_args(arguments)
    if given.out is None and not given.list:
        p.error("--out DIR is needed")
    if not 0 < given.budget < float("inf"):
        p.error(f"--budget {given.budget}: give seconds, more than 0")
    if given.out is not None and given.out.exists() and not given.out.is_dir():
        p.error(f"--out {given.out}: that is a file, give a folder")
    missing = next((file for file in given.skip_done if not file.is_file()), None)
    if missing is not None:
        p.error(f"--skip-done {missing}: there is no such file")
    try:
        steps = select(given.only)
    except ValueError as error:
        p.error(str(error))
    given.steps = [rehearsed(step) for step in steps] if given.small else steps
    return given


def rehearsed(step: Step) -> Step:
    """With the time that a CPU may take, which other work may share."""
    return replace(step, least=step.least / 2, limit=4 * step.limit)


def main(arguments: list[str] | None = None) -> None:
    given = parsed(arguments)
    if given.list:
        print(listed(given.steps))
        return
    out = given.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / LOG).touch()
    except OSError as error:
        sys.exit(f"gpu_suite: --out {given.out} cannot be written to ({error.strerror})")
    for number in (signal.SIGTERM, signal.SIGHUP):  # as by Ctrl-C: what it started ends, too
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    on = card(given.device)
    done = set()
    for file in given.skip_done:
        done |= shown(read(file), on, given.small)
    about = {
        "commit": given.commit,
        "python": platform.python_version(),
        "budget": given.budget,
        "steps": [step.name for step in given.steps],
    }
    append(out, Row("suite", "begin", "done", 0.0, on, given.small, about))
    with temporary() as work:
        launch = child_command(given.device, on, given.small, out)
        suite = Suite(out, Path(work), on, given.small, given.budget, launch, say)
        ended = suite.run(given.steps, done)
    say(f"{out / RESULTS}: " + ", ".join(f"{count} {status}" for status, count in ended.items()))
    sys.exit(1 if ended["failed"] + ended["timeout"] else 0)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
