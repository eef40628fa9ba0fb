"""More training of tiny-animals' U-Net with what time is left, by tools/tiny_animals.

Needs the pack of drawings at .data/tiny-animals.zip (tools/tiny_animals/pack.py makes it); goes on
from .data/more.safetensors where an earlier run's weights lie there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from .child import Case, Setup, Unavailable
from .runner import ROOT

TOOL = ROOT / "tools" / "tiny_animals" / "continue_unet.py"
PACK = ROOT / ".data" / "tiny-animals.zip"
EARLIER = ROOT / ".data" / "more.safetensors"
SOFT = ("horse", "whale", "rat", "bat", "monkey", "turkey")
SMALL = 40.0  # seconds of a rehearsal
ENDING = 8.0  # seconds for the process to end after its minutes


def train(setup: Setup) -> dict[str, Any]:
    """The tool's own figures, before and after. Raises Unavailable without the pack."""
    if not PACK.is_file():
        raise Unavailable(f"no {PACK.relative_to(ROOT)}: tools/tiny_animals/pack.py makes it")
    minutes = min(setup.left - ENDING, SMALL if setup.small else setup.left) / 60
    command = [sys.executable, str(TOOL), "--pack", str(PACK), "--minutes", f"{minutes:.3f}"]
    command += ["--out", str(setup.out), "--device", setup.device]
    command += ["--each", "0" if setup.small else "10"]
    command += ["--emphasis", *SOFT, "--weight", "2"]
    if EARLIER.is_file():
        command += ["--resume", str(EARLIER)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, flush=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        raise RuntimeError(f"{TOOL.name} ended with exit code {done.returncode}")
    return {"minutes": minutes, "resumed": EARLIER.is_file(), "lines": lines[:1] + lines[-3:]}


CASES: dict[str, Case] = {"train": train}
