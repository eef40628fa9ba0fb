"""Feature extractors against their networks called directly, on narrow random weights."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPModel, Dinov2Config, Dinov2Model

from nablagfn.config import Config, ConfigError, set_option
from nablagfn.evaluation.extractors import INCEPTION, LOADERS, Extractor, load_extractor
from tests.tiny_rewards import save_clip

CPU = torch.device("cpu")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pictures(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def standardised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    channels = [(images[:, i] - mean[i]) / std[i] for i in range(3)]
    return torch.stack(channels, 1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `reward.weights` has it, the true classes narrow."""
    root = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    save_clip(root / "clip")
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=224
    )
    Dinov2Model(config).save_pretrained(root / "dinov2")
    return root


@pytest.fixture(scope="module", params=["efficientnet-lite0", "clip", "dinov2"])
def extractor(request: pytest.FixtureRequest, weights: Path) -> Extractor:
    return load_extractor(request.param, CPU, str(weights))


@torch.no_grad()
def test_clip_is_the_image_embedding(weights: Path) -> None:
    images = pictures(2, 3, 224, 224)
    found = load_extractor("clip", CPU, str(weights))(images)
    model = CLIPModel.from_pretrained(weights / "clip").eval()
    vision = model.vision_model(pixel_values=standardised(images, CLIP_MEAN, CLIP_STD))
    embeds = model.visual_projection(vision.pooler_output)
    torch.testing.assert_close(found, embeds / embeds.norm(dim=1, keepdim=True))


@torch.no_grad()
def test_dinov2_is_the_class_token_of_the_middle(weights: Path) -> None:
    images = pictures(2, 3, 256, 300)  # 256 is the side it resizes to
    found = load_extractor("dinov2", CPU, str(weights))(images)
    seen = standardised(images[:, :, 16:240, 38:262], IMAGENET_MEAN, IMAGENET_STD)
    model = Dinov2Model.from_pretrained(weights / "dinov2").eval()
    torch.testing.assert_close(found, model(pixel_values=seen).last_hidden_state[:, 0])
    other = load_extractor("dinov2", CPU, str(weights))(pictures(1, 3, 64, 64))
    assert other.shape == (1, 32)  # smaller pictures are enlarged


def test_rows_are_pictures_and_carry_no_graph(extractor: Extractor) -> None:
    images = pictures(3, 3, 40, 48).requires_grad_()
    found = extractor(images)
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(extractor(images[[2, 0]]), found[[2, 0]], atol=1e-5, rtol=1e-4)
    assert float((found[0] - found[1]).norm()) > 1e-4


def test_unit_length_where_the_documents_say_so(weights: Path) -> None:
    images = pictures(3, 3, 40, 48)
    for name in ("efficientnet-lite0", "clip"):
        found = load_extractor(name, CPU, str(weights))(images)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("name", ["clip", "dinov2", "dreamsim", "inception"])
def test_missing_weights_are_one_line_with_the_fix(name: str, tmp_path: Path) -> None:
    for folder in ("", str(tmp_path)):
        with pytest.raises(ConfigError) as caught:
            load_extractor(name, CPU, folder)
        message = str(caught.value)
        assert "\n" not in message and "config.reward.weights" in message and name in message


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_clip(tmp_path / "dinov2")
    with pytest.raises(ConfigError, match="extractor dinov2 cannot use"):
        load_extractor("dinov2", CPU, str(tmp_path))


@pytest.mark.parametrize("name", ["dreamsim", "inception"])
def test_missing_packages_are_one_line_with_the_fix(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("dreamsim", "torch_fidelity"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "dreamsim").mkdir()
    (tmp_path / INCEPTION).touch()
    with pytest.raises(ConfigError, match="pip install") as caught:
        load_extractor(name, CPU, str(tmp_path))
    assert name in str(caught.value)


def test_packages_are_given_what_they_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins: bytes for the Inception, [0, 1] at 224 for DreamSim; where the weights lie."""
    (tmp_path / "dreamsim").mkdir()
    (tmp_path / INCEPTION).touch()
    asked: list[object] = []

    class Inception(torch.nn.Module):
        def __init__(self, name: str, features: list[str], path: str) -> None:
            super().__init__()
            asked.extend([features, path])

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            assert x.dtype == torch.uint8
            return (x.float().mean((2, 3)),)

    class DreamSim:
        def embed(self, x: Tensor) -> Tensor:
            assert x.shape[-2:] == (224, 224) and 0 <= float(x.min()) <= float(x.max()) <= 1
            return x.mean((2, 3))

    def dreamsim(pretrained: bool, device: str, cache_dir: str) -> tuple[DreamSim, None]:
        asked.extend([pretrained, cache_dir])
        return DreamSim(), None

    name = "torch_fidelity.feature_extractor_inceptionv3"
    fake = types.ModuleType("torch_fidelity")
    part = types.ModuleType(name)
    part.FeatureExtractorInceptionV3 = Inception  # type: ignore[attr-defined]
    package = types.ModuleType("dreamsim")
    package.dreamsim = dreamsim  # type: ignore[attr-defined]
    for key, module in {"torch_fidelity": fake, name: part, "dreamsim": package}.items():
        monkeypatch.setitem(sys.modules, key, module)
    images = pictures(2, 3, 32, 32)
    bytes_ = load_extractor("inception", CPU, str(tmp_path))(images)
    torch.testing.assert_close(bytes_ / 255, images.mean((2, 3)), atol=0.002, rtol=0)
    embeds = load_extractor("dreamsim", CPU, str(tmp_path))(images)
    torch.testing.assert_close(embeds, images.mean((2, 3)), atol=0.03, rtol=0)
    assert asked == [["2048"], str(tmp_path / INCEPTION), True, str(tmp_path / "dreamsim")]


def test_the_option_knows_every_extractor() -> None:
    config = Config()
    for name in LOADERS:
        set_option(config, "evaluation.extractor", name)
    with pytest.raises(ConfigError, match=r"evaluation\.extractor"):
        set_option(config, "evaluation.extractor", "lpips")
