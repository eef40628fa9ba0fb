"""Arithmetic of one update of SD1.5 at full size, counted on the meta device: no weights, no GPU.

    python benchmarks/flops.py [--reward aesthetic]

The published code's work per transition is three guided U-Net forward passes, five U-Net backward
passes and two VAE decodes with gradient; ours is counted by running an update in a world
(`planner/work.py`). Both draw their paths alike.
"""

from __future__ import annotations

from typing import Any

import torch
from common import machine, parser, report

from nablagfn import load_config
from nablagfn.commands.planner import Costs, Work, measure, work_of
from nablagfn.config import Config

TFLOP = 1e12
PATHS = {"default": 32, "fast": 4, "no_flow": 16}  # of an update, by the commands of the README


def published(config: Config, n: float) -> Work:
    """Of one path with n transitions; drawing the path, and its reward once, as ours."""
    return Work(n, config.sampling.num_steps + 3 * n, 5 * n, 2 * n + 1, 2 * n)


def path(parts: Costs, work: Work) -> float:
    """FLOPs of a path, all told; the flow network is left out on both sides."""
    decode = parts.decode.forward + parts.reward.forward
    back = parts.decode.backward + parts.reward.backward
    model = work.eps * parts.eps.forward + work.eps_backward * parts.eps.backward
    return model + work.decode * decode + work.decode_backward * back


def line(name: str, config: Config, parts: Costs, work: Work, paths: int) -> dict[str, Any]:
    drawing = config.sampling.num_steps * parts.eps.forward
    whole = path(parts, work)
    return {
        "settings": name,
        "U-Net forward": f"{work.eps - config.sampling.num_steps:.1f}",
        "U-Net backward": f"{work.eps_backward:.1f}",
        "decodes with gradient": f"{work.decode_backward:.1f}",
        "drawing, TFLOP/path": f"{drawing / TFLOP:.0f}",
        "learning, TFLOP/path": f"{(whole - drawing) / TFLOP:.0f}",
        "TFLOP/update": f"{paths * whole / TFLOP:.0f}",
    }


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--reward", default="aesthetic")
    arguments = p.parse_args()
    config = load_config("aesthetic")
    config.experiment.reward_fn = arguments.reward
    parts, rows = measure(config, torch.device("cuda")), []
    for name, paths in PATHS.items():
        config.model.no_flow = no_flow = name == "no_flow"
        work = work_of(config)
        if not no_flow:  # its work without g_φ is not known here
            theirs = published(config, work.transitions)
            rows.append(line(f"{name}, published code", config, parts, theirs, paths))
        rows.append(line(f"{name}, here", config, parts, work, paths))
    units = {name: vars(getattr(parts, name)) for name in ("eps", "decode", "reward", "flow")}
    report({"machine": machine(), "one row": units, "rows": rows}, rows, arguments.out)


if __name__ == "__main__":
    main()
