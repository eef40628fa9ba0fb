"""FLUX.2: what the conformance suite does not see, and what is said of distilled models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline

from nablagfn.config import ConfigError
from nablagfn.families import FAMILIES
from nablagfn.families.pipelines import tell_distilled
from nablagfn.models import load
from nablagfn.models.flux2 import Flux2Klein
from nablagfn.models.latent import LatentPolicy, quiet
from nablagfn.models.latent_model import PIPELINE_GRID
from nablagfn.models.published import PUBLISHED
from tests.test_conformance import (
    PipelineCall,
    config_of,
    noise_for,
    own_table,
    pictures,
    rollout,
    stock_pictures,
)
from tests.tiny_families import TINY

HUB = "black-forest-labs/FLUX.2"


def distilled_klein() -> Flux2KleinPipeline:
    pipeline = TINY["flux2-klein"]()
    pipeline.register_to_config(is_distilled=True)
    return pipeline


def test_a_distilled_klein_is_drawn_without_guidance_whatever_w() -> None:
    call = PipelineCall.of(config_of("flux2-klein"))
    policy = LatentPolicy(Flux2Klein(distilled_klein(), call), lora_rank=2)
    assert call.guidance_scale > 1 and policy.model.passes == 1
    table, noise = own_table(policy), noise_for(policy)
    with policy.reference():
        paths = rollout(policy, table, noise, policy.condition(["a cat", "big dog"]))
    with quiet():
        known = stock_pictures("flux2-klein", distilled_klein(), noise[:, 0], policy)
    assert np.abs(pictures(policy, paths.clean) - known).max() < 1e-4


def test_the_shift_depends_on_the_number_of_steps() -> None:
    model = Flux2Klein(TINY["flux2-klein"](), PipelineCall.of(config_of("flux2-klein")))
    for steps in (4, 50):
        own = model.times(PIPELINE_GRID, steps)
        shift = model.shift(steps)
        even = [1 - k / steps for k in range(steps)]
        assert own == pytest.approx([shift * s / (1 + (shift - 1) * s) for s in even], abs=1e-6)
    assert 1 < model.shift(50) < model.shift(4) - 1


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        (f"{HUB}-dev", {"transformer": 32, "text_encoder": 24}),
        (f"{HUB}-klein-base-4B", {"transformer": 4, "text_encoder": 4}),
        (f"{HUB}-klein-9B", {"transformer": 9, "text_encoder": 8}),
    ],
)
def test_the_known_architectures_have_the_published_sizes(
    name: str, billions: dict[str, int]
) -> None:
    with torch.device("meta"):
        parts = PUBLISHED[name]()
    counted = {part: sum(p.numel() for p in parts[part].parameters()) for part in billions}
    assert {part: round(count / 1e9) for part, count in counted.items()} == billions
    assert round(sum(p.numel() for p in parts["vae"].parameters()) / 1e6) == 84


@pytest.mark.parametrize(("distilled", "notes"), [(True, 1), (False, 0)])
def test_loading_a_distilled_model_says_once_what_that_means(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], distilled: bool, notes: int
) -> None:
    pipeline = distilled_klein() if distilled else TINY["flux2-klein"]()
    pipeline.save_pretrained(tmp_path / "klein")
    assert (
        json.loads((tmp_path / "klein" / "model_index.json").read_text())["is_distilled"]
        is distilled
    )
    capsys.readouterr()
    tell_distilled.cache_clear()
    for _ in range(2):
        config = config_of("flux2-klein", tmp_path / "klein")
        FAMILIES["flux2-klein"].load(config, torch.device("cpu"), False)
    said = capsys.readouterr().out
    assert said.count("is distilled to draw in a few steps") == notes


def test_distilled_models_are_known_by_name() -> None:
    known: set[str] = set()
    for family in FAMILIES.values():
        if family.pipelines:
            record = family.of_diffusers
            assert record.distilled <= set(record.names)
            known |= record.distilled
    assert known >= {
        "black-forest-labs/FLUX.1-schnell",
        "stabilityai/stable-diffusion-3.5-large-turbo",
        "stabilityai/sdxl-turbo",
        "stabilityai/sd-turbo",
        f"{HUB}-klein-4B",
        f"{HUB}-klein-9B",
        "Tongyi-MAI/Z-Image-Turbo",
    }
    assert not any("base" in name or "dev" in name for name in known)


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **options: Any) -> None:
        raise ImportError("\nPixtralProcessor requires the Torchvision library but\nmore")

    monkeypatch.setattr(Flux2Pipeline, "from_pretrained", fails)
    monkeypatch.setattr(load, "locate", lambda name, revision: "nowhere")
    with pytest.raises(ConfigError, match=r"pretrained\.model='x' .*requires the Torchvision lib"):
        load.load_pipeline(Flux2Pipeline, "x")
