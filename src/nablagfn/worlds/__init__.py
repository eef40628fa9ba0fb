"""Problems whose answer is known: pretrained model, reward, and the target of its sampler.

A world is one small file in `catalogue/`, or a file of your own, that defines `WORLD = World(...)`.
This module imports no torch; `load` does.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ConfigError, find_file
from . import catalogue

if TYPE_CHECKING:
    from .world import World

PREFIX = "worlds/"


def names() -> list[str]:
    """The packaged worlds, without the prefix: 'ring' for worlds/ring."""
    found = pkgutil.iter_modules(catalogue.__path__)
    return sorted(module.name.replace("_", "-") for module in found)


@lru_cache(maxsize=32)
def load(name: str) -> World:
    """The world of that name ('worlds/ring', 'ring'), or of a file ('path/to/my_world.py').

    The same name gives the same object. Raises ConfigError, one line, when there is none.
    """
    from .world import World

    file = find_file(name) if name.endswith(".py") else None
    short = name.removeprefix(PREFIX)
    if file is not None:
        module, full = _module_of(file), str(file)
    elif short in names():
        module = importlib.import_module(f"{catalogue.__name__}.{short.replace('-', '_')}")
        full = PREFIX + short
    else:
        near = difflib.get_close_matches(short, names(), n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"there is no world '{name}': did you mean {PREFIX}{near}? "
            f"(worlds: {', '.join(names())}; or a .py file with WORLD = World(...))"
        )
    world = getattr(module, "WORLD", None)
    if not isinstance(world, World):
        raise ConfigError(f"{name} is no world: the file must define WORLD = World(...)")
    return world.called(full)


def _module_of(path: Path) -> Any:
    """Run a user's file. Raises ConfigError whatever it raises."""
    found = importlib.util.spec_from_file_location(f"nablagfn_world_{path.stem}", path)
    if found is None or found.loader is None:
        raise ConfigError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything
        raise ConfigError(f"the world {path}: {type(error).__name__}: {error}") from None
    return module


def is_world(name: str) -> bool:
    """Whether a model, reward or prompt option names a world: worlds/NAME, or a Python file."""
    return name.startswith(PREFIX) or name.endswith(".py")
