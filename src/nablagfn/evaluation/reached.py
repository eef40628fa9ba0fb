"""What a run reached beside its target p_pretrained·exp(βr), from the samples before and after it.

All that is said of the target is of the pretrained model's samples weighted by exp(βr)
(`evaluation.target`): one number each, without an interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..core.types import View
from ..metrics import tilting
from ..metrics.tilting import PromptRows
from .certificate import Bootstrap, spent
from .draws import DrawnSamples
from .figures import Measured
from .samples import Sample
from .target import indicator, indicators, target_row

LEAST_GAIN = 0.05  # standard deviations of the rewards: a part of less says nothing


@dataclass(frozen=True)
class LabelShares:
    """Shares of the samples that show a label, in 0..1: of the pretrained model, of the finetuned
    one, and of the target (None where it is not known)."""

    before: float
    after: float
    target: float | None


@dataclass(frozen=True)
class Reached:
    """A run's result beside its target; a figure is None where the samples do not show it.

    beta: the one in force. samples: how many there are of the pretrained model.
    effective_samples: how many of them carry the target. target_reward, target_kl (nats),
    target_diversity, target_recognised: the figures of a perfect finetune. gain_reached: the gain
    of the mean reward as a share of the target's gain. least_kl: the KL in nats that the best
    sampler needs for the reward that was reached; efficiency: that over the path KL spent. shares:
    by "kind: label", of the kinds that the prompts leave open.
    """

    beta: float
    samples: int
    effective_samples: float
    target_reward: float | None = None
    target_kl: float | None = None
    target_diversity: float | None = None
    target_recognised: float | None = None
    gain_reached: float | None = None
    least_kl: float | None = None
    efficiency: float | None = None
    shares: dict[str, LabelShares] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As evaluation.json has it."""
        return asdict(self)

    @staticmethod
    def read(found: Mapping[str, Any]) -> Reached:
        """What `as_dict` returned."""
        shares = {name: LabelShares(**row) for name, row in found["shares"].items()}
        return Reached(**{**found, "shares": shares})


def without_pictures(samples: Sequence[Sample], view: View) -> DrawnSamples:
    """What is known of labelled samples, but for their pictures."""
    kinds = samples[0].labels
    labels = {kind: tuple(sample.labels[kind] for sample in samples) for kind in kinds}
    return DrawnSamples(Measured.of(samples, view), torch.zeros(0), labels)


def reached(before: DrawnSamples, after: DrawnSamples, beta: float) -> Reached | None:
    """The figures of a finetuned model's samples and the pretrained model's, which have the same
    prompts in the same order; None where some rewards are not finite."""
    base, model = before.measured, after.measured
    rewards, finetuned = base.scores["reward"], model.scores["reward"]
    if not bool(torch.cat([rewards, finetuned]).isfinite().all()):
        return None
    groups, count = PromptRows.of(base.prompts), len(base.prompts)
    plain = Bootstrap(torch.ones(0, count, dtype=torch.float64), 0.0)  # no intervals
    row = target_row(before, beta, plain)
    known, recognised = row.reliable, row.recognised
    targets = {name: share.value for name, share in row.shares.items()}
    start = float(tilting.plain_mean(rewards, groups))
    gained = float(tilting.plain_mean(finetuned, groups)) - start
    wanted = row.reward.value - start
    least = LEAST_GAIN * float(rewards.std(correction=0))
    paid = {name: float(figure(None)) for name, figure in spent(model, base, groups).items()}
    return Reached(
        beta=beta,
        samples=count,
        effective_samples=row.ess.value * count,
        target_reward=row.reward.value if known else None,
        target_kl=row.kl.value if known else None,
        target_diversity=number_or_none(row.diversity.value) if known else None,
        target_recognised=recognised.value if known and recognised else None,
        gain_reached=gained / wanted if known and wanted > least else None,
        least_kl=number_or_none(paid["least_kl"]),
        efficiency=number_or_none(paid["efficiency"]),
        shares=shares_of(before, after, targets if known else {}),
    )


def number_or_none(value: float) -> float | None:
    """None for what is not finite, which JSON does not have."""
    return value if math.isfinite(value) else None


def shares_of(
    before: DrawnSamples, after: DrawnSamples, targets: Mapping[str, float]
) -> dict[str, LabelShares]:
    """The shares of all labels that either model shows, of the kinds that the prompts leave open;
    which these are is told by the pretrained model's samples. targets: by "kind: label"."""
    groups, seen = PromptRows.of(before.measured.prompts), indicators(before)
    kinds = {name.partition(": ")[0] for name in seen}
    names = set(seen) | {f"{kind}: {label}" for kind in kinds for label in after.labels[kind]}
    return {
        name: LabelShares(
            before=float(tilting.plain_mean(indicator(before, name), groups)),
            after=float(tilting.plain_mean(indicator(after, name), groups)),
            target=targets.get(name, 0.0) if targets else None,
        )
        for name in sorted(names)
    }
