"""The report of a run: one self-contained HTML file made from the run's files; no torch."""

from .build import build

__all__ = ["build"]
