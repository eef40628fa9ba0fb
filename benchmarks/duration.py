"""The planner's seconds per update against true ones, on tiny-animals.

    OMP_NUM_THREADS=1 python benchmarks/duration.py

Predicted: every part timed alone, with random weights (`planner/seconds.py`). True: updates of the
demo's settings in a fresh process, from optimizer step to optimizer step, the first left out. On a
CPU both are seconds of the process's own work, which other processes do not slow: use one thread.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from common import QUIET, child, device, machine, parser, report, summary

from nablagfn.commands import planner
from nablagfn.config import set_option
from nablagfn.recipes.options import load_config

CUDA = torch.cuda.is_available()
VARIANTS = {
    "default": {},
    "no_flow": {"model.no_flow": True},
    "checkpointing": {"training.gradient_checkpointing": True},
}


def predicted(options: dict[str, Any]) -> float:
    config = load_config("demo")
    for key, value in options.items():
        set_option(config, key, value)
    found = planner.predict(config, device())
    clock = time.perf_counter if CUDA else time.process_time
    return planner.total(found.passes, planner.timed(config, device(), found, clock))


def line(name: str, rows: int, updates: int) -> dict[str, Any]:
    options = {**VARIANTS[name], "training.micro_batch": rows}
    job = {"config": "demo", "options": {**QUIET, **options}, "updates": 1 + updates}
    guess, found = predicted(options), child({**job, "mode": "time"})
    if "error" in found:
        raise SystemExit(found["error"])
    true = summary(found["seconds" if CUDA else "processor seconds"])
    return {
        "settings": name,
        "micro_batch": rows,
        "predicted, s": f"{guess:.1f}",
        "true, s": f"{true['median']:.1f} ({true['low']:.1f}-{true['high']:.1f})",
        "predicted / true": f"{guess / true['median']:.2f}",
    }


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--updates", type=int, default=3, help="timed of each setting")
    arguments = p.parse_args()
    rows = [line(name, rows, arguments.updates) for name in VARIANTS for rows in (4, 16)]
    report({"machine": machine(), "rows": rows}, rows, arguments.out)


if __name__ == "__main__":
    main()
