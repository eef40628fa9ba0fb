"""Rewards of worlds whose tilted density has no closed form.

d dimensions, P prompts, M rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .mixture import require_shape


@dataclass(frozen=True, eq=False)
class Saturating:
    """The reward r(x, p) = tanh(b_pᵀx − c_p): between −1 and 1, and flat at both ends.

    b: [P, d]. c: [P].
    """

    b: Tensor
    c: Tensor

    def check(self, prompts: int, dim: int) -> None:
        """Raises ValueError, one line, unless it is a reward of so many prompts and dimensions."""
        require_shape("reward.b", self.b, prompts, dim)
        require_shape("reward.c", self.c, prompts)

    def __call__(self, x: Tensor, prompt: Tensor) -> Tensor:
        """x [M, d], prompt [M] integers in 0..P-1 -> [M], in the dtype of x; differentiable."""
        b, c = self.b.to(x.device, x.dtype)[prompt], self.c.to(x.device, x.dtype)[prompt]
        return ((x * b).sum(1) - c).tanh()

    def gradient(self, x: Tensor, prompt: Tensor) -> Tensor:
        """∇r = (1 − r²)·b_p, [M, d]."""
        return (1 - self(x, prompt).square())[:, None] * self.b.to(x.device, x.dtype)[prompt]


@dataclass(frozen=True, eq=False)
class Peaks:
    """The reward r(x, p) = log Σ_j h_pj·exp(−‖x − c_pj‖²/(2·s_pj²)): J peaks with valleys between.

    It is not concave, and its gradient turns where two peaks are equally good; far away it falls
    like the widest peak. centres c: [P, J, d]. heights h, widths s: [P, J], positive.
    """

    centres: Tensor
    heights: Tensor
    widths: Tensor

    def check(self, prompts: int, dim: int) -> None:
        """Raises ValueError, one line, unless it is a reward of so many prompts and dimensions."""
        peaks = self.heights.shape[-1]
        require_shape("reward.centres", self.centres, prompts, peaks, dim)
        for what, value in (("heights", self.heights), ("widths", self.widths)):
            require_shape(f"reward.{what}", value, prompts, peaks)
            if not bool((value > 0).all()):
                raise ValueError(f"reward.{what} must be positive")

    def __call__(self, x: Tensor, prompt: Tensor) -> Tensor:
        """x [M, d], prompt [M] integers in 0..P-1 -> [M], in the dtype of x; differentiable."""
        return self._log_peaks(x, prompt).logsumexp(1)

    def gradient(self, x: Tensor, prompt: Tensor) -> Tensor:
        """∇r = Σ_j q_j(x)·(c_pj − x)/s_pj², q_j the share of peak j in the sum at x, [M, d]."""
        share = self._log_peaks(x, prompt).softmax(1)
        centres, widths = (t.to(x.device, x.dtype)[prompt] for t in (self.centres, self.widths))
        return ((share / widths.square())[..., None] * (centres - x[:, None])).sum(1)

    def _log_peaks(self, x: Tensor, prompt: Tensor) -> Tensor:
        """The log of each peak at x, [M, J]."""
        centres, heights, widths = (
            t.to(x.device, x.dtype)[prompt] for t in (self.centres, self.heights, self.widths)
        )
        square = (x[:, None] - centres).square().sum(-1)
        return heights.log() - square / (2 * widths.square())
