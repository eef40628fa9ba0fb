"""A world as a `Policy`: the pretrained model with an adapter that starts at 0, and its reward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import ConfigError
from ..core import rng
from ..core.grids import by_angle
from ..core.schedules import AngleNoising, Levels, Noising, output_of
from ..core.start import FirstState
from ..core.types import Condition, Metadata
from .features import OCTAVES, noise_octaves
from .mixture import Posterior
from .protocols import PointModel
from .world import World

HIDDEN = 128
PROMPT = "prompt"  # the tensor of a condition: one-hot, [B, P]


class PlaneFlow(nn.Module):
    """A field on noisy samples, (x, time, condition) -> [M, d]; exactly zero at start.

    An MLP with 3 hidden SiLU layers, and a linear map beside it. They see x, Fourier features of
    the noise angle arctan(σ/α), for P > 1 prompts the one-hot prompt of the condition, and a hint
    of `hint` numbers. It serves as g_φ, and as the adapter, whose hint is x̂_#(x).
    """

    def __init__(
        self, noising: Noising, dim: int, prompts: int, seed: int, *, hint: int = 0
    ) -> None:
        super().__init__()
        self.noising = noising
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
        self, x: Tensor, time: Tensor, condition: Condition, hint: Tensor | None = None
    ) -> Tensor:
        """x [M, d], time [M], hint [M, hint] -> [M, d] in the dtype of x."""
        dtype = self.linear.weight.dtype
        inputs = [x.to(dtype), self._features(time).to(dtype)]
        if self.conditional:
            if PROMPT not in condition.tensors:
                raise ValueError(f"a world with several prompts needs the tensor '{PROMPT}' [M, P]")
            inputs.append(condition.tensors[PROMPT].to(dtype))
        if hint is not None:
            inputs.append(hint.to(dtype))
        seen = torch.cat(inputs, 1)
        return (self.net(seen) + self.linear(seen)).to(x.dtype)

    def _features(self, time: Tensor) -> Tensor:
        """`noise_octaves` at the times, [M, 2·OCTAVES] float64."""
        levels = self.noising.levels(time)
        return noise_octaves(levels.alpha[:, None], levels.sigma[:, None])


class WorldPolicy:
    """The pretrained model with an adapter that is added to its score, a value gradient.

    As a LoRA works on the features of the pretrained network, the adapter sees x̂_#(x). It changes
    ε by −σ·adapter and x̂ by (σ²/α)·adapter, whatever the world's network predicts. On a schedule
    that starts at α = 0, where ∇ log F̃ vanishes with α, it is their ratio.
    seed: of the adapter's weights, all but the last layer, which is zero.
    """

    together = False

    def __init__(self, world: World, *, seed: int = 0, device: torch.device | str = "cpu") -> None:
        self.world = world
        self.sample_shape: tuple[int, ...] = (world.dim,)
        self.noising = world.noising
        self.prediction = world.prediction
        ends = torch.tensor([world.noising.noisiest], dtype=torch.float64)
        self._from_noise = float(world.noising.levels(ends).alpha) == 0
        self.adapter = self._field(rng.seed_of(seed, "adapter"), hint=world.dim)
        self.adapter_on = True
        self.first = FirstState()
        self._pretrained: dict[torch.dtype, PointModel] = {}
        self.to(device)

    def _field(self, seed: int, hint: int = 0) -> PlaneFlow:
        return PlaneFlow(self.noising, self.world.dim, len(self.world.prompts), seed, hint=hint)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> WorldPolicy:
        """Move everything there, and the adapter to `dtype` if given; returns itself."""
        self._device = torch.device(device)
        self.adapter.to(self._device, dtype)
        self._pretrained = {}
        return self

    @property
    def device(self) -> torch.device:
        return self._device

    def _mixture(self, dtype: torch.dtype) -> PointModel:
        """The pretrained model on the device in `dtype`, moved once."""
        if dtype not in self._pretrained:
            self._pretrained[dtype] = self.world.mixture.to(self.device, dtype)
        return self._pretrained[dtype]

    # ---------------------------------------------------------------- Policy

    def times(self, grid: str, num_steps: int) -> Sequence[float]:
        """Equal steps of the noise angle, noisiest first: the same for every named grid.

        Raises ConfigError for more steps than there are times.
        """
        try:
            return world_times(self.noising, num_steps)
        except ValueError as error:
            raise ConfigError(f"config.sampling.num_steps={num_steps}: {error}") from None

    def condition(self, prompts: Sequence[str], metadata: Sequence[Metadata] = ()) -> Condition:
        """One-hot prompts [B, P] as the tensor `PROMPT`; none in a world with one prompt.

        Raises ConfigError for a prompt that the world does not know.
        """
        rows = self.world.rows(prompts)
        count = len(self.world.prompts)
        return Condition(
            prompts=tuple(prompts),
            metadata=tuple(metadata) or tuple({} for _ in prompts),
            tensors={PROMPT: torch.eye(count, device=self.device)[rows]} if count > 1 else {},
        )

    def output(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """x [M, d], time [M] -> u [M, d] float32, float64 for float64 x."""
        x = x if x.dtype == torch.float64 else x.float()
        wide = self.noising.levels(time)
        levels = Levels(wide.alpha.to(x.dtype)[:, None], wide.sigma.to(x.dtype)[:, None])
        found = self._mixture(x.dtype).posterior(x, levels)
        if self.adapter_on:
            change = self.adapter(x, time, condition, found.x_clean)
            found = tilted_posterior(found, levels, change, over_alpha=self._from_noise)
        return output_of(found.x_clean, found.eps, levels, self.prediction)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Inside it the adapter is off."""
        before, self.adapter_on = self.adapter_on, False
        try:
            with self.first.reference():
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
        if not self.world.name:
            return {}
        return {"pretrained.model": self.world.name, "pretrained.family": "world"}

    def parameters(self) -> list[nn.Parameter]:
        return list(self.adapter.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        return {**self.adapter.state_dict(), **self.first.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.adapter.load_state_dict(self.first.load(state))

    def save(self, folder: Path) -> None:
        """adapter.safetensors: the weights of the MLP, and the mean of the first state."""
        save_file(
            {name: value.contiguous() for name, value in self.state_dict().items()},
            folder / "adapter.safetensors",
        )


def tilted_posterior(
    found: Posterior, levels: Levels, change: Tensor, *, over_alpha: bool
) -> Posterior:
    """The posterior of a density whose score at x is larger by `change`, [M, d]; by α·change if
    over_alpha."""
    alpha, sigma = levels.alpha, levels.sigma
    if over_alpha:
        return Posterior(
            found.x_clean + sigma.square() * change, found.eps - alpha * sigma * change
        )
    return Posterior(found.x_clean + sigma.square() / alpha * change, found.eps - sigma * change)


def world_times(noising: Noising, num_steps: int) -> list[float]:
    """N times with equal steps of the noise angle, noisiest first, the clean end left out.

    Whole numbers ⌊last·k/N⌋ where times are places in a table of equal angles. Raises ValueError
    when there are not that many.
    """
    if isinstance(noising, AngleNoising):
        if not 1 <= num_steps <= noising.last:
            raise ValueError(f"a world has at most {noising.last} steps")
        return [noising.last * k // num_steps for k in range(num_steps, 0, -1)]
    return by_angle(noising, num_steps)


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
