"""The model families. A new one is one file with a `Family`, and one entry in the registry."""

from .family import ExportForm, Family, Own, StockSampler
from .registry import FAMILIES, check_belongs, claimed, family_of_run, find_family

__all__ = [
    "FAMILIES",
    "ExportForm",
    "Family",
    "Own",
    "StockSampler",
    "check_belongs",
    "claimed",
    "family_of_run",
    "find_family",
]
