"""What a float16 U-Net does to gradients that pass it, against float32, at any reward scale β.

python benchmarks/fp16.py [--model FOLDER] [--plain] [--scales 0.001 1 10000]

guess: β·γ·∇r(x̂_θ(x_{k+1})). score, target: the two parts of residual ∇-DB's reverse condition.
adjoint: the lean adjoint at x_k, and what of it came through the U-Net. LoRA: the gradient of the
whole loss, under a loss scale of 65536 that is halved until the gradient is finite, as GradScaler
does, an update for each. --plain: the border `models.in_range` lets cotangents through as they are.

Four paths of eight steps, drawn in float32; transitions 0, 4 and 6, and the worst of the three is
shown. new zeros: share of entries that are 0 in float16 only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from bf16 import kernel
from common import machine, parser, report
from torch import Tensor

from nablagfn.core.bellman import Pass
from nablagfn.core.log_reward import LogReward, terminal_gradient
from nablagfn.core.rollout import rollout
from nablagfn.core.types import Trajectories, Transitions
from nablagfn.methods.estimators.residual_db import ResidualDB
from nablagfn.methods.objectives.matching import MatchingObjective
from nablagfn.models import in_range
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.rewards import analytic

ROWS, LEVELS, FIRST_SCALE, MOST_HALVINGS = 4, 8, 2.0**16, 60
PLACES = {"first": 0, "middle": 4, "last": LEVELS - 2}  # the very last sample is clean: no U-Net
Found = dict[str, tuple[Tensor, int]]


def load(model: str, dtype: torch.dtype) -> StableDiffusionPolicy:
    """The model with the same random LoRA, whatever the dtype."""
    policy = StableDiffusionPolicy.from_pretrained(model, dtype=dtype)
    draw = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=draw)
    return policy


def drawn(policy: StableDiffusionPolicy) -> Trajectories:
    """Paths by the model in float32."""
    shape = (ROWS, LEVELS + 1, *policy.sample_shape)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return rollout(policy, kernel(policy), noise, policy.condition(["cat"] * ROWS))


def at(paths: Trajectories, step: int) -> Transitions:
    """Transition `step` of every path."""
    return Transitions(
        x=paths.x[:, step],
        x_next=paths.x[:, step + 1],
        output_old=paths.output[:, step],
        step=torch.full((ROWS,), step),
        condition=paths.condition,
    )


def lora_gradient(policy: StableDiffusionPolicy, loss: Tensor) -> tuple[Tensor, int]:
    """The gradient, and how often 65536 had to be halved for it."""
    halvings, scale = 0, FIRST_SCALE if policy.dtype == torch.float16 else 1.0
    while True:
        found = torch.autograd.grad(loss * scale, policy.parameters(), retain_graph=True)
        gradient = torch.cat([value.flatten() for value in found])
        if gradient.isfinite().all() or halvings == MOST_HALVINGS:
            return gradient / scale, halvings
        halvings, scale = halvings + 1, scale / 2


def adjoints(policy: StableDiffusionPolicy, paths: Trajectories, v: Tensor) -> list[list[Tensor]]:
    """The lean adjoint at x_0 … x_{N-1}, from the one at x_N, and the part of it that passed ε."""
    table, found = kernel(policy), []
    for step in range(LEVELS - 1, -1, -1):
        x = paths.x[:, step]
        k = table.at_step(step, x)
        here = Pass.at(policy, x, k, paths.condition, frozen=True)
        found.append([here.pull_back(v), here.product([here.output], [k.c2 * v])])
        v = found[-1][0]
    return found[::-1]


def gradients(policy: StableDiffusionPolicy, paths: Trajectories, beta: float) -> dict[str, Found]:
    """What passes the U-Net, by place and name."""
    table = kernel(policy)
    paths = replace(paths, condition=policy.condition(paths.condition.prompts))
    log_reward = LogReward(policy, analytic.colourfulness, beta)
    estimator = ResidualDB(
        policy, log_reward, "squared", policy.make_flow((8, 16), 1, seed=0).requires_grad_(False)
    )
    objective = MatchingObjective(policy, table, estimator)
    lean = adjoints(policy, paths, terminal_gradient(log_reward, paths.clean, paths.condition))
    found: dict[str, Found] = {}
    for place, step in PLACES.items():
        batch = at(paths, step)
        here = objective.evaluate(batch)
        lora, halvings = lora_gradient(policy, objective.losses(batch).total().sum() / ROWS)
        found[place] = {
            "guess": (here.ahead.guess, 0),
            "score": (here.ahead.score_ref, 0),
            "target": (estimator.reverse_target(here), 0),
            "adjoint": (lean[step][0], 0),
            "its U-Net's part": (lean[step][1], 0),
            "LoRA": (lora, halvings),
        }
    return found


def compared(found: Tensor, true: Tensor) -> dict[str, float]:
    """Float16 against float32; the last two are NaN where float16 is not finite."""
    a, b = found.double().flatten(), true.double().flatten()
    return {
        "new zeros": float(((a == 0) & (b != 0)).double().mean()),
        "not finite": float((~a.isfinite()).double().mean()),
        "error": float((a - b).norm() / b.norm()),
        "cosine": float(a @ b / (a.norm() * b.norm())),
    }


def worst(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Over the places, as the table shows it."""

    def most(key: str) -> float:
        return max((row[key] for row in rows), key=lambda value: (value != value, value))

    return {
        "β": f"{rows[0]['β']:g}",
        "of": rows[0]["of"],
        "new zeros": f"{most('new zeros'):.2%}",
        "not finite": f"{most('not finite'):.0%}",
        "relative error": f"{most('error'):.1%}",
        "1 − cosine": f"{1 - min((row['cosine'] for row in rows), key=lambda v: (v == v, v)):.0e}",
        "halvings": most("halvings"),
    }


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--model", default="tiny-animals")
    p.add_argument("--plain", action="store_true")
    p.add_argument("--scales", nargs="+", type=float, default=[1e-6, 1e-3, 1.0, 1e2, 1e4, 1e6])
    arguments = p.parse_args()
    if arguments.plain:
        in_range.power_of_two = torch.ones_like
    wide, narrow = (load(arguments.model, dtype) for dtype in (torch.float32, torch.float16))
    paths = drawn(wide)
    rows, lines = [], []
    for beta in arguments.scales:
        true, found = (gradients(policy, paths, beta) for policy in (wide, narrow))
        for name in true["first"]:
            here = [
                {"β": beta, "of": name, "place": place, "halvings": found[place][name][1]}
                | compared(found[place][name][0], true[place][name][0])
                for place in PLACES
            ]
            rows += here
            lines.append(worst(here))
    report({"machine": machine(), "rows": rows}, lines, arguments.out)


if __name__ == "__main__":
    main()
