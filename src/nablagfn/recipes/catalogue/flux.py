"""FLUX.1-dev towards the LAION aesthetic score."""

from ...config import Config
from ..large import large


def get_config() -> Config:
    """Settings and their sources: docs/models.md."""
    config = large("black-forest-labs/FLUX.1-dev", guidance=3.5)
    config.training.vae_checkpointing = True
    return config
