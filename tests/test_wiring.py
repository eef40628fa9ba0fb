"""The settings reach the parts that they name: sampler, optimizer, clipping, rewards, folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from nablagfn.config import Config, ConfigError, set_option
from nablagfn.evaluation.pictures import grid
from nablagfn.families.stable_diffusion import STABLE_DIFFUSION
from nablagfn.methods.build import build_kernel
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.prompts import PromptSet
from nablagfn.rewards import named
from nablagfn.runs.runfolder import RunFolder
from nablagfn.runtime.optimizers import build_optimizer
from nablagfn.training.trainer import Trainer
from tests.tables import discrete_table
from tests.test_trainer import PROMPTS, make_trainer, small_config
from tests.tiny_pipeline import make_pipeline
from tests.worlds import MixtureWorld

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.mark.parametrize(("scheduler", "eta"), [("ddim", 0.5), ("ddpm", 1.0), ("dpm-solver", 1.0)])
def test_the_sampler_is_the_one_asked_for(scheduler: str, eta: float) -> None:
    config = Config()
    for key, value in {"scheduler": scheduler, "eta": eta, "num_steps": 10}.items():
        set_option(config, f"sampling.{key}", value)
    world = MixtureWorld()
    table = build_kernel(config, world)
    known = discrete_table(world.alphas_cumprod, world.times(scheduler, 10), eta)
    assert torch.equal(table.c2, known.c2) and torch.equal(table.std, known.std)


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_the_optimizer_has_every_setting(optimizer: str) -> None:
    config = Config().training
    config.optimizer = optimizer  # type: ignore[assignment]
    config.lr, config.flow_lr, config.flow_wd, config.adam_weight_decay = 1e-2, 2e-2, 3e-2, 4e-2
    config.adam_beta1, config.adam_beta2, config.adam_epsilon = 0.8, 0.95, 1e-5
    theta, phi = ([nn.Parameter(torch.ones(2))] for _ in range(2))
    built = build_optimizer(config, theta, phi)
    first, second = built.param_groups
    assert (first["lr"], first["weight_decay"]) == (1e-2, 4e-2)
    assert (second["lr"], second["weight_decay"]) == (2e-2, 3e-2)
    assert first["params"] is not second["params"]
    assert {tuple(group["betas"]) for group in built.param_groups} == {(0.8, 0.95)}
    if optimizer == "adamw":
        assert first["eps"] == 1e-5


def test_gradients_of_lora_and_flow_are_clipped_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path, **{"training.max_grad_norm": 1e-3, "training.num_epochs": 1})
    trainer = make_trainer(config)
    seen = []
    step = trainer.updater.optimizer.step

    def watch(*args: object, **options: object) -> None:
        for group in trainer.updater.optimizer.param_groups:
            grads = [p.grad.flatten() for p in group["params"] if p.grad is not None]
            seen.append(float(torch.cat(grads).norm()))
        step()

    monkeypatch.setattr(trainer.updater.optimizer, "step", watch)
    trainer.fit()
    assert len(seen) == 4
    assert seen == pytest.approx([1e-3] * 4, rel=1e-3)


def test_the_lora_of_a_run_gives_its_pictures_in_a_fresh_pipeline(tmp_path: Path) -> None:
    """The file that a run wrote, loaded by diffusers' own load_lora_weights."""
    trainer = make_trainer(small_config(tmp_path, **{"training.lr": 0.1}))
    trainer.fit()
    (newest,) = trainer.folder.checkpoints.glob("update_000004")
    fresh = make_pipeline()
    fresh.load_lora_weights(newest)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    time = torch.tensor([500, 20])
    where = trainer.policy.condition(["a cat", "a dog"], ())
    with torch.no_grad():
        embeds = where.tensors["prompt_embeds"]
        theirs = fresh.unet(x, time, embeds, return_dict=False)[0]
        ours = trainer.policy.network(x, time, embeds, return_dict=False)[0]
        with trainer.policy.reference():
            base = trainer.policy.network(x, time, embeds, return_dict=False)[0]
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    assert (ours - base).abs().max() > 1e-3


BROKEN = {
    "no gradient": lambda images, prompts, metadata: images.detach().mean((1, 2, 3)),
    "must return a tensor of shape [2]": lambda images, prompts, metadata: images.mean(),
    "not [2, 1]": lambda images, prompts, metadata: images.mean((1, 2, 3))[:, None],
    "not float": lambda images, prompts, metadata: 1.0,
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_reward_of_no_use_is_named_in_one_line(message: str) -> None:
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    with pytest.raises(ConfigError) as caught:
        named(BROKEN[message])(images, ["a", "b"], [{}, {}])
    assert message in str(caught.value)


def test_a_second_policy_on_a_pipeline_starts_anew() -> None:
    pipeline = make_pipeline()
    first = StableDiffusionPolicy(pipeline, lora_rank=2)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1.0)
    second = StableDiffusionPolicy(pipeline, lora_rank=4)
    assert second.settings()["model.lora_rank"] == 4
    assert all(p.requires_grad for p in second.parameters())
    assert all(not w.any() for name, w in second.state_dict().items() if "lora_B" in name)


def test_a_run_folder_takes_one_run_at_a_time(tmp_path: Path) -> None:
    trainer = make_trainer(small_config(tmp_path))
    with trainer.folder.lock(), pytest.raises(ConfigError, match="another process"):
        trainer.fit()
    assert trainer.fit().finished


def test_a_run_records_what_it_was_given_as_objects(tmp_path: Path) -> None:
    policy = StableDiffusionPolicy(make_pipeline(), guidance_scale=2.5, lora_rank=3, name="mine")
    config = small_config(tmp_path)
    reward = named(BROKEN["no gradient"])
    trainer = Trainer(policy, reward, PROMPTS, config, show_progress=False)
    assert trainer.config.sampling.guidance_scale == 2.5
    assert trainer.config.model.lora_rank == 3
    assert trainer.config.pretrained.model == "mine"
    assert trainer.config.experiment.reward_fn == reward.name
    assert config.sampling.guidance_scale == 5.0


def test_a_grid_has_every_picture_in_its_place() -> None:
    images = torch.stack([torch.full((3, 2, 2), i / 5) for i in range(5)])
    sheet = grid(images, columns=3)
    assert sheet.size == (3 * 2 + 2 * 2, 2 * 2 + 2)
    assert [sheet.getpixel((4 * i, 0))[0] for i in range(3)] == [0, 51, 102]
    assert sheet.getpixel((4, 4))[0] == 204
    assert sheet.getpixel((8, 4)) == (255, 255, 255)


def test_prompts_of_a_run_are_kept(tmp_path: Path) -> None:
    make_trainer(small_config(tmp_path)).fit()
    kept = RunFolder(tmp_path / "colourfulness_seed0").read_json("prompts.json")
    assert PromptSet(tuple(kept)) == PROMPTS


def test_a_grid_that_ends_too_early_names_both_options() -> None:
    config = Config()
    set_option(config, "sampling.final_sigma", 0.9)
    with pytest.raises(ConfigError, match=r"num_steps=50 with config\.sampling\.final_sigma=0\.9"):
        build_kernel(config, MixtureWorld())
    with pytest.raises(ConfigError, match=r"no scheduler of diffusers ends at"):
        STABLE_DIFFUSION.stock_sampler(config)
