"""Every option does something: changed, it gives another object, another number, or a refusal.

EFFECTS has an entry for each option; one without fails. What is compared is all that a short run
leaves behind, or the object that the option is for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import nablagfn
from nablagfn.cli.train import choose_folder
from nablagfn.commands.assemble import build_policy, build_reward, build_trainer, check_names
from nablagfn.config import Config, ConfigError, flatten, set_option
from nablagfn.methods.registry import check_settings
from nablagfn.models import locate, tune
from nablagfn.recipes.options import load_config
from nablagfn.rewards import modules_of
from nablagfn.runs.runfolder import RunFolder
from nablagfn.runtime.distributed import gradient_scaler, set_backend_flags, weight_dtype
from nablagfn.training.guard import Guard, Probe
from nablagfn.training.runlog import RunLog, make_accelerator
from tests.tiny_pipeline import save_pipeline

pytestmark = pytest.mark.usefixtures("no_report")

CPU = torch.device("cpu")
Look = Callable[[Config, Path], object]

WORLD: dict[str, Any] = {  # an update takes milliseconds
    "sampling.num_steps": 5,
    "sampling.batch_size": 4,
    "sampling.num_batches_per_epoch": 2,
    "training.batch_size": 4,
    "training.num_epochs": 2,
    "model.unet_reg_scale": 10.0,
    "logging.save_freq": 1,
    "logging.sample_freq": 0,
    "evaluation.num_prompts": 0,
}
PICTURES: dict[str, Any] = {  # a pipeline with random weights
    **WORLD,
    "experiment.reward_fn": "colourfulness",
    "model.flow_channel_width": (8, 16),
    "model.timestep_fraction": 0.4,
    "sampling.num_steps": 3,
    "sampling.batch_size": 2,
    "sampling.num_batches_per_epoch": 1,
    "training.batch_size": 2,
    "training.gradient_accumulation_steps": 1,
    "training.num_epochs": 1,
    "logging.tensorboard": False,
}
MEASURED = {**PICTURES, "evaluation.num_prompts": 2, "evaluation.images_per_prompt": 2}
WATCHED = {**PICTURES, "logging.sample_freq": 1, "logging.num_samples": 4}
SUM = {**PICTURES, "experiment.reward_fn": "colourfulness + contrast"}
ESTIMATED = {**PICTURES, "experiment.reward_fn": "jpeg-size", "reward.zeroth_order": 2}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("model") / "tiny")


# ---------------------------------------------------------------------- ways to look


def traces(config: Config, place: Path) -> dict[str, Any]:
    """All that a run leaves behind, without its times."""
    folder = RunFolder(nablagfn.finetune(config, folder=place / "run").folder)
    files = sorted(str(path.relative_to(folder.path)) for path in folder.path.rglob("*"))
    found: dict[str, Any] = {"files": [name for name in files if "tfevents" not in name]}
    for name in ("metrics.jsonl", "diagnostics.jsonl"):
        rows = (folder.path / name).read_text(encoding="utf-8").splitlines()
        found[name] = [{**json.loads(row), "seconds": 0} for row in rows]
    for name in ("evaluation.json", "guard.json"):
        found[name] = folder.read_json(name)
    for file in sorted(folder.checkpoints.rglob("*.safetensors")):
        values = load_file(file).items()
        found[file.name] = {key: value.double().sum().item() for key, value in values}
    return found


def refusal(config: Config, place: Path) -> str:
    """The one line in which the option is refused before anything is written; or none."""
    try:
        check_settings(config)
        check_names(config)
        build_trainer(config, RunFolder(place / "run"))
    except ConfigError as error:
        assert not (place / "run").exists()
        return str(error)
    return ""


def of_trainer(look: Callable[[Any], object], config: Config, place: Path) -> object:
    return look(build_trainer(config, RunFolder(place / "run")))


def of_policy(look: Callable[[Any], object], config: Config, place: Path) -> object:
    return look(build_policy(config, CPU))


def of_reward(look: Callable[[Any], object], config: Config, place: Path) -> object:
    return look(build_reward(config, CPU))


def judged(config: Config, place: Path) -> object:
    """What the guard says to the same four measurements."""
    guard = Guard(config.guard)
    said = []
    for update, share in enumerate((1.0, 0.7, 0.6, 0.5)):
        probe = Probe(1.0, share, 3.0 * update, 1.0, {"a": share}, {"a": 0.1})
        said.append(guard.judge(update, probe))
    return said, guard.factor, guard.state.stopped


def backend(config: Config, place: Path) -> object:
    set_backend_flags(config)
    return torch.backends.cuda.matmul.allow_tf32


def scaling(config: Config, place: Path) -> object:
    """How a loss scale is asked for."""
    asked: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.amp, "GradScaler", lambda *given, **named: asked.append(named))
        gradient_scaler(config, torch.device("cuda"))
    return asked


def trackers(config: Config, place: Path) -> object:
    """What is asked of the trackers when a run's log opens."""
    asked: list[object] = []
    folder = RunFolder(place / "run")
    accelerator: Accelerator = make_accelerator(config, folder)
    accelerator.init_trackers = lambda *given, **named: asked.append((given, named))  # type: ignore
    RunLog(accelerator, folder, config).open()
    return [str(kind) for kind in accelerator.log_with], str(asked).replace(str(place), "")


def revision(config: Config, place: Path) -> object:
    asked: list[str] = []

    def has_index(name: str, revision: str, *, local: bool) -> bool:
        asked.append(revision)
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locate, "_has_index", has_index)
        patch.setattr(locate, "hub_answers", lambda: False)
        with pytest.raises(ConfigError):
            locate.locate("owner/name", config.pretrained.revision)
    return asked


def compiled(modules: Callable[[Any], list[Any]]) -> Callable[[Any], object]:
    return lambda thing: [module._compiled_call_impl is not None for module in modules(thing)]


# ---------------------------------------------------------------------- every option


@dataclass(frozen=True)
class Effect:
    """A value that differs from the base's; the options it is tried with; where it shows.

    pictures: with the pipeline, not in a world.
    """

    value: object
    look: Look = traces
    base: dict[str, Any] = field(default_factory=dict)
    pictures: bool = False


def world(value: object, **base: object) -> Effect:
    """It shows in a run in a world."""
    return Effect(value, base={key.replace("__", "."): given for key, given in base.items()})


def pictures(value: object, base: dict[str, Any] = PICTURES, look: Look = traces) -> Effect:
    return Effect(value, look, base, pictures=True)


def method(name: str, value: object, **base: object) -> Effect:
    return world(value, experiment__method=name, **base)


def flow(name: str, value: object) -> Effect:
    """Of a method that needs a flow model."""
    places = dict.fromkeys(
        ("pretrained__model", "experiment__reward_fn", "experiment__prompt_fn"), "worlds/ring-flow"
    )
    return method(name, value, **places)


def trainer(value: object, look: Callable[[Any], object]) -> Effect:
    return Effect(value, partial(of_trainer, look))


def policy(value: object, look: Callable[[Any], object]) -> Effect:
    return pictures(value, look=partial(of_policy, look))


GUARDED = {"guard.min_diversity": 0.8}
DRAWN = {"guard.max_held_out_drop": 1.0, "evaluation.held_out_rewards": ("contrast",)}
FLOW_SDE = {
    "pretrained__model": "worlds/ring-flow",
    "experiment__reward_fn": "worlds/ring-flow",
    "experiment__prompt_fn": "worlds/ring-flow",
    "sampling__scheduler": "flow-sde",
}
EFFECTS = {
    "seed": world(1),
    "training.source": world("pool", model__unet_reg_scale=0.0),
    "training.lr": world(1e-4),
    "training.flow_lr": world(1e-4),
    "training.flow_wd": world(0.5),
    "training.lr_schedule": world("constant"),
    "training.optimizer": world("lion"),
    "training.adam_beta1": world(0.5),
    "training.adam_beta2": world(0.5),
    "training.adam_weight_decay": world(0.5),
    "training.adam_epsilon": world(1e-2),
    "training.max_grad_norm": world(1e-6, training__optimizer="adamw", training__adam_epsilon=1e-3),
    "training.num_inner_epochs": world(2),
    "training.batch_size": world(2),
    "training.gradient_accumulation_steps": world(2),
    "training.micro_batch": trainer(3, lambda made: made.updater.rows),
    "training.num_epochs": world(1),
    "training.max_minutes": world(1e-9),
    "training.mixed_precision": Effect(
        "fp16", lambda config, place: weight_dtype(config, torch.device("cuda"))
    ),
    "training.allow_tf32": Effect(False, backend),
    "training.gradscaler_growth_interval": Effect(7, scaling),
    "training.gradient_checkpointing": policy(
        True, lambda made: made.network.is_gradient_checkpointing
    ),
    "training.vae_slice": policy(1, lambda made: made.vae_slice),
    "training.vae_checkpointing": policy(True, lambda made: made.vae.is_gradient_checkpointing),
    "training.shard_base": pictures(True, look=refusal),
    "speed.compile": policy(True, compiled(lambda made: [made.network, made.vae.decoder])),
    "speed.compile_reward": pictures(
        True,
        {**PICTURES, "experiment.reward_fn": "tiny-aesthetic"},
        partial(of_reward, compiled(modules_of)),
    ),
    "speed.cuda_graphs": pictures(True, look=refusal),
    "speed.channels_last": policy(
        True,
        lambda made: made.vae.decoder.conv_in.weight.is_contiguous(
            memory_format=torch.channels_last
        ),
    ),
    "speed.fused_optimizer": trainer(True, lambda made: made.updater.optimizer.defaults["fused"]),
    "speed.offload_text_encoder": policy(True, lambda made: len(made._encoder_hooks)),
    "speed.offload_reward": pictures(
        True,
        {**PICTURES, "experiment.reward_fn": "tiny-aesthetic"},
        partial(of_reward, lambda made: type(made.function).__name__),
    ),
    "model.lora_rank": pictures(2),
    "model.lora_targets": pictures(("resnets",)),
    "model.lora_until": pictures(0.5),
    "model.lora_fade": pictures(0.5),
    "model.reward_scale": world(0.1),
    "model.pretrained_strength": world(0.5),
    "model.timestep_fraction": world(1.0, method__window=0),
    "model.unet_reg_scale": world(0.0),
    "model.reverse_loss_scale": method("nabla-db", 0.1),
    "model.no_flow": world(True),
    "model.reward_adaptive_mode": world("squared"),
    "model.guess_decoder": pictures("no/such-decoder", look=refusal),
    "model.flow_layers_per_block": pictures(2),
    "model.flow_channel_width": pictures((8, 24)),
    "experiment.method": world("adjoint-matching"),
    "experiment.reward_fn": pictures("contrast"),
    "experiment.prompt_fn": pictures("counting"),
    "method.return_lambda": world(0.1),
    "method.window": world(2),
    "method.flow_hint": world(False),
    "method.step_weight": world("one"),
    "method.guess": world("shifted"),
    "method.shift_cap": world(0.01, method__guess="shifted"),
    "method.guess_model": world("finetuned", training__num_inner_epochs=2),
    "method.mirror": world(True, method__window=0, method__return_lambda=0.0),
    "method.clip_quantile": method("adjoint-matching", 0.5),
    "method.vgg_boundary": flow("vgg-flow", 1.0),
    "method.vgg_difference": flow("vgg-flow", 0.2),
    "method.draft_steps": method("draft-k", 1),
    "method.draft_lv_samples": method("draft-lv", 3),
    "method.refl_share": method("refl", 1.0),
    "method.clip_range": method("ddpo", 10.0),
    "method.advantage_clip": method("ddpo", 0.1),
    "method.prompt_buffer": method("ddpo", 4, method__prompt_min_count=2),
    "method.prompt_min_count": method("ddpo", 2, training__num_epochs=3),
    "pool.size": method("reward-weighted", 32),
    "pool.images_per_prompt": method("reward-weighted", 4),
    "pool.tilt": method("reward-weighted", 0.1),
    "pool.renoise": method("reward-weighted", 0.6),
    "pool.looks": method("reward-weighted", 2),
    "pool.ahead": method("reward-weighted", 0, pool__looks=2),
    "pool.directions": method("reward-weighted", 1, pool__looks=2),
    "pool.gradient": method("nabla-db-pool", "linear"),
    "pool.shift_start": method("nabla-db-pool", True, pool__gradient="linear"),
    "pool.gradient_share": method("nabla-db-pool", 0.5),
    "pool.gradient_cap": method("nabla-db-pool", 0.01),
    "pool.own_share": method("reward-weighted", 0.5, pool__refresh=1),
    "pool.refresh": method("reward-weighted", 2, pool__own_share=0.5, training__num_epochs=3),
    "pool.keep_draws": method(
        "reward-weighted", 1, pool__own_share=0.5, pool__refresh=1, training__num_epochs=4
    ),
    "reward.weights": Effect(
        "/no/such/folder", refusal, {**PICTURES, "experiment.reward_fn": "aesthetic"}, pictures=True
    ),
    "reward.normalise": pictures(("colourfulness=1/2",)),
    "reward.clamp": pictures(("colourfulness=0:0.001",)),
    "reward.project_conflicts": pictures(
        True, SUM, partial(of_reward, lambda r: r.function.project)
    ),
    "reward.zeroth_order": pictures(3, ESTIMATED),
    "reward.zeroth_order_radius": pictures(0.5, ESTIMATED),
    "reward.zeroth_order_grid": pictures(2, ESTIMATED),
    "sampling.num_steps": world(4),
    "sampling.eta": world(0.5, sampling__scheduler="ddim"),
    "sampling.sde_noise": world(0.5, **FLOW_SDE),
    "sampling.guidance_scale": pictures(2.0),
    "sampling.height": policy(32, lambda made: made.sample_shape),
    "sampling.width": policy(32, lambda made: made.sample_shape),
    "sampling.max_sequence_length": pictures(12, look=refusal),
    "sampling.batch_size": world(8),
    "sampling.num_batches_per_epoch": world(1),
    "sampling.low_var_subsampling": world(False, method__window=0, model__timestep_fraction=0.5),
    "sampling.scheduler": pictures("dpm-solver", {**PICTURES, "sampling.num_steps": 5}),
    "sampling.spacing": pictures("logsnr"),
    "sampling.final_sigma": world(0.1),
    "pretrained.model": pictures("/no/such/model", look=refusal),
    "pretrained.revision": Effect("other", revision),
    "pretrained.family": Effect("stable-difusion", refusal),
    "evaluation.num_prompts": pictures(1, MEASURED),
    "evaluation.images_per_prompt": pictures(3, MEASURED),
    "evaluation.seed": pictures(1, MEASURED),
    "evaluation.batch_size": trainer(3, lambda made: made.observer.evaluator.batch_size),
    "evaluation.extractor": pictures("clip", {**MEASURED, "reward.weights": "/no/such"}, refusal),
    "evaluation.held_out_rewards": pictures(("contrast",), MEASURED),
    "guard.min_diversity": Effect(0.8, judged),
    "guard.max_path_kl": Effect(1.0, judged),
    "guard.max_held_out_drop": Effect(1.0, judged),
    "guard.patience": Effect(2, judged, GUARDED),
    "guard.action": Effect("lower-beta", judged, GUARDED),
    "guard.beta_factor": Effect(0.9, judged, {**GUARDED, "guard.action": "lower-beta"}),
    "logging.use_wandb": Effect(True, trackers),
    "logging.tensorboard": Effect(True, trackers),
    "logging.wandb_dir": Effect("elsewhere", trackers, {"logging.use_wandb": True}),
    "logging.proj_name": Effect("mine", trackers, {"logging.use_wandb": True}),
    "logging.save_freq": world(2),
    "logging.num_checkpoint_limit": world(1),
    "logging.sample_freq": pictures(1),
    "logging.eval_freq": pictures(1),
    "logging.num_samples": pictures(8, WATCHED),
    "logging.samples_per_prompt": pictures(2, WATCHED),
    "saving.output_dir": Effect(
        "elsewhere", lambda config, place: choose_folder(config, "", "auto").path
    ),
}


def config_of(effect: Effect, pipeline: Path) -> Config:
    config = Config() if effect.pictures else load_config("worlds/prompts")
    if effect.pictures:
        set_option(config, "pretrained.model", str(pipeline))
        set_option(config, "sampling.guidance_scale", 1.0)
    for key, value in {**({} if effect.pictures else WORLD), **effect.base}.items():
        set_option(config, key, value)
    return config


def test_every_option_has_an_effect_here() -> None:
    assert EFFECTS.keys() == flatten(Config()).keys()


@pytest.mark.parametrize("group", sorted({name.partition(".")[0] for name in EFFECTS}))
def test_an_option_that_is_changed_changes_something(
    group: str, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(tune, "BACKEND", "eager")
    tf32 = torch.backends.cuda.matmul.allow_tf32
    known: dict[str, object] = {}  # what the same base gave
    idle = []
    for number, (name, effect) in enumerate(EFFECTS.items()):
        if name.partition(".")[0] != group:
            continue
        config = config_of(effect, pipeline)
        base = f"{effect.look} {sorted(flatten(config).items())}"
        if base not in known:
            known[base] = effect.look(config.model_copy(deep=True), tmp_path / f"{number}-base")
        assert flatten(config)[name] != effect.value, name
        set_option(config, name, effect.value)
        if effect.look(config, tmp_path / f"{number}") == known[base]:
            idle.append(name)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    assert not idle
