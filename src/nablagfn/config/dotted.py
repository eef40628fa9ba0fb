"""Objects of the user's own code, named as package.module:object."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TypeVar

from .base import ConfigError

Kind = TypeVar("Kind")


def load_object(spec: str, key: str, kind: type[Kind]) -> Kind:
    """The object, of which only instances of `kind` will do; the working folder is importable.

    Raises ConfigError, one line with the option `key`, when it cannot be had.
    """
    module, _, name = spec.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # a user's module may raise anything
        raise ConfigError(f"{key}={spec!r} cannot be imported: {error}") from None
    if not isinstance(found, kind):
        what = "class" if isinstance(found, type) else type(found).__name__
        raise ConfigError(f"{key}={spec!r} is a {what}: it must be a {kind.__name__}")
    return found
