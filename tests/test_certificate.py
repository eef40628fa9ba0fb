"""The certificate where the truth is known: worlds, with a policy that tilts half of the way."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nablagfn import worlds
from nablagfn.config import Config, ConfigError, set_option
from nablagfn.core import rng
from nablagfn.core.kernels import KernelTable
from nablagfn.core.path_kl import log_weight
from nablagfn.core.types import Condition
from nablagfn.evaluation import Evaluator, Measured, Sample
from nablagfn.evaluation.certificate import Bootstrap, Certificate, certificate, frontier
from nablagfn.evaluation.resampling import (
    Correction,
    base_paths,
    chosen_rows,
    distinct_share,
    draw_of_both,
    resample,
)
from nablagfn.methods.registry import target_of
from nablagfn.metrics.tilting import PromptRows, log_mean, most_kl, weighted_mean
from nablagfn.worlds.measure import distances, floors
from nablagfn.worlds.policy import WorldPolicy, WorldReward
from nablagfn.worlds.target import Target
from nablagfn.worlds.view import WorldView
from tests.tables import table_of

STEPS, COUNT, BASE = 30, 2000, 40_000
SHARE = 0.6  # of the exact value gradient of one Gaussian


class Tilt(nn.Module):
    """∇V of one Gaussian of the world's variances at every x, which a mixture's own exceeds."""

    def __init__(self, policy: WorldPolicy, share: float) -> None:
        super().__init__()
        self.policy, self.share = policy, share

    def forward(self, x: Tensor, time: Tensor, condition: Condition, hint: Tensor) -> Tensor:
        world = self.policy.world
        levels = world.noising.levels(time)
        alpha, sigma = levels.alpha[:, None], levels.sigma[:, None]
        v = world.mixture.variances
        rows = world.rows(condition.prompts)
        slope = alpha * v / (alpha.square() * v + sigma.square())
        gradient = world.reward.gradient(hint, rows)  # r is quadratic in some
        return (self.share * world.beta * slope * gradient).to(x.dtype)


class Subject:
    """Samples of a world's pretrained sampler and of the tilted one, and the targets."""

    def __init__(self, name: str, share: float = SHARE) -> None:
        self.world = worlds.load(f"worlds/{name}")
        self.policy = WorldPolicy(self.world)
        self.policy.adapter = Tilt(self.policy, share)  # type: ignore[assignment]
        self.table: KernelTable = table_of(self.policy, STEPS)
        self.view = WorldView(self.world, self.table, count=BASE)
        self.targets = [
            Target.of(self.world, self.table, p, count=BASE) for p in self.world.prompts
        ]
        prompts = [p for p in self.world.prompts for _ in range(COUNT)]
        self.evaluator = Evaluator(
            Accelerator(cpu=True),
            self.policy,
            WorldReward(self.world),
            self.table,
            batch_size=COUNT,
            seed=0,
            view=self.view,
        )
        self.samples = self.evaluator.samples(prompts, both=True)
        self.base = self.evaluator.samples(prompts, reference=True)

    def measured(self, samples: list[Sample]) -> Measured:
        return Measured.of(samples, self.view)

    def certificate(self, beta: float | None = None, keep: slice = slice(None)) -> Certificate:
        model, base = self.measured(self.samples[keep]), self.measured(self.base[keep])
        bootstrap = Bootstrap.of(model.prompts, 100, 0.95, 0)
        return certificate(model, base, beta or self.world.beta, bootstrap)

    @property
    def log_z(self) -> float:
        """Of 40,000 samples of the pretrained sampler, mean over prompts."""
        return sum(
            float((self.world.beta * target.rewards).logsumexp(0)) - math.log(BASE)
            for target in self.targets
        ) / len(self.targets)

    def known_kl_from(self, p: int) -> float:
        """KL(p*‖p_θ) of prompt p, by 10,000 other paths of the pretrained model."""
        prompt, beta = self.world.prompts[p], self.world.beta
        drawn = self.evaluator.samples(
            [prompt] * (BASE // 4), reference=True, compared=True, first=2**20
        )
        reward, ratio = (
            torch.tensor([getattr(s, name) for s in drawn], dtype=torch.float64)
            for name in ("reward", "log_ratio")
        )
        weights = (beta * reward).softmax(0)
        log_z = float((beta * reward).logsumexp(0)) - math.log(len(reward))
        return float((weights * log_weight(ratio, reward, beta)).sum()) - log_z


@functools.cache
def of_world(name: str) -> Subject:
    return Subject(name, 0.9 if name == "gaussian" else SHARE)


@pytest.fixture(scope="module", params=["gaussian", "ring", "prompts"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return of_world(request.param)


def near(found: Certificate, name: str, truth: float, slack: float = 0.5) -> None:
    """Within its 95 % interval, widened by half of its width for a truth of finite samples."""
    figure = found.figures[name]
    assert figure.low is not None and figure.high is not None
    wide = slack * (figure.high - figure.low)
    assert figure.low - wide <= truth <= figure.high + wide, (name, figure, truth)


def test_every_figure_of_the_certificate_is_the_known_one(subject: Subject) -> None:
    found = subject.certificate()
    beta, measured = subject.world.beta, subject.measured(subject.samples)
    reward = float(measured.scores["reward"].mean())
    spent = float(measured.scores["path_kl"].mean())
    near(found, "log_z", subject.log_z)
    near(found, "log_z_base", subject.log_z)
    near(found, "kl_to_target", spent - beta * reward + subject.log_z)
    known = [subject.known_kl_from(p) for p in range(len(subject.targets))]
    near(found, "kl_from_target", sum(known) / len(known))
    near(found, "free_energy", beta * reward - spent, 0.01)
    near(
        found,
        "free_energy_base",
        beta * float(torch.tensor([s.reward for s in subject.base]).mean()),
    )
    near(found, "reward_weighted", sum(t.reward for t in subject.targets) / len(subject.targets))
    near(found, "target_reward", sum(t.reward for t in subject.targets) / len(subject.targets))
    kl = sum(beta * t.reward for t in subject.targets) / len(subject.targets) - subject.log_z
    near(found, "target_kl", kl)
    assert found.figures["free_energy"].value < found.figures["log_z"].value
    assert 0.05 < found.figures["ess"].value < 0.99
    assert 0 < found.figures["efficiency"].value <= 1.02
    assert not found.notes


def test_log_ratio_and_path_kl_are_two_estimates_of_one_number(subject: Subject) -> None:
    scores = subject.measured(subject.samples).scores
    gap = scores["log_ratio"] - scores["path_kl"]
    assert float(scores["path_kl"].mean()) > 5 * float(gap.std()) / len(gap) ** 0.5
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / len(gap) ** 0.5
    steps = subject.measured(subject.samples).step_kl
    torch.testing.assert_close(steps.double().sum(1), scores["path_kl"], rtol=1e-5, atol=1e-5)
    assert sum(subject.certificate().step_kl) == pytest.approx(float(scores["path_kl"].mean()))


def test_the_pretrained_samples_have_no_ratio(subject: Subject) -> None:
    scores = subject.measured(subject.base).scores
    assert not scores["log_ratio"].any() and not scores["path_kl"].any()


def test_both_is_the_pretrained_model_s_path_of_the_same_noise() -> None:
    subject, rows = of_world("ring"), slice(0, 40)
    assert all(math.isnan(s.log_ratio_base) for s in subject.base[rows])
    prompts = [s.prompt for s in subject.base[rows]]
    compared = subject.evaluator.samples(prompts, reference=True, compared=True)
    found = [s.log_ratio_base for s in subject.samples[rows]]
    assert found == pytest.approx([s.log_ratio for s in compared], rel=1e-5)
    scores = subject.measured(subject.samples).scores
    assert float(scores["log_ratio_base"].mean()) < 0 < float(scores["log_ratio"].mean())
    assert [s.reward for s in compared] == pytest.approx([s.reward for s in subject.base[rows]])


def test_one_in_k_of_each_prompt_is_kept_in_random_order() -> None:
    """Whatever the other prompt's weights are; rows of one weight are taken alike."""
    prompts = ["a", "b", "b", "b"] * 40
    log_w = torch.zeros(160, dtype=torch.float64)
    log_w[0], log_w[1::2] = 3.0, 700.0  # of b, which must not count in a
    reward = torch.arange(160.0)
    kept = chosen_rows(log_w, reward, prompts, 4, 0)
    names = [prompts[row] for row in kept.tolist()]
    assert names == ["a"] * 10 + ["b"] * 30
    assert 3 <= int((kept == 0).sum()) <= 4  # 10 e³/(39 + e³) = 3.4
    assert set(kept[10:].remainder(2).tolist()) == {1}
    assert kept[10:].tolist() != sorted(kept[10:].tolist())
    assert kept.equal(chosen_rows(log_w, reward, prompts, 4, 0))
    assert not kept.equal(chosen_rows(log_w, reward, prompts, 4, 1))
    log_w[5] = math.nan
    with pytest.raises(ConfigError, match="not finite"):
        chosen_rows(log_w, reward, prompts, 4, 0)


@pytest.mark.parametrize("paths", [2, 4])
def test_resampled_samples_are_the_target_s(paths: int) -> None:
    """1 in K paths, which miss it by many floors as they were drawn."""
    subject = of_world("ring")
    target, beta = subject.targets[0], subject.world.beta
    prompts = subject.world.prompts[0:1] * (COUNT // 2)
    drawn = draw_of_both(
        subject.evaluator, prompts, paths, on_done=lambda count: None, keep=lambda x: x
    )
    assert len(drawn) == paths * len(prompts)
    assert [s.index for s in drawn] == list(range(len(drawn)))  # no noise is used twice
    ratio = torch.tensor([s.log_ratio for s in drawn], dtype=torch.float64)
    split = len(drawn) - base_paths(paths) * len(prompts)
    assert ratio[:split].mean() > 0 > ratio[split:].mean()  # the policy's, then the pretrained ones
    untilted = log_weight(ratio, torch.zeros(len(ratio)), beta, base_paths(paths) / paths).exp()
    assert abs(float(untilted.mean()) - 1) < 4 * float(untilted.std()) / len(ratio) ** 0.5
    kept = resample(drawn, beta, paths, 0)
    assert [s.index for s in kept] == list(range(len(prompts)))
    x, raw = (torch.stack([s.image for s in some]) for some in (kept, drawn[: len(kept)]))
    least = floors(target, len(kept))
    found, before = distances(target, x), distances(target, raw)
    for name in ("mmd2", "mode_kl"):
        assert before[name] > 10 * least[name]
        assert found[name] < 4 * least[name]  # 2 in 3 of these rows are there twice
    turned = resample(drawn, -beta, paths, 0)
    assert sum(s.reward for s in turned) < sum(s.reward for s in drawn[: len(kept)])
    again = subject.measured(kept)
    assert 0.3 < distinct_share(again) < 0.95
    assert distinct_share(subject.measured(drawn)) == 1


def test_a_correction_draws_the_target() -> None:
    """As `sample --resample` does it, in batches that do not divide the paths."""
    subject = of_world("ring")
    target, world = subject.targets[0], subject.world
    reward, prompt = WorldReward(world), world.prompts[0]
    correction = Correction(
        subject.policy, subject.table, reward, beta=world.beta, paths=4, about={}, batch=700, seed=0
    )
    x = correction.draw(prompt, range(1000))
    assert len(x) == 1000 and len(x.unique(dim=0)) > 500
    mean = float(reward(x, [prompt] * 1000, [{}] * 1000).mean())
    own = sum(s.reward for s in subject.samples) / COUNT
    assert abs(mean - target.reward) < 0.15 * (target.reward - own)


def test_a_lost_mode_is_there_again() -> None:
    """A policy that pushes away from the target keeps an ESS of nothing; a quarter of the paths are
    the pretrained model's, and weights by both are near those by the pretrained model alone.

    Its own paths know nothing of what they have lost; the certificate's are those of both, too."""
    subject = Subject("ring", -3.0)
    target, beta = subject.targets[0], subject.world.beta
    prompts = subject.world.prompts[0:1] * COUNT
    drawn = draw_of_both(subject.evaluator, prompts, 4, on_done=lambda c: None, keep=lambda x: x)
    kept = torch.stack([s.image for s in resample(drawn, beta, 4, 0)])
    least, found = floors(target, COUNT), distances(target, kept)
    assert found["mode_kl"] < 10 * least["mode_kl"]
    rewards = subject.world.reward(kept.double(), subject.world.rows(prompts))
    assert float(rewards.mean()) == pytest.approx(target.reward, abs=0.1)
    model = subject.measured(subject.samples)
    log_w = log_weight(model.scores["log_ratio"], model.scores["reward"], beta)
    groups = PromptRows.of(model.prompts)
    assert float(weighted_mean(model.scores["reward"], log_w, groups)) < target.reward - 0.1
    assert float(log_mean(log_w, groups)) < subject.log_z - 0.2
    found = subject.certificate()
    assert found.figures["ess"].value < 0.05 and not found.notes
    near(found, "log_z", subject.log_z)
    near(found, "reward_weighted", target.reward)
    near(found, "kl_to_target", subject.log_z - float(log_w.mean()))
    assert found.figures["kl_from_target"].value > 3


def test_few_samples_say_what_they_cannot_show() -> None:
    subject = of_world("ring")
    found = subject.certificate(beta=40.0, keep=slice(0, 16))
    assert {"target_kl", "target_reward", "log_z_base"}.isdisjoint(found.figures)
    assert found.figures["ess"].low is None and found.figures["kl_to_target"].low is None
    text = " ".join(found.notes)
    assert "at least" in text and "more --images-per-prompt" in text
    alone = certificate(
        subject.measured(subject.samples[:16]),
        subject.measured(subject.base[:16]),
        None,
        Bootstrap.of(["a"] * 16, 50, 0.95, 0),
        "because",
    )
    assert alone.beta is None and alone.why == "because"
    assert alone.figures.keys() <= {"path_kl", "least_kl", "efficiency"}


def with_gain(gain: float, count: int = 16, prompts: int = 45) -> Certificate:
    """Of a sampler N(gain, ¼) without a target, where the pretrained rewards are N(0, 1)."""
    generator = rng.generator(0, "scene")
    names = tuple(str(p) for p in range(prompts) for _ in range(count))
    noise = torch.randn(2, len(names), generator=generator, dtype=torch.float64)
    flat = torch.zeros(len(names), 1)
    spent = {"path_kl": gain**2 / 2 + 0.1 * noise[1].abs()}
    model = Measured(names, flat, {"reward": gain + noise[1] / 2, **spent}, step_kl=flat)
    base = Measured(names, flat, {"reward": noise[0]}, step_kl=flat)
    return certificate(model, base, None, Bootstrap.of(names, 200, 0.95, 0), "because")


def test_near_the_end_of_the_frontier_there_is_no_interval() -> None:
    """There the resamples that still have a least KL are the few with the best base samples."""
    inside, near_end, beyond = with_gain(0.8), with_gain(1.45), with_gain(2.5)
    for name in ("least_kl", "efficiency"):
        assert inside.figures[name].low is not None
        assert math.isfinite(near_end.figures[name].value) and near_end.figures[name].low is None
        assert name not in beyond.figures
    assert not inside.notes
    assert "so near the end of the frontier" in " ".join(near_end.notes)
    assert "beyond the frontier" in " ".join(beyond.notes)


@pytest.mark.parametrize("name", ["reward", "log_ratio_base"])
def test_what_is_not_finite_is_told(name: str) -> None:
    subject = of_world("ring")
    model, base = (subject.measured(some[:16]) for some in (subject.samples, subject.base))
    model.scores[name][3] = math.nan
    found = certificate(model, base, 1.0, Bootstrap.of(["a"] * 16, 50, 0.95, 0))
    assert found.notes == ("some rewards or paths are not finite: no figures of the target",)
    assert found.figures.keys() <= {"path_kl", "least_kl", "efficiency"}


def test_without_a_gain_there_is_no_efficiency() -> None:
    subject = Subject("gaussian", -0.5)
    assert "efficiency" not in subject.certificate().figures
    assert subject.certificate().figures["least_kl"].value == pytest.approx(0, abs=1e-9)


def test_the_frontier_rises_and_ends_where_the_samples_do(subject: Subject) -> None:
    base = subject.measured(subject.base)
    points = frontier(base, Bootstrap.of(base.prompts, 50, 0.95, 0))
    kl, reward = [p.kl.value for p in points], [p.reward.value for p in points]
    assert kl == sorted(kl) and reward == sorted(reward)
    assert points[0].beta == 0 and kl[0] == pytest.approx(0, abs=1e-9)
    assert kl[-1] == pytest.approx(most_kl(PromptRows.of(base.prompts)), rel=1e-3)


@pytest.mark.parametrize(
    "option, value, why",
    [
        ("experiment.method", "refl", "refl has no prior term"),
        ("model.pretrained_strength", 0.5, "pretrained_strength=0.5"),
    ],
)
def test_a_run_without_this_target_says_so(option: str, value: object, why: str) -> None:
    config = Config()
    set_option(config, option, value)
    aim = target_of(config)
    assert aim.beta is None and why in aim.why
    assert target_of(Config(), 0.25).beta == 0.25 * Config().model.reward_scale
