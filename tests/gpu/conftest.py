"""`pytest -m gpu`: what is claimed of a GPU, tried on one. Skipped where there is none.

NABLAGFN_GPU=cpu rehearses on a CPU those that make sense there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

REHEARSAL = os.environ.get("NABLAGFN_GPU") == "cpu"
HERE = os.path.dirname(__file__)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder bears the marker."""
    for item in items:
        if str(item.path).startswith(HERE):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests run."""
    if torch.cuda.is_available() and not REHEARSAL:
        return torch.device("cuda")
    if REHEARSAL:
        return torch.device("cpu")
    pytest.skip("no CUDA device (pytest -m gpu on a machine that has one)")


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The same, for what a CPU has no likeness of."""
    if device.type != "cuda":
        pytest.skip("means nothing on a CPU")
    return device


@pytest.fixture(autouse=True)
def clean(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No report is drawn; backend flags and memory are as they were."""
    monkeypatch.setattr("nablagfn.report.build", lambda folder: None)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    flags = matmul.allow_tf32, cudnn.allow_tf32
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = flags
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.empty_cache()
