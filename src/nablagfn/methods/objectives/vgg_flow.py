"""VGG-Flow (Liu et al., NeurIPS 2025, "Value Gradient Guidance for Flow Matching Alignment").

The paper's time τ runs from noise (0) to clean (1), dx = v dτ. It seeks the change ṽ = v_θ − v_base
of least E[½∫‖ṽ‖² dτ − β·r(x_1)], and knows it by the value gradient g = ∇V, V(x_1, 1) = −r:

    ṽ = −βg,   ∂_τ g + [∇g]ᵀ(v_base − βg) + [∇v_base]ᵀ g = 0,   g(x_1, 1) = −∇r(x_1)

Here x = (1 − t)·x_clean + t·ε, u = ε − x_clean: t = 1 − τ, v = −u, ∂_τ = −∂_t. In V̂ = −βg, which is
positive where the reward pulls, the same reads

    u_θ = u_# − V̂,   ∂_t V̂ + [∇V̂]ᵀ(u_# − V̂) + [∇u_#]ᵀ V̂ = 0,   V̂(x_N) = β∇r(x_N)

    V̂(x, t) = β·γ·∇r(E[x_N|x]) + g_φ(x, t),   γ = (α/α_N)² (the paper's η = τ²; "squared")

with no Jacobian of the network in the first term, and E[x_N|x] by the finetuned model without a
graph. A model that ends at t_N > 0 keeps some noise in x_N; γ and E[x_N|x] are then relative to
that end, so that V̂ is continuous there, and for t_N = 0 they are the paper's. Three losses:

    matching     ‖u_θ − u_# + stop(V̂)‖²                                                trains θ
    consistency  ‖D_h V̂ − [∇u_#] V̂‖²                                                   trains φ
    boundary     w·‖g_φ(x_N, t_N)‖² = w·‖V̂(x_N) − β∇r(x_N)‖²                            trains φ

    D_h V̂ = [V̂(x + h(stop(V̂) − u_#), t − h) − V̂(x, t)]/h        along the path that V̂ asks for
    [∇u_#] V̂ = [u_#(x + κV̂) − u_#(x)]/κ,  κ = stop(h/rms(V̂))     [∇u_#]ᵀ = ∇u_# for a true score

One difference along the path stands for the paper's two (in t, and in x along v − βg); h is cut to
the length of the step, so that no time leaves the sampler's. As in the paper's code φ's gradient
passes both ends of each difference, and not their direction. Consistency and boundary are both in
units of V̂; the paper's are those of g, a factor β² on both. The paths are those of the ODE (η = 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import ConfigError
from ...core.kernels import KernelTable, Step
from ...core.log_reward import LogReward, terminal_gradient
from ...core.lookahead import LEAST, Attenuation, attenuation
from ...core.rollout import StepChoice
from ...core.schedules import LinearNoising
from ...core.types import Condition, Losses, Objective, Policy, Transitions, beside
from ...core.value_gradient import mean_square
from ..parts import Parts


@dataclass(frozen=True)
class ValueField:
    """V̂ = guess + flow at M samples, [M, ...] each; only flow has a graph, and that to φ."""

    guess: Tensor
    flow: Tensor

    @property
    def value(self) -> Tensor:
        return self.guess + self.flow


@dataclass(frozen=True)
class Later:
    """A state a little later on the path that V̂ asks for. x: [M, ...], time: [M]; h: [M, 1, …]."""

    x: Tensor
    time: Tensor
    h: Tensor


def column(value: Tensor, like: Tensor) -> Tensor:
    """[M] shaped to broadcast against `like` [M, ...]."""
    return value.reshape(-1, *[1] * (like.ndim - 1))


def mismatch(output: Tensor, output_ref: Tensor, value: Tensor) -> Tensor:
    """u_θ − u_# + stop(V̂), [M, ...]."""
    return output - output_ref + value.detach()


def ahead_of(x: Tensor, value: Tensor, output_ref: Tensor, k: Step, h: float) -> Later:
    """The state h later, from x along dx/dτ = V̂ − u_#, without a graph."""
    length = (k.here.time - k.next.time).clamp(max=h)
    wide = column(length, x)
    return Later(x + wide * (value.detach() - output_ref), k.here.time - length, wide)


def inconsistency(here: Tensor, there: Tensor, carried: Tensor, h: Tensor) -> Tensor:
    """D_h V̂ − [∇u_#] V̂, [M, ...]: 0 for a value gradient. here, there: V̂ at both ends of D_h."""
    return (there - here) / h - carried


class VggFlow(Objective):
    """mode: γ. boundary: w. difference: h. trust: λ of the trust region. flow: g_φ; None for V̂
    without it, which leaves the matching loss alone. table: of a flow model's ODE."""

    def __init__(
        self,
        policy: Policy,
        log_reward: LogReward,
        table: KernelTable,
        flow: nn.Module | None,
        *,
        mode: Attenuation = "squared",
        boundary: float = 1e4,
        difference: float = 0.01,
        trust: float = 0.0,
        steps: StepChoice | None = None,
    ) -> None:
        self.policy = policy
        self.log_reward = log_reward
        self.table = table
        self.flow = flow
        self.mode = mode
        self.boundary = boundary
        self.difference = difference
        self.trust = trust
        self.steps = steps or StepChoice()
        self.modules = nn.ModuleDict({} if flow is None else {"flow": flow})
        schedule = table.schedule
        self._end_alpha, self._end_sigma = float(schedule.alpha[-1]), float(schedule.sigma[-1])

    def choose(self, num_steps: int, generator: torch.Generator) -> Tensor:
        return self.steps(num_steps, generator)

    def field(self, x: Tensor, output: Tensor, time: Tensor, where: Condition) -> ValueField:
        """V̂ at x [M, ...] and any time [M] of the model, from u_θ(x)."""
        guess = self._guess(x, output.detach(), column(time, x), where)
        if self.flow is None:
            return ValueField(guess, torch.zeros_like(guess))
        with torch.enable_grad():
            return ValueField(guess, self.flow(x, time, where).to(x.dtype))

    def _guess(self, x: Tensor, output: Tensor, t: Tensor, where: Condition) -> Tensor:
        """β·γ·∇r(E[x_N|x]); t: [M, 1, ...], which is σ, and α = 1 − t."""
        scale = (1 - t) / self._end_alpha
        x_clean = x - t * output
        kept = scale * self._end_sigma**2 / t.square().clamp(min=LEAST)
        x_end = self._end_alpha * x_clean + kept * (x - (1 - t) * x_clean)
        slope = terminal_gradient(self.log_reward, x_end, where)
        return attenuation(scale.square(), self.mode) * slope

    def losses(self, batch: Transitions) -> Losses:
        k, x, where = self.table.at(batch.step, batch.x), batch.x.detach(), batch.condition
        with self.policy.reference(), torch.no_grad():
            output_ref = self.policy.output(x, k.here.time, where)
        with torch.enable_grad():
            output = self.policy.output(x, k.here.time, where)
        here = self.field(x, output, k.here.time, where)
        value, change = here.value.detach(), (output - output_ref).detach()
        drift = mean_square(k.eps_slope * (output - batch.output_old))
        terms = {
            "forward": mean_square(mismatch(output, output_ref, here.value)),
            "trust": self.trust * drift,
        }
        metrics = {
            "change_sq": mean_square(change),
            "guess_sq": mean_square(here.guess),
            "value_gradient_sq": mean_square(value),
            "cosine": F.cosine_similarity(-change.flatten(1), value.flatten(1)),
        }
        if self.flow is not None:
            with torch.enable_grad():
                residual = self.residual(x, here.value, output_ref, k, where)
                terms["consistency"] = mean_square(residual)
                terms["boundary"] = self.boundary * self._boundary(batch, k)
            metrics["flow_sq"] = mean_square(here.flow.detach())
        return Losses(terms, metrics, {"value_gradient": value})

    def residual(
        self, x: Tensor, value: Tensor, output_ref: Tensor, k: Step, where: Condition
    ) -> Tensor:
        """D_h V̂ − [∇u_#] V̂ at x = x_k, [M, ...], with a graph to φ; value: V̂(x_k)."""
        ahead = ahead_of(x, value, output_ref, k, self.difference)
        with torch.no_grad():
            output = self.policy.output(ahead.x, ahead.time, where)
        there = self.field(ahead.x, output, ahead.time, where).value
        return inconsistency(value, there, self._carried(x, value, output_ref, k, where), ahead.h)

    def _carried(
        self, x: Tensor, value: Tensor, output_ref: Tensor, k: Step, where: Condition
    ) -> Tensor:
        """[∇u_#] V̂ at x_k by a difference, [M, ...], with V̂'s graph."""
        length = column(mean_square(value.detach()).sqrt().clamp(min=LEAST), x)
        kappa = self.difference / length
        with self.policy.reference():
            moved = self.policy.output(x + kappa * value, k.here.time, where)
        return (moved - output_ref) / kappa

    def _boundary(self, batch: Transitions, k: Step) -> Tensor:
        """‖g_φ(x_N, t_N)‖² of the rows that end there, 0 of the others, [M]."""
        assert self.flow is not None
        rows = (batch.step + 1 == self.table.num_steps).nonzero()[:, 0]
        found = torch.zeros_like(k.here.time)
        if not len(rows):
            return found
        here = beside(rows, batch.x)
        flow = self.flow(batch.x_next[here], k.next.time[here], batch.condition[rows])
        return found.index_put((here,), mean_square(flow.to(batch.x.dtype)))


# Below it finite differences of a bfloat16 network are rounding: on tiny-animals-flow [∇u_#]v was
# off by 2.5 of its size at 0.01 and 0.28 at 0.1, where float32 is off by 0.05 to 0.1.
LEAST_IN_HALF = 0.1


def build(p: Parts) -> Objective:
    """The method vgg-flow. Raises ConfigError for a model that is not a flow model."""
    if p.policy.prediction != "flow" or not isinstance(p.policy.noising, LinearNoising):
        raise ConfigError(
            "config.experiment.method=vgg-flow changes the velocity of a flow model, and "
            f"config.pretrained.model={p.config.pretrained.model} predicts {p.policy.prediction}: "
            "take a flow model, or nabla-db-lambda"
        )
    m, own = p.config.model, p.config.method
    half = getattr(p.policy, "dtype", torch.float32) in (torch.float16, torch.bfloat16)
    if half and not m.no_flow and own.vgg_difference < LEAST_IN_HALF:  # of what g_φ learns
        raise ConfigError(
            f"config.method.vgg_difference={own.vgg_difference:g}: the velocities of a network in "
            f"half precision differ by their rounding at so small a distance: set {LEAST_IN_HALF:g}"
        )
    return VggFlow(
        p.policy,
        p.log_reward,
        p.table,
        None if m.no_flow else p.flow(),
        mode=m.reward_adaptive_mode,
        boundary=own.vgg_boundary,
        difference=own.vgg_difference,
        trust=m.unet_reg_scale,
        steps=p.steps,
    )
