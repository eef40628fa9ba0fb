"""Devices and dtypes of every record through one update of every method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nablagfn.core.types import Losses, Transitions
from nablagfn.methods.registry import METHODS
from tests.gpu.setting import PRECISION, drawn, trainer_on

ON_THE_CPU = ("row", "step", "seed", "noisy", "known")  # so that choosing rows never waits
EMBEDS = "prompt_embeds"  # in the dtype of the text encoder


def tensors(record: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor within a record, with the name of its field."""
    if isinstance(record, Tensor):
        yield name, record
    elif isinstance(record, Mapping):
        for key, value in record.items():
            yield from tensors(value, str(key))
    elif is_dataclass(record):
        for field in fields(record):
            yield from tensors(getattr(record, field.name), field.name)


def check(record: Any, device: torch.device, dtype: torch.dtype) -> int:
    """Where each tensor is and what it is made of; how many there were."""
    count = 0
    for name, tensor in tensors(record):
        count += 1
        place = "cpu" if name in ON_THE_CPU else device.type
        assert tensor.device.type == place, name
        if tensor.is_floating_point():
            assert tensor.dtype == (dtype if name == EMBEDS else torch.float32), name
    return count


@pytest.mark.parametrize("precision", PRECISION)
@pytest.mark.parametrize("method", [name for name, known in METHODS.items() if not known.ode])
def test_every_record(method: str, precision: str, device: torch.device, tmp_path: Path) -> None:
    trainer = trainer_on(device, method, tmp_path, **{"training.mixed_precision": precision})
    dtype, seen = PRECISION[precision], []
    losses = trainer.objective.losses

    def watched(batch: Transitions) -> Losses:
        found = losses(batch)
        k = trainer.table.at(batch.step, batch.x)
        seen.append(sum(check(record, device, dtype) for record in (batch, found, k)))
        return found

    trainer.objective.losses = watched  # type: ignore[method-assign]
    chosen = drawn(trainer)
    assert check(chosen, device, dtype) >= 5
    updated = trainer.updater.update(chosen)
    assert seen and min(seen) >= 12
    assert all(torch.isfinite(torch.tensor(value)) for value in updated.metrics.values())
    groups = trainer.updater.groups
    assert all(p.device.type == device.type for group in groups for p in group)
    assert {p.dtype for group in groups for p in group} == {torch.float32}
    assert {p.grad.dtype for p in groups[0] if p.grad is not None} == {torch.float32}
    moments = [
        value
        for state in trainer.updater.optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    ]
    assert moments and {value.device.type for value in moments} == {device.type}
    assert {p.dtype for p in trainer.policy.network.conv_in.parameters()} == {dtype}
