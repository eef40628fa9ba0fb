"""Prompt sets: from files, by name, or given."""

from .files import read_prompts
from .named import BUILT_IN, load_prompts
from .sets import PromptSet

__all__ = ["BUILT_IN", "PromptSet", "load_prompts", "read_prompts"]
