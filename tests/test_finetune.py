"""The Python API: `finetune` does what the command line does, `Trainer` what it writes down."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import nablagfn
from nablagfn.cli import main
from nablagfn.config import Config, ConfigError, flatten, set_option
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.models.tune import tune
from nablagfn.prompts import PromptSet
from nablagfn.rewards import offloaded, resolve
from nablagfn.training.trainer import Trainer
from tests.test_trainer import small_config
from tests.tiny_pipeline import make_pipeline

pytestmark = pytest.mark.usefixtures("no_report")
CPU = torch.device("cpu")


def greyness(images, prompts, metadata):
    return -images.std(1).mean((1, 2))


def options(tiny_folder: Path, out: Path) -> dict[str, Any]:
    built = {"training.gradient_checkpointing": True, "training.vae_slice": 1}
    config = small_config(out, **built, **{"training.num_epochs": 1, "sampling.guidance_scale": 1})
    set_option(config, "pretrained.model", str(tiny_folder))
    set_option(config, "experiment.reward_fn", "colourfulness")
    return {key: value for key, value in flatten(config).items() if value != ""}


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{**json.loads(line), "seconds": 0} for line in lines]


def test_it_is_the_command_line(tiny_folder: Path, tmp_path: Path) -> None:
    """Given a config, a nested mapping, or what --config takes: the same run."""
    given = options(tiny_folder, tmp_path)
    main(["train", "--exp_name=line", *(f"--config.{k}={v}" for k, v in given.items())])
    (line,) = tmp_path.iterdir()
    config, nested = Config(), {}
    for key, value in given.items():
        set_option(config, key, value)
        *groups, name = key.split(".")
        place: dict[str, Any] = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    file = tmp_path / "mine.py"
    file.write_text(f"def get_config():\n    return {nested!r}\n", encoding="utf-8")
    for name, settings in (("object", config), ("file", str(file))):  # a file of a nested mapping
        result = nablagfn.finetune(settings, folder=tmp_path / name)
        assert result.finished and rows(result.folder) == rows(line), name
    assert flatten(config) == {**flatten(Config()), **given}  # left as it was


def test_reward_prompts_and_callbacks_can_be_given(tiny_folder: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path, **{"training.num_epochs": 3, "sampling.num_steps": 2})
    config.pretrained.model = str(tiny_folder)
    seen: list[tuple[int, float]] = []

    def enough(update: int, row: Mapping[str, Any]) -> bool:
        seen.append((update, row["reward"]))
        return update == 1

    result = nablagfn.finetune(
        config, reward=greyness, prompts=["a cat", "a dog"], callbacks=[enough]
    )
    assert [update for update, _ in seen] == [1, 2]  # to the end of the epoch
    assert not result.finished and result.updates == 2
    assert all(reward < 0 for _, reward in seen)
    recorded = json.loads((result.folder / "config.json").read_text(encoding="utf-8"))
    assert recorded["experiment"]["reward_fn"] == "tests.test_finetune:greyness"
    prompts = json.loads((result.folder / "prompts.json").read_text(encoding="utf-8"))
    assert prompts == ["a cat", "a dog"]
    again = nablagfn.finetune(config, reward=greyness, prompts=["a cat", "a dog"])
    assert again.finished and again.updates == 6


@pytest.mark.parametrize("reward", ["nobody", 3])
def test_what_cannot_be_is_refused_before_anything_is_written(
    reward: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    config = small_config(tmp_path / "runs")
    config.pretrained.model = str(tiny_folder)
    with pytest.raises(ConfigError, match=r"nobody|3"):
        nablagfn.finetune(config, reward=reward)
    assert not (tmp_path / "runs").exists()


NOT_BUILT = {
    "training.gradient_checkpointing": True,
    "training.vae_checkpointing": True,
    "training.vae_slice": 2,
    "speed.compile": True,
    "speed.compile_reward": True,
    "speed.channels_last": True,
    "speed.offload_text_encoder": True,
    "speed.offload_reward": True,
    "reward.clamp": ("colourfulness=0:1",),
    "reward.normalise": ("colourfulness=0/1",),
    "reward.project_conflicts": True,
    "reward.zeroth_order": 2,
    "reward.weights": "elsewhere",
    "model.lora_rank": 3,
    "sampling.guidance_scale": 2.0,
    "evaluation.extractor": "clip",
    "evaluation.held_out_rewards": ("contrast",),
}


def test_trainer_refuses_what_its_objects_do_not_have(tmp_path: Path) -> None:
    policy, prompts = StableDiffusionPolicy(make_pipeline()), PromptSet(("a cat",))
    for key, value in NOT_BUILT.items():
        config = small_config(tmp_path / "runs", **{key: value})
        with pytest.raises(ConfigError, match=key.replace(".", r"\.")) as refused:
            Trainer(policy, greyness, prompts, config, show_progress=False)
        assert "nablagfn.finetune" in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_trainer_takes_objects_that_have_what_is_asked(tmp_path: Path) -> None:
    """And writes down what they have, where the config says nothing."""
    set_up = {"speed.channels_last": True, "speed.offload_reward": True, "training.vae_slice": 2}
    config = small_config(tmp_path, **set_up, **{"reward.clamp": ("colourfulness=0:1",)})
    policy = StableDiffusionPolicy(make_pipeline(), vae_slice=2, lora_rank=3, guidance_scale=2.0)
    reward = offloaded(resolve("colourfulness", CPU, "", config.reward))
    trainer = Trainer(
        tune(policy, config.speed), reward, PromptSet(("a cat",)), config, show_progress=False
    )
    trainer.fit()
    used = trainer.folder.config()
    assert used.model.lora_rank == 3 and used.sampling.guidance_scale == 2.0
    assert used.training.vae_slice == 2 and used.speed.offload_reward
    assert used.pretrained.family == "stable-diffusion"
