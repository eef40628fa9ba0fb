"""Figures made of features against closed forms, brute force and torchmetrics' own.

Random bounds are five standard errors or say where they come from; all seeds are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nablagfn.core import rng
from nablagfn.metrics import diversity, intervals, prior
from nablagfn.metrics.drift import feature_drift
from nablagfn.metrics.groups import pair_mean, rows_of
from tests.test_worlds import generator

GROUPS = ["cat"] * 4 + ["dog"] * 5 + ["fox"]


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=generator(seed), dtype=torch.float64)


def with_moments(n: int, mean: Tensor, cov: Tensor, seed: int) -> Tensor:
    """n rows whose mean and unbiased covariance are exactly those."""
    white = normal(n, len(mean), seed)
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T.cov())).T
    return mean + white @ torch.linalg.cholesky(cov).T


def covariance(d: int, seed: int) -> Tensor:
    root = normal(d, d, seed)
    return root @ root.T + torch.eye(d, dtype=torch.float64)


# -------------------------------------------------------------------------------- diversity


def test_diversity_by_brute_force() -> None:
    e = normal(10, 3)
    distances, variances = [], []
    for own in (range(4), range(4, 9)):
        n = len(own)
        square = [[float((e[i] - e[j]).square().sum()) for j in own] for i in own]
        distances.append(sum(math.sqrt(v) for row in square for v in row) / (n * (n - 1)))
        variances.append(sum(v for row in square for v in row) / (2 * n * (n - 1)))
    assert float(diversity.pairwise_distance(e, GROUPS)) == pytest.approx(sum(distances) / 2)
    assert float(diversity.variance(e, GROUPS)) == pytest.approx(sum(variances) / 2)
    assert float(diversity.variance(e[:4], ["cat"] * 4)) == pytest.approx(
        float(e[:4].T.cov().trace())
    )
    for figure in (diversity.pairwise_distance, diversity.variance, diversity.vendi):
        with pytest.raises(ValueError, match="two samples"):
            figure(e[:2], ["a", "b"])


def test_vendi_counts_what_is_different() -> None:
    eye = torch.eye(6, 9)
    assert float(diversity.vendi(eye, ["a"] * 6)) == pytest.approx(6)
    assert float(diversity.vendi(eye[:1].repeat(6, 1), ["a"] * 6)) == pytest.approx(1)
    twice = torch.cat([eye[:3] * 2, eye[:3]])  # length does not count, nor do copies
    assert float(diversity.vendi(twice, ["a"] * 6)) == pytest.approx(3)
    assert float(diversity.vendi(torch.cat([eye, twice]), ["a"] * 6 + ["b"] * 6)) == pytest.approx(
        4.5
    )
    many = normal(40, 3)  # more rows than dimensions: by the other Gram matrix
    unit = many / many.norm(dim=1, keepdim=True)
    spectrum = torch.linalg.eigvalsh(unit @ unit.T / 40).clamp(min=1e-300)
    exact = math.exp(-float((spectrum * spectrum.log()).sum()))
    assert float(diversity.vendi(many, ["a"] * 40)) == pytest.approx(exact)


# -------------------------------------------------------------------------------- Fréchet


def test_fid_of_two_gaussians_in_closed_form() -> None:
    """Diagonal covariances: Σ (√a − √b)²; and a rotation of both changes nothing."""
    a, b = torch.tensor([4.0, 1.0, 0.25]).double(), torch.tensor([1.0, 9.0, 0.25]).double()
    shift = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    turn = torch.linalg.qr(normal(3, 3))[0]
    x = with_moments(50, shift, a.diag(), 1) @ turn
    y = with_moments(31, torch.zeros(3, dtype=torch.float64), b.diag(), 2) @ turn
    exact = 5 + float((a.sqrt() - b.sqrt()).square().sum())
    assert float(prior.frechet_distance(x, y)) == pytest.approx(exact)
    assert float(prior.frechet_distance(x, x)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("n", "m", "d"), [(60, 45, 8), (7, 9, 40)])
def test_fid_equals_torchmetrics_own(n: int, m: int, d: int) -> None:
    """n ≪ D, too, where their eigenvalues of a singular product carry rounding of about 1e-8."""
    from torchmetrics.image.fid import _compute_fid

    x, y = normal(n, d, 1) @ covariance(d, 2), normal(m, d, 3) + 0.5
    theirs = _compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert float(prior.frechet_distance(x, y)) == pytest.approx(float(theirs), rel=1e-6)


def test_fid_per_prompt_is_the_mean_over_prompts() -> None:
    x, y = normal(9, 6), normal(9, 6, 1)
    parts = [prior.frechet_distance(x[i], y[i]) for i in (slice(0, 4), slice(4, 9))]
    found = prior.frechet_per_prompt(x, y, GROUPS[:9])
    assert float(found) == pytest.approx(float(sum(parts)) / 2)
    with pytest.raises(ValueError, match="two samples"):
        prior.frechet_per_prompt(x, y, [*GROUPS[:8], "fox"])


# -------------------------------------------------------------------------------- kernels


def test_kid_by_brute_force_and_by_torchmetrics() -> None:
    """Theirs is for independent sets: it takes the pairs (x_i, y_i) in, ours leaves them out."""
    from torchmetrics.image.kid import poly_mmd

    n, d = 8, 5
    x, y = normal(n, d), normal(n, d, 1) + 1

    def k(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / d + 1) ** 3

    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    total = sum(k(x[i], x[j]) + k(y[i], y[j]) - 2 * k(x[i], y[j]) for i, j in pairs)
    assert float(prior.kid(x, y)) == pytest.approx(total / len(pairs))
    every = [k(a, b) for a in x for b in y]
    others = [k(x[i], y[j]) for i, j in pairs]
    theirs = float(poly_mmd(x, y))
    ours = float(prior.kid(x, y)) + 2 * sum(others) / len(others) - 2 * sum(every) / len(every)
    assert ours == pytest.approx(theirs)


@pytest.mark.parametrize("figure", [prior.kid, prior.mmd])
def test_paired_distances_are_unbiased_for_the_same_noise(figure: Callable[..., Tensor]) -> None:
    """Mean 0 over splits of one distribution, for independent rows and for rows that go together,
    where the unpaired estimator is far below 0; and 0 for equal samples."""
    n, together, apart, wrong = 20, [], [], []
    for seed in range(150):
        z, w = normal(n, 4, 2 * seed), normal(n, 4, 2 * seed + 1)
        x = 0.9 * z + math.sqrt(1 - 0.81) * w  # N(0, I) like z, and close to it
        together.append(float(figure(x, z)))
        apart.append(float(figure(w, z)))
        wrong.append(float(prior.mmd2(x, z, prior.rbf_widths(z), unbiased=True)))
    for found in (together, apart):
        values = torch.tensor(found)
        assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(len(values))
    values = torch.tensor(wrong)
    assert float(values.mean()) < -20 * float(values.std()) / math.sqrt(len(values))
    assert float(figure(z, z)) == pytest.approx(0, abs=1e-12)


def test_paired_mmd_of_a_shift_in_closed_form() -> None:
    """One width w, N(0, I) in the plane against itself shifted by δ (see test_worlds)."""
    n, w, shift = 1200, 1.2, torch.tensor([1.0, 0.5], dtype=torch.float64)
    exact = 2 * w**2 / (w**2 + 2) * (1 - math.exp(-1.25 / (2 * (w**2 + 2))))
    x, y = normal(n, 2) + shift, normal(n, 2, 1)
    found = float(prior.paired_mmd2(x, y, prior.rbf((w,))))
    assert found == pytest.approx(exact, abs=0.04)
    assert float(prior.mmd(x, y)) == pytest.approx(
        float(prior.paired_mmd2(x, y, prior.rbf(prior.rbf_widths(y))))
    )


def test_pairs_are_averaged_for_each_two_prompts() -> None:
    """By brute force."""
    groups = ["a", "b", "a", "b", "b"]
    x, y = normal(5, 3), normal(5, 3, 1)

    def h(i: int, j: int) -> float:
        rows = torch.stack([x[i], x[j], y[i], y[j]])
        k = prior.polynomial(rows, rows)
        return float(k[0, 1] + k[2, 3] - k[0, 3] - k[1, 2])

    blocks = []
    for p in "ab":
        for q in "ab":
            pairs = [(i, j) for i in range(5) for j in range(5)]
            own = [h(i, j) for i, j in pairs if i != j and (groups[i], groups[j]) == (p, q)]
            blocks.append(sum(own) / len(own))
    assert float(prior.kid(x, y, groups)) == pytest.approx(sum(blocks) / 4)


@pytest.mark.parametrize("name", ["pairwise_distance", "variance", "kid", "mmd", "drift"])
def test_resampling_does_not_shift(name: str) -> None:
    """Prompts far apart, four pictures each: the mean over resamples is the figure itself. Averaged
    over all pairs at once, kid and mmd would be four deviations off."""
    groups = [g for g in range(12) for _ in range(4)]
    centre = 2 * normal(12, 30, 7).repeat_interleave(4, 0)
    y = centre + normal(48, 30, 8)
    x = y + normal(12, 30, 9).repeat_interleave(4, 0)  # each prompt has moved its own way
    x = x + 0.1 * normal(48, 30, 10)  # and each picture a little, or drift would have no deviation
    counts = intervals.resampled_counts(groups, 400, rng.generator(0, "bootstrap"))
    value = float(FIGURES[name](x, y, groups))
    resampled = FIGURES[name](x, y, groups, counts)
    assert 1e-6 * abs(value) < float(resampled.std())
    assert abs(float(resampled.mean()) - value) < 0.25 * float(resampled.std())


def test_drift_is_the_distance_moved() -> None:
    y = normal(10, 3)
    x = y + torch.tensor([2.0, 0.0, 0.0])
    x[:5] -= torch.tensor([1.0, 0.0, 0.0])
    assert float(feature_drift(x, y)) == pytest.approx(1.5)
    counts = torch.tensor([[0.0] * 5 + [1.0] * 5])
    assert feature_drift(x, y, counts).tolist() == pytest.approx([2.0])


# -------------------------------------------------------------------------------- resampling

FIGURES: dict[str, Callable[..., Tensor]] = {
    "pairwise_distance": lambda x, y, groups, counts=None: diversity.pairwise_distance(
        x, groups, counts
    ),
    "variance": lambda x, y, groups, counts=None: diversity.variance(x, groups, counts),
    "kid": lambda x, y, groups, counts=None: prior.kid(x, y, groups, counts),
    "mmd": lambda x, y, groups, counts=None: prior.mmd(x, y, groups, counts),
    "drift": lambda x, y, groups, counts=None: feature_drift(x, y, counts),
    "vendi": lambda x, y, groups: diversity.vendi(x, groups),
    "fid": lambda x, y, groups: prior.frechet_distance(x, y),
    "fid_per_prompt": lambda x, y, groups: prior.frechet_per_prompt(x, y, groups),
}
COUNTED = [name for name in FIGURES if not name.startswith(("vendi", "fid"))]


@pytest.mark.parametrize("name", FIGURES)
def test_order_does_not_count(name: str) -> None:
    x, y, groups = normal(9, 20), normal(9, 20, 1), GROUPS[:9]
    order = torch.randperm(9, generator=generator(2))
    shuffled = [groups[i] for i in order.tolist()]
    found = float(FIGURES[name](x[order], y[order], shuffled))
    assert found == pytest.approx(float(FIGURES[name](x, y, groups)))


@pytest.mark.parametrize("name", COUNTED)
def test_counts_leave_out_and_repeat(name: str) -> None:
    """Ones give the figure itself; 0 leaves a sample out; all twice changes nothing, for pairs of
    a sample with itself never count."""
    figure = FIGURES[name]
    x, y, groups = normal(9, 3), normal(9, 3, 1), GROUPS[:9]
    without = torch.tensor([1.0, 0, 1, 1, 1, 1, 0, 1, 1])
    kept = without.nonzero()[:, 0]
    counts = torch.stack([torch.ones(9), without, 2 * without])
    whole, cut, doubled = figure(x, y, groups, counts).tolist()
    assert whole == pytest.approx(float(figure(x, y, groups)))
    assert doubled == pytest.approx(cut)
    if name != "mmd":  # its widths are those of all of y
        few = float(figure(x[kept], y[kept], [groups[i] for i in kept.tolist()]))
        assert cut == pytest.approx(few)


def weighted_fid(x: Tensor, y: Tensor, weights: Tensor) -> float:
    """By covariances and eigenvalues; weights sum to n."""
    p = weights * len(x) / weights.sum()

    def moments(z: Tensor) -> tuple[Tensor, Tensor]:
        mean = (p[:, None] * z).sum(0) / len(z)
        return mean, ((z - mean).T * p) @ (z - mean) / (len(z) - 1)

    (a, A), (b, B) = moments(x), moments(y)
    root = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt().sum()
    return float((a - b).square().sum() + A.trace() + B.trace() - 2 * root)


def test_influence_on_fid_is_the_derivative() -> None:
    x, y, step = normal(12, 4), 0.5 * normal(12, 4, 1) + 1, 1e-5
    one = torch.ones(12, dtype=torch.float64)
    assert weighted_fid(x, y, one) == pytest.approx(float(prior.frechet_distance(x, y)))
    influence = prior.frechet_influence(x, y)
    for i in range(12):
        bump = step * torch.eye(12, dtype=torch.float64)[i]
        slope = (weighted_fid(x, y, one + bump) - weighted_fid(x, y, one - bump)) / (2 * step)
        assert float(influence[i]) == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_influence_on_vendi_is_what_is_lost_without() -> None:
    """Three pairs of equal vectors and one alone: without it 3 kinds of 6, else 4 of 7."""
    eye = torch.eye(4)
    x = torch.cat([eye[:3], eye[:3], eye[3:]])
    influence = diversity.vendi_influence(x, ["a"] * 7)

    def vendi(*shares: float) -> float:
        return math.exp(-sum(p * math.log(p) for p in shares))

    single, double = vendi(1 / 3, 1 / 3, 1 / 3), vendi(1 / 6, 1 / 3, 1 / 3, 1 / 6)
    mean = (single + 6 * double) / 7
    exact = [6 / 7 * (mean - double)] * 6 + [6 / 7 * (mean - single)]
    assert influence.tolist() == pytest.approx(exact)


def test_influences_of_several_prompts() -> None:
    x, y = normal(9, 30), normal(9, 30, 1)
    parts = [slice(0, 4), slice(4, 9)]
    found = diversity.vendi_influence(x, GROUPS[:9])
    per_prompt = prior.frechet_per_prompt_influence(x, y, GROUPS[:9])
    for own in parts:
        alone = diversity.vendi_influence(x[own], ["a"] * len(x[own]))
        torch.testing.assert_close(found[own], alone / 2)
        torch.testing.assert_close(per_prompt[own], prior.frechet_influence(x[own], y[own]) / 2)


def test_resamples_stay_within_prompts_and_weigh_the_same() -> None:
    counts = intervals.resampled_counts(GROUPS, 500, rng.generator(0, "bootstrap"))
    for rows in rows_of(GROUPS).values():
        torch.testing.assert_close(
            counts[:, rows].sum(1), torch.full((500,), float(len(rows)), dtype=torch.float64)
        )
    assert bool((counts[:, -1] == 1).all())  # the only fox
    one = counts[:, 0] / (4 / 3)
    assert set(one.tolist()) == {0.0, 1.0, 2.0, 3.0}
    assert float(one.mean()) == pytest.approx(0.75, abs=5 * 0.75 / math.sqrt(500))


@pytest.mark.parametrize("each", [4, 16])
def test_bootstrap_covers_a_known_mean(each: int) -> None:
    """80 % intervals for the mean of 6 prompts with different means hold it in about 80 % of 400
    experiments (five standard errors are 0.1). Drawing all m instead of m − 1 gives 0.73 for
    m = 4; resampling over prompts would give nearly 1."""
    groups = [prompt for prompt in range(6) for _ in range(each)]
    mean = torch.arange(6).repeat_interleave(each).double() * 3
    hits = 0
    for seed in range(400):
        values = mean + normal(6 * each, 1, seed)[:, 0]
        counts = intervals.resampled_counts(groups, 200, rng.generator(seed, "bootstrap"))
        resampled = intervals.resampled_mean(values, counts)
        found = intervals.percentile(float(values.mean()), resampled, 0.8)
        assert found.low is not None and found.high is not None
        hits += found.low <= 7.5 <= found.high
    assert hits / 400 == pytest.approx(0.8, abs=0.05)


def test_bootstrap_spread_of_pairs_and_influences_is_that_of_experiments() -> None:
    """Standard deviation of a figure over resamples against that over 300 new experiments."""
    groups = ["a"] * 12 + ["b"] * 12
    for name in ("variance", "vendi", "fid"):
        values, spreads = [], []
        for seed in range(300):
            x = normal(24, 8, 2 * seed) + 1  # on one side, as features of a network are
            y = 0.7 * x + normal(24, 8, 2 * seed + 1)
            values.append(float(FIGURES[name](x, y, groups)))
            if seed < 60:
                counts = intervals.resampled_counts(groups, 200, rng.generator(seed, "bootstrap"))
                if name == "variance":
                    resampled = diversity.variance(x, groups, counts)
                elif name == "vendi":
                    resampled = counts @ diversity.vendi_influence(x, groups)
                else:
                    resampled = counts @ prior.frechet_influence(x, y)
                spreads.append(float(resampled.std()))
        ratio = sum(spreads) / len(spreads) / float(torch.tensor(values).std())
        assert ratio == pytest.approx(1, abs=0.25), name


def test_no_interval_where_nothing_is_known() -> None:
    assert intervals.percentile(1.0, torch.full((9,), torch.nan), 0.9) == intervals.Interval(1.0)
    nan = intervals.percentile(math.nan, torch.ones(9), 0.9)
    assert nan.low is None and nan.high is None
    found = intervals.percentile(0.5, torch.linspace(0, 1, 101), 0.9)
    assert (found.low, found.high) == pytest.approx((0.05, 0.95))
    assert pair_mean(torch.ones(2, 2), torch.tensor([[3.0, 0.0]])).isnan().all()
