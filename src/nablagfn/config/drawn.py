"""What samples of the pretrained model depend on, beside prompts and noise."""

from __future__ import annotations

from typing import Any

from .config import Config

SAMPLER = ("num_steps", "eta", "guidance_scale", "scheduler", "spacing", "final_sigma", "sde_noise")

SIZES = ("height", "width", "max_sequence_length")


def drawn_with(config: Config) -> dict[str, Any]:
    """model, sampler and reward, as JSON has them: equal for samples that may be compared."""
    sampler = config.sampling.model_dump(mode="json", include=set(SAMPLER))
    if config.sampling.sde_noise == type(config.sampling)().sde_noise:
        del sampler["sde_noise"]  # as in files from before there was such an option
    for name in SIZES:
        if size := getattr(config.sampling, name):  # 0, the pipeline's own, as before
            sampler[name] = size
    return {
        "model": [config.pretrained.model, config.pretrained.revision],
        "sampler": sampler,
        "reward": [config.experiment.reward_fn, config.reward.model_dump(mode="json")],
    }
