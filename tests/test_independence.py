"""Draws are functions of (seed, epoch, global index): ranks differ, nothing drifts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nablagfn.config import Config
from nablagfn.core import rng
from nablagfn.core.rollout import subsample_steps
from nablagfn.core.types import Losses, Objective, Trajectories, Transitions
from nablagfn.prompts import PromptSet, load_prompts
from nablagfn.training.collect import Collector
from tests.tables import table_of
from tests.worlds import MixtureWorld

PROMPTS = PromptSet(tuple(f"prompt {i}" for i in range(45)))
STEPS = 4


def make_collector(world: int = 1, rank: int = 0, per_process: int = 4, seed: int = 0) -> Collector:
    config = Config(seed=seed)
    config.sampling.batch_size = per_process
    config.sampling.num_batches_per_epoch = 3
    config.training.batch_size = 2
    config.training.gradient_accumulation_steps = 1
    config.model.timestep_fraction = 0.5
    policy = MixtureWorld()
    table = table_of(policy, STEPS)
    return Collector(policy, table, PROMPTS, config, rank=rank, world=world)


def by_index(collector: Collector, drawn: Trajectories) -> dict[int, tuple[str, Tensor]]:
    """Global index -> (prompt, path)."""
    indices = [i for batch in range(3) for i in collector.indices(batch)]
    return dict(zip(indices, zip(drawn.condition.prompts, drawn.x, strict=True), strict=True))


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        one[i][0] == other[i][0] and torch.equal(one[i][1], other[i][1]) for i in one
    )


def chi_square(counts: Tensor) -> float:
    expected = counts.double().mean()
    return float(((counts - expected) ** 2 / expected).sum())


def chi_square_bound(cells: int) -> float:
    """Five standard deviations over the mean of χ² with cells − 1 degrees of freedom."""
    return cells - 1 + 5 * (2 * (cells - 1)) ** 0.5


# -------------------------------------------------------------------------------- ranks


def test_ranks_draw_different_prompts_and_noise() -> None:
    drawn = [make_collector(world=2, rank=rank).collect(0) for rank in (0, 1)]
    assert drawn[0].condition.prompts != drawn[1].condition.prompts
    noise = torch.cat([d.x[:, 0] for d in drawn])
    assert len(torch.unique(noise, dim=0)) == len(noise)


def test_the_global_batch_does_not_depend_on_the_number_of_processes() -> None:
    whole = make_collector(per_process=4)
    one = by_index(whole, whole.collect(2))
    shared: dict = {}
    for rank in (0, 1):
        part = make_collector(world=2, rank=rank, per_process=2)
        shared |= by_index(part, part.collect(2))
    assert sorted(one) == list(range(12))
    assert same(one, shared)


def test_an_epoch_is_a_function_of_seed_epoch_and_index() -> None:
    def collect(seed: int, epochs: list[int]) -> dict:
        collector = make_collector(seed=seed)
        for epoch in epochs:
            drawn = collector.collect(epoch)
        return by_index(collector, drawn)

    torch.manual_seed(1)
    straight = collect(0, [0, 1, 2])
    torch.manual_seed(2)  # global state must not matter
    assert same(straight, collect(0, [2]))
    assert not same(straight, collect(0, [1]))
    assert not same(straight, collect(1, [2]))


def test_trajectories_of_one_epoch_all_differ() -> None:
    drawn = make_collector().collect(0)
    assert len(torch.unique(drawn.x[:, 0], dim=0)) == len(drawn.x)
    assert not torch.equal(drawn.x[:, 0], make_collector().collect(1).x[:, 0])


# -------------------------------------------------------------------------------- transitions


class Half(Objective):
    """Chooses half the steps of each trajectory, and the last."""

    def choose(self, num_steps: int, generator: torch.Generator) -> Tensor:
        return subsample_steps(num_steps, 0.5, True, generator)

    def losses(self, batch: Transitions) -> Losses:
        raise AssertionError("nothing is trained here")


def of_updates(
    collector: Collector, drawn: Trajectories, epoch: int = 0, inner: int = 0
) -> list[Transitions]:
    chosen = collector.batches(drawn, epoch, inner, Half())
    return [selection.transitions() for selection in chosen]


def chosen(collector: Collector, epoch: int, inner: int = 0) -> list[Transitions]:
    drawn = collector.collect(epoch)
    return of_updates(collector, drawn, epoch, inner)


def test_every_trajectory_is_used_once_per_inner_epoch() -> None:
    collector = make_collector()
    batches = chosen(collector, 0)
    assert len(batches) == 6  # 12 trajectories, 2 per update
    last = torch.cat([batch.x_next[batch.step == STEPS - 1] for batch in batches])
    clean = collector.collect(0).clean
    assert len(torch.unique(last, dim=0)) == len(clean)
    assert (torch.cdist(clean, last).min(1).values == 0).all()


def test_transitions_are_the_pairs_of_their_own_trajectory() -> None:
    collector = make_collector()
    drawn = collector.collect(0)
    for batch in of_updates(collector, drawn):
        for i in range(len(batch)):
            row = int((drawn.x[:, batch.step[i]] == batch.x[i]).all(1).nonzero()[0])
            assert torch.equal(drawn.x[row, batch.step[i] + 1], batch.x_next[i])
            assert torch.equal(drawn.output[row, batch.step[i]], batch.output_old[i])
            assert drawn.condition.prompts[row] == batch.condition.prompts[i]


def test_order_and_steps_change_between_epochs_and_inner_epochs() -> None:
    collector = make_collector()
    drawn = collector.collect(0)
    orders = {
        tuple(
            (p, int(k))
            for batch in of_updates(collector, drawn, epoch, inner)
            for p, k in zip(batch.condition.prompts, batch.step, strict=True)
        )
        for epoch, inner in ((0, 0), (1, 0), (2, 0))
    }
    assert len(orders) == 3
    collector.config.training.num_inner_epochs = 2
    assert len({steps_in_order(collector, drawn, inner) for inner in (0, 1)}) == 2


def steps_in_order(collector: Collector, drawn: Trajectories, inner: int) -> tuple[int, ...]:
    return tuple(int(k) for batch in of_updates(collector, drawn, 0, inner) for k in batch.step)


# -------------------------------------------------------------------------------- prompts


def test_a_thousand_draws_leave_the_prompt_set_unchanged_and_are_uniform() -> None:
    prompts = load_prompts("simple_animals")
    before = tuple(prompts.prompts)
    drawn = [prompts.draw(rng.generator(0, "prompt", 0, i)) for i in range(1000)]
    assert prompts.prompts == before and len(before) == 45
    counts = torch.tensor([drawn.count(p) for p in before])
    assert chi_square(counts) < chi_square_bound(45)


def test_a_prompt_set_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        PROMPTS.prompts = ("other",)  # type: ignore[misc]


def test_spread_repeats_nothing_until_it_must() -> None:
    assert len(set(PROMPTS.spread(45))) == 45
    assert len(set(PROMPTS.spread(8))) == 8
    assert set(PromptSet(("a", "b")).spread(5)) == {"a", "b"}


# -------------------------------------------------------------------------------- generators


def test_seeds_differ_when_any_part_does() -> None:
    keys = [
        (seed, purpose, step, index)
        for seed in range(4)
        for purpose in ("noise", "prompt")
        for step in range(12)
        for index in range(12)
    ]
    assert len({rng.seed_of(*key) for key in keys}) == len(keys)


def test_normal_rows_depend_on_their_index_only() -> None:
    def rows(*indices: int) -> Tensor:
        return rng.normal((3,), indices, seed=0, purpose="noise", step=1)

    torch.testing.assert_close(rows(5, 2, 9), torch.cat([rows(5), rows(2), rows(9)]))
    assert not torch.equal(rows(5), rows(2))


def test_normal_is_standard() -> None:
    """4,096 numbers: mean and variance within 4 standard errors."""
    x = rng.normal((4,), range(1024), seed=0, purpose="noise", dtype=torch.float64).flatten()
    assert abs(float(x.mean())) < 4 / 4096**0.5
    assert abs(float(x.var()) - 1) < 4 * (2 / 4096) ** 0.5


# -------------------------------------------------------------------------------- which steps

SIZES = [(50, 0.1, 5), (20, 0.4, 8), (20, 0.35, 7), (10, 0.01, 1), (3, 0.99, 2)]


def steps_of(num_steps: int, fraction: float, low_variance: bool, index: int) -> Tensor:
    generator = rng.generator(0, "steps", 0, index)
    return subsample_steps(num_steps, fraction, low_variance, generator)


@pytest.mark.parametrize("low_variance", [True, False])
@pytest.mark.parametrize(("num_steps", "fraction", "count"), SIZES)
def test_the_last_step_is_always_chosen(
    num_steps: int, fraction: float, count: int, low_variance: bool
) -> None:
    for index in range(50):
        steps = steps_of(num_steps, fraction, low_variance, index)
        assert len(steps) == count + 1
        assert steps[-1] == num_steps - 1
        assert steps.min() >= 0 and steps.max() < num_steps


@pytest.mark.parametrize(("num_steps", "fraction", "count"), SIZES)
def test_low_variance_takes_one_step_of_each_stratum(
    num_steps: int, fraction: float, count: int
) -> None:
    """Step k covers [k, k + 1); stratum j is [j, j + 1)·N/n."""
    width = num_steps / count
    for index in range(50):
        for j, step in enumerate(steps_of(num_steps, fraction, True, index)[:-1].tolist()):
            assert step < (j + 1) * width and step + 1 > j * width


@pytest.mark.parametrize(("num_steps", "fraction", "count"), SIZES)
def test_without_strata_no_step_is_chosen_twice(
    num_steps: int, fraction: float, count: int
) -> None:
    for index in range(50):
        assert len(set(steps_of(num_steps, fraction, False, index)[:-1].tolist())) == count


@pytest.mark.parametrize("low_variance", [True, False])
def test_fraction_one_takes_every_step_once(low_variance: bool) -> None:
    assert steps_of(20, 1.0, low_variance, 0).tolist() == list(range(20))


@pytest.mark.parametrize("low_variance", [True, False])
@pytest.mark.parametrize(("num_steps", "fraction"), [(50, 0.1), (20, 0.4), (20, 0.35)])
def test_every_step_is_as_likely(num_steps: int, fraction: float, low_variance: bool) -> None:
    drawn = [steps_of(num_steps, fraction, low_variance, i)[:-1] for i in range(1000)]
    counts = torch.bincount(torch.cat(drawn), minlength=num_steps)
    assert chi_square(counts) < chi_square_bound(num_steps)
