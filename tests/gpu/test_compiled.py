"""torch.compile with inductor, which no CPU test can wait for: a compiled run is the plain one."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.gpu.test_switches import ended, plain, same

__all__ = ["plain"]  # a fixture


def test_a_compiled_run(cuda: torch.device, plain: dict, tmp_path: Path) -> None:
    torch._dynamo.reset()
    same(ended(cuda, tmp_path, **{"speed.compile": True}), plain)


def test_a_run_with_everything(cuda: torch.device, plain: dict, tmp_path: Path) -> None:
    torch._dynamo.reset()
    switches = ("compile", "cuda_graphs", "channels_last", "fused_optimizer")
    same(ended(cuda, tmp_path, **{f"speed.{name}": True for name in switches}), plain)
