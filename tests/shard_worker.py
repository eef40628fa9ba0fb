"""What tests/test_shard_base.py runs on two processes: whole and sharded runs, in float64.

    torchrun --nproc_per_node=2 tests/shard_worker.py MODEL OUT

Ends by running out of memory on the second process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from nablagfn import report
from nablagfn.cli.common import fail
from nablagfn.commands.assemble import build_evaluator
from nablagfn.commands.evaluate import EvaluationRequest, evaluate, make_plan
from nablagfn.config import Config
from nablagfn.core.types import Losses, Metadata, Transitions
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.rewards import NamedReward, resolve
from nablagfn.runs.runfolder import RunFolder
from nablagfn.runtime import distributed
from nablagfn.training.trainer import Trainer, TrainingError
from tests.test_trainer import PROMPTS, small_config

RANK = int(os.environ["RANK"])
OPTIONS = {
    "training.micro_batch": 1,
    "sampling.num_batches_per_epoch": 1,  # an update an epoch
    "model.unet_reg_scale": 10.0,
    "logging.save_freq": 1,
    "logging.sample_freq": 1,
    "logging.num_samples": 2,
    "logging.samples_per_prompt": 2,
    "evaluation.num_prompts": 1,
    "evaluation.images_per_prompt": 3,  # two for the first process and one for the second
    "evaluation.batch_size": 1,
}


class Score:
    """A reward that calls `act` on the second process at its n-th gradient."""

    def __init__(self, act: Callable[[], None] | None = None, n: int = 0) -> None:
        self.act, self.left = act, n
        self.reward = resolve("colourfulness", torch.device("cpu"))

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        self.left -= images.requires_grad
        if self.act and RANK == 1 and self.left == 0 and images.requires_grad:
            self.act()
        return self.reward(images, prompts, metadata)


def run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def trainer(
    model: Path, out: Path, *, shard: bool, reward: Score | None = None, **options: object
) -> Trainer:
    chosen = {"pretrained.model": str(model), "training.shard_base": shard, **OPTIONS, **options}
    config: Config = small_config(out, **chosen)
    policy = StableDiffusionPolicy.from_pretrained(
        str(model),
        dtype=torch.float64,
        guidance_scale=config.sampling.guidance_scale,
        gradient_checkpointing=config.training.gradient_checkpointing,
        vae_slice=config.training.vae_slice,
        shard=shard,
    )
    folder = RunFolder(out)
    score = NamedReward("colourfulness", reward or Score())
    return Trainer(policy, score, PROMPTS, config, folder=folder, show_progress=False)


def bytes_of(policy: StableDiffusionPolicy) -> int:
    """Of the U-Net's frozen weights, on this process."""
    own = [
        p.to_local() if isinstance(p, DTensor) else p
        for name, p in policy.network.named_parameters()
        if ".lora_" not in name
    ]
    return sum(p.untyped_storage().nbytes() for p in own)


def watch_clean(trainer: Trainer) -> list[bool]:
    """Fills with whether each micro-batch has clean rows only."""
    seen: list[bool] = []
    losses = trainer.objective.losses

    def watched(batch: Transitions) -> Losses:
        seen.append(bool((batch.step + 1 == trainer.table.num_steps).all()))
        return losses(batch)

    trainer.objective.losses = watched  # type: ignore[method-assign]
    return seen


UNMEASURED = {"evaluation.num_prompts": 0, "logging.sample_freq": 0}
QUICK = {"training.num_epochs": 1, **UNMEASURED}

KINDS = {
    "flow": {},
    "no_flow": {"model.no_flow": True, **QUICK},
}


def main(model: Path, out: Path) -> None:
    found: dict[str, object] = {}
    for kind, options in KINDS.items():
        whole = trainer(model, out / f"whole_{kind}", shard=False, **options)
        whole.fit()
        found["bytes_whole"] = bytes_of(whole.policy)
        sharded = trainer(model, out / f"sharded_{kind}", shard=True, **options)
        clean = watch_clean(sharded)
        sharded.fit()
        found[f"clean_{kind}"] = distributed.gather(sharded.accelerator, [clean])
        held = bytes_of(sharded.policy)
        found[f"bytes_{kind}"] = distributed.gather(sharded.accelerator, [held])
    checkpointed = {"training.gradient_checkpointing": True, "training.vae_slice": 1, **QUICK}
    trainer(model, out / "checkpointed", shard=True, **checkpointed).fit()
    stop = Score(lambda: os.kill(os.getpid(), signal.SIGTERM), 7)
    cut = trainer(model, out / "cut", shard=True, reward=stop, **UNMEASURED).fit()
    found["cut"] = [cut.finished, cut.updates]
    found["resumed"] = trainer(model, out / "cut", shard=True, **UNMEASURED).fit().updates
    for kind in ("whole", "sharded"):
        asked = EvaluationRequest(images_per_prompt=3, rewards=(), checkpoints=("update_000002",))
        folder = RunFolder(out / f"{kind}_flow")
        evaluate(folder, asked, show=False)
        built = build_evaluator(make_plan(folder, asked).config, sharded.accelerator, about={})
        found[f"evaluated_{kind}"] = bytes_of(built.policy)
    if RANK == 0:
        (out / "found.json").write_text(json.dumps(found), encoding="utf-8")
    try:
        full = Score(run_out_of_memory, 3)
        options = {"training.micro_batch": 2, **QUICK}  # one alone would try again with 1
        trainer(model, out / "oom", shard=True, reward=full, **options).fit()
    except TrainingError as error:
        fail(str(error), alone=error.alone)


if __name__ == "__main__":
    torch.set_num_threads(1)
    Accelerator.end_training = lambda self: None  # it ends the process group, too
    report.build = lambda folder: None  # slow, and nothing to do with it
    main(Path(sys.argv[1]), Path(sys.argv[2]))
