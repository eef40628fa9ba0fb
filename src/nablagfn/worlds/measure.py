"""All measures of a set of samples against a world's target, each with its sampling floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from ..core import rng
from ..metrics.prior import kernel_across, kernel_within, rbf_widths
from . import measures
from .target import Target

MMD_ROWS = 1_000  # MMD² costs rows²; the other figures use all samples
SPLITS = 10  # pairs of target draws that make a floor
YARDSTICKS = 4  # target draws that samples are compared with


@lru_cache(maxsize=64)
def floors(target: Target, rows: int) -> dict[str, float]:
    """What `rows` perfect samples get in each measure, by name; kept in memory."""
    generator = rng.generator(0, "floor", rows)

    def drawn() -> Cloud:
        return Cloud.of(target, target.resample(rows, generator))

    return _mean([_against(target, drawn(), drawn()) for _ in range(SPLITS)])


def distances(target: Target, x: Tensor) -> dict[str, float]:
    """mmd2, swd and mode_kl (for K = 1 gaussian_kl) of samples x [B, d] against the target.

    Means over a few fixed draws of the target: one draw alone is half of the noise of mmd2 and
    swd. B ≥ 2, for gaussian_kl above d.
    """
    own = Cloud.of(target, x)
    return _mean([_against(target, own, drawn) for drawn in yardsticks(target, len(x))])


@lru_cache(maxsize=64)
def yardsticks(target: Target, rows: int) -> tuple[Cloud, ...]:
    """The draws of the target that samples are compared with; kept in memory."""
    generator = rng.generator(0, "yardstick")
    draws = (target.resample(rows, generator) for _ in range(YARDSTICKS))
    return tuple(Cloud.of(target, y) for y in draws)


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


@dataclass(frozen=True, eq=False)
class Cloud:
    """Samples [B, d] float64, with the parts of mmd2 and swd that are theirs alone."""

    x: Tensor
    within: Tensor
    along: Tensor

    @staticmethod
    def of(target: Target, x: Tensor) -> Cloud:
        x = x.detach().cpu().double()
        within = kernel_within(x[:MMD_ROWS], _widths(target))
        return Cloud(x, within, measures.sorted_along(x, _directions(x.shape[1])))


@lru_cache(maxsize=64)
def _directions(dim: int) -> Tensor:
    return measures.directions(dim, measures.PROJECTIONS, rng.generator(0, "directions"))


def _against(target: Target, own: Cloud, drawn: Cloud) -> dict[str, float]:
    """The distances of samples from one draw of the target, of equal size."""
    x, rows = own.x, slice(MMD_ROWS)
    across = kernel_across(x[rows], drawn.x[rows], _widths(target))
    figures = {
        "mmd2": own.within + drawn.within - 2 * across,
        "swd": measures.sorted_distance(own.along, drawn.along),
    }
    mixture = target.world.mixture
    if target.gaussian is None:
        masses = measures.mode_masses(mixture.mode_of(x), len(mixture))
        figures["mode_kl"] = measures.mode_mass_kl(masses, target.masses)
    else:
        figures["gaussian_kl"] = measures.gaussian_kl(x.mean(0), x.T.cov(), *target.gaussian)
    return {name: float(value) for name, value in figures.items()}


@lru_cache(maxsize=64)
def _widths(target: Target) -> tuple[float, ...]:
    return rbf_widths(target.resample(MMD_ROWS, rng.generator(0, "widths")))


def of_prompt(target: Target, x: Tensor) -> dict[str, float]:
    """Every figure of the samples x [B, d] of one prompt."""
    row = target.world.rows([target.prompt] * len(x))
    found, least = distances(target, x), floors(target, len(x))
    figures = {
        "reward": float(target.world.reward(x.cpu().double(), row).mean()),
        "reward_target": target.reward,
        "target_ess": target.effective_size,
    }
    for name, value in found.items():
        figures |= {name: value, f"{name}_floor": least[name]}
    return {**figures, "mmd2_ratio": found["mmd2"] / least["mmd2"]}


def measure(by_prompt: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The world's figures from those of its prompts (`of_prompt`).

    reward, reward_target: means over prompts. target_ess: the least. All others: those of the
    worst prompt. *_floor: what as many exact samples of the target get.
    mmd2: 0..2. mmd2_ratio: mmd2/mmd2_floor, 0.4 to 2 when exact. swd: unit of x, ≥ 0. mode_kl:
    nats, ≥ 0; for K = 1 gaussian_kl instead.
    """

    def together(name: str) -> float:
        values = [figures[name] for figures in by_prompt]
        if name in ("reward", "reward_target"):
            return sum(values) / len(values)
        return min(values) if name == "target_ess" else max(values)

    return {name: together(name) for name in by_prompt[0]}
