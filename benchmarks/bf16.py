"""What bf16 weights cost: the error of the residual ε_θ − ε_#, against float32, on tiny-animals.

python benchmarks/bf16.py [--sizes 0.0005 0.005 0.05] [--dtype float16]

The LoRA is moved away from its start by random matrices B of the given size. The figures are over
eight paths of eight steps, drawn in float32, and without guidance, which would add to the error.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from common import machine, parser, report
from torch import Tensor

from nablagfn import load_config
from nablagfn.core.kernels import KernelTable
from nablagfn.core.rollout import rollout
from nablagfn.core.types import Trajectories
from nablagfn.methods.build import build_kernel
from nablagfn.models.stable_diffusion import StableDiffusionPolicy

PROMPT, ROWS, LEVELS = "cat", 8, 8


def load(dtype: torch.dtype, size: float) -> StableDiffusionPolicy:
    """The model with the same random B, whatever the dtype."""
    policy = StableDiffusionPolicy.from_pretrained("tiny-animals", dtype=dtype, guidance_scale=1.0)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in policy.network.named_parameters():
        if "lora_B" in name:
            parameter.data = size * torch.randn(parameter.shape, generator=draw)
    return policy


def predictions(policy: StableDiffusionPolicy, paths: Trajectories) -> tuple[Tensor, Tensor]:
    """ε_θ and ε_# along the paths, float32, [64, ...]."""
    table = kernel(policy)
    where = policy.condition(paths.condition.prompts)
    tuned, frozen = [], []
    for step in range(LEVELS):
        x = paths.x[:, step]
        timestep = table.at_step(step, x).here.time
        with torch.no_grad():
            tuned.append(policy.output(x, timestep, where))
            with policy.reference():
                frozen.append(policy.output(x, timestep, where))
    return torch.cat(tuned), torch.cat(frozen)


def kernel(policy: StableDiffusionPolicy) -> KernelTable:
    config = load_config("demo")
    config.sampling.num_steps = LEVELS
    return build_kernel(config, policy)


def drawn(policy: StableDiffusionPolicy) -> Trajectories:
    """Eight paths of eight steps, by the model in float32."""
    noise = torch.randn(
        ROWS, LEVELS + 1, *policy.sample_shape, generator=torch.Generator().manual_seed(1)
    )
    return rollout(policy, kernel(policy), noise, policy.condition([PROMPT] * ROWS))


def relative(error: Tensor, value: Tensor) -> float:
    return float(error.norm() / value.norm())


def line(size: float, dtype: torch.dtype) -> dict[str, Any]:
    policy = load(torch.float32, size)
    paths = drawn(policy)
    tuned, frozen = predictions(policy, paths)
    tuned16, frozen16 = predictions(load(dtype, size), paths)
    residual, residual16 = tuned - frozen, tuned16 - frozen16
    return {
        "size of B": size,
        "‖ε_θ − ε_#‖ / ‖ε_#‖": f"{relative(residual, frozen):.1%}",
        "relative error of ε_θ": f"{relative(tuned16 - tuned, tuned):.2%}",
        "relative error of ε_θ − ε_#": f"{relative(residual16 - residual, residual):.0%}",
        "its cosine to the float32 one": (
            f"{float(F.cosine_similarity(residual16.flatten(), residual.flatten(), dim=0)):.2f}"
        ),
    }


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--sizes", nargs="+", type=float, default=[0.0005, 0.005, 0.05])
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    arguments = p.parse_args()
    rows = [line(size, getattr(torch, arguments.dtype)) for size in arguments.sizes]
    report({"machine": machine(), "rows": rows}, rows, arguments.out)


if __name__ == "__main__":
    main()
