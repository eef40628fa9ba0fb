"""The trainer in one process: steps, every option value, metrics, resuming rules."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nablagfn.config import Config, ConfigError, set_option
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.prompts import PromptSet
from nablagfn.rewards import resolve
from nablagfn.runs.runfolder import RunFolder
from nablagfn.training.checkpoint import Position
from nablagfn.training.trainer import Trainer, TrainingError
from tests.tiny_pipeline import make_pipeline

pytestmark = pytest.mark.usefixtures("no_report")

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
    optimizer = trainer.updater.optimizer
    step = optimizer.step
    monkeypatch.setattr(optimizer, "step", lambda *a, **k: (calls.append(1), step())[1])
    result = trainer.fit()
    assert result.updates == 8
    assert len(calls) == 8
    assert all(state["step"] == 8 for state in optimizer.state.values())
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


def test_a_run_ends_by_its_minutes_is_measured_and_goes_on_with_more(tmp_path: Path) -> None:
    """It stands where a run of so many epochs stands, and measuring takes none of its time."""
    measured = {
        "evaluation.num_prompts": 2,
        "evaluation.images_per_prompt": 2,
        "logging.num_samples": 2,
        "logging.samples_per_prompt": 2,
        "logging.sample_freq": 50,
    }
    hurried = {**measured, "training.max_minutes": 1e-9, "logging.save_freq": 50}
    ended = make_trainer(small_config(tmp_path / "a", **hurried)).fit()
    plain = make_trainer(small_config(tmp_path / "b", **measured, **{"training.num_epochs": 1}))
    whole = plain.fit()
    assert ended.finished and ended.updates == whole.updates == 2
    assert ended.after == whole.after is not None
    again = make_trainer(small_config(tmp_path / "a", **hurried)).fit()
    assert again.updates == 2 and again.after == ended.after
    hurried["training.max_minutes"] = 0
    longer = make_trainer(small_config(tmp_path / "a", **hurried)).fit()
    assert longer.updates == 4
    rows = longer.folder.joinpath("metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(row)["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert ["probe_gain" in json.loads(row) for row in rows] == [False, True, False, True]
    assert (longer.folder / "grids" / "epoch_00001.png").is_file()


def test_its_minutes_are_minutes(tmp_path: Path) -> None:
    trainer = make_trainer(small_config(tmp_path, **{"training.max_minutes": 1}))
    assert not trainer._ended(Position(1, 2, 59)) and trainer._ended(Position(1, 2, 60))
    trainer = make_trainer(small_config(tmp_path / "b"))
    assert not trainer._ended(Position(1, 2, 1e9)) and trainer._ended(Position(2, 4, 0))


def test_a_finished_run_started_again_changes_nothing(tmp_path: Path) -> None:
    make_trainer(small_config(tmp_path)).fit()
    folder = RunFolder(tmp_path / "colourfulness_seed0")
    before = (folder.path / "metrics.jsonl").read_bytes()
    assert make_trainer(small_config(tmp_path)).fit().updates == 4
    assert (folder.path / "metrics.jsonl").read_bytes() == before


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
    epochs = {f"epoch_{epoch:05d}.png" for epoch in (0, 1, 2)}
    assert names == {"before.png", "after.png"} | epochs


def destructive(images, prompts, metadata):
    """Every picture grey: the reward of a model without diversity."""
    return -(images - 0.5).square().mean((1, 2, 3))


def guarded(out: Path, **options: object) -> Trainer:
    """Direct backpropagation of a reward that wants sameness, measured every epoch."""
    settings = {
        "experiment.method": "draft-k",
        "method.draft_steps": 4,
        "training.num_epochs": 8,
        "training.lr": 0.03,
        "logging.eval_freq": 1,
        "logging.save_freq": 100,
        "logging.num_samples": 6,
        "sampling.guidance_scale": 1.0,
        **options,
    }
    policy = StableDiffusionPolicy(make_pipeline(), guidance_scale=1.0)
    return Trainer(
        policy,
        destructive,
        PROMPTS,
        small_config(out, **settings),
        held_out={"contrast": resolve("contrast", torch.device("cpu"))},
        show_progress=False,
    )


def updates_and_kl(trainer: Trainer) -> list[tuple[int, float]]:
    rows = trainer.folder.metrics()
    return [(row["update"], row["probe_path_kl"]) for row in rows if "probe_path_kl" in row]


def test_the_guard_stops_a_run_and_gives_back_its_best_model(tmp_path: Path) -> None:
    """The same run with and without a budget that it exceeds half way."""
    free = guarded(tmp_path / "free")
    assert free.fit().updates == 16
    path = updates_and_kl(free)
    assert [update for update, _ in path] == list(range(2, 17, 2))
    assert all(a < b for (_, a), (_, b) in itertools.pairwise(path))
    budget = (path[3][1] * path[4][1]) ** 0.5
    held = guarded(tmp_path / "held", **{"guard.max_path_kl": budget})
    result = held.fit()
    assert result.finished and result.updates == 10
    assert updates_and_kl(held) == path[:5]
    said = held.folder.read_json("guard.json")
    assert said["stopped"] and said["best"]["update"] <= 8
    assert said["events"][0]["update"] == 10 and "stopped" in said["events"][0]["text"]
    assert held.folder.result_checkpoint() == said["best"]["checkpoint"]
    kept = load_file(held.folder.checkpoints / said["best"]["checkpoint"] / "policy.safetensors")
    now = held.policy.state_dict()
    assert all(torch.equal(now[name], value) for name, value in kept.items())
    again = guarded(tmp_path / "held", **{"guard.max_path_kl": budget})
    assert again.fit().updates == 10
    wider = guarded(tmp_path / "held", **{"guard.max_path_kl": 1e9})
    assert wider.fit().updates == 16


def test_a_held_out_reward_that_falls_stops_the_run(tmp_path: Path) -> None:
    """Grey pictures lose contrast, which is watched by name and not trained on."""
    options = {"evaluation.held_out_rewards": ("contrast",), "guard.max_held_out_drop": 0.2}
    trainer = guarded(tmp_path, **options, **{"training.num_epochs": 20})
    result = trainer.fit()
    values = [
        row["probe_reward_contrast"] for row in trainer.folder.metrics() if "probe_reward" in row
    ]
    assert values[-1] < values[0] and result.updates < 40
    best = trainer.folder.read_json("guard.json")["best"]
    assert best["watched"] == max(values[:-1])


def test_lowering_beta_is_halving_the_reward(tmp_path: Path) -> None:
    """After the guard has acted, guess and loss are those of half the reward scale."""
    settings = {"experiment.method": "nabla-db", "model.no_flow": True, "training.num_epochs": 2}
    settings |= {"training.lr": 1e-5, "guard.max_path_kl": 1e-300}
    plain = guarded(tmp_path / "a", **settings | {"guard.max_path_kl": 0.0})
    calmed = guarded(tmp_path / "b", **settings | {"guard.action": "lower-beta"})
    plain.fit()
    calmed.fit()
    one, other = plain.folder.metrics(), calmed.folder.metrics()
    assert calmed.folder.read_json("guard.json")["events"][0]["update"] == 2
    assert other[1]["guess_sq"] == one[1]["guess_sq"]
    assert other[3]["guess_sq"] == pytest.approx(one[3]["guess_sq"] / 4, rel=1e-3)
