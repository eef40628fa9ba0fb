"""The original three configs, one update each: true reward architectures with random weights,
narrow, on a narrow pipeline; through the command line, as a user with weights would run them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nablagfn.cli import main
from nablagfn.config import ConfigError
from nablagfn.prompts import load_prompts
from nablagfn.recipes.options import load_config
from nablagfn.rewards import resolve
from nablagfn.runs.runfolder import RunFolder
from tests.shared import PROMPTS
from tests.tiny_rewards import save_weights

REAL = ("aesthetic", "hpsv2", "imagereward", "pickscore", "clipscore")
CONFIGS = ("aesthetic", "hpsv2", "imagereward")
READS_PROMPT = {name: name != "aesthetic" for name in REAL}
SMALL = (
    "--config.sampling.num_steps=3",
    "--config.sampling.batch_size=2",
    "--config.sampling.num_batches_per_epoch=1",
    "--config.training.batch_size=1",
    "--config.training.gradient_accumulation_steps=2",
    "--config.training.num_epochs=1",
    "--config.model.flow_channel_width=32,32",
    "--config.evaluation.num_prompts=1",
    "--config.evaluation.images_per_prompt=2",
    "--config.logging.sample_freq=0",
    "--config.logging.tensorboard=False",
)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(tmp_path_factory.mktemp("weights") / "narrow")


@pytest.fixture
def prompt_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The config's own prompts where a developer has the lists, else three of a file."""
    if PROMPTS is not None:
        monkeypatch.setenv("NABLAGFN_PROMPTS", str(PROMPTS))
        return []
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(["a red car", "two dogs", "a frog"]), encoding="utf-8")
    return [f"--config.experiment.prompt_fn={file}"]


@pytest.mark.parametrize("name", CONFIGS)
def test_one_update(
    name: str, weights: Path, tiny_folder: Path, tmp_path: Path, prompt_option: list[str]
) -> None:
    main(
        [
            "train",
            f"--config={name}",
            "--exp_name=one",
            f"--config.pretrained.model={tiny_folder}",
            f"--config.reward.weights={weights}",
            f"--config.saving.output_dir={tmp_path / 'runs'}",
            *SMALL,
            *prompt_option,
        ]
    )
    folder = RunFolder(tmp_path / "runs" / f"{name}_one_seed0")
    (row,) = folder.metrics()
    assert row["update"] == 1 and all(math.isfinite(v) for v in row.values())
    assert row["guess_sq"] > 0 and row["grad_norm"] > 0 and row["grad_norm_own"] > 0
    if PROMPTS is not None:
        known = load_prompts(load_config(name).experiment.prompt_fn)
        assert folder.read_json("prompts.json") == list(known.prompts)


@pytest.mark.parametrize("name", REAL)
def test_scores_are_float32_with_gradients_and_their_own_prompts(name: str, weights: Path) -> None:
    reward = resolve(name, torch.device("cpu"), str(weights))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 40, 56, generator=generator).requires_grad_()
    prompts = ["a red car", "two dogs", "a frog"]
    score = reward(images, prompts, [{}] * 3)
    (gradient,) = torch.autograd.grad(score.sum(), images)
    assert score.dtype == gradient.dtype == torch.float32 and score.isfinite().all()
    assert (gradient.flatten(1).norm(dim=1) > 0).all() and gradient.isfinite().all()
    with torch.no_grad():
        turned = reward(images.flip(0), prompts[::-1], [{}] * 3).flip(0)
        alone = reward(images[1:2], prompts[1:2], [{}])
        others = reward(images, prompts[::-1], [{}] * 3)
    torch.testing.assert_close(turned, score.detach())
    torch.testing.assert_close(alone, score[1:2].detach())
    assert (others[0] != score[0]) == READS_PROMPT[name] and others[1] == score[1]
    assert not any(p.requires_grad for p in reward.function.parameters())


@pytest.mark.parametrize("name", REAL)
def test_pixels_outside_of_the_range_keep_their_gradient(name: str, weights: Path) -> None:
    reward = resolve(name, torch.device("cpu"), str(weights))
    images = (torch.rand(1, 3, 224, 224) * 2 - 0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, ["a cat"], [{}]).sum(), images)
    beyond = (images < 0) | (images > 1)
    assert (gradient[beyond] != 0).float().mean() > 0.99


@pytest.mark.parametrize("name", REAL)
def test_a_folder_that_lacks_a_part_is_said_in_one_line(
    name: str, weights: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(name, torch.device("cpu"), str(tmp_path))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert "config.reward.weights" in message and name in message and "hub:" in message


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("aesthetic", "sac+logos+ava1-l14-linearMSE.pth"),
        ("aesthetic", "clip/model.safetensors"),
        ("hpsv2", "HPS_v2.1_compressed.pt"),
        ("hpsv2", "hpsv2.json"),
        ("hpsv2", "clip/vocab.json"),
        ("imagereward", "ImageReward.pt"),
        ("imagereward", "imagereward.json"),
        ("imagereward", "bert/vocab.txt"),
        ("pickscore", "pickscore/config.json"),
        ("clipscore", "clip/merges.txt"),
    ],
)
def test_a_damaged_file_is_said_in_one_line(
    name: str, file: str, weights: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(weights, folder)
    (folder / file).write_bytes(b"{ this is not it")
    with pytest.raises(ConfigError) as caught:
        resolve(name, torch.device("cpu"), str(folder))
    assert len(str(caught.value).splitlines()) == 1 and str(folder) in str(caught.value)


class Evil:
    """Runs code when unpickled the old way."""

    def __reduce__(self) -> tuple:
        return (exec, ("raise SystemExit('code of a weights file was run')",))


@pytest.mark.parametrize("file", ["HPS_v2.1_compressed.pt", "ImageReward.pt"])
def test_code_in_a_weights_file_is_not_run(file: str, weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    shutil.copytree(weights, folder)
    torch.save({"state_dict": Evil()}, folder / file)
    name = "hpsv2" if file.startswith("HPS") else "imagereward"
    with pytest.raises(ConfigError, match=file):
        resolve(name, torch.device("cpu"), str(folder))


def test_weights_that_do_not_fit_are_said_in_one_line(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(weights, folder)
    state = torch.load(folder / "HPS_v2.1_compressed.pt", weights_only=True)
    del state["state_dict"]["visual.proj"]
    torch.save(state, folder / "HPS_v2.1_compressed.pt")
    with pytest.raises(ConfigError, match="visual_projection") as caught:
        resolve("hpsv2", torch.device("cpu"), str(folder))
    assert len(str(caught.value).splitlines()) == 1


def test_a_clip_folder_that_lacks_a_weight_is_refused(weights: Path, tmp_path: Path) -> None:
    """transformers would fill it with random numbers and go on."""
    folder = tmp_path / "partial"
    shutil.copytree(weights, folder)
    file = folder / "clip" / "model.safetensors"
    state = load_file(file)
    del state["visual_projection.weight"]
    save_file(state, file, metadata={"format": "pt"})
    for name in ("aesthetic", "clipscore"):
        with pytest.raises(ConfigError, match="visual_projection"):
            resolve(name, torch.device("cpu"), str(folder))
