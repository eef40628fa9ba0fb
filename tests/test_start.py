"""The first state's own mean, against closed forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

from nablagfn.core import start
from nablagfn.core.path_kl import log_weight, path_ratio
from nablagfn.core.rollout import rollout
from nablagfn.core.types import Condition
from nablagfn.models.latent import LatentPolicy
from nablagfn.worlds import load
from nablagfn.worlds.policy import WorldPolicy
from tests.test_policy import make_policy
from tests.test_rivals import GaussianWorld
from tests.worlds import randomise

MEAN = torch.tensor([0.7, -1.1], dtype=torch.float64)


def test_what_it_costs_is_the_kl_and_the_ratio_of_two_normals() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200_000, 2, generator=generator, dtype=torch.float64)
    std = 0.9
    x = start.drawn(noise, std, MEAN)
    moved, plain = Normal(MEAN, std), Normal(torch.zeros(2).double(), std)
    wanted = float(kl_divergence(moved, plain).sum())
    assert start.kl(MEAN, std) == pytest.approx(wanted)
    ratio = start.log_ratio(x, MEAN, std)
    torch.testing.assert_close(ratio, (moved.log_prob(x) - plain.log_prob(x)).sum(1))
    assert float(ratio.mean()) == pytest.approx(wanted, abs=0.01)
    assert torch.equal(start.drawn(noise, std, None), std * noise)


@pytest.mark.parametrize("of_reference", [False, True])
def test_every_path_has_one_weight_where_the_first_state_goes_with_the_steps(
    of_reference: bool,
) -> None:
    """A linear reward on a normal: with the optimal steps and E_{p*}[x_0] = s² w_0 log w is log Z
    on every path, whichever sampler drew it; without the first state it is not."""
    slope = torch.tensor([0.8, -0.4], dtype=torch.float64)
    world = GaussianWorld(slope)
    world.first = start.FirstState()
    std = world.table.start_std
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(64, world.table.num_steps + 1, 2, generator=generator).double()
    condition = Condition(("a",) * 64, ({},) * 64)

    def weights() -> torch.Tensor:
        paths = rollout(world, world.table, noise, condition)
        if of_reference:
            world.on = False
            with world.first.reference():
                paths = rollout(world, world.table, noise, condition)
            world.on = True
        ratio = path_ratio(world, world.table, paths, of_reference=of_reference)
        return log_weight(ratio.log_ratio.sum(1), paths.clean @ slope, 1.0)

    assert float(weights().std()) > 0.05
    world.first.mean = std**2 * world.w[0]
    log_z = float(world.const[0] + std**2 / 2 * world.w[0] @ world.w[0])
    torch.testing.assert_close(weights(), torch.full((64,), log_z).double())


def test_its_kl_is_counted_once_with_the_first_step() -> None:
    world = GaussianWorld(torch.tensor([0.8, -0.4], dtype=torch.float64))
    noise = torch.zeros(3, world.table.num_steps + 1, 2, dtype=torch.float64)
    paths = rollout(world, world.table, noise, Condition(("a",) * 3, ({},) * 3))
    before = path_ratio(world, world.table, paths).kl
    world.first = start.FirstState()
    world.first.mean = MEAN
    added = path_ratio(world, world.table, paths).kl - before
    wanted = torch.zeros_like(added)
    wanted[:, 0] = start.kl(MEAN, world.table.start_std)
    torch.testing.assert_close(added, wanted)


@pytest.mark.parametrize("kind", ["latent", "world"])
def test_it_is_part_of_a_policys_state_and_off_in_the_pretrained_model(kind: str) -> None:
    def made() -> LatentPolicy | WorldPolicy:
        return make_policy() if kind == "latent" else WorldPolicy(load("ring"))

    policy, other = made(), made()
    plain = {name: value.clone() for name, value in policy.state_dict().items()}
    assert start.KEY not in plain and start.mean_of(policy) is None
    policy.first.mean = torch.full(policy.sample_shape, 0.5)
    randomise(policy.parameters(), 0.2, seed=3)
    other.load_state_dict(policy.state_dict())
    assert all(torch.equal(a, other.state_dict()[name]) for name, a in policy.state_dict().items())
    assert torch.equal(start.mean_of(other), policy.first.mean)
    with policy.reference():
        assert start.mean_of(policy) is None
        with policy.first.reference():
            pass
        assert start.mean_of(policy) is None
    assert start.mean_of(policy) is policy.first.mean
    if kind == "latent":
        with pytest.raises(ValueError, match="do not fit"):
            policy.load_state_dict({**plain, start.KEY: torch.zeros(1)})
        assert start.mean_of(policy) is policy.first.mean is not None
    policy.load_state_dict(plain)  # back to before it had one
    assert start.mean_of(policy) is None


def test_it_lies_beside_the_lora_for_other_software(tmp_path: Path) -> None:
    policy = make_policy()
    policy.save(tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"pytorch_lora_weights.safetensors"}
    policy.first.mean = torch.rand(policy.sample_shape)
    policy.save(tmp_path)
    state = load_file(tmp_path / "first_state.safetensors")
    assert state.keys() == {"mean"} and torch.equal(state["mean"], policy.first.mean)
    lora = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert not any("first" in name for name in lora)


def test_a_policy_that_knows_none_begins_as_ever() -> None:
    world = GaussianWorld(torch.ones(2, dtype=torch.float64))
    assert not hasattr(world, "first") and start.mean_of(world) is None
