"""Sums of rewards, black boxes, and estimated gradients: against closed forms."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from nablagfn.config import Config, ConfigError, RewardSettings
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.prompts import PromptSet
from nablagfn.rewards import NamedReward, analytic, named, require_gradient, resolve
from nablagfn.rewards.blackbox import ZerothOrder, block_sizes, blocks, jpeg_size, noise_of
from nablagfn.rewards.compose import (
    Component,
    Composition,
    Term,
    parse,
    project_conflicts,
    with_settings,
)
from nablagfn.training.trainer import Trainer
from tests.test_docs import small_config
from tests.tiny_pipeline import make_pipeline

pytestmark = pytest.mark.usefixtures("no_report")

CPU = torch.device("cpu")


def pictures(count: int = 3, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def score(spec: str, images: Tensor, **settings: object) -> Tensor:
    reward = resolve(spec, CPU, settings=RewardSettings(**settings))
    return reward(images, ["a cat"] * len(images), [{}] * len(images))


def known(name: str, images: Tensor) -> Tensor:
    return getattr(analytic, name)(images, [""] * len(images), [{}] * len(images))


def gradient(spec: str, images: Tensor, **settings: object) -> Tensor:
    x = images.clone().requires_grad_()
    return torch.autograd.grad(score(spec, x, **settings).sum(), x)[0]


# -------------------------------------------------------------------------------- the language


@pytest.mark.parametrize(
    ("spec", "terms"),
    [
        ("brightness", [("brightness", 1)]),
        ("-brightness", [("brightness", -1)]),
        ("2*brightness", [("brightness", 2)]),
        ("0.7*hpsv2 + 0.3*aesthetic", [("hpsv2", 0.7), ("aesthetic", 0.3)]),
        ("hpsv2 - 1e-2 * jpeg-size", [("hpsv2", 1), ("jpeg-size", -0.01)]),
        ("-tiny-aesthetic - -2*a.b:c", [("tiny-aesthetic", -1), ("a.b:c", 2)]),
    ],
)
def test_parse(spec: str, terms: list[tuple[str, float]]) -> None:
    assert parse(spec) == tuple(Term(name, weight) for name, weight in terms)


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("brightness + brightness", "twice"),
        ("0*brightness", "other than 0"),
        ("x*brightness", "other than 0"),
        ("nan*brightness", "other than 0"),
        ("inf*brightness", "other than 0"),
        ("brightness + ", "no reward"),
        (" + brightness + 2*", "no reward"),
        ("brightness contrast", "no reward"),
        ("2*3*brightness", "no reward"),
        ("brightness + brigthness", "did you mean brightness"),
    ],
)
def test_a_bad_sum_gives_one_line(spec: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part) as caught:
        resolve(spec, CPU)
    assert "config.experiment.reward_fn" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("normalise", "brightness"),
        ("normalise", "brightness=1"),
        ("normalise", "brightness=1/0"),
        ("normalise", "brightness=1/-2"),
        ("normalise", "brightness=/2"),
        ("normalise", "contrast=0/1"),
        ("normalise", "=0/1"),
        ("clamp", "brightness=1"),
        ("clamp", "brightness=2:1"),
        ("clamp", "brightness=1:1"),
        ("clamp", "brightness=a:1"),
        ("clamp", "hpsv2=0:1"),
    ],
)
def test_a_bad_setting_names_its_key(key: str, entry: str) -> None:
    with pytest.raises(ConfigError, match=f"config.reward.{key}") as caught:
        resolve("brightness", CPU, settings=RewardSettings(**{key: (entry,)}))
    assert len(str(caught.value).splitlines()) == 1


# -------------------------------------------------------------------------------- the sum


def test_a_single_reward_is_left_as_it_is() -> None:
    assert resolve("brightness", CPU).function is analytic.brightness


def test_a_weighted_sum_and_its_gradient() -> None:
    images = pictures()
    spec = "2*brightness - 0.5*colourfulness"
    expected = 2 * known("brightness", images) - 0.5 * known("colourfulness", images)
    torch.testing.assert_close(score(spec, images), expected)
    slopes = 2 * gradient("brightness", images) - 0.5 * gradient("colourfulness", images)
    torch.testing.assert_close(gradient(spec, images), slopes)


def test_minus_minimises() -> None:
    images = pictures()
    torch.testing.assert_close(score("-contrast", images), -known("contrast", images))
    torch.testing.assert_close(gradient("-contrast", images), -gradient("contrast", images))


def test_normalisation_comes_before_the_weight() -> None:
    images = pictures()
    found = score("3*brightness", images, normalise=("brightness=0.4/0.1",))
    torch.testing.assert_close(found, 3 * (known("brightness", images) - 0.4) / 0.1)


def test_beyond_a_threshold_a_reward_is_constant() -> None:
    images = torch.cat([pictures(1) * 0.1, pictures(1) * 0.5 + 0.3, pictures(1) * 0.1 + 0.9])
    raw = known("brightness", images)
    assert raw[0] < 0.2 < raw[1] < 0.8 < raw[2]
    limits = {"clamp": ("brightness=0.2:0.8",), "normalise": ("brightness=0.5/2",)}
    found = score("brightness", images, **limits)
    torch.testing.assert_close(found, (torch.tensor([0.2, float(raw[1]), 0.8]) - 0.5) / 2)
    slope = gradient("brightness", images, **limits)
    assert not slope[0].any() and not slope[2].any()
    torch.testing.assert_close(slope[1], gradient("brightness", images)[1] / 2)


def test_one_threshold_may_be_left_out() -> None:
    (low,) = with_settings([Component("a", analytic.contrast)], (), ("a=0.1:",))
    (high,) = with_settings([Component("a", analytic.contrast)], (), ("a=:0.1",))
    assert (low.low, low.high) == (0.1, math.inf) and (high.low, high.high) == (-math.inf, 0.1)


def test_two_opposed_gradients_are_projected_as_in_the_paper() -> None:
    """Yu et al. 2020: each is freed of its part along the other; agreeing ones are kept."""
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 1.0]])
    torch.testing.assert_close(project_conflicts([a, b]), torch.tensor([[0.5, 1.5]]))
    c = torch.tensor([[1.0, 1.0]])
    torch.testing.assert_close(project_conflicts([a, c]), a + c)
    one, many = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    rows = torch.cat(
        [project_conflicts([x, y]) for x, y in zip(one[:, None], many[:, None], strict=True)]
    )
    torch.testing.assert_close(project_conflicts([one, many]), rows)  # each picture by itself


def test_projection_keeps_the_value_and_harms_no_part() -> None:
    images = pictures()
    spec, on = "brightness - 0.9*contrast - 0.3*colourfulness", {"project_conflicts": True}
    torch.testing.assert_close(
        score(spec, images.clone().requires_grad_(), **on).detach(), score(spec, images)
    )
    spec = "brightness - 0.9*contrast"
    found = gradient(spec, images, **on)
    parts = [gradient("brightness", images), -0.9 * gradient("contrast", images)]
    torch.testing.assert_close(found, project_conflicts(parts))
    for part in parts:
        assert (found * part).flatten(1).sum(1).min() > -1e-6


def test_projection_does_something() -> None:
    images = pictures()
    parts = [gradient("contrast", images), -gradient("colourfulness", images)]
    assert (parts[0] * parts[1]).flatten(1).sum(1).min() < 0  # they do conflict
    spec = "contrast - colourfulness"
    plain, projected = gradient(spec, images), gradient(spec, images, project_conflicts=True)
    torch.testing.assert_close(projected, project_conflicts(parts))
    assert (plain - projected).norm() > 1e-3 * plain.norm()


# -------------------------------------------------------------------------------- in a run


def train(tmp_path: Path, spec: str, **settings: object) -> SimpleNamespace:
    config = small_config(tmp_path, no_flow=True)
    config.evaluation.num_prompts = 0
    config.logging.sample_freq = 0
    config.reward = RewardSettings(**settings)
    trainer = Trainer(
        StableDiffusionPolicy(make_pipeline(), seed=0),
        resolve(spec, CPU, settings=config.reward),
        PromptSet(("cat", "dog")),
        config,
        show_progress=False,
    )
    trainer.fit()
    return SimpleNamespace(rows=trainer.folder.metrics(), trainer=trainer)


def test_every_component_is_logged(tmp_path: Path) -> None:
    spec = "2*brightness - contrast"
    rows = train(tmp_path, spec, normalise=("brightness=0.5/0.1",)).rows
    for row in rows:
        total = 2 * (row["reward_brightness"] - 0.5) / 0.1 - row["reward_contrast"]
        assert row["reward"] == pytest.approx(total, rel=1e-4)


def test_a_single_reward_logs_no_components(tmp_path: Path) -> None:
    (row, *_) = train(tmp_path, "brightness").rows
    assert [name for name in row if name.startswith("reward_")] == ["reward_std"]


# -------------------------------------------------------------------------------- black boxes


def listed(images: Tensor, prompts: list[str], metadata: list[dict]) -> list[float]:
    return [float(image.mean()) for image in images]


listed.differentiable = False


def as_numpy(images: Tensor, prompts: list[str], metadata: list[dict]) -> np.ndarray:
    return images.numpy().mean((1, 2, 3))  # would fail with a gradient attached


as_numpy.differentiable = False


@pytest.mark.parametrize("box", [listed, as_numpy])
def test_a_black_box_may_return_numbers_of_any_kind(box) -> None:
    images = pictures()
    found = named(box)(images, [""] * 3, [{}] * 3)
    torch.testing.assert_close(found, images.mean((1, 2, 3)))
    assert found.dtype == torch.float32 and not named(box).differentiable


@pytest.mark.parametrize("bad", [[0.5], "text", None, [[1.0, 2.0, 3.0]], ["a", "b", "c"]])
def test_a_black_box_that_returns_nothing_of_use_is_named(bad: object) -> None:
    reward = NamedReward("mine", lambda *_: bad, differentiable=False)
    with pytest.raises(ConfigError, match="the reward mine must return"):
        reward(pictures(), [""] * 3, [{}] * 3)


def test_jpeg_size_is_the_size_of_the_file() -> None:
    flat, rich = torch.full((1, 3, 64, 64), 0.5), pictures(1, 64)
    found = jpeg_size(torch.cat([flat, rich]), ["", ""], [{}, {}])
    assert 0.5 < found[0] < 1.5 < 5 < found[1]
    torch.testing.assert_close(found[1:], jpeg_size(rich, [""], [{}]))


def test_a_method_that_needs_a_gradient_says_so_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="zeroth_order") as caught:
        train(tmp_path / "runs", "brightness - jpeg-size")
    assert "nabla-db" in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "runs").exists()
    require_gradient(resolve("brightness", CPU), "nabla-db")
    require_gradient(analytic.brightness, "nabla-db")  # a plain callable: taken at its word


def test_values_of_a_black_box_cannot_be_differentiated_by_mistake() -> None:
    with pytest.raises(ConfigError, match="values only"):
        resolve("jpeg-size", CPU)(pictures().requires_grad_(), [""] * 3, [{}] * 3)


# -------------------------------------------------------------------------------- zeroth order


def test_blocks_and_their_sizes_are_a_map_and_its_transpose() -> None:
    for height, width, grid in ((16, 16, 4), (10, 13, 4), (5, 5, 5)):
        coarse = torch.randn(2, 3, grid, grid)
        total = blocks(coarse, height, width).sum((2, 3))
        torch.testing.assert_close((coarse * block_sizes(grid, height, width)).sum((2, 3)), total)
        assert block_sizes(grid, height, width).sum() == height * width


WEIGHTS = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(5))


def linear(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    return (images * WEIGHTS).sum((1, 2, 3))


def block_mean(slope: Tensor, grid: int) -> Tensor:
    side = slope.shape[-1] // grid
    means = torch.nn.functional.avg_pool2d(slope[None], side)
    return blocks(means, *slope.shape[-2:])[0]


def test_the_estimate_s_mean_is_the_blocks_mean_gradient() -> None:
    """Unbiased on a linear reward: many pairs on a coarse grid come close."""
    box = ZerothOrder(linear, pairs=4000, radius=0.05, grid=2)
    found = box.estimate(pictures(1), [""], [{}])[0]
    expected = block_mean(WEIGHTS, 2)
    assert (found - expected).norm() / expected.norm() < 4 * math.sqrt(13 / 4000)


@pytest.mark.parametrize(("pairs", "grid"), [(8, 2), (32, 4), (96, 4)])
def test_the_estimate_s_error_is_what_the_docstring_says(pairs: int, grid: int) -> None:
    box = ZerothOrder(linear, pairs, 0.05, grid)
    images = pictures(24)
    found = box.estimate(images, [""] * 24, [{}] * 24).flatten(1)
    expected = block_mean(WEIGHTS, grid).flatten()[None]
    cosine = torch.nn.functional.cosine_similarity(found, expected).mean()
    assert float(cosine) == pytest.approx(math.sqrt(pairs / (pairs + 3 * grid**2 + 1)), abs=0.06)


def test_the_estimate_is_a_function_of_the_picture() -> None:
    box, images = ZerothOrder(linear, 4, 0.05, 2), pictures()
    whole = box.estimate(images, [""] * 3, [{}] * 3)
    torch.testing.assert_close(whole[1:2], box.estimate(images[1:2], [""], [{}]))
    assert torch.equal(noise_of(images[0], 2, 0), noise_of(images[0], 2, 0))
    assert not torch.equal(noise_of(images[0], 2, 0), noise_of(images[0], 2, 1))
    assert not torch.equal(noise_of(images[0], 2, 0), noise_of(images[1], 2, 0))


def test_jpeg_size_trains_with_an_estimated_gradient(tmp_path: Path) -> None:
    settings = {"zeroth_order": 2, "zeroth_order_grid": 2}
    images = pictures().requires_grad_()
    value = score("brightness - 0.1*jpeg-size", images, **settings)
    (slope,) = torch.autograd.grad(value.sum(), images)
    assert (slope.flatten(1).norm(dim=1) > 0).all()
    assert resolve("jpeg-size", CPU, settings=RewardSettings(**settings)).differentiable
    rows = train(tmp_path, "-jpeg-size", **settings).rows
    assert rows[0]["guess_sq"] > 0


def test_a_reward_with_a_gradient_keeps_its_own() -> None:
    images = pictures()
    found = gradient("brightness", images, zeroth_order=3)
    assert torch.equal(found, gradient("brightness", images))


def test_the_composition_is_one_function_of_each_row() -> None:
    images = pictures()
    sum_of = Composition((Component("a", analytic.brightness, 2.0),), project=True)
    whole = sum_of(images.requires_grad_(), [""] * 3, [{}] * 3)
    torch.testing.assert_close(whole.detach(), 2 * known("brightness", images.detach()))
    assert Config().reward == RewardSettings()
