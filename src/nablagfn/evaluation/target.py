"""The exact target of a run, p_pretrained·exp(βr), stated from samples of the pretrained model.

What is written of a β: the mean reward E*[r] and KL* of a perfect finetune, how different its
samples are and what they show, each with a bootstrap interval; and what is missing of E*[r] and KL*
for want of samples, judged from half of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import rng
from ..metrics import diversity, tilting
from ..metrics.groups import rows_of
from ..metrics.intervals import Interval, basic_of_log, percentile
from ..metrics.tilting import PromptRows
from .certificate import SHARE_OF_BIAS, Bootstrap
from .draws import DrawnSamples

LITTLE = 1e-3  # nats: a smaller bias is not worth a word


@dataclass(frozen=True)
class TargetRow:
    """The target at one β. reliable: KL* is no more than the samples can show (log M − 1). beyond:
    the number of prompts whose own KL* is more.

    reward, kl: E*[r] and KL* in nats. gain: E*[r] − E[r] in standard deviations of the pretrained
    model's rewards. ess: effective share of the samples, 0..1. diversity: mean feature distance
    within prompts; recognised: share of samples that show what they should. shares: of each label,
    by "kind: label". reward_bias, kl_bias: what few samples are off by; NaN below 4 a prompt.
    """

    beta: float
    reliable: bool
    reward: Interval
    kl: Interval
    gain: float
    ess: Interval
    diversity: Interval
    recognised: Interval | None
    shares: dict[str, Interval]
    reward_bias: float
    kl_bias: float
    beyond: int = 0


def target_row(drawn: DrawnSamples, beta: float, bootstrap: Bootstrap) -> TargetRow:
    """The figures of the samples weighted by exp(βr) within each prompt."""
    measured = drawn.measured
    groups, reward = PromptRows.of(measured.prompts), measured.scores["reward"]
    log_w = tilting.tilt(reward, beta)
    kl = bootstrap(lambda c: tilting.target_kl(reward, beta, groups, c), basic_of_log)
    mean = bootstrap(lambda c: tilting.target_reward(reward, beta, groups, c))

    def share(values: Tensor) -> Interval:
        return bootstrap(lambda c: tilting.weighted_mean(values, log_w, groups, c), percentile)

    recognised = measured.scores["recognised"]
    return TargetRow(
        beta=beta,
        reliable=kl.value <= tilting.most_kl(groups),
        reward=mean,
        kl=kl,
        gain=(mean.value - float(tilting.plain_mean(reward, groups))) / spread(reward),
        ess=bootstrap(lambda c: tilting.effective_share(log_w, groups, c), basic_of_log),
        diversity=bootstrap(
            lambda c: spread_of(measured.features, groups, measured.prompts, log_w, c), percentile
        ),
        recognised=share(recognised) if bool(recognised.isfinite().all()) else None,
        shares={name: share(values) for name, values in indicators(drawn).items()},
        reward_bias=tilting.halved(
            lambda r, part: tilting.target_reward(r, beta, part), reward, groups
        ),
        kl_bias=tilting.halved(lambda r, part: tilting.target_kl(r, beta, part), reward, groups),
        beyond=int((tilting.kl_by_prompt(reward, beta, groups) > tilting.most_kl(groups)).sum()),
    )


def spread(reward: Tensor) -> float:
    """Standard deviation of all rewards; at least 1e-12."""
    return max(float(reward.std()), 1e-12)


def spread_of(
    features: Tensor,
    groups: PromptRows,
    prompts: Sequence[str],
    log_w: Tensor,
    counts: Tensor | None,
) -> Tensor:
    """`diversity.pairwise_distance` of weighted samples, [R or 1].

    Σ_{i≠j} w_i w_j d_ij / Σ_{i≠j} w_i w_j of each prompt, then the mean over prompts. Two draws of
    the target are never the same sample, so pairs i = j are left out of both sums, however large
    w_i is: to count them, with their distance 0, would make few samples look less different than
    the target is. With equal weights it is the plain figure.
    """
    weights = tilting.normalised(log_w, groups, counts)
    taken = torch.zeros(len(weights), len(features), dtype=torch.float64)
    there = groups.there
    taken[:, groups.rows[there]] = weights[:, there] * groups.rows.shape[1]
    return diversity.pairwise_distance(features, prompts, taken)


def indicators(drawn: DrawnSamples) -> dict[str, Tensor]:
    """1 where a sample shows a label, [n] each, of the kinds that the prompts leave open."""
    return {
        name: indicator(drawn, name)
        for kind, labels in drawn.labels.items()
        if not asked_for(labels, drawn.measured.prompts)
        for name in sorted({f"{kind}: {label}" for label in labels})
    }


def indicator(drawn: DrawnSamples, name: str) -> Tensor:
    """1 where a sample shows the label of "kind: label", [n]."""
    kind, _, label = name.partition(": ")
    return torch.tensor([seen == label for seen in drawn.labels[kind]], dtype=torch.float64)


def asked_for(labels: Sequence[str], prompts: Sequence[str]) -> bool:
    """Whether most prompts name what is seen: then `recognised` counts it."""
    named = [label in prompt.lower().split() for label, prompt in zip(labels, prompts, strict=True)]
    return 2 * sum(named) > len(named)


def warnings(rows: Sequence[TargetRow], images: int, prompts: int) -> list[str]:
    """What the samples do not bear, in words."""
    refused = [f"{row.beta:.3g}" for row in rows if not row.reliable]
    found = []
    if refused:
        found.append(
            f"β = {', '.join(refused)}: KL* is above log M − 1 = {math.log(images) - 1:.2g} nats, "
            f"which {images} images per prompt do not show; for more, raise --images-per-prompt"
        )
    some = [
        f"{row.beyond} of {prompts} prompts at β = {row.beta:.3g}"
        for row in rows
        if row.reliable and row.beyond
    ]
    if some:
        found.append(
            f"{', '.join(some)}: their own KL* is above log M − 1, and more than {images} images "
            "show; the mean over prompts is too low"
        )
    biased = [
        f"{-row.kl_bias / row.kl.value:.0%} at β = {row.beta:.3g}"
        for row in rows
        if row.reliable and -row.kl_bias > SHARE_OF_BIAS * row.kl.value > LITTLE
    ]
    if biased:
        found.append(
            "few samples put the frontier too low, and so an efficiency against it too high: KL* "
            f"by about {', '.join(biased)} (judged from half of them)"
        )
    return found


def resampled(drawn: DrawnSamples, beta: float, per_prompt: int, seed: int) -> Tensor:
    """Rows of a perfect finetune's samples, `per_prompt` of each prompt in turn, [P·per_prompt].

    Systematic resampling within each prompt: a few may be taken more than once.
    """
    reward, generator = drawn.measured.scores["reward"], rng.generator(seed, "resample")
    found = []
    for rows in rows_of(drawn.measured.prompts).values():
        weights = tilting.tilt(reward[rows], beta).softmax(0)
        u = float(torch.rand(1, generator=generator, dtype=torch.float64))
        found.append(rows[tilting.systematic(weights, per_prompt, u)])
    return torch.cat(found)
