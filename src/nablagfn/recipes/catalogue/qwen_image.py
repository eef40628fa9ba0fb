"""Qwen-Image towards the LAION aesthetic score."""

from ...config import Config
from ..large import large


def get_config() -> Config:
    """Settings and their sources: docs/models.md."""
    config = large("Qwen/Qwen-Image", guidance=4.0)
    return config
