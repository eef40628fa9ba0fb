"""Modules that have moved open under their old names, too: in configs, reward strings and scripts.

Importing one says where it is now. The names are those of version 0.1.0, when all modules lay in
the package's root.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

HOMES = {
    "commands": "architectures assemble check_reward doctor evaluate export planner",
    "core": "bellman counting kernels lookahead path_kl rng rollout surrogate types value_gradient",
    "evaluation": "extractors pictures",
    "methods": "estimators objectives",
    "metrics": "groups",
    "recipes": "options",
    "report": "diff",
    "rewards": "critics",
    "runs": "advice hub progress runfolder",
    "runtime": "backoff costs distributed optimizers",
    "training": "checkpoint collect diagnostics guard observe runlog trainer updater",
}
MOVED = {name: f"{home}.{name}" for home, names in HOMES.items() for name in names.split()}
MOVED |= {"configs": "recipes.catalogue", "worlds.settings": "recipes.worlds"}


def new_name(name: str) -> str | None:
    """'nablagfn.trainer' -> 'nablagfn.training.trainer'; None for what has not moved."""
    package = __package__ or "nablagfn"
    inside = name.removeprefix(f"{package}.")
    for old, new in MOVED.items():
        if inside == old or inside.startswith(f"{old}."):
            return f"{package}.{new}{inside.removeprefix(old)}"
    return None


class _Alias(importlib.abc.Loader):
    """Gives the module of another name.

    What a package has loaded so far gets its old name at once. If the import system did that later,
    it would also put each module into the package, over a function of the same name, as
    `export.export`.
    """

    def __init__(self, name: str, target: str) -> None:
        self.name, self.target = name, target

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.target)
        self.spec = module.__spec__  # the import system is about to put the old name's there
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec
        for loaded, part in list(sys.modules.items()):
            if loaded.startswith(f"{self.target}."):
                sys.modules.setdefault(self.name + loaded.removeprefix(self.target), part)


class MovedFinder(importlib.abc.MetaPathFinder):
    """Asked first, or parts of a package that has moved would be found in its new place under their
    old names, as modules of their own."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package = __package__ or "nablagfn"
        found = new_name(fullname) if fullname.startswith(f"{package}.") else None
        if found is None:
            return None
        warnings.warn(f"{fullname} is now {found}", FutureWarning, stacklevel=2)
        return importlib.machinery.ModuleSpec(fullname, _Alias(fullname, found))


def install() -> None:
    """Make the import system ask the finder; once in a process."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedFinder())
