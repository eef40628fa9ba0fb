"""Z-Image towards the LAION aesthetic score."""

from ...config import Config
from ..large import large


def get_config() -> Config:
    """Settings and their sources: docs/models.md."""
    config = large("Tongyi-MAI/Z-Image", guidance=5.0)
    config.training.vae_checkpointing = True
    return config
