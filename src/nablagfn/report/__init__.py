"""Reports: self-contained HTML files made from run folders, of one run or of several; no torch."""

from .render import build, compare

__all__ = ["build", "compare"]
