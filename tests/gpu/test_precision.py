"""bf16, fp16 and TF32 against float32: losses, gradients and the LoRA after an update, within the
bounds of docs/performance.md#precision-on-a-gpu.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nablagfn.commands.assemble import build_reward
from nablagfn.core.log_reward import LogReward
from nablagfn.core.lookahead import guess
from nablagfn.core.rollout import rollout
from nablagfn.core.types import Transitions
from nablagfn.methods.build import build_kernel
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.recipes.options import load_config
from tests.gpu.setting import PRECISION, cosine, drawn, flat, learned, relative, trainer_on

BOUNDS = {"bf16": 0.1, "fp16": 0.02}  # relative error of the loss, and of LoRA gradients
COSINES = {"bf16": 0.99, "fp16": 0.999}
METHODS = ("nabla-db", "nabla-db-lambda", "adjoint-matching", "draft-k")


@dataclass(frozen=True)
class Ended:
    """Of one update from the same data: loss, θ's gradient, θ's change."""

    loss: float
    gradient: Tensor
    moved: Tensor


def one_update(
    precision: str, method: str, device: torch.device, out: Path, **options: object
) -> Ended:
    usual = {"model.reward_scale": 1e4, "model.unet_reg_scale": 0.0}  # ε_θ† is another model's
    chosen = drawn(trainer_on(device, method, out / "data", **usual))  # always float32's
    half = {"training.mixed_precision": precision}
    trainer = trainer_on(device, method, out / precision, **usual, **half, **options)
    start = learned(trainer)
    condition = trainer.policy.condition(chosen.paths.condition.prompts, ())
    paths = type(chosen.paths)(chosen.paths.x, chosen.paths.output, condition, chosen.paths.reward)
    updated = trainer.updater.update(type(chosen)(paths, chosen.row, chosen.step, chosen.seed))
    theta = list(trainer.policy.state_dict())
    end = learned(trainer)
    gradient = flat(p.grad for p in trainer.policy.parameters())
    return Ended(updated.metrics["loss"], gradient, flat(end[n] - start[n] for n in theta))


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("method", METHODS)
def test_half_the_bits_against_float32(
    method: str, precision: str, device: torch.device, tmp_path: Path
) -> None:
    known = one_update("no", method, device, tmp_path)
    found = one_update(precision, method, device, tmp_path)
    assert float(known.gradient.norm()) > 1e-3
    assert found.loss == pytest.approx(known.loss, rel=BOUNDS[precision])
    assert relative(found.gradient, known.gradient) < BOUNDS[precision]
    assert cosine(found.gradient, known.gradient) > COSINES[precision]
    assert cosine(found.moved, known.moved) > COSINES[precision]


def test_tf32_is_off_and_on(cuda: torch.device, tmp_path: Path) -> None:
    """The option reaches the device: products of float32 change, and by no more than TF32's 1e-3
    does it change an update."""
    a = torch.randn(512, 512, device=cuda)
    exact, products = (a.double() @ a.double()).float(), []
    ends = []
    for allowed in (False, True):
        ends.append(
            one_update(
                "no",
                "nabla-db",
                cuda,
                tmp_path / str(allowed),
                **{"training.allow_tf32": allowed},
            )
        )
        products.append(relative(a @ a, exact))
    assert products[0] < 1e-5 < products[1] < 1e-2
    assert relative(ends[1].gradient, ends[0].gradient) < 0.02
    assert cosine(ends[1].moved, ends[0].moved) > 0.999


# ------------------------------------------------------------------ Jacobian products in float16


def guesses(precision: str, beta: float, device: torch.device) -> Tensor:
    """β·γ·∇r(x̂(x)) at six noise levels of paths of tiny-animals, by its reward, [12, ...]."""
    config = load_config("demo")
    config.sampling.num_steps = 6
    policy = StableDiffusionPolicy.from_pretrained(
        "tiny-animals", dtype=PRECISION[precision], device=device, guidance_scale=1.0
    )
    table = build_kernel(config, policy)
    noise = torch.randn(2, 7, *policy.sample_shape, generator=torch.Generator().manual_seed(0))
    source = policy
    if precision != "no":
        source = StableDiffusionPolicy.from_pretrained(
            "tiny-animals", device=device, guidance_scale=1.0
        )
    paths = rollout(source, table, noise, source.condition(["cat", "dog"], ()))
    log_reward = LogReward(policy, build_reward(config, device), beta)
    found = []
    for step in range(6):
        steps = torch.full((2,), step)
        where = policy.condition(["cat", "dog"], ())
        batch = Transitions(
            paths.x[:, step], paths.x[:, step + 1], paths.output[:, 0], steps, where
        )
        k = table.at(steps, batch.x)
        found.append(guess(log_reward, policy, batch.x_next, k, where, "squared").gradient)
    return torch.cat(found).cpu()


@pytest.mark.parametrize("beta", [1e-3, 1.0, 1e2, 1e4])
def test_fp16_loses_no_gradient_to_its_range(beta: float, device: torch.device) -> None:
    """No infinity and no silent zero, whatever β: these products lie outside the loss scaler."""
    known, found = guesses("no", beta, device), guesses("fp16", beta, device)
    assert bool(found.isfinite().all())
    assert float((found == 0).float().mean()) <= float((known == 0).float().mean()) + 1e-3
    assert cosine(found, known) > COSINES["fp16"]
    assert relative(found, known) < 0.05
