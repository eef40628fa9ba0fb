"""The memory planner against what an update really holds, counted storage by storage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nablagfn import planner
from nablagfn.config import Config
from nablagfn.costs import Tracker
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.planner import Parts, Setting
from nablagfn.prompts import PromptSet
from nablagfn.rewards import resolve
from nablagfn.trainer import Trainer
from tests.test_trainer import small_config
from tests.tiny_pipeline import make_pipeline

CPU = torch.device("cpu")


def config_of(folder: Path, out: Path, method: str, **options: object) -> Config:
    return small_config(
        out,
        **{
            "pretrained.model": str(folder),
            "experiment.reward_fn": "colourfulness",
            "experiment.method": method,
            "method.draft_steps": 2,
            "training.batch_size": 4,
            **options,
        },
    )


def held_by_update(config: Config, rows: int) -> float:
    """Peak bytes of all that an update makes, on real tensors."""
    policy = StableDiffusionPolicy(
        make_pipeline(),
        guidance_scale=config.sampling.guidance_scale,
        gradient_checkpointing=config.training.gradient_checkpointing,
        name=config.pretrained.model,
    )
    reward = resolve("colourfulness", CPU)
    trainer = Trainer(policy, reward, PromptSet(("a cat",)), config, show_progress=False)
    drawn = replace(trainer.collector.collect(0), reward=torch.zeros(4))
    trainer.objective.observe(drawn.condition.prompts, drawn.reward)
    (chosen, *_) = trainer.collector.batches(drawn, 0, 0, trainer.objective)
    modules = [policy.unet, policy.vae, policy.pipeline.text_encoder, trainer.objective.modules]
    known = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    with Tracker([*known, chosen.paths.x, chosen.paths.eps]) as tracker:
        trainer._accumulate(chosen, rows)
    return tracker.peak


@pytest.fixture(scope="module")
def parts(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    config = config_of(tiny_folder, tmp_path_factory.mktemp("out"), "nabla-db")
    return planner.measure(config, CPU)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["nabla-db", "adjoint-matching", "draft-k", "ddpo"])
def test_the_prediction_is_what_an_update_holds(
    method: str, checkpointing: bool, tiny_folder: Path, tmp_path: Path, parts: Parts
) -> None:
    """Of two sizes, the difference: what rows add, which is what the planner decides by."""
    config = config_of(tiny_folder, tmp_path, method)
    config.training.gradient_checkpointing = checkpointing
    work = planner.work_of(config)

    def predicted(rows: int) -> float:
        found = planner.moments(config, parts, work, Setting(rows, checkpointing, 2))
        return max(value for name, value in found.items() if name.startswith("update"))

    true = held_by_update(config, 4) - held_by_update(config, 2)
    print(method, checkpointing, (predicted(4) - predicted(2)) / true)
