"""Paths of two samplers weighted as one set, where everything is known: p_# = N(0, 1), r(x) = x.

The target at β is N(β, 1) with log Z = β²/2; a policy N(a, 1) has log p_θ/p_# = a·x − a²/2, and
both KLs between it and the target are (a − β)²/2.
"""

from __future__ import annotations

import pytest
import torch

from nablagfn.core import rng
from nablagfn.core.path_kl import log_weight
from nablagfn.evaluation.two_samplers import TwoSamplers
from nablagfn.metrics import tilting
from nablagfn.metrics.tilting import PromptRows

BETA = 1.0


class Scene:
    """Of each prompt `count` paths of the policy and as many of p_#, by the same noise."""

    def __init__(
        self, moved: float, prompts: int, count: int, beta: float = BETA, seed: int = 0
    ) -> None:
        generator = rng.generator(seed, "scene")
        noise = torch.randn(prompts * count, generator=generator, dtype=torch.float64)
        self.prompts = [str(prompt) for prompt in range(prompts) for _ in range(count)]
        self.x = torch.cat([moved + noise, noise])
        self.ratio = moved * self.x - moved**2 / 2
        self.log_w = log_weight(self.ratio, self.x, beta)
        self.kl = (moved - beta) ** 2 / 2
        self.samplers = TwoSamplers.of(self.log_w, self.ratio, self.prompts)

    @property
    def log_z_own(self) -> float:
        """By the policy's paths alone."""
        log_w = self.log_w[: len(self.prompts)]
        return float(tilting.log_mean(log_w, PromptRows.of(self.prompts)))


def test_a_policy_that_draws_the_target_needs_few_paths() -> None:
    samplers = Scene(BETA, 45, 4).samplers
    assert float(samplers.log_z()) == pytest.approx(BETA**2 / 2, abs=1e-12)
    assert float(samplers.kl_to_target()) == pytest.approx(0, abs=1e-12)
    assert float(samplers.kl_from_target()) == pytest.approx(0, abs=1e-12)


def test_a_policy_that_has_not_moved_adds_nothing() -> None:
    """The same paths twice."""
    scene = Scene(0.0, 2, 50)
    assert float(scene.samplers.log_z()) == pytest.approx(scene.log_z_own, abs=1e-12)


@pytest.mark.parametrize("moved", [-2.0, 0.7, 2.5])
def test_the_figures_are_the_known_ones(moved: float) -> None:
    """Also of a policy that has run away, whose own paths do not show the target."""
    scene = Scene(moved, 2, 40_000)
    samplers = scene.samplers
    assert float(samplers.log_z()) == pytest.approx(BETA**2 / 2, abs=0.02)
    assert float(samplers.target_mean(scene.x)) == pytest.approx(BETA, abs=0.03)
    assert float(samplers.kl_to_target()) == pytest.approx(scene.kl, rel=0.02)
    assert float(samplers.kl_from_target()) == pytest.approx(scene.kl, rel=0.02)


@pytest.mark.parametrize("moved", [1.0, 0.9, 0.7, 0.0, -0.5, 2.5])
def test_few_paths_of_many_prompts(moved: float) -> None:
    """45 × 16: no worse than the better of the two samplers alone, and no KL below 0."""
    scenes = [Scene(moved, 45, 16, seed=seed) for seed in range(30)]
    found = torch.tensor([float(scene.samplers.log_z()) for scene in scenes]) - BETA**2 / 2
    own = torch.tensor([scene.log_z_own for scene in scenes]) - BETA**2 / 2
    base = torch.tensor([Scene(0.0, 45, 16, seed=s).log_z_own for s in range(30)]) - BETA**2 / 2
    best = min(float(alone.square().mean()) for alone in (own, base))
    assert float(found.square().mean()) ** 0.5 < 1.5 * best**0.5 + 0.01
    for scene in scenes:
        for kl in (scene.samplers.kl_to_target(), scene.samplers.kl_from_target()):
            assert -1e-12 < float(kl) < scene.kl + 0.15
    mean = sum(float(scene.samplers.kl_to_target()) for scene in scenes) / len(scenes)
    assert mean == pytest.approx(scenes[0].kl, rel=0.12, abs=1e-3)


def test_prompts_do_not_mix_and_counts_are_of_pairs() -> None:
    """What is added to a prompt's log w is added to its log Z, and a pair that is taken twice is
    there twice."""
    scene = Scene(0.6, 2, 30)
    bee = torch.arange(120) % 60 >= 30
    moved = TwoSamplers.of(scene.log_w + 2000.0 * bee, scene.ratio, scene.prompts)
    assert float(moved.log_z() - scene.samplers.log_z()) == pytest.approx(1000, abs=1e-9)
    for name in ("kl_to_target", "kl_from_target"):
        found, before = getattr(moved, name)(), getattr(scene.samplers, name)()
        assert float(found) == pytest.approx(float(before), abs=1e-9)
    counts = torch.randint(0, 3, (2, 60), generator=rng.generator(1, "counts"))
    for row, taken in enumerate(counts):
        twice = torch.cat([taken, taken])
        prompts = [p for p, n in zip(scene.prompts, taken.tolist(), strict=True) for _ in range(n)]
        again = TwoSamplers.of(
            scene.log_w.repeat_interleave(twice), scene.ratio.repeat_interleave(twice), prompts
        )
        x = scene.x.repeat_interleave(twice)
        for name in ("log_z", "kl_to_target", "kl_from_target"):
            taken_by = getattr(scene.samplers, name)(counts)[row]
            assert float(taken_by) == pytest.approx(float(getattr(again, name)()), abs=1e-9)
        mean = scene.samplers.target_mean(scene.x, counts)[row]
        assert float(mean) == pytest.approx(float(again.target_mean(x)), abs=1e-9)


def test_prompts_may_have_different_numbers_of_paths() -> None:
    sizes = {"fox": 3, "bee": 5}
    parts = {name: Scene(0.5, 1, size, seed=size) for name, size in sizes.items()}
    halves = [(s.log_w.chunk(2), s.ratio.chunk(2)) for s in parts.values()]
    log_w = torch.cat([log_w[i] for i in range(2) for log_w, _ in halves])
    ratio = torch.cat([ratio[i] for i in range(2) for _, ratio in halves])
    prompts = [name for name, size in sizes.items() for _ in range(size)]
    found = TwoSamplers.of(log_w, ratio, prompts)
    for name in ("log_z", "kl_to_target", "kl_from_target"):
        alone = [float(getattr(scene.samplers, name)()) for scene in parts.values()]
        assert float(getattr(found, name)()) == pytest.approx(sum(alone) / 2, abs=1e-12)


@pytest.mark.parametrize(
    "moved, beta, few",
    [(0.0, 0.5, False), (0.0, 3.0, True), (0.0, 6.0, True), (1.0, 1.0, False), (1.0, 5.0, True)],
)
def test_effective_pairs_tell_where_the_target_is_not_seen(
    moved: float, beta: float, few: bool
) -> None:
    """By pairs: of a policy that has not moved a path and its double are one."""
    samplers = Scene(moved, 45, 16, beta).samplers
    assert (samplers.effective_pairs < 2.7) == few
    assert samplers.effective_pairs <= 16


def test_a_pair_counts_by_what_both_of_its_paths_carry() -> None:
    """One pair's own path and another's of p_# carry the target: two of four pairs."""
    nothing = -200.0
    log_w = torch.tensor([0.0, nothing, nothing, nothing, nothing, 0.0, nothing, nothing])
    samplers = TwoSamplers.of(log_w, torch.zeros(8), ["one"] * 4)
    assert samplers.effective_pairs == pytest.approx(2)


def test_paths_that_one_of_the_two_never_takes_are_no_trouble() -> None:
    ratio = torch.tensor([1e6] * 4 + [-1e6] * 4, dtype=torch.float64)
    samplers = TwoSamplers.of(log_weight(ratio, torch.zeros(8), 1.0), ratio, ["one"] * 4)
    assert float(samplers.log_z()) == pytest.approx(0, abs=1e-9)
    assert float(samplers.kl_to_target()) == pytest.approx(1e6)
    assert float(samplers.kl_from_target()) == pytest.approx(1e6)
