"""The arithmetic of before the one kernel formula, put back (tools/compare_revisions.py runs this).

Until then x̂ came from ᾱ alone: √ᾱ and √(1 − ᾱ) of the float32 ᾱ, whose 1 − ᾱ has lost up to five
digits near the clean end; and what predicts v or x̂ was turned into ε before all else. Now α, σ and
the coefficients of x̂ are rounded once, from float64, and everything is written in the network's own
output. With these functions in place of today's, all runs give the old numbers bit for bit: the
rounding is all that changed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nablagfn.core import kernels
from nablagfn.core.kernels import Level, Step
from nablagfn.core.types import Condition
from nablagfn.models.latent import LatentPolicy
from nablagfn.worlds.policy import WorldPolicy


def old_clean(x: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    return (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()


def predict_clean(x: Tensor, output: Tensor, level: Level) -> Tensor:
    return old_clean(x, output, level.alpha_bar)


def renoise(x_next: Tensor, noise: Tensor, k: Step) -> Tensor:
    kept = k.here.alpha_bar / k.next.alpha_bar
    return kept.sqrt() * x_next + (1 - kept).sqrt() * noise


def old_eps(policy: WorldPolicy, x: Tensor, alpha_bar: Tensor) -> Tensor:
    mixture = policy._mixture(x.dtype)
    signal, noise = alpha_bar.sqrt(), 1 - alpha_bar
    variance = alpha_bar * mixture.variances + noise
    if len(mixture) == 1:
        return noise.sqrt() * (x - signal * mixture.means) / variance
    across = (signal * x / variance) @ mixture.means.T
    own = (alpha_bar / variance) @ mixture.means.square().T
    share = (mixture.weights.log() + across - own / 2).softmax(1)
    return noise.sqrt() * (x - signal * (share @ mixture.means)) / variance


def world_output(policy: WorldPolicy, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    alpha_bar = policy.noising.levels(time).alpha.square().to(x.dtype)[:, None]
    eps = old_eps(policy, x, alpha_bar)
    if policy.adapter_on:
        change = policy.adapter(x, time, condition, old_clean(x, eps, alpha_bar))
        eps = eps - (1 - alpha_bar).sqrt() * change
    return eps


def eps_of(output: Tensor, x: Tensor, alpha_bar: Tensor, kind: str) -> Tensor:
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if kind == "v_prediction":
        return signal * output + noise * x
    return (x - signal * output) / noise if kind == "sample" else output


_today = LatentPolicy._output


def latent_eps(
    policy: LatentPolicy, x: Tensor, time: Tensor, given: Mapping[str, Tensor]
) -> Tensor:
    output = _today(policy, x, time, given)
    levels = policy.noising.alphas_cumprod.to(x.dtype)[time.long()]  # type: ignore[attr-defined]
    return eps_of(output, x, levels.reshape(-1, 1, 1, 1), policy.model.prediction)


LatentPolicy._output = latent_eps  # type: ignore[method-assign]
LatentPolicy.prediction = property(lambda policy: "epsilon", lambda policy, kind: None)  # type: ignore
kernels.predict_clean = predict_clean
kernels.renoise = renoise
WorldPolicy.output = world_output  # type: ignore[method-assign]
