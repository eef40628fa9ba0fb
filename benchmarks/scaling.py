"""Cost of an update against steps, batch, resolution and processes.

    python benchmarks/scaling.py [--model tiny-animals] [--processes 1 2]

Processes are started by torchrun (gloo on a CPU, NCCL on GPUs), each with the whole batch: twice
the processes draw and learn from twice as many paths.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import child, machine, parser, report
from update import settings

TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


def cases(processes: list[int]) -> list[dict[str, Any]]:
    """One thing at a time is changed; batch and paths of an update are the same."""

    def batch(n: int) -> dict[str, Any]:
        return {"sampling.batch_size": n, "training.batch_size": n}

    found = [{"what": f"{n} steps", "options": {"sampling.num_steps": n}} for n in (10, 20, 40)]
    found += [{"what": f"batch {n}", "options": batch(n)} for n in (4, 8, 16)]
    found += [{"what": f"latents of {n}x{n}", "options": batch(4), "size": n} for n in (8, 16)]
    found += [
        {"what": f"{n} process" + "es" * (n > 1), "options": batch(8), "processes": n}
        for n in processes
    ]
    return found


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--model", default="sd15" if torch.cuda.is_available() else "tiny-animals")
    p.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    p.add_argument("--updates", type=int, default=3)
    arguments = p.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        config, base = settings(arguments.model, Path(folder))
        for number, case in enumerate(cases(arguments.processes)):
            count = case.get("processes", 1)
            job = {
                "config": config,
                "options": {**base, **case["options"]},
                "size": case.get("size", 0),
                "updates": 1 + arguments.updates,
                "mode": "time",
                "folder": str(Path(folder) / str(number)),  # one for all processes
            }
            launcher = (*TORCHRUN, f"--nproc_per_node={count}") if "processes" in case else ()
            found = child(job, launcher=launcher)
            line = {"what": case["what"], "s/update": found.get("error", ""), "trajectories/s": ""}
            if "error" not in found:
                middle = statistics.median(found["seconds"])
                line["s/update"] = f"{middle:.2f}"
                line["trajectories/s"] = f"{count * found['paths'] / middle:.2f}"
                line["peak, GB"] = f"{found['peak'] / 1e9:.2f}"
            rows.append(line)
    report({"machine": machine(), "rows": rows}, rows, arguments.out)


if __name__ == "__main__":
    main()
