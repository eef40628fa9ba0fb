"""The processor never waits for the device within sampling or a micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from nablagfn.core.rollout import rollout
from nablagfn.methods.registry import METHODS
from nablagfn.rewards import resolve
from tests.gpu.setting import drawn, trainer_on
from tests.tiny_rewards import save_weights

KINDS = {
    **{name: {} for name, method in METHODS.items() if not method.ode},  # it is no flow model
    "nabla-db ": {"model.no_flow": True},
    "reward-weighted ": {"pool.looks": 2},
}
# ImageReward waits: in its text encoder transformers asks whether the masks are all ones
REWARDS = ("brightness", "tiny-aesthetic", "tiny-alignment", "aesthetic", "hpsv2")
FREE = tuple(KINDS)


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Inside it a wait for the device raises."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_check_sees_a_wait(cuda: torch.device) -> None:
    x = torch.ones(3, device=cuda)
    with no_waiting(cuda), pytest.raises(RuntimeError, match="synchroni"):
        float(x.sum())


def test_sampling(device: torch.device, tmp_path: Path) -> None:
    trainer = trainer_on(device, "nabla-db", tmp_path)
    policy, table = trainer.policy, trainer.table
    noise = torch.randn(3, table.num_steps + 1, *policy.sample_shape, device=device)
    where = policy.condition(["a cat", "a dog", "ants"], ())
    rollout(policy, table, noise, where)  # what is kept on the device gets there
    with no_waiting(device):
        drawn = rollout(policy, table, noise, where)
    assert bool(drawn.x.isfinite().all())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Narrow rewards of the true architectures."""
    return str(save_weights(tmp_path_factory.mktemp("weights") / "narrow"))


@pytest.mark.parametrize("name", REWARDS)
def test_scoring_and_its_gradient(name: str, folder: str, device: torch.device) -> None:
    """Prompts that were seen before."""
    reward = resolve(name, device, folder)
    x = torch.rand(2, 3, 64, 64, device=device).requires_grad_()
    prompts, metadata = ["a cat", "an ant"], [{}, {}]
    known = reward(x, prompts, metadata)
    with no_waiting(device):
        value = reward(x, prompts, metadata)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    assert torch.allclose(value, known, rtol=1e-4, atol=1e-5)
    assert bool(gradient.isfinite().all()) and bool(gradient.any())


@pytest.mark.parametrize("method", FREE)
def test_a_micro_batch(method: str, device: torch.device, tmp_path: Path) -> None:
    """Losses, their backward pass, and the sums of an update's diagnostics."""
    options = {"training.micro_batch": 3, **KINDS[method]}
    trainer = trainer_on(device, method.strip(), tmp_path, **options)
    chosen = drawn(trainer)
    known = trainer.updater.accumulate(chosen, 3)
    with no_waiting(device):
        found = trainer.updater.accumulate(chosen, 3)
    assert torch.allclose(found.sums["loss"], known.sums["loss"], rtol=1e-4)
