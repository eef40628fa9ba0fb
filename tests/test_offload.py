"""`speed.offload_reward`: the same scores, and weights that leave no copy where they were used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nablagfn.commands import assemble, planner
from nablagfn.config import Config, ConfigError, RewardSettings
from nablagfn.core.log_reward import LogReward
from nablagfn.core.lookahead import guess
from nablagfn.core.types import Metadata
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.recipes.options import load_config
from nablagfn.rewards import NamedReward, components_of, modules_of, named, offload, offloaded
from nablagfn.rewards import resolve as find
from nablagfn.rewards.offload import Offloaded
from nablagfn.runtime.costs import Tracker, size_of, tensors_of
from tests.test_planner import config_of
from tests.test_speed import draw, make_policy

CPU = torch.device("cpu")
PROMPTS = ["a glossy cat", "a dog", "an ant"]
METADATA: list[Metadata] = [{}, {}, {}]
SUM = "0.7*tiny-aesthetic - 0.3*tiny-alignment + 0.1*brightness"


def resolve(spec: str, **settings: object) -> NamedReward:
    return find(spec, CPU, "", RewardSettings(**settings))


def pictures() -> Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def scored(reward: NamedReward) -> tuple[Tensor, Tensor]:
    """Scores and their gradient."""
    x = pictures().requires_grad_()
    value = reward(x, PROMPTS, METADATA)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


def weights_of(reward: NamedReward) -> list[Tensor]:
    return tensors_of(modules_of(reward))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The device is another place: copies are made, and kept here in the order of their making."""
    made: list[Tensor] = []

    def copied(data: Tensor, device: torch.device) -> Tensor:
        made.append(data)
        return data.clone()

    monkeypatch.setattr(offload, "copied", copied)
    return made


def test_scores_and_gradients_are_those_of_before_bit_for_bit(elsewhere: list[Tensor]) -> None:
    known = scored(resolve("tiny-aesthetic"))
    found = scored(offloaded(resolve("tiny-aesthetic")))
    assert elsewhere and float(known[1].abs().max()) > 0
    assert torch.equal(found[0], known[0]) and torch.equal(found[1], known[1])


@pytest.mark.parametrize("project", [False, True])
def test_a_weighted_sum(project: bool, elsewhere: list[Tensor]) -> None:
    """Scores bit for bit, gradients but for the order of a product; components are still known."""
    plain, away = (resolve(SUM, project_conflicts=project) for _ in range(2))
    away = offloaded(away)
    known, found = scored(plain), scored(away)
    assert torch.equal(found[0], known[0])
    torch.testing.assert_close(found[1], known[1], rtol=1e-4, atol=1e-6 * float(known[1].max()))
    parts = [reward.scores(pictures(), PROMPTS, METADATA).parts for reward in (plain, away)]
    assert list(parts[0]) == ["tiny-aesthetic", "tiny-alignment", "brightness"]
    for name, value in parts[0].items():
        assert torch.equal(parts[1][name], value)


def test_one_component_visits_at_a_time(elsewhere: list[Tensor]) -> None:
    reward = resolve(SUM)
    own = [weights_of(part) for part in components_of(reward)]
    assert own[0] and own[1] and not own[2]
    home = {t.data_ptr() for part in own for t in part}
    away: list[tuple[bool, ...]] = []

    def look(module: nn.Module, inputs: object) -> None:
        away.append(tuple(all(t.data_ptr() not in home for t in part) for part in own[:2]))

    for module in modules_of(reward):
        module.register_forward_pre_hook(look)
    scored(offloaded(reward))
    assert away == [(True, False), (False, True)]


@pytest.mark.parametrize("gradient", [True, False])
def test_no_copy_stays_and_the_originals_come_back(gradient: bool, elsewhere: list[Tensor]) -> None:
    """Counted storage by storage; a graph of the reward would keep them."""
    reward = offloaded(resolve("tiny-aesthetic"))
    own = weights_of(reward)
    places, size = [t.data_ptr() for t in own], size_of(own)
    x = pictures().requires_grad_(gradient)
    with Tracker([*own, x]) as tracker:
        value = reward(x, PROMPTS, METADATA)
    assert value.requires_grad == gradient
    assert tracker.peak > size and tracker.live < size / 10 + 3 * size_of([x])
    assert [t.data_ptr() for t in own] == places
    assert sum(t.numel() for t in elsewhere) == sum(t.numel() for t in own)


def test_an_error_brings_them_home_too(elsewhere: list[Tensor]) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, images: Tensor, *rest: object) -> Tensor:
            raise torch.OutOfMemoryError

    module = Broken()
    place = module.weight.data_ptr()
    with pytest.raises(torch.OutOfMemoryError):
        scored(offloaded(named(module)))
    assert elsewhere and module.weight.data_ptr() == place


class Judge:
    """A user's black box with a network two levels down."""

    differentiable = False

    def __init__(self) -> None:
        self.tools = [nn.Flatten(), (nn.Linear(3 * 64 * 64, 1),)]

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> list[float]:
        return self.tools[1][0](self.tools[0](images))[:, 0].tolist()


def test_a_black_box_with_a_network(elsewhere: list[Tensor]) -> None:
    reward = named(Judge())
    known = reward(pictures(), PROMPTS, METADATA)
    assert torch.equal(offloaded(reward)(pictures(), PROMPTS, METADATA), known)
    assert len(elsewhere) == 2  # weight and bias


def test_what_has_no_modules_is_left_alone() -> None:
    for spec in ("brightness", "jpeg-size"):
        reward = resolve(spec)
        assert offloaded(reward).function is reward.function


def test_a_reward_without_gradient_still_ends_with_its_one_line() -> None:
    class Deaf(nn.Linear):
        def forward(self, images: Tensor, *rest: object) -> Tensor:
            return images.detach().mean((1, 2, 3))

    with pytest.raises(ConfigError, match="has no gradient"):
        scored(offloaded(named(Deaf(1, 1))))


@pytest.mark.parametrize("piece", [0, 2])
def test_the_guess_is_the_same_bit_for_bit(piece: int, elsewhere: list[Tensor]) -> None:
    """β and γ = 1 are powers of two, so that their place in the product does not matter."""
    policy = make_policy(torch.float32)
    table, chosen = draw(policy, torch.float32)
    batch = chosen.transitions()
    k = table.at(batch.step, batch.x)

    def found(policy: StableDiffusionPolicy, reward: NamedReward) -> Tensor:
        log_reward = LogReward(policy, reward, 64.0, piece=piece)
        return guess(log_reward, policy, batch.x_next, k, batch.condition, "none").gradient

    known = found(policy, resolve("tiny-aesthetic"))
    assert float(known.abs().max()) > 0
    assert torch.equal(found(policy, offloaded(resolve("tiny-aesthetic"))), known)


def test_the_option_covers_the_reward_and_held_out_ones() -> None:
    """They are loaded where they wait, not on the device."""
    config = load_config("demo")
    config.evaluation.held_out_rewards = ("tiny-alignment",)
    meta = torch.device("meta")
    for on in (False, True):
        config.speed.offload_reward = on
        (held_out,) = assemble.build_held_out(config, meta).values()
        for reward in (assemble.build_reward(config, meta), held_out):
            assert isinstance(reward.function, Offloaded) == on
            assert {t.device.type for t in weights_of(reward)} == {"cpu" if on else "meta"}


def test_the_planner_moves_the_weights_to_where_they_are_used(
    tiny_folder: Path, tmp_path: Path
) -> None:
    config: Config = config_of(tiny_folder, tmp_path, "nabla-db")
    config.experiment.reward_fn = "aesthetic"  # 1.2 GB beside a model of one
    there = planner.measure(config, CPU)
    config.speed.offload_reward = True
    away, work = planner.measure(config, CPU), planner.work_of(config)
    size = there.fixed["reward"]
    assert size > 1e9 and away.fixed["reward"] == 0
    for piece in (0, 1):
        setting = replace(planner.setting_of(config), vae_slice=piece)
        before, after = (planner.moments(config, p, work, setting) for p in (there, away))
        changed = {name: after[name] - value for name, value in before.items()}
        assert changed["drawing"] == changed["update, the rest"] == 0
        for name in ("rewards of the epoch", "update, reward's gradient"):
            assert 0.5 * size < changed[name] <= 1.11 * size, name
