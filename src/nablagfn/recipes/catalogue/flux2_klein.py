"""FLUX.2 Klein (the base model of 4B) towards the LAION aesthetic score."""

from ...config import Config
from ..large import large


def get_config() -> Config:
    """Settings and their sources: docs/models.md."""
    config = large("black-forest-labs/FLUX.2-klein-base-4B", guidance=4.0)
    config.training.vae_checkpointing = True
    return config
