"""A world as a `Policy`: the exact ε_# with an MLP adapter that starts at zero, and its reward."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import ConfigError
from ..core import rng
from ..core.kernels import predict_clean
from ..core.types import Condition, Metadata
from .mixture import Mixture
from .world import World

TIMES = 1000  # length of the training schedule, as Stable Diffusion's
CLEAN_ANGLE = 0.029  # noise angle at the clean end; SD's alphas_cumprod[0] has the same
NOISY_GAP = 0.02  # the noisiest angle is π/2 less this: x_0 and x_N are nearly independent
HIDDEN = 128
OCTAVES = 4  # Fourier features sin, cos(2^j · angle), j < OCTAVES


def cosine_schedule() -> Tensor:
    """ᾱ = cos²(angle) with uniform angles (Nichol & Dhariwal 2021), [1000] float64, falling.

    Against SD's schedule with uniform steps this has a third of the discretisation error.
    """
    angle = torch.linspace(CLEAN_ANGLE, math.pi / 2 - NOISY_GAP, TIMES, dtype=torch.float64)
    return angle.cos().square()


class PlaneFlow(nn.Module):
    """A field on noisy samples, (x, timestep, condition) -> [M, d]; exactly zero at start.

    An MLP with 3 hidden SiLU layers, and a linear map beside it. They see x, Fourier features of
    the noise angle arccos √ᾱ, for P > 1 prompts the one-hot prompt of `Condition.embeds`, and a
    hint of `hint` numbers. It serves as g_φ, and as the adapter, whose hint is x̂_#(x).
    """

    features: Tensor

    def __init__(
        self, alphas_cumprod: Tensor, dim: int, prompts: int, seed: int, *, hint: int = 0
    ) -> None:
        super().__init__()
        angle = alphas_cumprod.sqrt().arccos()[:, None] * 2.0 ** torch.arange(OCTAVES)
        features = torch.cat([angle.sin(), angle.cos()], 1).float()
        self.register_buffer("features", features, persistent=False)
        self.conditional = prompts > 1
        width = dim + 2 * OCTAVES + (prompts if self.conditional else 0) + hint
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            for inputs in (width, HIDDEN, HIDDEN):
                layers += [nn.Linear(inputs, HIDDEN), nn.SiLU()]
            last = nn.Linear(HIDDEN, dim)
            self.linear = nn.Linear(width, dim, bias=False)
        for start in (last.weight, last.bias, self.linear.weight):
            nn.init.zeros_(start)
        self.net = nn.Sequential(*layers, last)

    def forward(
        self, x: Tensor, timestep: Tensor, condition: Condition, hint: Tensor | None = None
    ) -> Tensor:
        """x [M, d], timestep [M] in 0..999, hint [M, hint] -> [M, d] in the dtype of x."""
        inputs = [x.to(self.features.dtype), self.features[timestep]]
        if self.conditional:
            if condition.embeds is None:
                raise ValueError("a world with several prompts needs Condition.embeds [M, P]")
            inputs.append(condition.embeds.to(self.features))
        if hint is not None:
            inputs.append(hint.to(self.features.dtype))
        seen = torch.cat(inputs, 1)
        return (self.net(seen) + self.linear(seen)).to(x.dtype)


class WorldPolicy:
    """ε_θ = ε_# − √(1−ᾱ)·adapter(x, x̂_#): the adapter is what is added to the score, a value
    gradient. As a LoRA works on the features of the pretrained network, it sees x̂_#(x).

    seed: of the adapter's weights, all but the last layer, which is zero.
    """

    together = False

    def __init__(self, world: World, *, seed: int = 0, device: torch.device | str = "cpu") -> None:
        self.world = world
        self.sample_shape: tuple[int, ...] = (world.dim,)
        self.alphas_cumprod = cosine_schedule()
        self.adapter = self._field(rng.seed_of(seed, "adapter"), hint=world.dim)
        self.adapter_on = True
        self._exact: dict[torch.dtype, tuple[Mixture, Tensor]] = {}
        self.to(device)

    def _field(self, seed: int, hint: int = 0) -> PlaneFlow:
        prompts = len(self.world.prompts)
        return PlaneFlow(self.alphas_cumprod, self.world.dim, prompts, seed, hint=hint)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> WorldPolicy:
        """Move everything there, and the adapter to `dtype` if given; returns itself."""
        self._device = torch.device(device)
        self.adapter.to(self._device, dtype)
        self._exact = {}
        return self

    @property
    def device(self) -> torch.device:
        return self._device

    def _constants(self, dtype: torch.dtype) -> tuple[Mixture, Tensor]:
        """The mixture and ᾱ [1000, 1] on the device in `dtype`, made once."""
        if dtype not in self._exact:
            levels = self.alphas_cumprod.to(self.device, dtype)[:, None]
            self._exact[dtype] = (self.world.mixture.to(self.device, dtype), levels)
        return self._exact[dtype]

    # ---------------------------------------------------------------- Policy

    def timesteps(self, scheduler: str, num_steps: int) -> list[int]:
        """⌊999·k/N⌋ for k = N … 1: noisiest first, equal steps of the noise angle.

        The same for every scheduler. Raises ConfigError for more than 999 steps.
        """
        most = TIMES - 1
        if not 1 <= num_steps <= most:
            raise ConfigError(
                f"config.sampling.num_steps={num_steps}: a world has at most {most} steps"
            )
        return [most * k // num_steps for k in range(num_steps, 0, -1)]

    def condition(self, prompts: Sequence[str], metadata: Sequence[Metadata] = ()) -> Condition:
        """One-hot prompts [B, P] in `embeds`; None in a world with one prompt.

        Raises ConfigError for a prompt that the world does not know.
        """
        rows = self.world.rows(prompts)
        count = len(self.world.prompts)
        return Condition(
            prompts=tuple(prompts),
            metadata=tuple(metadata) or tuple({} for _ in prompts),
            embeds=torch.eye(count, device=self.device)[rows] if count > 1 else None,
        )

    def eps(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """x [M, d], timestep [M] in 0..999 -> [M, d] float32, float64 for float64 x."""
        x = x if x.dtype == torch.float64 else x.float()
        mixture, levels = self._constants(x.dtype)
        alpha_bar = levels[timestep]
        eps = mixture.eps(x, alpha_bar)
        if self.adapter_on:
            x_clean = predict_clean(x, eps, alpha_bar)
            change = self.adapter(x, timestep, condition, x_clean)
            eps = eps - (1 - alpha_bar).sqrt() * change
        return eps

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Inside it the adapter is off."""
        before, self.adapter_on = self.adapter_on, False
        try:
            yield
        finally:
            self.adapter_on = before

    def decode(self, x: Tensor) -> Tensor:
        """The sample is its own picture, [M, d]."""
        return x

    def make_flow(
        self, widths: Sequence[int], layers_per_block: int, seed: int, *, hint: bool = False
    ) -> nn.Module:
        """A new g_φ of the adapter's shape; widths and layers are those of picture models."""
        extra = self.world.dim if hint else 0
        return self._field(rng.seed_of(seed, "flow"), hint=extra).to(self.device)

    def settings(self) -> dict[str, Any]:
        return {"pretrained.model": self.world.name} if self.world.name else {}

    def parameters(self) -> list[nn.Parameter]:
        return list(self.adapter.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.adapter.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.adapter.load_state_dict(dict(state))

    def save(self, folder: Path) -> None:
        """adapter.safetensors: the weights of the MLP."""
        save_file(
            {name: value.contiguous() for name, value in self.state_dict().items()},
            folder / "adapter.safetensors",
        )


class WorldReward:
    """r(x, p) of a world, as a `Reward`; each row is scored with its own prompt."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        """images: samples [B, d] -> [B]. Raises ConfigError for an unknown prompt."""
        rows = self.world.rows(prompts).to(images.device)
        return self.world.reward(images, rows)
