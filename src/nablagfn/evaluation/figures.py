"""Figures of a set of measured samples: those before and after a run, and with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core import rng
from ..core.types import View
from ..metrics import diversity, prior
from ..metrics.drift import feature_drift
from ..metrics.groups import rows_of
from ..metrics.intervals import Interval, percentile, resampled_counts, resampled_mean
from .samples import Sample

MOST_PAIRS = 2_000  # samples of which kid and mmd compare all pairs; of more, every second or third


@dataclass(frozen=True)
class Measured:
    """What is known of one model's n samples, the pictures themselves left out.

    features: [n, D]. scores: [n] float64 each, NaN where unknown: reward, reward_NAME for held-out
    rewards, recognised (0 or 1), path_kl and log_ratio (transport_cost instead of both
    where paths have no noise), and log_ratio_base if somebody asked. others: figures of
    `View.measures`. step_kl: [n, N], what path_kl is the sum of.
    """

    prompts: tuple[str, ...]
    features: Tensor
    scores: dict[str, Tensor]
    others: dict[str, float] = field(default_factory=dict)
    step_kl: Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    @staticmethod
    def of(samples: Sequence[Sample], view: View) -> Measured:
        """Takes the view's own figures, too."""
        prompts = tuple(sample.prompt for sample in samples)
        features = torch.stack([sample.feature for sample in samples])
        images = torch.stack([sample.image for sample in samples])
        steps = torch.stack([sample.step_kl for sample in samples])
        others = view.measures(images, prompts)
        return Measured(prompts, features, scores_of(samples), others, steps)

    def __getitem__(self, rows: Tensor) -> Measured:
        """Some of the samples, by number; without `others`, which are of all."""
        return Measured(
            tuple(self.prompts[i] for i in rows.tolist()),
            self.features[rows],
            {name: values[rows] for name, values in self.scores.items()},
            step_kl=self.step_kl[rows] if len(self.step_kl) else self.step_kl,
        )


def scores_of(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The numbers that each sample has of its own, [n] float64 by name."""
    columns: dict[str, list[float]] = {
        "reward": [sample.reward for sample in samples],
        **{
            f"reward_{name}": [sample.held_out[name] for sample in samples]
            for name in samples[0].held_out
        },
        "recognised": [
            math.nan if sample.recognised is None else float(sample.recognised)
            for sample in samples
        ],
        "path_kl": [sample.path_kl for sample in samples],
        "log_ratio": [sample.log_ratio for sample in samples],
        "log_ratio_base": [sample.log_ratio_base for sample in samples],
        "transport_cost": [sample.transport_cost for sample in samples],
    }
    unknown = {n for n in ("log_ratio_base", "transport_cost") if all(map(math.isnan, columns[n]))}
    if "transport_cost" not in unknown:
        unknown |= {"path_kl", "log_ratio"}
    kept = {name: values for name, values in columns.items() if name not in unknown}
    return {name: torch.tensor(v, dtype=torch.float64) for name, v in kept.items()}


# -------------------------------------------------------------------------------- one number each


@dataclass(frozen=True)
class Measurement:
    """Figures of one set of samples.

    diversity: mean feature distance within prompts, in [0, 2] for pictures. others: those of
    `View.measures`. path_kl: KL(p_θ‖p_#) of the paths, in nats; None where they have no noise, and
    then transport_cost is known (`core.transport`). held_out: mean held-out rewards.
    """

    num_samples: int
    reward_mean: float
    reward_std: float
    diversity: float
    recognised: float | None
    others: dict[str, float] = field(default_factory=dict)
    path_kl: float | None = 0.0
    held_out: dict[str, float] = field(default_factory=dict)
    transport_cost: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def headline(self) -> dict[str, float]:
        """The figures worth a curve; recognised where it is known."""
        spent = {"path_kl": self.path_kl, "transport_cost": self.transport_cost}
        figures = {
            "reward": self.reward_mean,
            "diversity": self.diversity,
            **{name: value for name, value in spent.items() if value is not None},
            **{f"reward_{name}": value for name, value in self.held_out.items()},
            **self.others,
        }
        return figures if self.recognised is None else {**figures, "recognised": self.recognised}


def summarise(samples: Sequence[Sample], view: View) -> Measurement:
    """The figures of a set of samples with at least two of some prompt."""
    return summary_of(Measured.of(samples, view))


def summary_of(found: Measured) -> Measurement:
    """`summarise` of samples that have been measured."""
    mean = {name: float(values.nanmean()) for name, values in found.scores.items()}
    return Measurement(
        num_samples=len(found.prompts),
        reward_mean=mean["reward"],
        reward_std=float(found.scores["reward"].std()),
        diversity=float(diversity.pairwise_distance(found.features, found.prompts)),
        recognised=None if math.isnan(mean["recognised"]) else mean["recognised"],
        others=found.others,
        path_kl=mean.get("path_kl"),
        transport_cost=mean.get("transport_cost"),
        held_out={
            name.removeprefix("reward_"): value
            for name, value in mean.items()
            if name.startswith("reward_")
        },
    )


# -------------------------------------------------------------------------------- with intervals

Value = Callable[[Measured, Measured], Tensor]
Counted = Callable[[Measured, Measured, Tensor | None], Tensor]


@dataclass(frozen=True)
class Figure:
    """A figure of a model's samples m and the pretrained model's b; resampled: [R] by counts."""

    value: Value
    resampled: Callable[[Measured, Measured, Tensor], Tensor]


def _counted(function: Counted) -> Figure:
    return Figure(lambda m, b: function(m, b, None), function)


def _influenced(value: Value, influence: Value) -> Figure:
    return Figure(value, lambda m, b, counts: value(m, b) + counts @ influence(m, b))


OWN = {
    "diversity": _counted(lambda m, b, c: diversity.pairwise_distance(m.features, m.prompts, c)),
    "diversity_variance": _counted(lambda m, b, c: diversity.variance(m.features, m.prompts, c)),
    "vendi": _influenced(
        lambda m, b: diversity.vendi(m.features, m.prompts),
        lambda m, b: diversity.vendi_influence(m.features, m.prompts),
    ),
}
AGAINST_BASE = {
    "fid": _influenced(
        lambda m, b: prior.frechet_distance(m.features, b.features),
        lambda m, b: prior.frechet_influence(m.features, b.features),
    ),
    "fid_per_prompt": _influenced(
        lambda m, b: prior.frechet_per_prompt(m.features, b.features, m.prompts),
        lambda m, b: prior.frechet_per_prompt_influence(m.features, b.features, m.prompts),
    ),
    "kid": _counted(lambda m, b, c: _thinned(prior.kid, m, b, c)),
    "mmd": _counted(lambda m, b, c: _thinned(prior.mmd, m, b, c)),
    "drift": _counted(lambda m, b, c: feature_drift(m.features, b.features, c)),
}
PER_PROMPT = ("diversity", "diversity_variance", "vendi", "fid", "drift")


def _thinned(function: Callable[..., Tensor], m: Measured, b: Measured, c: Tensor | None) -> Tensor:
    """A figure of all pairs, from every k-th sample where there are too many."""
    rows = torch.arange(0, len(m.prompts), math.ceil(len(m.prompts) / MOST_PAIRS))
    prompts = [m.prompts[i] for i in rows.tolist()]
    few = None if c is None else c[:, rows]
    return function(m.features[rows], b.features[rows], prompts, few)


def figures(
    measured: Measured,
    base: Measured | None,
    *,
    resamples: int,
    confidence: float,
    seed: int,
) -> dict[str, Interval]:
    """Every figure of a model with its bootstrap interval.

    base: the pretrained model's samples of the same prompts and noise; None for that model itself,
    which is not compared. The view's own figures have no interval, with 0 resamples no figure has.
    """
    counts = resampled_counts(measured.prompts, resamples, rng.generator(seed, "bootstrap"))
    found = {
        name: percentile(float(values.nanmean()), _known_mean(values, counts), confidence)
        for name, values in _scores(measured, base).items()
    }
    for name, figure in (OWN if base is None else OWN | AGAINST_BASE).items():
        other = base or measured
        value = float(figure.value(measured, other))
        found[name] = percentile(value, figure.resampled(measured, other, counts), confidence)
    alone = {name: Interval(value) for name, value in measured.others.items()}
    return {name: v for name, v in {**alone, **found}.items() if math.isfinite(v.value)}


def _known_mean(values: Tensor, counts: Tensor) -> Tensor:
    known = values.isfinite()
    return resampled_mean(values[known], counts[:, known])


def _scores(measured: Measured, base: Measured | None) -> dict[str, Tensor]:
    """Those that mean something: none that no sample has, and nothing spent by the base model."""
    return {
        name: values
        for name, values in measured.scores.items()
        if not name.startswith("log_ratio")
        and bool(values.isfinite().any())
        and not (base is None and name in ("path_kl", "transport_cost"))
    }


def per_prompt(measured: Measured, base: Measured | None) -> dict[str, dict[str, float]]:
    """The figures of each prompt alone, where they make sense of few samples; no intervals."""
    table = {}
    known = OWN if base is None else OWN | AGAINST_BASE
    for prompt, rows in rows_of(measured.prompts).items():
        own = measured[rows]
        other = own if base is None else base[rows]
        row = {name: float(v.nanmean()) for name, v in _scores(own, base).items()}
        row |= {n: float(known[n].value(own, other)) for n in PER_PROMPT if n in known}
        table[str(prompt)] = {name: value for name, value in row.items() if math.isfinite(value)}
    return table
