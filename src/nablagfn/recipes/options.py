"""Command lines of the original form: --config=FILE_OR_NAME --config.group.option=value."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import worlds
from ..config import Config, ConfigError, find_file, flatten, merge, set_option
from . import catalogue as configs

PREFIX = "--config."


def packaged() -> list[str]:
    """Names of the configs shipped with nablagfn."""
    return sorted(module.name for module in pkgutil.iter_modules(configs.__path__))


def load_config(spec: str) -> Config:
    """The config of a file with `get_config()`, or a packaged config by name, or worlds/NAME.

    `config/NAME.py` means the packaged NAME where there is no such file. A file may return a
    `Config`, a nested dict, or an ml_collections ConfigDict; or define a `WORLD` (docs/worlds.md).
    Raises ConfigError, one line.
    """
    file = find_file(spec)
    if file is not None:
        module = _module_of(file)
        return _of_world(spec) if hasattr(module, "WORLD") else _call(module, spec)
    if spec.startswith(worlds.PREFIX):
        return _of_world(spec)
    path = Path(spec)
    if path.stem in packaged() and str(path.parent) in (".", "config"):
        return _call(importlib.import_module(f"{configs.__name__}.{path.stem}"), spec)
    near = difflib.get_close_matches(path.stem, packaged(), n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"--config={spec}: no such file and no packaged config of that name; did you mean "
        f"{near}? (packaged: {', '.join(packaged())}; worlds: "
        + ", ".join(worlds.PREFIX + name for name in worlds.names())
        + ")"
    )


def _of_world(spec: str) -> Config:
    from .worlds import get_config

    return get_config(spec)


def _module_of(path: Path) -> Any:
    found = importlib.util.spec_from_file_location(f"nablagfn_config_{path.stem}", path)
    if found is None or found.loader is None:
        raise ConfigError(f"--config={path}: not a Python file")
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything
        raise ConfigError(f"--config={path}: {type(error).__name__}: {error}") from None
    return module


def _call(module: Any, spec: str) -> Config:
    function = getattr(module, "get_config", None)
    if not callable(function):
        raise ConfigError(f"--config={spec}: the file must define get_config()")
    try:
        value = function()
    except Exception as error:  # a user's function may raise anything
        raise ConfigError(f"--config={spec}: {type(error).__name__}: {error}") from None
    if isinstance(value, Config):
        return value
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if not isinstance(value, dict):
        raise ConfigError(f"--config={spec}: get_config() must return a Config or a dict")
    return merge(Config(), value)


def apply_overrides(config: Config, arguments: Sequence[str]) -> Config:
    """Set every `--config.group.option=value` (or `... value`; a bare bool means True).

    Raises ConfigError, one line, for anything else that is left on the command line.
    """
    known = flatten(config)
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith(PREFIX):
            raise ConfigError(f"unknown argument {argument}: {_nearest_flag(argument)}")
        key, equals, value = argument.removeprefix(PREFIX).partition("=")
        if not equals:
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif isinstance(known.get(key), bool):
                value = "True"
            elif key in known:
                raise ConfigError(f"config.{key} needs a value: {argument}=VALUE")
        set_option(config, key, value)
    return config


def _nearest_flag(argument: str) -> str:
    flags = ["--config", "--seed", "--exp_name", "--resume", "--help"]
    flags += [PREFIX + key for key in flatten(Config())]
    name = argument.partition("=")[0]
    return f"did you mean {difflib.get_close_matches(name, flags, n=1, cutoff=0.0)[0]}?"
