"""Objects by name: of this package, or of the user's own code as package.module:object."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

from .base import ConfigError

Kind = TypeVar("Kind")


def find_object(name: str, known: Mapping[str, Kind], key: str, kind: type[Kind]) -> Kind:
    """The known object of that name, or package.module:object, which must be a `kind`.

    Raises ConfigError, one line with the option `key`, when it cannot be had.
    """
    if name in known:
        return known[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"{key}={name!r} is unknown: did you mean {near}? (known: {', '.join(known)}; your "
            "own: package.module:object)"
        )
    found = import_object(name, f"{key}={name!r}")
    if not isinstance(found, kind):
        what = "class" if isinstance(found, type) else type(found).__name__
        raise ConfigError(f"{key}={name!r} is a {what}: it must be a {kind.__name__}")
    return found


def import_object(name: str, given: str) -> Any:
    """The object package.module:object; the working folder is importable, as for `python -m`.

    given: the option as it was written, for the error. Raises ConfigError, one line.
    """
    module, _, attribute = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise ConfigError(f"{given} cannot be imported: {error}") from None
