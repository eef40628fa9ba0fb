"""Memory: what is moved, what is given back, and a run that meets its limit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nablagfn.commands.assemble import build_policy, build_reward
from nablagfn.recipes.options import load_config
from nablagfn.rewards import modules_of, offloaded
from nablagfn.runtime import backoff
from nablagfn.runtime.costs import size_of, tensors_of
from tests.gpu.setting import drawn, learned, relative, trainer_on


@pytest.fixture
def fraction(cuda: torch.device) -> Iterator[Any]:
    """Sets what this process may take of the device's memory, in bytes."""
    whole = torch.cuda.get_device_properties(cuda).total_memory

    def limit(size: float) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / whole))

    yield limit
    limit(whole)


def test_out_of_memory_backs_off_with_the_same_result(fraction: Any, tmp_path: Path) -> None:
    """All 128 transitions at once do not fit, a part of them does: the update is the same."""
    cuda = torch.device("cuda")
    options = {
        "sampling.batch_size": 64,
        "training.batch_size": 64,
        "training.micro_batch": 128,
        "model.timestep_fraction": 0.3,
    }
    free = trainer_on(cuda, "nabla-db", tmp_path / "free", **options)
    chosen = drawn(free)
    free.updater.accumulate(chosen, 128)  # workspaces of the libraries get there
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    free.updater.update(chosen)
    rows, known = free.updater.rows, learned(free)
    grown = torch.cuda.max_memory_reserved() - before
    del free
    tight = trainer_on(cuda, "nabla-db", tmp_path / "tight", **options)
    chosen = drawn(tight)
    torch.cuda.empty_cache()
    fraction(torch.cuda.memory_reserved() + 0.6 * grown)
    tight.updater.update(chosen)
    assert rows == 128 and 1 <= tight.updater.rows < 128
    for name, value in learned(tight).items():
        assert relative(value, known[name]) < 1e-3 or float(known[name].norm()) < 1e-6, name


def test_one_row_too_many_is_an_error_that_says_what_to_do(cuda: torch.device) -> None:
    def attempt(rows: int) -> None:
        torch.empty(2**50, dtype=torch.uint8, device=cuda)

    with pytest.raises(torch.OutOfMemoryError):
        backoff.fit(attempt, 8, lambda text: None)


def test_a_text_encoder_that_is_offloaded(device: torch.device) -> None:
    """On the device for a new prompt only; the same embeddings."""
    config = load_config("demo")
    known = build_policy(config, device).condition(["a cat"], ()).tensors["prompt_embeds"]  # type: ignore[union-attr]
    config.speed.offload_text_encoder = True
    policy: Any = build_policy(config, device)
    encoder = policy.pipeline.text_encoder
    assert {t.device.type for t in tensors_of([encoder])} == {"cpu"}
    assert torch.equal(policy.condition(["a cat"], ()).tensors["prompt_embeds"], known)
    assert {t.device.type for t in tensors_of([encoder])} == {"cpu"}


def test_a_reward_that_is_offloaded(device: torch.device) -> None:
    """Its weights are on the device only while it scores; the same scores and gradients."""
    config = load_config("demo")
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    found = []
    for away in (False, True):
        reward = build_reward(config, torch.device("cpu") if away else device)
        reward = offloaded(reward) if away else reward
        size = size_of(tensors_of(modules_of(reward)))
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        x = pictures.clone().requires_grad_()
        value = reward(x, ["cat"] * 3, [{}] * 3)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        found.append((value.detach(), gradient))
        if device.type == "cuda" and away:
            assert torch.cuda.memory_allocated() - before < size / 2
            assert {t.device.type for t in tensors_of(modules_of(reward))} == {"cpu"}
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
