"""The card: versions, rates of matrix products, of memory and of convolutions; and the doctor."""

from __future__ import annotations

import shutil
import subprocess
import time
from functools import partial
from typing import Any

import torch
from common import machine

from nablagfn.commands import planner
from nablagfn.commands.doctor import examine
from nablagfn.recipes.options import load_config
from nablagfn.runs.runfolder import versions

from .child import Case, Failed, Setup, Unavailable


def rates(setup: Setup) -> dict[str, Any]:
    """FLOP/s of square products of random matrices by dtype, TF32 on and off; bytes/s of a copy."""
    device, seconds = torch.device(setup.device), 0.2 if setup.small else 1.5
    found: dict[str, Any] = {}
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for name, dtype in dtypes.items():
        if setup.device == "cpu" and name != "fp32":
            continue
        torch.backends.cuda.matmul.allow_tf32 = False
        found[name] = planner.matmul_rate(device, dtype, seconds)
    if setup.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        found["tf32"] = planner.matmul_rate(device, torch.float32, seconds)
    return {
        "FLOP/s": found,
        "copy, bytes/s": copy_rate(device, seconds),
        "machine": machine(),
        "versions": versions(),
        "driver": driver() if setup.device == "cuda" else "",
        **capabilities(setup.device),
    }


def copy_rate(device: torch.device, seconds: float) -> float:
    """Bytes read and written a second, the best of many copies."""
    a = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    b, best, until = torch.empty_like(a), 0.0, time.perf_counter() + seconds
    while not best or time.perf_counter() < until:
        planner.synchronise(device)
        started = time.perf_counter()
        b.copy_(a)
        planner.synchronise(device)
        best = max(best, 2 * a.numel() / (time.perf_counter() - started))
    return best


def driver() -> str:
    """nvidia-smi's own words."""
    tool = shutil.which("nvidia-smi")
    fields = "name,driver_version,memory.total,power.limit,clocks.max.sm,mig.mode.current"
    if tool is None:
        return "nvidia-smi is not here"
    done = subprocess.run(
        [tool, f"--query-gpu={fields}", "--format=csv"], capture_output=True, text=True
    )
    return done.stdout.strip()


def capabilities(device: str) -> dict[str, Any]:
    if device != "cuda":
        return {}
    about = torch.cuda.get_device_properties(0)
    return {
        "capability": list(torch.cuda.get_device_capability()),
        "memory, bytes": about.total_memory,
        "multiprocessors": about.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": list(torch.cuda.nccl.version()),
    }


def doctor(setup: Setup, *, compiled: bool = False) -> dict[str, Any]:
    """Every row of `nablagfn doctor --config=demo`, with everything compiled on request.

    Raises Failed when one of them is a failure, and Unavailable for compiling without a GPU.
    """
    config = load_config("demo")
    if compiled and setup.device != "cuda":
        raise Unavailable("compiling takes minutes on a CPU")
    if compiled:
        for switch in ("compile", "compile_reward", "cuda_graphs"):
            setattr(config.speed, switch, True)
    rows = [
        {"check": row.name, **vars(row.finding)}
        for row in examine(config, torch.device(setup.device))
    ]
    broken = [f"{row['check']}: {row['text']}" for row in rows if row["status"] == "failure"]
    if broken:
        raise Failed("; ".join(broken), {"rows": rows})
    return {"rows": rows}


CASES: dict[str, Case] = {
    "rates": rates,
    "doctor": doctor,
    "doctor-compiled": partial(doctor, compiled=True),
}
