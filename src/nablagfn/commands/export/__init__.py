"""A run's model for other programs, each form proved by loading it again."""

from .export import export

__all__ = ["export"]
