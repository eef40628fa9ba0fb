"""Paths that were drawn at one time, and the files that keep them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Kept = TypeVar("Kept", bound="Tensors")

SUFFIX = ".safetensors"
IDENTITY = "of"  # in a file's metadata


class Tensors:
    """A record of tensors, as a file keeps it."""

    def tensors(self) -> dict[str, Tensor]:
        """By name, each with storage of its own."""
        return {part.name: getattr(self, part.name).contiguous() for part in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def of(cls: type[Kept], tensors: dict[str, Tensor]) -> Kept:
        return cls(**tensors)

    @classmethod
    def cat(cls: type[Kept], parts: Sequence[Kept]) -> Kept:
        """All rows, one part after the other."""
        names = [part.name for part in fields(cls)]  # type: ignore[arg-type]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


@dataclass(frozen=True)
class Draw(Tensors):
    """Paths that were drawn at one time, n of them, those of a prompt side by side.

    x: [n, N+1, ...]. output, output_ref: [n, N, ...] u(x_k) of what drew them, and u_#(x_k). slot:
    [n] int64, which of the pool's prompts. reward: [n]. seen: [n, looks] r of the predicted clean
    samples. log_ratio: [n, N] float64, log p_drawn/p_# of the steps. gradient: [n, N, ...] λ_{k+1},
    the reward's gradient carried back to what each step led to, or J_x̂ᵀa (`training.linear`); [n,
    0] where none is asked for.
    """

    x: Tensor
    output: Tensor
    output_ref: Tensor
    slot: Tensor
    reward: Tensor
    seen: Tensor
    log_ratio: Tensor
    gradient: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """By name, each with storage of its own."""
        found = super().tensors()
        if found["output"].data_ptr() == found["output_ref"].data_ptr():
            del found["output"]  # the pretrained model's own: kept once
        return found

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Draw:
        return cls(**{"output": tensors["output_ref"], **tensors})

    def at(self, rows: Tensor) -> Draw:
        """The paths `rows` [m]."""
        picked = {part.name: getattr(self, part.name)[rows] for part in fields(self)}
        if self.output is self.output_ref:
            picked["output"] = picked["output_ref"]
        return Draw(**picked)

    @classmethod
    def cat(cls, parts: Sequence[Draw]) -> Draw:
        values = {
            part.name: torch.cat([getattr(draw, part.name) for draw in parts])
            for part in fields(Draw)
            if part.name != "output"
        }
        if all(draw.output is draw.output_ref for draw in parts):
            return Draw(output=values["output_ref"], **values)
        return Draw(output=torch.cat([draw.output for draw in parts]), **values)


def identity(**of: object) -> str:
    """What the paths of a file are of, in few characters."""
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:32]


def itself(lacking: bool) -> bool:
    """Of one process alone."""
    return lacking


@dataclass(frozen=True)
class Shelf:
    """The draws that one process keeps in a folder, in files of their own.

    agree: whether anything is lacking on any process; then all of them make it, since they may have
    to pass through the model together.
    """

    folder: Path
    rank: int
    agree: Callable[[bool], bool] = itself

    def file(self, name: str) -> Path:
        return self.folder / f"rank{self.rank:02d}_{name}{SUFFIX}"

    def kept(self, name: str, of: str, kind: type[Kept], make: Callable[[], Kept]) -> Kept:
        """The record of that name from its file, where that is whole and has this identity."""
        found = self._read(self.file(name), of, kind)
        if not self.agree(found is None):
            assert found is not None
            return found
        made = make()
        if found is not None:
            return found
        file = self.file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".{file.name}.partial")
        save_file(made.tensors(), unfinished, metadata={IDENTITY: of})
        os.replace(unfinished, file)
        return made

    def _read(self, file: Path, of: str, kind: type[Kept]) -> Kept | None:
        try:
            with safe_open(file, "pt") as opened:
                if (opened.metadata() or {}).get(IDENTITY) != of:
                    return None
                names = opened.keys()
                return kind.of({name: opened.get_tensor(name) for name in names})
        except (OSError, SafetensorError, KeyError, TypeError):
            return None

    def forget(self, before: str) -> None:
        """Delete this process's draws of epochs whose names come before that one."""
        for file in self.folder.glob(f"rank{self.rank:02d}_epoch*{SUFFIX}"):
            if file.name < self.file(before).name:
                with contextlib.suppress(OSError):
                    file.unlink()
