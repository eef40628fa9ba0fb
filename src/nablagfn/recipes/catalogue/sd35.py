"""Stable Diffusion 3.5 medium towards the LAION aesthetic score."""

from ...config import Config
from ..large import large


def get_config() -> Config:
    """Settings and their sources: docs/models.md."""
    config = large("stabilityai/stable-diffusion-3.5-medium", guidance=4.5)
    config.training.vae_checkpointing = True
    return config
