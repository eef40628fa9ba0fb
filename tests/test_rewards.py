"""Rewards: formulas against numpy, gradients against finite differences, and how they are found."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nablagfn.config import ConfigError
from nablagfn.core.log_reward import LogReward
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.prompts import PromptSet
from nablagfn.rewards import BUILT_IN, analytic, resolve
from nablagfn.training.trainer import Trainer
from tests.test_docs import small_config
from tests.tiny_pipeline import make_pipeline
from tests.worlds import MixtureWorld

pytestmark = pytest.mark.usefixtures("no_report")

CPU = torch.device("cpu")
FORMULAS = {
    "brightness": analytic.brightness,
    "warmth": analytic.warmth,
    "colourfulness": analytic.colourfulness,
    "contrast": analytic.contrast,
}
every_formula = pytest.mark.parametrize("name", FORMULAS)


def pictures(count: int = 3, size: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, size, size + 1, generator=generator, dtype=torch.float64)


def score(name: str, images: Tensor) -> Tensor:
    return FORMULAS[name](images, [""] * len(images), [{}] * len(images))


def painted(*colour: float) -> Tensor:
    return torch.tensor(colour, dtype=torch.float64).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)


# -------------------------------------------------------------------------------- formulas


def by_numpy(name: str, image: np.ndarray) -> float:
    red, green, blue = image
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    if name == "brightness":
        return float(luma.mean())
    if name == "contrast":
        return float(luma.std())
    if name == "warmth":
        return float(red.mean() - blue.mean())
    rg, yb = red - green, (red + green) / 2 - blue
    spread = np.hypot(rg.std(), yb.std())
    return float(spread + 0.3 * np.hypot(rg.mean(), yb.mean()))


@every_formula
def test_formula_equals_numpy(name: str) -> None:
    known = [by_numpy(name, image.numpy()) for image in pictures()]
    np.testing.assert_allclose(score(name, pictures()).numpy(), known, rtol=1e-9)


@every_formula
def test_gradient_equals_finite_differences(name: str) -> None:
    images = pictures(size=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: score(name, x), (images,))


@every_formula
@pytest.mark.parametrize("colour", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.2, 0.5, 0.9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_pictures_have_finite_scores_and_gradients(
    name: str, colour: tuple[float, ...], dtype: torch.dtype
) -> None:
    images = painted(*colour).to(dtype).clone().requires_grad_()
    value = score(name, images)
    value.sum().backward()
    assert value.isfinite().all() and images.grad.isfinite().all()


def test_known_values() -> None:
    assert score("brightness", painted(1, 1, 1)).item() == pytest.approx(1)
    assert score("brightness", painted(0, 1, 0)).item() == pytest.approx(0.7152)
    assert score("warmth", painted(0.75, 0.5, 0.5)).item() == pytest.approx(0.25)
    assert score("warmth", painted(0, 0.5, 1)).item() == pytest.approx(-1)
    assert score("colourfulness", painted(0.4, 0.4, 0.4)).item() == pytest.approx(0, abs=1e-5)
    assert score("colourfulness", painted(1, 0, 0)).item() == pytest.approx(
        0.3 * 1.25**0.5, abs=1e-5
    )
    halves = torch.cat([painted(0, 0, 0), painted(1, 1, 1)], 3)
    assert score("contrast", halves).item() == pytest.approx(0.5)
    assert score("contrast", painted(0.3, 0.3, 0.3)).item() == pytest.approx(0, abs=1e-5)


@every_formula
def test_a_picture_s_score_does_not_depend_on_its_batch(name: str) -> None:
    images = pictures()
    whole = score(name, images)
    torch.testing.assert_close(whole[1:2], score(name, images[1:2]))
    torch.testing.assert_close(whole.flip(0), score(name, images.flip(0)))


# -------------------------------------------------------------------------------- what they get


class Recorder:
    """A reward that keeps what it was called with."""

    def __call__(self, images, prompts, metadata) -> Tensor:
        self.images, self.prompts, self.metadata = images, prompts, metadata
        return images.flatten(1).sum(1)


def test_images_are_not_clamped_and_carry_the_gradient() -> None:
    reward, world = Recorder(), MixtureWorld()
    x = torch.tensor([[-3.0, 0.5], [7.0, 2.0]], dtype=torch.float64, requires_grad=True)
    value = LogReward(world, reward, 2.0)(x, world.condition(["a", "b"], [{"n": 0}, {"n": 1}]))
    assert torch.equal(reward.images, x) and reward.images.requires_grad
    assert tuple(reward.prompts) == ("a", "b") and [m["n"] for m in reward.metadata] == [0, 1]
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 2.0))  # also outside of [0, 1]


def test_a_half_precision_policy_gives_float32_images(tiny_folder: Path) -> None:
    policy = StableDiffusionPolicy.from_pretrained(str(tiny_folder), dtype=torch.bfloat16)
    reward = Recorder()
    x = torch.randn(2, *policy.sample_shape, dtype=torch.bfloat16, requires_grad=True)
    value = LogReward(policy, reward, 1.0)(x, policy.condition(["a", "b"]))
    assert reward.images.dtype == torch.float32 and value.dtype == torch.float32
    assert reward.images.shape[:2] == (2, 3)
    assert torch.autograd.grad(value.sum(), x)[0].abs().max() > 0


# -------------------------------------------------------------------------------- finding them


def error_line(spec: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(spec, CPU)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and repr(spec) in message
    return message


@every_formula
def test_a_formula_is_found_by_its_name(name: str) -> None:
    images = pictures()
    found = resolve(name, CPU)(images, [""] * 3, [{}] * 3)
    assert torch.equal(found, score(name, images))


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_every_built_in_reward_loads_or_says_what_is_missing(name: str) -> None:
    try:
        assert callable(resolve(name, CPU))
    except ConfigError as error:
        message = str(error)
        assert len(message.splitlines()) == 1 and name in message


@pytest.mark.parametrize(
    ("spec", "near"),
    [("brigtness", "brightness"), ("colorfulness", "colourfulness"), ("tiny-aestetic", "tiny-")],
)
def test_a_misspelt_reward_names_the_nearest(spec: str, near: str) -> None:
    assert f"did you mean {near}" in error_line(spec)


MODULE = """
from collections.abc import Sequence
NUMBER = 3
def score(images, prompts, metadata):
    return images.mean((1, 2, 3)) + len(prompts[0])
class Scorer:
    def __call__(self, images, prompts, metadata):
        return -images.mean((1, 2, 3))
SCORER = Scorer()
"""


@pytest.fixture
def own_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with a module of rewards in the current folder, which is not on sys.path."""
    package = tmp_path / "own_package_for_tests"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "rewards.py").write_text(MODULE, encoding="utf-8")
    (package / "broken.py").write_text("import a_package_that_is_not_there\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return "own_package_for_tests"


def test_a_user_s_own_reward(own_rewards: str) -> None:
    images = pictures()
    found = resolve(f"{own_rewards}.rewards:score", CPU)(images, ["ab"] * 3, [{}] * 3)
    torch.testing.assert_close(found, images.mean((1, 2, 3)) + 2)
    found = resolve(f"{own_rewards}.rewards:SCORER", CPU)(images, [""] * 3, [{}] * 3)
    torch.testing.assert_close(found, -images.mean((1, 2, 3)))


@pytest.mark.parametrize(
    "end",
    [".rewards:scores", ".rewards:NUMBER", ".rewards:", ".reward:score", ".broken:score", ":score"],
)
def test_an_own_reward_that_cannot_be_had_gives_one_line(own_rewards: str, end: str) -> None:
    error_line(own_rewards + end)


@pytest.mark.parametrize("spec", ["", ":", ":score", "a:b:c", ".relative:score", "no_such:f"])
def test_a_bad_import_path_gives_one_line(spec: str) -> None:
    error_line(spec)


class Album:
    """Keeps each picture with the prompt it was scored with: when sampled, and when learnt from."""

    def __init__(self) -> None:
        self.sampled: list[tuple[Tensor, str]] = []
        self.learnt: list[tuple[Tensor, str]] = []

    def __call__(self, images, prompts, metadata) -> Tensor:
        kept = self.learnt if images.requires_grad else self.sampled
        kept += zip(images.detach().clone(), prompts, strict=True)
        return images.mean((1, 2, 3))


@pytest.mark.parametrize("no_flow", [True, False])
def test_a_picture_is_learnt_from_with_the_prompt_it_was_drawn_for(
    no_flow: bool, tmp_path: Path
) -> None:
    """At the clean end the guess sees the sample itself, so pictures can be told apart.

    The published code scored all of them with the prompts of the last sampling batch.
    """
    config = small_config(tmp_path, no_flow)
    config.sampling.batch_size, config.sampling.num_batches_per_epoch = 2, 3
    config.training.batch_size, config.training.gradient_accumulation_steps = 2, 3
    config.training.num_epochs = 1
    config.evaluation.num_prompts = config.logging.sample_freq = 0
    album = Album()
    words = tuple("abcdefghijklmnopqrstuvwxyz")
    policy = StableDiffusionPolicy(make_pipeline(), seed=0)
    Trainer(policy, album, PromptSet(words), config, show_progress=False).fit()
    assert len({prompt for _, prompt in album.sampled}) > 3
    found = [
        (own, prompt)
        for image, own in album.learnt
        for sample, prompt in album.sampled
        if (image - sample).abs().max() < 1e-5
    ]
    assert len(found) >= 6  # the last step may have been drawn twice
    assert all(own == prompt for own, prompt in found)
