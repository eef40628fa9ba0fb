"""What all groups of options are built from."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line that names the key and the fix."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # whatever it quotes, one line


class Group(BaseModel):
    """Base of all groups: unknown keys are refused, assignments are checked."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False
    )


def lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def named(value: Any) -> Any:
    """A name in small letters; package.module:object as it is."""
    return value if isinstance(value, str) and ":" in value else lower(value)


Lower = BeforeValidator(lower)  # choices may be written in capitals
Name = BeforeValidator(named)
