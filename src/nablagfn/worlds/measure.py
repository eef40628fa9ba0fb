"""All measures of a set of samples against a world's target, each with its sampling floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from torch import Tensor

from .. import rng
from ..metrics.prior import mmd2, rbf_widths
from . import measures
from .target import Target

MMD_ROWS = 1_000  # MMD² costs rows²; the other figures use all samples
SPLITS = 10  # pairs of target draws that make a floor
YARDSTICKS = 4  # target draws that samples are compared with


@lru_cache(maxsize=64)
def floors(target: Target, rows: int) -> dict[str, float]:
    """What `rows` perfect samples get in each measure, by name; kept in memory."""
    generator = rng.generator(0, "floor", rows)
    pairs = [
        _against(target, target.resample(rows, generator), target.resample(rows, generator))
        for _ in range(SPLITS)
    ]
    return _mean(pairs)


def distances(target: Target, x: Tensor) -> dict[str, float]:
    """mmd2, swd and mode_kl (for K = 1 gaussian_kl) of samples x [B, d] against the target.

    Means over a few fixed draws of the target: one draw alone is half of the noise of mmd2 and
    swd. B ≥ 2, for gaussian_kl above d.
    """
    generator = rng.generator(0, "yardstick")
    return _mean(
        [_against(target, x, target.resample(len(x), generator)) for _ in range(YARDSTICKS)]
    )


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _against(target: Target, x: Tensor, y: Tensor) -> dict[str, float]:
    """The distances of samples x from one draw y of the target, both [B, d]."""
    x, y = x.detach().cpu().double(), y.double()
    turn = rng.generator(0, "directions")
    figures = {
        "mmd2": mmd2(x[:MMD_ROWS], y[:MMD_ROWS], _widths(target)),
        "swd": measures.sliced_wasserstein(x, y, measures.PROJECTIONS, turn),
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


def measure(targets: Mapping[str, Target], samples: Mapping[str, Tensor]) -> dict[str, float]:
    """The world's figures from samples [B, d] by prompt.

    reward, reward_target: means over prompts. target_ess: the least. All others: those of the
    worst prompt. *_floor: what as many exact samples of the target get.
    mmd2: 0..2. mmd2_ratio: mmd2/mmd2_floor, 0.4 to 2 when exact. swd: unit of x, ≥ 0. mode_kl:
    nats, ≥ 0; for K = 1 gaussian_kl instead.
    """
    by_prompt = [of_prompt(targets[prompt], x) for prompt, x in samples.items()]

    def together(name: str) -> float:
        values = [figures[name] for figures in by_prompt]
        if name in ("reward", "reward_target"):
            return sum(values) / len(values)
        return min(values) if name == "target_ess" else max(values)

    return {name: together(name) for name in by_prompt[0]}
