"""Every switch of `speed` on a GPU: the same run as without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nablagfn.core.rollout import rollout
from nablagfn.models.tune import Replayed
from tests.gpu.setting import learned, random_policy, settings, trainer_on

SWITCHES = ("channels_last", "fused_optimizer", "offload_text_encoder", "offload_reward")


def ended(device: torch.device, out: Path, **options: object) -> dict[str, Tensor]:
    """Two updates of nabla-db."""
    trainer = trainer_on(device, "nabla-db", out, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "deterministic", True)
        trainer.fit()
    return learned(trainer)


@pytest.fixture(scope="module")
def plain(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return ended(device, tmp_path_factory.mktemp("plain"))


def same(found: dict[str, Tensor], known: dict[str, Tensor]) -> None:
    """Up to float32 rounding through two updates."""
    moved = max(float(value.abs().max()) for name, value in known.items() if "lora_B" in name)
    assert moved > 1e-3
    for name, value in known.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-3 * moved)


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_changes_speed_and_not_the_run(
    switch: str, device: torch.device, plain: dict[str, Tensor], tmp_path: Path
) -> None:
    same(ended(device, tmp_path, **{f"speed.{switch}": True}), plain)


def test_a_run_is_the_same_twice(
    device: torch.device, plain: dict[str, Tensor], tmp_path: Path
) -> None:
    same(ended(device, tmp_path), plain)


def test_cuda_graphs_draw_the_plain_paths_bit_for_bit(cuda: torch.device, tmp_path: Path) -> None:
    """Graphs replay what was captured; inductor is kept out of it by capturing the plain pass."""
    config = settings("nabla-db", tmp_path)
    policy = random_policy(config, cuda)
    trainer = trainer_on(cuda, "nabla-db", tmp_path)
    table = trainer.table
    noise = torch.randn(3, table.num_steps + 1, *policy.sample_shape, device=cuda)
    where = policy.condition(["a cat", "a dog", "ants"], ())
    known = rollout(policy, table, noise, where)
    policy.network_free = Replayed(
        torch.compile(policy.network.forward, dynamic=False, backend="cudagraphs")
    )
    for _ in range(3):  # warm-up, capture, replay
        found = rollout(policy, table, noise, where)
    assert torch.equal(found.x, known.x) and torch.equal(found.output, known.output)


def test_cuda_graphs_tell_the_frozen_model_from_the_tuned_one(
    cuda: torch.device, tmp_path: Path
) -> None:
    """With the option as users set it, through an update that moves the LoRA in place."""
    trainer = trainer_on(cuda, "nabla-db", tmp_path, **{"speed.cuda_graphs": True})
    policy = trainer.policy
    trainer.fit()
    x = torch.randn(2, *policy.sample_shape, device=cuda)
    time, where = torch.full((2,), 7, device=cuda), policy.condition(["a cat", "ants"], ())

    def both() -> list[Tensor]:
        with torch.no_grad():
            tuned = policy.output(x, time, where)
            with policy.reference():
                return [tuned, policy.output(x, time, where)]

    turns = [both() for _ in range(3)]
    policy.network_free = None
    tuned, frozen = both()
    assert float((tuned - frozen).abs().max()) > 1e-3
    for one, two in turns:
        torch.testing.assert_close(one, tuned, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(two, frozen, rtol=1e-3, atol=1e-4)


def test_a_run_with_cuda_graphs(
    cuda: torch.device, plain: dict[str, Tensor], tmp_path: Path
) -> None:
    same(ended(cuda, tmp_path, **{"speed.cuda_graphs": True}), plain)
