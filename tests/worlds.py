"""A world whose answer is known: a mixture of Gaussians in the plane with its exact ε, in float64.

It speaks `nablagfn.core.types.Policy`; with the adapter off it is the exact pretrained model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nablagfn.core.grids import trailing
from nablagfn.core.schedules import DiscreteNoising, LinearNoising, Noising, Prediction
from nablagfn.core.start import FirstState
from nablagfn.core.types import Condition, Metadata

MEANS = ((-1.5, 0.0), (1.0, 1.5), (1.0, -1.0))
WEIGHTS = (0.2, 0.5, 0.3)
STD = 0.3
INPUTS = 10  # of the small networks


def sd_alphas_cumprod() -> Tensor:
    """Stable Diffusion's training schedule, [1000] float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def _mlp(hidden: int, seed: int, hint: int = 0) -> nn.Sequential:
    """[M, INPUTS + hint] -> [M, 2]; the last layer is zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(INPUTS + hint, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 2),
        ).double()
    nn.init.zeros_(net[-1].weight)
    nn.init.zeros_(net[-1].bias)
    return net


def _inputs(x: Tensor, level: Tensor) -> Tensor:
    """x [M, 2] and the Fourier features of the noise angle atan2(√(1−ᾱ), √ᾱ), [M, INPUTS]."""
    angle = torch.atan2((1 - level).sqrt(), level.sqrt()) * 2.0 ** torch.arange(4)
    return torch.cat([x.double(), angle.sin(), angle.cos()], 1)


class PlaneFlow(nn.Module):
    """g_φ of the plane: a small MLP, exactly zero at start."""

    def __init__(self, alphas_cumprod: Tensor, hidden: int, seed: int, *, hint: int = 0) -> None:
        super().__init__()
        self.levels = alphas_cumprod
        self.net = _mlp(hidden, seed, hint)

    def forward(
        self, x: Tensor, time: Tensor, condition: Condition, hint: Tensor | None = None
    ) -> Tensor:
        inputs = _inputs(x, self.levels[time.long()][:, None])
        return self.net(inputs if hint is None else torch.cat([inputs, hint], 1))


class MixtureWorld:
    """The exact ε of a Gaussian mixture plus an MLP adapter that starts at zero."""

    sample_shape: tuple[int, ...] = (2,)
    device = torch.device("cpu")
    together = False
    prediction: Prediction = "epsilon"

    def __init__(self, hidden: int = 16, seed: int = 0) -> None:
        self.alphas_cumprod = sd_alphas_cumprod()
        self.noising: Noising = DiscreteNoising(self.alphas_cumprod)
        self.means = torch.tensor(MEANS, dtype=torch.float64)
        self.weights = torch.tensor(WEIGHTS, dtype=torch.float64)
        self.adapter = _mlp(hidden, seed)
        self.adapter_on = True
        self.first = FirstState()

    # ---------------------------------------------------------------- the known answer

    def log_density(self, x: Tensor, alpha_bar: Tensor) -> Tensor:
        """log p of the noised mixture at level `alpha_bar` ([M, 1]); x [M, 2] -> [M]."""
        variance = alpha_bar * STD**2 + 1 - alpha_bar
        square = (x[:, None] - alpha_bar.sqrt()[..., None] * self.means).square().sum(-1)
        normal = -square / (2 * variance) - (2 * torch.pi * variance).log()
        return (self.weights.log() + normal).logsumexp(1)

    def exact_eps(self, x: Tensor, alpha_bar: Tensor) -> Tensor:
        """−√(1−ᾱ)·∇ log p in closed form, [M, 2]."""
        variance = alpha_bar * STD**2 + 1 - alpha_bar
        toward = alpha_bar.sqrt()[..., None] * self.means - x[:, None]
        share = (self.weights.log() - toward.square().sum(-1) / (2 * variance)).softmax(1)
        return -(1 - alpha_bar).sqrt() * (share[..., None] * toward).sum(1) / variance

    def moments(self, alpha_bar: float) -> tuple[Tensor, Tensor]:
        """Mean [2] and covariance [2, 2] of the noised mixture."""
        centres = alpha_bar**0.5 * self.means
        mean = self.weights @ centres
        spread = (self.weights[:, None] * (centres - mean)).T @ (centres - mean)
        return mean, spread + (alpha_bar * STD**2 + 1 - alpha_bar) * torch.eye(2).double()

    def mode_of(self, x: Tensor) -> Tensor:
        """Index of the nearest mode, [M]."""
        return torch.cdist(x.double(), self.means).argmin(1)

    # ---------------------------------------------------------------- Policy

    def times(self, grid: str, num_steps: int) -> Sequence[float]:
        ratio = len(self.alphas_cumprod) // num_steps
        return [1 + ratio * k for k in reversed(range(num_steps))]

    def condition(self, prompts: Sequence[str], metadata: Sequence[Metadata] = ()) -> Condition:
        return Condition(tuple(prompts), tuple(metadata) or tuple({} for _ in prompts))

    def output(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        assert len(x) == len(time) == len(condition)
        level = self.alphas_cumprod[time.long()][:, None]
        eps = self.exact_eps(x.double(), level)
        if self.adapter_on:
            eps = eps + (1 - level).sqrt() * self.adapter(_inputs(x, level))
        return eps.to(x.dtype)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        self.adapter_on = False
        try:
            with self.first.reference():
                yield
        finally:
            self.adapter_on = True

    def decode(self, x: Tensor) -> Tensor:
        """The sample is its own picture, [M, 2]."""
        return x

    def make_flow(
        self, widths: Sequence[int], layers_per_block: int, seed: int, *, hint: bool = False
    ) -> nn.Module:
        return PlaneFlow(self.alphas_cumprod, 16, seed, hint=2 if hint else 0)

    def settings(self) -> dict[str, Any]:
        return {}

    def parameters(self) -> list[nn.Parameter]:
        return list(self.adapter.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        return {**self.adapter.state_dict(), **self.first.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.adapter.load_state_dict(self.first.load(state))

    def save(self, folder: Path) -> None:
        save_file(self.state_dict(), folder / "adapter.safetensors")


def randomise(parameters: Sequence[nn.Parameter], scale: float, seed: int = 0) -> None:
    """Add noise to parameters in place, so that an adapter or a flow is no longer at its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(scale * noise.to(parameter.dtype))


def tilt(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
    """A smooth reward that depends on the prompt: its length sets the weight of the first axis."""
    weight = torch.tensor([float(len(p)) for p in prompts], dtype=images.dtype)
    flat = images.flatten(1)
    return weight * flat[:, 0] + (2 * flat[:, 1]).sin() + 0.1 * flat.square().mean(1)


class PromptedWorld(MixtureWorld):
    """Its ε depends on the prompt, so that a prompt of another row shows."""

    def output(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        lengths = torch.tensor([float(len(p)) for p in condition.prompts], dtype=x.dtype)
        return super().output(x, time, condition) + 0.05 * lengths[:, None]


class VelocityFlow(PlaneFlow):
    """g_φ of the plane at the times of a flow model."""

    def forward(
        self, x: Tensor, time: Tensor, condition: Condition, hint: Tensor | None = None
    ) -> Tensor:
        inputs = _inputs(x, linear_level(time)[1])
        return self.net(inputs if hint is None else torch.cat([inputs, hint], 1))


def linear_level(time: Tensor) -> tuple[Tensor, Tensor]:
    """√(α² + σ²) and ᾱ of α = 1 − t, σ = t, each [M, 1] float64."""
    t = time.double()[:, None]
    scale = ((1 - t).square() + t.square()).sqrt()
    return scale, ((1 - t) / scale).square()


class FlowWorld(PromptedWorld):
    """The same mixture as a flow model: α = 1 − t, σ = t, and its velocity as output."""

    prediction: Prediction = "flow"

    def __init__(self, hidden: int = 16, seed: int = 0) -> None:
        super().__init__(hidden, seed)
        self.noising = LinearNoising(cleanest=0.03, noisiest=0.97)

    def times(self, grid: str, num_steps: int) -> list[float]:
        return trailing(self.noising, num_steps)

    def output(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        assert len(x) == len(time) == len(condition)
        (scale, level), t = linear_level(time), time.double()[:, None]
        eps = self.exact_eps(x.double() / scale, level)
        if self.adapter_on:
            eps = eps + (1 - level).sqrt() * self.adapter(_inputs(x, level))
        lengths = torch.tensor([float(len(p)) for p in condition.prompts], dtype=torch.float64)
        eps = eps + 0.05 * lengths[:, None]
        return (eps - (x.double() - t * eps) / (1 - t)).to(x.dtype)

    def make_flow(
        self, widths: Sequence[int], layers_per_block: int, seed: int, *, hint: bool = False
    ) -> nn.Module:
        return VelocityFlow(self.alphas_cumprod, 16, seed, hint=2 if hint else 0)
