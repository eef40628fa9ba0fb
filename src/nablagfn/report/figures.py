"""Figures of a run in words: what was gained, what was kept, and what it cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from ..config import ConfigError
from ..methods.registry import find_method
from .read import FigureRow, ModelRow, Record

PERCENT = {"recognised"}
HEADLINES = ("reward", "diversity", "recognised", "path_kl")  # the order of a report
MEANINGS = {
    "reward": ("reward", "mean reward of the pictures, as it was trained"),
    "diversity": ("diversity", "mean feature distance between pictures of one prompt"),
    "recognised": ("recognised", "a separate classifier sees what the prompt names"),
    "diversity_variance": ("variance", "variance of the features within a prompt"),
    "vendi": ("Vendi score", "effective number of different pictures per prompt"),
    "path_kl": ("path KL", "how far the sampler has moved from the pretrained one, in nats"),
    "transport_cost": ("transport cost", "½∫‖u_θ − u_#‖² dt, what a sampler without noise changed"),
    "drift": ("drift", "feature distance to the pretrained model's picture of the same seed"),
    "fid": ("Fréchet distance", "to the pretrained model's pictures, all prompts"),
    "fid_per_prompt": ("Fréchet distance, per prompt", "the same within prompts"),
    "kid": ("KID", "kernel distance to the pretrained model's pictures"),
    "mmd": ("MMD", "kernel distance to the pretrained model's features"),
}


@dataclass(frozen=True)
class Card:
    """A headline: a figure before and after, with intervals where known."""

    name: str
    meaning: str
    before: str
    after: str
    change: str
    interval: str = ""
    headline: bool = True


@dataclass(frozen=True)
class Outcome:
    """What a run gained and kept. gain: in standard deviations of the base model's rewards.

    kept: share of the base model's diversity. recognised: change, in points. source: the command
    that measured it, "" when nothing did. reward: the mean reached.
    """

    gain: FigureRow | None = None
    kept: FigureRow | None = None
    recognised: float | None = None
    path_kl: float | None = None
    source: str = ""
    reward: FigureRow | None = None

    def change(self, key: str) -> str:
        """Say it in words; empty for figures whose change needs no unit of its own."""
        if key == "reward" and self.gain:
            return f"{self.gain.value:+.2f} σ"
        if key == "diversity" and self.kept:
            return f"{self.kept.value:.1%} kept"
        if key == "recognised" and self.recognised is not None:
            return f"{self.recognised:+.1f} points"
        return ""


@dataclass(frozen=True)
class TrainingCost:
    """seconds: of training. evaluations: passes through the denoiser (main process)."""

    updates: int
    seconds: float
    evaluations: float | None
    processes: str
    device: str

    @property
    def time(self) -> str:
        minutes, seconds = divmod(round(self.seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"

    @property
    def work(self) -> str:
        return "–" if self.evaluations is None else f"{self.evaluations:,.0f}"


def title(key: str) -> str:
    """A figure's name for people."""
    if key.startswith("reward_"):
        return key.removeprefix("reward_")
    return MEANINGS.get(key, (key, ""))[0]


def meaning(key: str) -> str:
    """What a figure is, in a few words."""
    if key.startswith("reward_"):
        return "a reward that was not trained"
    return MEANINGS.get(key, ("", ""))[1]


def is_headline(key: str) -> bool:
    """Reward, held-out rewards, diversity, recognised, path KL."""
    return key in HEADLINES or key.startswith("reward_")


def place(key: str) -> int:
    """Headlines first, held-out rewards after them, then the rest as measured."""
    if key in HEADLINES:
        return HEADLINES.index(key)
    return len(HEADLINES) + (not is_headline(key))


def number(value: float | None, key: str = "") -> str:
    """Three or four digits that count; shares in per cent."""
    if value is None:
        return "–"
    if key in PERCENT:
        return f"{value:.1%}"
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    size = abs(value)
    if size < 0.01 or size >= 1e6:
        return f"{value:.3g}"
    return f"{value:.3f}" if size < 10 else f"{value:.1f}" if size < 100 else f"{value:,.0f}"


def interval(figure: FigureRow, key: str = "") -> str:
    """'low to high', or nothing where no interval is known."""
    if figure.low is None or figure.high is None:
        return ""
    return f"{number(figure.low, key)} to {number(figure.high, key)}"


def deviation(record: Record) -> float | None:
    """Standard deviation of the base model's rewards; None when nothing says it."""
    evaluated = record.evaluation.evaluated
    sheet = record.sheet("base") if record.models else None
    if sheet is not None and evaluated is not None:
        name = evaluated.settings.trained_reward
        values = [s.rewards[name] for s in sheet.samples if name in s.rewards]
        if len(values) > 1:
            return statistics.stdev(values) or None
    before = record.evaluation.before
    return before.reward_std or None if before else None


def gain(record: Record, model: ModelRow) -> FigureRow | None:
    """Reward over the base model's, in standard deviations of its rewards."""
    base, std = record.models[0].figures.get("reward"), deviation(record)
    own = model.figures.get("reward")
    if base is None or own is None or std is None:
        return None
    return _each(own, lambda value: (value - base.value) / std)


def kept(record: Record, model: ModelRow) -> FigureRow | None:
    """Diversity as a share of the base model's."""
    base, own = record.models[0].figures.get("diversity"), model.figures.get("diversity")
    if base is None or own is None or not base.value:
        return None
    return _each(own, lambda value: value / base.value)


def _each(figure: FigureRow, change: Callable[[float], float]) -> FigureRow:
    def ends(value: float | None) -> float | None:
        return None if value is None else change(value)

    return FigureRow(value=change(figure.value), low=ends(figure.low), high=ends(figure.high))


def outcome(record: Record) -> Outcome:
    """Tell it by `nablagfn evaluate` if that was run, else by the training's before and after."""
    if record.final is not None:
        base, final = record.models[0].figures, record.final.figures
        seen = [figures.get("recognised") for figures in (base, final)]
        moved = final.get("path_kl")
        return Outcome(
            gain=gain(record, record.final),
            kept=kept(record, record.final),
            recognised=100 * (seen[1].value - seen[0].value) if seen[0] and seen[1] else None,
            path_kl=moved.value if moved else None,
            source="nablagfn evaluate",
            reward=final.get("reward"),
        )
    before, after = record.evaluation.before, record.evaluation.after
    if before is None or after is None:
        return Outcome()
    known = before.recognised is not None and after.recognised is not None
    points = 100 * ((after.recognised or 0.0) - (before.recognised or 0.0)) if known else None
    return Outcome(
        gain=FigureRow(value=(after.reward_mean - before.reward_mean) / (before.reward_std or 1.0)),
        kept=FigureRow(value=after.diversity / before.diversity) if before.diversity else None,
        recognised=points,
        path_kl=after.path_kl,
        source="nablagfn train",
        reward=FigureRow(value=after.reward_mean),
    )


def cards(record: Record) -> list[Card]:
    """The headline figures; empty until something was measured."""
    return _evaluated_cards(record) if record.final else _trained_cards(record)


def _evaluated_cards(record: Record) -> list[Card]:
    base, final, reached = record.models[0].figures, record.final, outcome(record)
    assert final is not None
    return [
        Card(
            name=title(key),
            meaning=meaning(key),
            before=number(base[key].value, key) if key in base else "",
            after=number(figure.value, key),
            change=reached.change(key),
            interval=interval(figure, key),
            headline=is_headline(key),
        )
        for key, figure in sorted(final.figures.items(), key=lambda item: place(item[0]))
    ]


def _trained_cards(record: Record) -> list[Card]:
    before, after, reached = record.evaluation.before, record.evaluation.after, outcome(record)
    if before is None or after is None:
        return []
    pairs = {
        "reward": (before.reward_mean, after.reward_mean),
        "diversity": (before.diversity, after.diversity),
        "recognised": (before.recognised, after.recognised),
        "path_kl": (before.path_kl, after.path_kl),
        "transport_cost": (before.transport_cost, after.transport_cost),
        **{key: (before.others.get(key), value) for key, value in after.others.items()},
    }
    return [
        Card(
            name=title(key),
            meaning=meaning(key) or "distance to the target, or its sampling floor",
            before=number(old, key),
            after=number(new, key),
            change=reached.change(key),
        )
        for key, (old, new) in pairs.items()
        if new is not None
    ]


def cost(record: Record) -> TrainingCost:
    """Add up what the training took."""
    counted = [row["model_evals"] for row in record.rows if row.get("model_evals") is not None]
    return TrainingCost(
        updates=record.updates,
        seconds=float(record.rows[-1].get("seconds") or 0.0) if record.rows else 0.0,
        evaluations=sum(counted) if counted else None,
        processes=record.versions.get("processes", "1"),
        device=record.versions.get("device", "unknown device"),
    )


def method(record: Record) -> str:
    """The method's name, and what makes a variant of it."""
    config = record.config
    name = str(config.experiment.method)
    if name == "draft-k":
        return f"draft-{config.method.draft_steps}"
    return f"{name}, no flow" if config.model.no_flow and name == "nabla-db" else name


def has_prior(record: Record) -> bool:
    """Whether the method has a prior term, so that β changes its result."""
    try:
        return find_method(record.config.experiment.method).has_prior
    except ConfigError:  # somebody's own, whose module is not here
        return True
