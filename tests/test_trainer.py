"""The trainer in one process: steps, every option value, metrics, resuming rules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nablagfn.config import Config, ConfigError, set_option
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.prompts import PromptSet
from nablagfn.rewards import resolve
from nablagfn.runfolder import RunFolder
from nablagfn.trainer import Trainer, TrainingError
from tests.tiny_pipeline import make_pipeline

PROMPTS = PromptSet(("a cat", "a dog", "an ant"))


def small_config(out: Path, **options: object) -> Config:
    config = Config()
    values = {
        "training.num_epochs": 2,
        "training.batch_size": 2,
        "training.gradient_accumulation_steps": 1,
        "sampling.batch_size": 2,
        "sampling.num_batches_per_epoch": 2,
        "sampling.num_steps": 4,
        "model.timestep_fraction": 0.5,
        "model.flow_channel_width": (8, 16),
        "model.reward_scale": 100,
        "logging.tensorboard": False,
        "logging.sample_freq": 0,
        "evaluation.num_prompts": 0,
        "saving.output_dir": str(out),
        **options,
    }
    for key, value in values.items():
        set_option(config, key, value)
    return config


def make_trainer(config: Config, prediction_type: str = "epsilon", **arguments) -> Trainer:
    policy = StableDiffusionPolicy(
        make_pipeline(prediction_type), guidance_scale=config.sampling.guidance_scale
    )
    reward = resolve("colourfulness", torch.device("cpu"))
    return Trainer(policy, reward, PROMPTS, config, show_progress=False, **arguments)


def test_each_update_is_exactly_one_optimizer_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two updates an epoch, two inner epochs, two epochs: eight steps, counted by AdamW itself."""
    trainer = make_trainer(small_config(tmp_path, **{"training.num_inner_epochs": 2}))
    calls = []
    step = trainer.optimizer.step
    monkeypatch.setattr(trainer.optimizer, "step", lambda *a, **k: (calls.append(1), step())[1])
    result = trainer.fit()
    assert result.updates == 8
    assert len(calls) == 8
    assert all(state["step"] == 8 for state in trainer.optimizer.state.values())
    assert [row["update"] for row in trainer.folder.metrics()] == list(range(1, 9))


def test_samples_of_an_epoch_are_drawn_by_the_parameters_of_that_epoch(tmp_path: Path) -> None:
    """On-policy: at the first update of every epoch the trust region is exactly zero."""
    trainer = make_trainer(small_config(tmp_path, **{"sampling.guidance_scale": 1.0}))
    trainer.fit()
    rows = trainer.folder.metrics()
    assert rows[2]["epoch"] == 2
    first_of_epochs = [rows[0]["loss_trust"], rows[2]["loss_trust"]]
    second_of_epochs = [rows[1]["loss_trust"], rows[3]["loss_trust"]]
    assert max(first_of_epochs) < 1e-6 < min(second_of_epochs)


VALUES = [
    ("sampling.scheduler", "ddim"),
    ("sampling.scheduler", "ddpm"),
    ("sampling.scheduler", "dpm-solver"),
    ("sampling.guidance_scale", 1.0),
    ("sampling.low_var_subsampling", False),
    ("model.timestep_fraction", 1.0),
    ("model.reward_adaptive_mode", "sqrt"),
    ("model.pretrained_strength", 0.5),
    ("model.no_flow", True),
    ("model.reverse_loss_scale", 0.0),
    ("model.unet_reg_scale", 0.0),
    ("training.optimizer", "lion"),
    ("training.mixed_precision", "no"),
    ("training.mixed_precision", "fp16"),
    ("training.allow_tf32", False),
    ("training.micro_batch", 3),
    ("experiment.method", "nabla-db"),
]


@pytest.mark.parametrize(("key", "value"), VALUES)
def test_every_option_value_trains(key: str, value: object, tmp_path: Path) -> None:
    trainer = make_trainer(small_config(tmp_path, **{"training.num_epochs": 1, key: value}))
    before = {name: w.clone() for name, w in trainer.policy.state_dict().items()}
    assert trainer.fit().finished
    after = trainer.policy.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_eta_below_one_trains_with_ddim_and_is_refused_elsewhere(tmp_path: Path) -> None:
    options = {"sampling.scheduler": "ddim", "sampling.eta": 0.5}
    assert make_trainer(small_config(tmp_path, **options)).fit().finished
    with pytest.raises(ConfigError, match=r"sampling\.eta"):
        make_trainer(small_config(tmp_path, **{"sampling.eta": 0.5}))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_type_trains(prediction_type: str, tmp_path: Path) -> None:
    trainer = make_trainer(small_config(tmp_path), prediction_type)
    assert trainer.fit().finished


def test_settings_that_change_the_result_are_refused_on_resume(tmp_path: Path) -> None:
    make_trainer(small_config(tmp_path)).fit()
    with pytest.raises(ConfigError, match=r"model\.reward_scale \(100.* -> 7"):
        make_trainer(small_config(tmp_path, **{"model.reward_scale": 7}))
    longer = make_trainer(small_config(tmp_path, **{"training.num_epochs": 3})).fit()
    assert longer.updates == 6


def test_a_finished_run_started_again_changes_nothing(tmp_path: Path) -> None:
    make_trainer(small_config(tmp_path)).fit()
    folder = RunFolder(tmp_path / "colourfulness_seed0")
    before = folder.metrics_file.read_bytes()
    assert make_trainer(small_config(tmp_path)).fit().updates == 4
    assert folder.metrics_file.read_bytes() == before


@pytest.mark.parametrize(("factor", "message"), [(float("nan"), "the reward"), (1e38, "gradient")])
def test_numbers_that_are_not_finite_stop_the_run(
    factor: float, message: str, tmp_path: Path
) -> None:
    """Before the weights are touched."""
    config = small_config(tmp_path)
    policy = StableDiffusionPolicy(make_pipeline(), guidance_scale=1.0)
    trainer = Trainer(
        policy,
        lambda images, prompts, metadata: images.mean((1, 2, 3)) * factor,
        PROMPTS,
        config,
        show_progress=False,
    )
    before = {name: w.clone() for name, w in policy.state_dict().items()}
    with pytest.raises(TrainingError, match=f"{message} is not finite"):
        trainer.fit()
    assert all(torch.equal(w, before[name]) for name, w in policy.state_dict().items())


def test_wandb_works_offline_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config = small_config(tmp_path, **{"logging.use_wandb": True, "logging.tensorboard": True})
    make_trainer(config).fit()
    run = tmp_path / "colourfulness_seed0"
    assert list((run / "wandb").glob("offline-run-*"))
    assert list((run / "tensorboard").rglob("*tfevents*"))


def test_measuring_before_equals_the_frozen_model_and_grids_are_written(tmp_path: Path) -> None:
    options = {
        "evaluation.num_prompts": 2,
        "evaluation.images_per_prompt": 2,
        "logging.sample_freq": 1,
        "logging.num_samples": 4,
    }
    trainer = make_trainer(small_config(tmp_path, **options))
    result = trainer.fit()
    assert result.before is not None and result.after is not None
    again = trainer.observer.evaluator.samples(
        [p for p in PROMPTS.spread(2) for _ in range(2)], reference=True
    )
    mean = sum(sample.reward for sample in again) / len(again)
    assert result.before.reward_mean == pytest.approx(mean, abs=1e-7)
    assert result.after.reward_mean != pytest.approx(mean, abs=1e-7)
    names = {path.name for path in trainer.folder.grids.iterdir()}
    assert names == {"before.png", "after.png", "epoch_00001.png", "epoch_00002.png"}
