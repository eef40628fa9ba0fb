"""A score that a network has learned: near that of a mixture, but inexact, as in real models.

K components, d dimensions, M rows, L layers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from ..core.schedules import Levels
from .features import OCTAVES, noise_octaves
from .mixture import Mixture, Posterior, require_shape
from .protocols import Density

WEIGHTS = Path(__file__).parent.parent / "assets" / "worlds"


def uneven_grid() -> Mixture:
    """Nine Gaussians on a 3×3 grid in the plane, row by row from below, with unequal weights.

    tools/train_learned_world.py trains the packaged network on its samples.
    """
    side = torch.tensor([-1.5, 0.0, 1.5], dtype=torch.float64)
    return Mixture(
        means=torch.cartesian_prod(side, side).flip(1),
        weights=torch.tensor([12, 8, 14, 16, 6, 10, 5, 20, 9], dtype=torch.float64) / 100,
        variances=torch.tensor([0.09, 0.05], dtype=torch.float64),
    )


@dataclass(frozen=True, eq=False)
class Dense:
    """The affine map weight·h + bias of one layer. weight: [outputs, inputs]. bias: [outputs]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, h: Tensor) -> Tensor:
        """h [M, inputs] -> [M, outputs]."""
        return functional.linear(h, self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class LearnedScore:
    """An MLP's estimate of E[x_clean|x] and E[noise|x], of which only its sampler has a density.

    The network sees x and Fourier features of the noise angle arctan(σ/α), has SiLU between its
    layers, and predicts the velocity v = (α·noise − σ·x_clean)/s, s² = α² + σ²: the one output from
    which neither x̂ nor ε loses digits at either end. There is no log density and there are no
    exact draws; what the model draws, its sampler says (`target.base_samples`).

    trained_on: the density whose samples the network learned from. Its means, weights, moments and
    modes stand for those of the model, which has none that are known. layers: L ≥ 1 of them.
    """

    trained_on: Density
    layers: tuple[Dense, ...]

    @staticmethod
    def read(file: Path, trained_on: Density) -> LearnedScore:
        """The network of a file that `save` wrote. Raises OSError where there is none."""
        found = load_file(file)
        layers = tuple(
            Dense(found[f"{k}.weight"].double(), found[f"{k}.bias"].double())
            for k in range(len(found) // 2)
        )
        return LearnedScore(trained_on, layers)

    def save(self, file: Path) -> None:
        """Writes the layers, float32, as K.weight and K.bias of a safetensors file."""
        tensors = {
            f"{k}.{name}": value.detach().float().contiguous()
            for k, layer in enumerate(self.layers)
            for name, value in vars(layer).items()
        }
        save_file(tensors, file)

    @property
    def means(self) -> Tensor:
        """Those of the density it was trained on, [K, d]."""
        return self.trained_on.means

    @property
    def weights(self) -> Tensor:
        """Those of the density it was trained on, [K]: the model's own masses differ a little."""
        return self.trained_on.weights

    @property
    def dim(self) -> int:
        return self.trained_on.dim

    def __len__(self) -> int:
        """K, the number of components of the density it was trained on."""
        return len(self.trained_on)

    def check(self) -> None:
        """Raises ValueError, one line, when shapes or values do not fit."""
        self.trained_on.check()
        widths = [self.dim + 2 * OCTAVES, *(len(layer.bias) for layer in self.layers)]
        for k, (layer, (inputs, outputs)) in enumerate(
            zip(self.layers, itertools.pairwise(widths), strict=True)
        ):
            require_shape(f"the weight of layer {k}", layer.weight, outputs, inputs)
            if not bool(layer.weight.isfinite().all() and layer.bias.isfinite().all()):
                raise ValueError(f"layer {k} has a number that is not finite")
        if widths[-1] != self.dim or not self.layers:
            raise ValueError(f"the last layer must have {self.dim} outputs")

    def to(self, device: torch.device | str, dtype: torch.dtype) -> LearnedScore:
        """The same network there; float64 weights are the stored float32 ones, without rounding."""
        layers = tuple(
            Dense(layer.weight.to(device, dtype), layer.bias.to(device, dtype))
            for layer in self.layers
        )
        return LearnedScore(self.trained_on.to(device, dtype), layers)

    def velocity(self, x: Tensor, levels: Levels) -> Tensor:
        """What the network says of v = (α·noise − σ·x_clean)/s; x [M, d], levels [M, 1] -> [M, d].

        It is shown x/s, so that α and σ count by their ratio alone.
        """
        size = (levels.alpha.square() + levels.sigma.square()).sqrt()
        h = torch.cat([x / size, noise_octaves(levels.alpha, levels.sigma)], 1)
        for layer in self.layers[:-1]:
            h = functional.silu(layer(h))
        return self.layers[-1](h)

    def posterior(self, x: Tensor, levels: Levels) -> Posterior:
        """What the network says of x_clean and of the noise in x = α·x_clean + σ·noise.

            x̂ = (α·x/s − σ·v)/s,   ε = (σ·x/s + α·v)/s,   s² = α² + σ²

        so that x = α·x̂ + σ·ε whatever v is. x: [M, d]. levels: [M, 1] each, σ above 0.
        """
        alpha, sigma = levels.alpha, levels.sigma
        square = alpha.square() + sigma.square()
        v = self.velocity(x, levels) * square.sqrt()
        return Posterior(
            x_clean=(alpha * x - sigma * v) / square, eps=(sigma * x + alpha * v) / square
        )

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [d] and covariance [d, d] of the density it was trained on."""
        return self.trained_on.moments()

    def mode_of(self, x: Tensor) -> Tensor:
        """The mode of the density it was trained on that x [M, d] is counted to, [M] in 0..K-1."""
        return self.trained_on.mode_of(x)
