"""What the suite measures: a trainer for SD1.5's architecture and a reward at full width, random
weights made on the device; or, small, tiny-animals and its own rewards.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import QUIET
from one_update import memory as peak
from update import sizes

from nablagfn.commands.architectures import REWARDS
from nablagfn.commands.assemble import build_policy, build_prompts, build_reward
from nablagfn.commands.planner import synchronise
from nablagfn.config import Config, set_option
from nablagfn.core.rollout import walk
from nablagfn.core.types import Selection
from nablagfn.models.architectures import random_sd15
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.models.tune import tune
from nablagfn.prompts import PromptSet
from nablagfn.recipes.options import load_config
from nablagfn.rewards import NamedReward, offloaded
from nablagfn.runs.runfolder import RunFolder
from nablagfn.runtime.distributed import weight_dtype
from nablagfn.training.trainer import Trainer

from .child import Setup

Options = dict[str, Any]
ORIGINAL = ("aesthetic", "hpsv2", "imagereward")
SMALL = {"aesthetic": "tiny-aesthetic", "hpsv2": "tiny-alignment", "imagereward": "tiny-alignment"}
PROMPTS = PromptSet(("cat", "dog", "horse", "bear"))


def paths(count: int) -> Options:
    """One update an epoch of `count` paths, drawn at once."""
    return sizes(count, 1)


def random_pipeline(device: torch.device, dtype: torch.dtype) -> Any:
    """SD1.5 with random weights, made where they are used."""
    with torch.device(device):
        pipeline = random_sd15()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, dtype)


def config_of(setup: Setup, options: Mapping[str, Any], reward: str = "aesthetic") -> Config:
    """The settings of config/NAME.py, or small ones of the demo, with `options`."""
    config = load_config("demo" if setup.small else reward)
    if setup.small:
        config.experiment.reward_fn = SMALL[reward]
        config.sampling.num_steps = 5
    out = {"saving.output_dir": str(setup.work / "runs")}
    for key, value in {**QUIET, **out, **options}.items():
        set_option(config, key, value)
    return config


def policy_of(setup: Setup, config: Config) -> StableDiffusionPolicy:
    device = torch.device(setup.device)
    if setup.small:
        return build_policy(config, device)
    t = config.training
    policy = StableDiffusionPolicy(
        random_pipeline(device, weight_dtype(config, device)),
        guidance_scale=config.sampling.guidance_scale,
        lora_rank=config.model.lora_rank,
        gradient_checkpointing=t.gradient_checkpointing,
        vae_checkpointing=t.vae_checkpointing,
        vae_slice=t.vae_slice,
        name="sd15-random",
    )
    return tune(policy, config.speed)


def reward_of(setup: Setup, config: Config, name: str) -> NamedReward:
    device = torch.device(setup.device)
    if setup.small:
        return build_reward(config, device)
    with torch.device(device):
        module = REWARDS[name]()
    reward = NamedReward(name, module.to(device).requires_grad_(False).eval())
    return offloaded(reward) if config.speed.offload_reward else reward


def trainer_of(setup: Setup, options: Mapping[str, Any], reward: str = "aesthetic") -> Trainer:
    """Ready for `one_update`; its run folder is never written to."""
    torch.manual_seed(0)
    config = config_of(setup, options, reward)
    prompts = build_prompts(config) if setup.small else PROMPTS
    folder = RunFolder(setup.work / "runs" / f"{time.monotonic_ns()}")
    policy, score = policy_of(setup, config), reward_of(setup, config, reward)
    return Trainer(policy, score, prompts, config, folder=folder, show_progress=False)


@dataclass(frozen=True)
class Update:
    """Seconds of the parts of one update; peaks in bytes of the device (of the process on a CPU).

    paths, transitions: what was drawn and learned from. evals, decodes: rows through the denoiser
    (forward and backward, guidance counted once) and the decoder.
    """

    draw: float
    score: float
    learn: float
    step: float
    paths: int
    transitions: int
    peak_draw: int
    peak_learn: int
    built: int
    evals: int
    decodes: int
    loss: float

    @property
    def seconds(self) -> float:
        return self.draw + self.score + self.learn + self.step

    def figures(self) -> dict[str, Any]:
        """For a row of the results; trajectories/s is of the whole update."""
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()}
        rate = {"seconds": round(self.seconds, 4), "trajectories/s": self.paths / self.seconds}
        return {**rounded, **rate}


class Stopwatch:
    """Seconds between calls, the device's work done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lap()

    def lap(self) -> float:
        synchronise(self.device)
        now = time.perf_counter()
        past, self.since = now - getattr(self, "since", now), now
        return past


def reset(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def warm_up(trainer: Trainer) -> None:
    """Two steps of a rollout and a decode, so that kernels are chosen before they are timed."""
    policy, size = trainer.policy, trainer.config.sampling.batch_size
    noise = torch.randn(size, 3, *policy.sample_shape, device=policy.device)
    where = policy.condition([trainer.prompts.prompts[0]] * size, ())
    with torch.no_grad():
        drawn = walk(policy, trainer.table, noise[:, 0], noise[:, 1:], where)
        policy.decode(drawn.clean)
    trainer.counts.take()


def first_pass(chosen: Selection, rows: int) -> Selection:
    """The transitions of the first micro-batch; seeds are left out."""
    return replace(chosen, row=chosen.row[:rows], step=chosen.step[:rows], seed=None)


def one_update(trainer: Trainer, *, warm: bool = True) -> Update:
    """Draw, score, learn and step once, as `Trainer.fit` does, each with a stopwatch.

    warm: kernels are chosen, and one micro-batch is learned from, before it is timed.
    """
    device, updater = trainer.policy.device, trainer.updater
    if warm:
        warm_up(trainer)
    synchronise(device)
    built = torch.cuda.memory_allocated(device) if device.type == "cuda" else peak(device)
    reset(device)
    watch = Stopwatch(device)
    drawn = trainer.collector.collect(0)
    draw = watch.lap()
    drawn = replace(drawn, reward=trainer._scores(drawn).total)
    trainer._observe(drawn)
    score, peak_draw = watch.lap(), peak(device)
    (chosen,) = trainer.collector.batches(drawn, 0, 0, trainer.objective)
    drawing = trainer.counts.take()
    if warm:
        updater.accumulate(first_pass(chosen, updater.rows), updater.rows)
        trainer.counts.take()
    reset(device)
    watch.lap()
    found = updater.accumulate(chosen, updater.rows)
    learn, peak_learn = watch.lap(), peak(device)
    updater._step()
    step, learning = watch.lap(), trainer.counts.take()
    return Update(
        draw,
        score,
        learn,
        step,
        len(drawn.condition),
        len(chosen.row),
        peak_draw,
        peak_learn,
        built,
        int(drawing["model_evals"] + learning["model_evals"]),
        int(drawing["decode_evals"] + learning["decode_evals"]),
        float(found.sums["loss"]),
    )


def measured(setup: Setup, options: Mapping[str, Any], reward: str = "aesthetic") -> dict[str, Any]:
    """Figures of one warm update, with what is needed to predict them: `options` and reward."""
    update = one_update(trainer_of(setup, options, reward))
    return {**update.figures(), "options": dict(options), "reward": reward}


def save_sd15(folder: Path, device: torch.device) -> Path:
    """SD1.5 and the aesthetic reward as files, for the command line; in bfloat16."""
    if not (folder / "sd15" / "model_index.json").is_file():
        random_pipeline(device, torch.bfloat16).save_pretrained(folder / "sd15")
        with torch.device(device):
            reward = REWARDS["aesthetic"]()
        reward.clip.to(torch.bfloat16).save_pretrained(folder / "clip")
        state = {name: value.cpu() for name, value in reward.head.state_dict().items()}
        torch.save(state, folder / "sac+logos+ava1-l14-linearMSE.pth")
    return folder
