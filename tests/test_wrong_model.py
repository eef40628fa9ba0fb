"""A wrong model ends in one line that names the right family, or says that there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nablagfn.cli import main
from tests.tiny_families import TINY


def refused(capsys: pytest.CaptureFixture[str], model: Path, *options: str) -> str:
    """The one line with which training does not begin."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["train", f"--config.pretrained.model={model}", *options])
    assert caught.value.code == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    return said


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def index_of(folder: Path, kind: str) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}), encoding="utf-8")
    return folder


def test_another_family_than_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = index_of(here / "xl", "StableDiffusionXLPipeline")
    said = refused(capsys, model, "--config.pretrained.family=stable-diffusion")
    assert "is a StableDiffusionXLPipeline" in said and "pretrained.family=sdxl" in said
    assert list(here.iterdir()) == [model]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("StableDiffusionInpaintPipeline", "draws from another picture"),
        ("FluxKontextPipeline", "draws from another picture"),
        ("StableDiffusionControlNetPipeline", "draws from another picture"),
        ("WanPipeline", "no family for video models"),
        ("PixArtSigmaPipeline", "there is no family for it; supported are"),
    ],
)
def test_a_pipeline_that_there_is_no_family_for(
    here: Path, capsys: pytest.CaptureFixture[str], kind: str, reason: str
) -> None:
    said = refused(capsys, index_of(here / "model", kind))
    assert kind in said and reason in said and "StableDiffusion3Pipeline" in said


def test_an_inpainting_unet_in_a_text_to_image_pipeline(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TINY["stable-diffusion"]().save_pretrained(here / "model")
    file = here / "model" / "unet" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"in_channels": 9}
    file.write_text(json.dumps(config), encoding="utf-8")
    said = refused(capsys, here / "model")
    assert "9 input channels for latents of 4" in said and "inpainting" in said


def test_a_part_of_a_pipeline_and_a_single_file(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = here / "controlnet"
    part.mkdir()
    (part / "config.json").write_text('{"_class_name": "ControlNetModel"}', encoding="utf-8")
    assert "is a ControlNetModel, a part of a pipeline" in refused(capsys, part)
    file = here / "flux1-dev-Q4_0.gguf"
    file.write_bytes(b"GGUF")
    said = refused(capsys, file)
    assert "is a single file" in said and "GGUF" in said


def test_a_length_of_prompts_where_there_is_none(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, Path("tiny-animals"), "--config.sampling.max_sequence_length=77")
    assert "config.sampling.max_sequence_length=77" in said and "set it to 0" in said
