"""What the benchmarks share: the machine, fresh processes, medians, tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nablagfn.runs.runfolder import write_atomic

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
QUIET = {  # nothing but sampling and updates
    "evaluation.num_prompts": 0,
    "logging.sample_freq": 0,
    "logging.save_freq": 1000,
    "logging.tensorboard": False,
}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 1) for x in os.getloadavg()],
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def child(
    job: Mapping[str, Any], source: Path = ROOT / "src", launcher: Sequence[str] = ()
) -> dict[str, Any]:
    """The result of one_update.py in a fresh process that imports nablagfn from `source`."""
    environment = {**os.environ, "PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, str(HERE / "one_update.py"), json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        return {"error": last}
    return json.loads(lines[-1])


@contextmanager
def revision(name: str) -> Iterator[Path]:
    """The `src` folder of another revision, in a worktree that is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "-q", str(place), name], check=True)
        try:
            yield place / "src"
        finally:
            subprocess.run([*git, "remove", "--force", str(place)], check=True)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, and the least and the largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, one column per key of the first row."""
    keys = list(rows[0])
    lines = [keys, ["---"] * len(keys), *[[str(row.get(key, "")) for key in keys] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parser(text: str | None) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--out", type=Path, default=None, help="write the figures there, as JSON")
    return found


def report(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], out: Path | None) -> None:
    """Print the table; write the JSON if asked."""
    print(json.dumps(result["machine"]))
    print(table(rows))
    if out is not None:
        write_atomic(out, json.dumps(result, indent=2) + "\n")
