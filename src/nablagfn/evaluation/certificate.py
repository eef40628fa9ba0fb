"""How far a run is from its target p_pretrained·exp(βr), and what the best sampler would do.

Everything is estimated from measured samples: of the finetuned model and of the pretrained one,
whose tilted samples are the target (`metrics.tilting`), with the log-ratios of the paths of both
(`core.path_kl`), which weighted together are the target, too (`TwoSamplers`). Intervals are
bootstrap intervals of other noise for the same prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import rng
from ..core.path_kl import log_weight
from ..metrics import tilting
from ..metrics.intervals import Interval, basic, basic_of_log, percentile, resampled_counts
from ..metrics.tilting import PromptRows
from .figures import Measured
from .two_samplers import TwoSamplers

POINTS = 16  # of a frontier
SHARE_OF_BIAS = 0.1  # of a figure: a larger bias of few samples is worth a warning

PIECE = 4_000_000  # counts at once: their memory
SEARCHED = {"least_kl": 200, "efficiency": 200}  # resamples of what is searched for in each

Ends = Callable[[float, Tensor, float], Interval]
ENDS: dict[str, Ends] = {  # basic for the others
    "path_kl": percentile,
    "efficiency": basic_of_log,
    "ess": basic_of_log,
    "least_kl": basic_of_log,
    "kl_to_target": basic_of_log,
    "kl_from_target": basic_of_log,
    "target_kl": basic_of_log,
}

Figure = Callable[[Tensor | None], Tensor]  # of the counts [R, n] of a resample, or of all samples


@dataclass(frozen=True)
class Bootstrap:
    """Draws of the samples' counts, shared by all figures of one table. counts: [R, n]."""

    counts: Tensor
    confidence: float

    @staticmethod
    def of(prompts: Sequence[str], resamples: int, confidence: float, seed: int) -> Bootstrap:
        counts = resampled_counts(prompts, resamples, rng.generator(seed, "bootstrap"))
        return Bootstrap(counts, confidence)

    def __call__(
        self, figure: Figure, ends: Ends = basic, resamples: int | None = None
    ) -> Interval:
        """The figure of all samples, and its interval from the first `resamples` (all).

        ends: how the interval is made of the resampled values (`metrics.intervals`). There is none
        where more resamples lack the figure than lie beyond one of the ends: those that have it
        are not like the others.
        """
        counts = self.counts[:resamples]
        pieces = counts.split(max(1, PIECE // counts.shape[1]))
        values = torch.cat([figure(piece) for piece in pieces])
        lacking = float((~values.isfinite()).double().mean())
        if lacking > (1 - self.confidence) / 2:
            return Interval(float(figure(None)))
        return ends(float(figure(None)), values, self.confidence)


@dataclass(frozen=True)
class Certificate:
    """A finetuned model against its target. beta: None where it has none; why: the reason.

    figures, each with its interval, in nats where not said otherwise:

    path_kl, least_kl    spent, and what the best sampler needs for the same mean reward
    efficiency           least_kl / path_kl, 0..1; missing without a gain
    free_energy          β·E[r] − KL(p_θ‖p_#), which methods with a prior maximise
    free_energy_base     the same of the pretrained model
    log_z, log_z_base    its largest possible value log Z, by path weights and by base samples
    kl_to_target         KL(p_θ‖p*): large where the model draws what the target does not
    kl_from_target       KL(p*‖p_θ): large where it does not draw what the target does
    ess                  effective share of its own samples under the path weights, 0..1
    reward_weighted      E[r] under the path weights, in the reward's unit
    target_reward        E*[r] by base samples, in the reward's unit
    target_kl            KL(p*‖p_#) by base samples

    Path weights are those of the paths of both models. step_kl: the path KL of each step. notes:
    what the figures do not bear.
    """

    beta: float | None
    figures: dict[str, Interval]
    step_kl: tuple[float, ...]
    why: str = ""
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it, before and after it was written."""
        return {**asdict(self), "step_kl": list(self.step_kl), "notes": list(self.notes)}


def certificate(
    model: Measured,
    base: Measured,
    beta: float | None,
    bootstrap: Bootstrap,
    why: str = "",
) -> Certificate:
    """Of a model's samples and the pretrained model's, which have the same prompts in the same
    order. model: drawn with `both`, if there is a β. beta: the one in force; None where the method
    has no such target (why says so)."""
    groups = PromptRows.of(model.prompts)
    figures = {
        name: bootstrap(figure, ENDS.get(name, basic), SEARCHED.get(name))
        for name, figure in spent(model, base, groups).items()
    }
    paths = None if beta is None else paths_of_both(model, base, beta)
    notes = limits_of_the_frontier(figures, groups)
    if not finite(model, base, paths):
        notes = ["some rewards or paths are not finite: no figures of the target"]
    elif beta is not None and paths is not None:
        found = against_target(model, base, beta, paths, groups)
        figures |= {name: bootstrap(f, ENDS.get(name, basic)) for name, f in found.items()}
        enough = seen(paths)
        notes += limits(figures, groups, enough)
        gone = refused(figures, groups)
        figures = {name: figure for name, figure in figures.items() if name not in gone}
        alone = set() if enough else BY_WEIGHTS
        figures = {n: Interval(f.value) if n in alone else f for n, f in figures.items()}
    known = {name: value for name, value in figures.items() if math.isfinite(value.value)}
    steps = tuple(model.step_kl.double().mean(0).tolist())
    return Certificate(beta, known, steps, why, tuple(notes))


def spent(model: Measured, base: Measured, groups: PromptRows) -> dict[str, Figure]:
    """What holds without a target: the KL that was spent, and the least for as much reward; the
    latter alone for paths without noise."""
    reward, reward_base = model.scores["reward"], base.scores["reward"]

    def path_kl(counts: Tensor | None) -> Tensor:
        return tilting.plain_mean(model.scores["path_kl"], groups, counts)

    def least(counts: Tensor | None) -> Tensor:
        reached = tilting.plain_mean(reward, groups, counts)
        return tilting.least_kl(reward_base, reached, groups, counts)

    def efficiency(counts: Tensor | None) -> Tensor:
        gained = tilting.plain_mean(reward - reward_base, groups, counts) > 0
        nothing = torch.nan if counts is None else 0.0  # a resample without a gain
        return torch.where(gained, least(counts) / path_kl(counts), nothing)

    if "path_kl" not in model.scores:
        return {"least_kl": least}
    return {"path_kl": path_kl, "least_kl": least, "efficiency": efficiency}


BY_WEIGHTS = {"kl_to_target", "kl_from_target", "log_z", "ess", "reward_weighted"}
LEAST_PAIRS = math.e  # of a prompt's paths that carry the target, on average


def paths_of_both(model: Measured, base: Measured, beta: float) -> TwoSamplers:
    """The finetuned model's paths and the pretrained one's of the same noise, and their weights."""
    ratio = torch.cat([model.scores["log_ratio"], model.scores["log_ratio_base"]])
    log_w = log_weight(ratio, rewards_of_both(model, base), beta)
    return TwoSamplers.of(log_w, ratio, model.prompts)


def rewards_of_both(model: Measured, base: Measured) -> Tensor:
    """[2n], of where the paths of `paths_of_both` end."""
    return torch.cat([model.scores["reward"], base.scores["reward"]])


def seen(paths: TwoSamplers) -> bool:
    """Whether so many paths can show the target: more than a few must carry its weights, or nobody
    knows which others are missing."""
    return tilting.most_kl(paths.pairs) > 0 and paths.effective_pairs >= LEAST_PAIRS


def finite(model: Measured, base: Measured, paths: TwoSamplers | None) -> bool:
    """Whether all rewards are numbers, and the weights of all paths."""
    rewards = bool(rewards_of_both(model, base).isfinite().all())
    return rewards and (paths is None or bool(paths.log_f.isfinite().all()))


def against_target(
    model: Measured, base: Measured, beta: float, paths: TwoSamplers, groups: PromptRows
) -> dict[str, Figure]:
    """The model's paths weighted for the target at β, and the target by base samples."""
    reward, reward_base, kl = model.scores["reward"], base.scores["reward"], model.scores["path_kl"]
    own, reward_both = paths.log_w[: len(reward)], rewards_of_both(model, base)
    tilted = tilting.tilt(reward_base, beta)
    return {
        "free_energy": lambda c: tilting.plain_mean(beta * reward - kl, groups, c),
        "free_energy_base": lambda c: tilting.plain_mean(tilted, groups, c),
        "log_z": paths.log_z,
        "log_z_base": lambda c: tilting.log_mean(tilted, groups, c),
        "kl_to_target": paths.kl_to_target,
        "kl_from_target": paths.kl_from_target,
        "ess": lambda c: tilting.effective_share(own, groups, c),
        "reward_weighted": lambda c: paths.target_mean(reward_both, c),
        "target_reward": lambda c: tilting.target_reward(reward_base, beta, groups, c),
        "target_kl": lambda c: tilting.target_kl(reward_base, beta, groups, c),
    }


def refused(figures: Mapping[str, Interval], groups: PromptRows) -> set[str]:
    """Figures of a target that the base samples cannot show."""
    beyond = figures["target_kl"].value > tilting.most_kl(groups)
    return {"target_kl", "target_reward", "log_z_base"} if beyond else set()


def limits(figures: Mapping[str, Interval], groups: PromptRows, enough: bool) -> list[str]:
    """What so few samples cannot say of the target, in words. enough: `seen`."""
    most, found = tilting.most_kl(groups), []
    if most <= 0:
        return []
    if not enough:
        found.append(
            f"KL(p_θ‖p*) is at least {figures['kl_to_target'].value:,.1f} nats: of the finetuned "
            f"and the pretrained model's {groups.fewest} paths of a prompt too few come near the "
            "target, so that log Z, ESS, the weighted reward and KL(p*‖p_θ) say little"
        )
    if figures["target_kl"].value > most:
        found.append(
            f"the target at this β lies further than {most:.2g} nats from the pretrained model, "
            f"beyond what {groups.fewest} samples of a prompt can show: more --images-per-prompt"
        )
    return found


def limits_of_the_frontier(figures: Mapping[str, Interval], groups: PromptRows) -> list[str]:
    """What so few samples cannot say of the best sampler for the same reward, in words."""
    most = tilting.most_kl(groups)
    found: list[str] = []
    if most <= 0:
        return [f"{groups.fewest} samples of a prompt show no target: more --images-per-prompt"]
    efficiency, least = figures.get("efficiency"), figures["least_kl"]
    if efficiency is None:  # without a path KL
        return found
    if efficiency.value > 1 or (efficiency.low is not None and efficiency.low <= 0):
        found.append(
            "so few samples do not tell the efficiency: it is 1 at the most, and 0 without a gain"
        )
    end = f"the frontier of {groups.fewest} base samples of a prompt, which ends at {most:.2g} nats"
    if math.isnan(least.value):
        found.append(f"the reward lies beyond {end}: no efficiency")
    elif least.low is None:
        found.append(
            f"the reward lies so near the end of {end}, that neither the least KL nor the "
            "efficiency has an interval: more --images-per-prompt"
        )
    return found


# ------------------------------------------------------------------------------------ the frontier


@dataclass(frozen=True)
class FrontierPoint:
    """The target at one β: its KL from the pretrained model in nats, and its mean reward."""

    beta: float
    kl: Interval
    reward: Interval


def frontier(base: Measured, bootstrap: Bootstrap, points: int = POINTS) -> list[FrontierPoint]:
    """The best reward for each KL, as far as the samples show it; none of fewer than 4 a prompt."""
    groups, reward = PromptRows.of(base.prompts), base.scores["reward"]
    most = tilting.most_kl(groups)
    if most <= 0 or not bool(reward.isfinite().all()):
        return []
    shares = torch.linspace(0, 1, points + 1, dtype=torch.float64)[1:].square()
    betas = [0.0]
    for share in shares:
        try:
            betas.append(tilting.beta_of_kl(reward, float(share) * most, groups))
        except ValueError:  # samples share the largest reward: the frontier ends before
            break
    return [point(reward, beta, groups, bootstrap) for beta in betas]


def point(reward: Tensor, beta: float, groups: PromptRows, bootstrap: Bootstrap) -> FrontierPoint:
    return FrontierPoint(
        beta,
        bootstrap(lambda c: tilting.target_kl(reward, beta, groups, c), basic_of_log),
        bootstrap(lambda c: tilting.target_reward(reward, beta, groups, c)),
    )
