"""`check-reward`: every built-in passes or says what is missing, every broken one is named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nablagfn.cli import UNUSABLE, main
from nablagfn.commands.check_reward import latent_gradient
from nablagfn.metrics.tilting import PromptRows, target_kl
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.rewards import BUILT_IN, NamedReward, named, resolve
from nablagfn.rewards.check import FAIL, INFO, OK, WARN, RewardCheck, check_reward, noise
from tests.tiny_pipeline import make_pipeline
from tests.tiny_rewards import save_weights

CPU = torch.device("cpu")
NEED_WEIGHTS = ("aesthetic", "hpsv2", "imagereward", "pickscore", "clipscore")
READ_PROMPTS = ("hpsv2", "imagereward", "pickscore", "clipscore", "tiny-alignment")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(tmp_path_factory.mktemp("weights") / "narrow")


# -------------------------------------------------------------------------------- sound rewards


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_every_built_in_is_usable(name: str, weights: Path) -> None:
    found = check_reward(resolve(name, CPU, str(weights) if name in NEED_WEIGHTS else ""))
    assert found.usable, found.table()
    assert found.row("batch-invariant").verdict == found.row("repeatable").verdict == OK
    ignores = found.row("prompt").figure == "ignores the prompt"
    assert ignores == (name not in READ_PROMPTS)
    if name == "jpeg-size":
        assert found.row("gradient").figure == "values only"
        return
    assert found.row("gradient").verdict == OK
    assert found.row("finite differences").verdict == OK, found.table()
    assert found.row("outside [0, 1]").verdict == OK
    assert "bfloat16" in found.row("precision").figure


def test_figures_on_noise_and_samples_are_those_of_the_reward() -> None:
    samples = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.5
    found = check_reward(resolve("brightness", CPU), samples, ["a cat"] * 6)
    score = resolve("brightness", CPU)(samples, [""] * 6, [{}] * 6)
    seen = resolve("brightness", CPU)(noise(4, 32, 32, CPU), [""] * 4, [{}] * 4)
    assert found.row("on samples").figure.startswith(f"{score.mean():.4g} ± {score.std():.3g}")
    assert found.row("on noise").figure.startswith(f"{seen.mean():.4g} ± {seen.std():.3g}")
    mean, std = found.row("normalise").figure.rpartition("=")[2].split("/")
    assert float(mean) == pytest.approx(float(score.mean()), rel=1e-3)
    assert float(std) == pytest.approx(float(score.std()), rel=1e-2)
    assert found.row("sign").verdict == WARN  # these samples are darker than the noise
    assert "'-brightness'" in found.row("sign").advice


def test_the_size_of_the_latents_gradient_is_told() -> None:
    policy = StableDiffusionPolicy(make_pipeline(), seed=0)
    reward, prompts = resolve("brightness", CPU), ("a cat", "a dog")
    latents = torch.randn(2, *policy.sample_shape, generator=torch.Generator().manual_seed(0))
    slope = latent_gradient(policy, reward, latents, prompts, [{}] * 2)
    x = latents.clone().requires_grad_()
    score = reward(policy.decode(x), prompts, [{}] * 2)
    (known,) = torch.autograd.grad(score.sum(), x)
    torch.testing.assert_close(slope, known)
    samples = policy.decode(latents).detach()
    found = check_reward(reward, samples, prompts, latent_gradient=slope)
    rms = known.square().mean().sqrt()
    assert found.row("gradient in latents").figure == f"rms {rms:.2g}"
    assert found.row("reward_scale").figure.endswith("by the spread")  # one sample of a prompt


def test_the_advised_scale_is_that_of_the_target() -> None:
    """Half a nat from the samples, tilted within each prompt, whose levels differ widely."""
    level = torch.linspace(0.2, 0.8, 16).repeat(2) * 0.1 + torch.tensor(
        [0.1, 0.8]
    ).repeat_interleave(16)
    samples = level[:, None, None, None].expand(-1, 3, 8, 8)
    prompts = ["dark"] * 16 + ["bright"] * 16
    found = check_reward(resolve("brightness", CPU), samples, prompts)
    figure = found.row("reward_scale").figure
    assert "0.5 nats" in figure
    reward, groups = level.double(), PromptRows.of(prompts)
    beta = float(figure.split()[0])
    assert float(target_kl(reward, beta, groups)) == pytest.approx(0.5, rel=0.1)


# -------------------------------------------------------------------------------- broken rewards


def detached(images: Tensor, prompts, metadata) -> Tensor:
    return images.detach().square().mean((1, 2, 3))


def without_grad(images: Tensor, prompts, metadata) -> Tensor:
    with torch.no_grad():
        return images.square().mean((1, 2, 3))


def eight_bits(images: Tensor, prompts, metadata) -> Tensor:
    return (images.clamp(0, 1) * 255).to(torch.uint8).float().mean((1, 2, 3))


def rounded(images: Tensor, prompts, metadata) -> Tensor:
    return (images * 255).round().mean((1, 2, 3))  # has a graph, and a gradient of zero


def nan(images: Tensor, prompts, metadata) -> Tensor:
    return (images.mean((1, 2, 3)) - 1).log()


def nan_gradient(images: Tensor, prompts, metadata) -> Tensor:
    return (images.mean((1, 2, 3)) * 0).sqrt() + images.mean((1, 2, 3))


def constant(images: Tensor, prompts, metadata) -> Tensor:
    return images.mean((1, 2, 3)) * 0 + 3


def swapped(prompts, images: Tensor, metadata) -> Tensor:
    return images.mean((1, 2, 3)) + len(prompts[0])


def swapped_unnamed(a, b, c) -> Tensor:
    return b.mean((1, 2, 3)) + len(a[0])


def clamped(images: Tensor, prompts, metadata) -> Tensor:
    return images.clamp(0, 1).square().mean((1, 2, 3))


def wrong_gradient(images: Tensor, prompts, metadata) -> Tensor:
    value = images.square().mean((1, 2, 3))
    return value + 2 * (images - images.detach()).mean((1, 2, 3))


def batch_norm(images: Tensor, prompts, metadata) -> Tensor:
    value = images.square().mean((1, 2, 3))
    return (value - value.mean()) / value.std(unbiased=False).clamp(min=1e-3)


class StalePrompts:
    """The published code's mistake: it scores with the prompts of an earlier batch."""

    def __init__(self) -> None:
        self.kept: list[str] = []

    def __call__(self, images: Tensor, prompts, metadata) -> Tensor:
        self.kept = self.kept or list(prompts)
        used = torch.tensor([float(len(p)) for p in (self.kept * 9)[: len(images)]])
        return images.mean((1, 2, 3)) * used


def dropout(images: Tensor, prompts, metadata) -> Tensor:
    return torch.nn.functional.dropout(images, 0.5).mean((1, 2, 3))


def wrong_shape(images: Tensor, prompts, metadata) -> Tensor:
    return images.mean()


def failing(images: Tensor, prompts, metadata) -> Tensor:
    raise KeyError("no\nsuch thing")


BROKEN = {
    "detached": (detached, "gradient", "detached"),
    "no_grad": (without_grad, "gradient", "detached"),
    "uint8": (eight_bits, "gradient", "rounded"),
    "round": (rounded, "gradient", "rounded"),
    "NaN": (nan, "values", "NaN"),
    "NaN gradient": (nan_gradient, "gradient", "NaN"),
    "constant": (constant, "gradient", "constant"),
    "swapped": (swapped, "call", "swapped arguments"),
    "swapped, unnamed": (swapped_unnamed, "call", "swapped arguments"),
    "wrong gradient": (wrong_gradient, "finite differences", "relative error"),
    "batch statistics": (batch_norm, "batch-invariant", "differs"),
    "stale prompts": (StalePrompts(), "batch-invariant", "differs"),
    "dropout": (dropout, "repeatable", "differs"),
    "shape": (wrong_shape, "call", "must return"),
    "failing": (failing, "call", "KeyError"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_reward_is_named_rightly(name: str) -> None:
    function, row, figure = BROKEN[name]
    found = check_reward(named(function))
    assert not found.usable and "NOT usable" in found.table()
    assert found.row(row).verdict == FAIL, found.table()
    assert figure in found.row(row).figure
    assert all(len(line.splitlines()) == 1 for line in found.table().splitlines())


def test_only_what_is_broken_is_named() -> None:
    """A reward that is fine but for its gradient fails in that row alone."""
    for function in (detached, eight_bits):
        failed = [row.name for row in check_reward(named(function)).rows if row.verdict == FAIL]
        assert failed == ["gradient"]


def test_a_clamp_before_the_reward_is_named() -> None:
    found = check_reward(named(clamped))
    assert (
        found.row("outside [0, 1]").verdict == WARN
        and "clamp" in found.row("outside [0, 1]").advice
    )


def test_an_estimated_gradient_is_not_taken_for_the_true_one() -> None:
    from nablagfn.config import RewardSettings

    settings = RewardSettings(zeroth_order=2, zeroth_order_grid=4)
    found = check_reward(resolve("jpeg-size", CPU, settings=settings))
    assert found.row("finite differences").verdict in (WARN, FAIL)


# -------------------------------------------------------------------------------- the command


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["check-reward", "tiny-alignment", "--samples=4", "--config.sampling.num_steps=4"])
    text = capsys.readouterr().out
    assert text.startswith("reward tiny-alignment\n") and text.rstrip().endswith("\nusable")
    for row in ("finite differences", "on samples", "reward_scale", "prompt", "precision"):
        assert f"  {row} " in text


def test_the_command_fails_for_a_broken_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "def score(images, prompts, metadata):\n    return images.detach().mean((1, 2, 3))\n"
    (tmp_path / "broken_reward_for_tests.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as caught:
        main(["check-reward", "broken_reward_for_tests:score", "--samples=0"])
    assert caught.value.code == UNUSABLE == 1
    assert "detached" in capsys.readouterr().out and not list(tmp_path.glob("runs*"))


@pytest.mark.parametrize("samples", ["0", "4"])
def test_the_command_gives_the_metadata_of_the_prompt_file(
    samples: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """To a reward that cannot do without."""
    code = (
        "def score(images, prompts, metadata):\n"
        "    weight = images.new_tensor([float(entry['weight']) for entry in metadata])\n"
        "    return weight * images.mean((1, 2, 3))\n"
    )
    (tmp_path / "told_reward_for_tests.py").write_text(code, encoding="utf-8")
    (tmp_path / "told.csv").write_text("prompt,weight\na cat,1\na dog,3\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    asked = ["--config.experiment.prompt_fn=told.csv", "--config.sampling.num_steps=4"]
    main(["check-reward", "told_reward_for_tests:score", f"--samples={samples}", *asked])
    text = capsys.readouterr().out
    assert ("gradient in latents" in text) == (samples == "4")
    assert samples == "4" or "for other prompts" in text  # samples of one prompt show no other


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-reward"],
        ["brightness", "--samples=1"],
        ["brightness", "--config.pretrained.model=/no/such/folder"],
        ["hpsv2", "--config.reward.weights=/no/such/folder"],
        ["brightness", "--nonsense"],
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["check-reward", *arguments])
    assert caught.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_a_check_is_usable_unless_something_failed() -> None:
    fine = check_reward(named(clamped))
    assert fine.usable and {row.verdict for row in fine.rows} <= {OK, WARN, INFO}
    assert isinstance(fine, RewardCheck) and isinstance(named(clamped), NamedReward)
