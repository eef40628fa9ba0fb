"""Options by their dotted names."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from .base import ConfigError
from .config import Config


def flatten(config: BaseModel, prefix: str = "") -> dict[str, Any]:
    """{'training.lr': 0.001, ...}: every option by its dotted name."""
    flat: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def describe() -> dict[str, tuple[str, Any]]:
    """Help text and default of every option by its dotted name."""
    rows: dict[str, tuple[str, Any]] = {}

    def walk(group: BaseModel, prefix: str) -> None:
        for name, info in type(group).model_fields.items():
            value = getattr(group, name)
            if isinstance(value, BaseModel):
                walk(value, f"{prefix}{name}.")
            else:
                rows[prefix + name] = (info.description or "", value)

    walk(Config(), "")
    return rows


REMOVED = {
    "logging.wandb_key": "keys are never kept in a config: set WANDB_API_KEY or run `wandb login`",
    "logging.save_json": "metrics are always written to RUN/metrics.jsonl",
}

ELSEWHERE = {"training.learning_rate": "training.lr"}  # names of other programs, unlike ours


def find_file(name: str) -> Path | None:
    """The file `name` (~ expanded), or None; never raises, however odd the name."""
    expanded = os.path.expanduser(name)
    return Path(expanded) if os.path.isfile(expanded) else None


def unquoted(text: str) -> str:
    """A name as Python prints it in a list, without its quotes; any other text as it is."""
    name = text.strip()
    quoted = len(name) > 2 and name[0] == name[-1] and name[0] in "'\""
    return name[1:-1] if quoted and name[1:-1].strip() else text


def set_option(config: Config, key: str, value: Any) -> None:
    """Set one dotted option; strings are parsed by the option's type.

    Raises ConfigError, one line, for an unknown key (naming the nearest) or a bad value.
    """
    known = flatten(config)
    if key in REMOVED:
        raise ConfigError(f"config.{key} does not exist here: {REMOVED[key]}")
    if key not in known:
        near = ELSEWHERE.get(key) or difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        raise ConfigError(f"unknown option config.{key}: did you mean config.{near}?")
    *path, name = key.split(".")
    group: Any = config
    for part in path:
        group = getattr(group, part)
    if isinstance(known[key], tuple) and isinstance(value, str):
        value = [unquoted(part) for part in value.strip("()[] ").split(",") if part.strip()]
    try:
        setattr(group, name, value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        help_text = describe()[key][0]
        raise ConfigError(f"config.{key}={value!r}: {reason} ({help_text})") from None


def merge(config: Config, values: dict[str, Any], prefix: str = "") -> Config:
    """Set a nested mapping of options (an original-style config file's content) on `config`."""
    for name, value in values.items():
        if isinstance(value, dict):
            merge(config, value, f"{prefix}{name}.")
        else:
            set_option(config, f"{prefix}{name}", value)
    return config
