"""Stable Diffusion XL towards the LAION aesthetic score."""

from ...config import Config
from ..large import large


def get_config() -> Config:
    """Settings and their sources: docs/models.md."""
    config = large("stabilityai/stable-diffusion-xl-base-1.0", guidance=5.0, pixels=1024)
    config.sampling.scheduler = "dpm-solver"
    config.training.lr = 1e-4
    config.training.vae_checkpointing = True
    return config
