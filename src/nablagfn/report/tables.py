"""Tables of a report, as rows of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config import Config, flatten
from .figures import interval, is_headline, number, place, title
from .pictures import ContactSheet, Picture, load
from .read import Record, SampleRow

SHOWN = 6  # best and worst samples
PLACES = ("saving.", "logging.")  # where and how often is written: no part of a method


@dataclass(frozen=True)
class SettingRow:
    """An option; changed: differs from its default."""

    key: str
    value: str
    changed: bool


@dataclass(frozen=True)
class Table:
    """A header and rows of cells; the first cell of a row names it."""

    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Shown:
    """A picture with the pretrained model's of the same seed, its prompt and its reward."""

    prompt: str
    reward: str
    picture: Picture
    before: Picture | None = None
    reward_before: str = ""


@dataclass(frozen=True)
class Extremes:
    """The samples with the highest and the lowest reward."""

    best: list[Shown]
    worst: list[Shown]


def settings(config: Config) -> list[SettingRow]:
    """Every option, in the order of the config."""
    defaults = flatten(Config())
    return [SettingRow(k, text(v), v != defaults[k]) for k, v in flatten(config).items()]


def text(value: Any) -> str:
    """An option's value for people."""
    if isinstance(value, tuple):
        return ", ".join(str(part) for part in value) or "–"
    if isinstance(value, float):
        return f"{value:g}"
    return "–" if value == "" else str(value)


def differing(records: Sequence[Record]) -> list[str]:
    """Options in which runs differ, but for where and how often they write."""
    flat = [flatten(record.config) for record in records]
    return [
        key
        for key in flat[0]
        if not key.startswith(PLACES) and any(other[key] != flat[0][key] for other in flat)
    ]


def differences(records: Sequence[Record]) -> list[list[str]]:
    """Return each differing option with its value in each run."""
    flat = [flatten(record.config) for record in records]
    return [[key, *(text(values[key]) for values in flat)] for key in differing(records)]


CERTIFIED = {
    "efficiency": ("efficiency", "KL that the best sampler needs for this reward, over that spent"),
    "path_kl": ("path KL", "spent, in nats"),
    "least_kl": ("least KL", "what the best sampler needs for this reward, in nats"),
    "kl_to_target": ("KL to the target", "KL(p_θ‖p*) of the paths, in nats; 0 is perfect"),
    "kl_from_target": ("KL from the target", "KL(p*‖p_θ): large where a part of it is lost"),
    "ess": ("ESS", "effective share of its own samples under their weights; 100 % is perfect"),
    "free_energy": ("free energy", "β·E[r] − KL, which a method with a prior maximises"),
    "free_energy_base": ("… of the pretrained model", "β·E[r]"),
    "log_z": ("… at best, by both models' paths", "log Z, the free energy of a perfect sampler"),
    "log_z_base": ("… at best, by base samples", "log Z again"),
    "reward_weighted": ("weighted reward", "E*[r], by both models' paths"),
    "target_reward": ("reward of the target", "E*[r], by samples of the pretrained model"),
    "target_kl": ("KL of the target", "KL(p*‖p_#), by the same, in nats"),
}


def certificate(record: Record) -> Table | None:
    """The result against its target; None before `nablagfn evaluate`."""
    made = record.final.certificate if record.final else None
    if made is None or not made.figures:
        return None
    rows = []
    for key, (name, meaning) in CERTIFIED.items():
        figure = made.figures.get(key)
        if figure is not None:
            kind = "recognised" if key in ("ess", "efficiency") else ""  # in per cent
            ends = interval(figure, kind) or "–"
            rows.append([name, number(figure.value, kind), ends, meaning])
    return Table(["figure", "value", "interval", "what it is"], rows)


def reached(record: Record) -> Table | None:
    """Before, after and target by the training's own samples; None where it is not known."""
    before, after = record.evaluation.before, record.evaluation.after
    beside = record.evaluation.against_target
    if before is None or after is None or beside is None or beside.target_reward is None:
        return None
    figures = {
        "reward": (before.reward_mean, after.reward_mean, beside.target_reward),
        "path_kl": (None, after.path_kl, beside.target_kl),
        "diversity": (before.diversity, after.diversity, beside.target_diversity),
        "recognised": (before.recognised, after.recognised, beside.target_recognised),
    }
    rows = [
        [title(key), *(number(value, key) for value in values)]
        for key, values in figures.items()
        if values[1] is not None
    ]
    rows += [
        [name, *(number(value, "recognised") for value in (row.before, row.after, row.target))]
        for name, row in beside.shares.items()
    ]
    rows.append(["gain of the reward", "", number(beside.gain_reached, "recognised"), "100.0%"])
    rows.append(["least KL", "", number(beside.least_kl), ""])
    rows.append(["efficiency", "", number(beside.efficiency, "recognised"), "100.0%"])
    return Table(["figure", "before", "after", "target"], rows)


def per_prompt(record: Record) -> Table | None:
    """Each prompt's figures before and after, as `nablagfn evaluate` measured them."""
    if record.final is None:
        return None
    base, final = record.models[0].prompts, record.final.prompts
    known = dict.fromkeys(key for figures in final.values() for key in figures)
    keys = sorted((key for key in known if is_headline(key) and key != "path_kl"), key=place)
    if not keys:
        return None
    header = ["prompt"]
    for key in keys:
        header += [f"{title(key)} before", "after"]
    rows = []
    for prompt, figures in final.items():
        row = [prompt]
        for key in keys:
            old, new = base.get(prompt, {}).get(key), figures.get(key)
            row += [number(old, key), number(new, key)]
        rows.append(row)
    return Table(header, rows)


def extremes(record: Record) -> Extremes | None:
    """Best and worst samples of the run's result, each beside the pretrained model's.

    None where pictures were not kept, and in a world, where a picture is no single sample.
    """
    if record.final is None or record.evaluation.evaluated is None:
        return None
    reward = record.evaluation.evaluated.settings.trained_reward
    after, before = contact_sheet(record, record.final.name), contact_sheet(record, "base")
    if after is None:
        return None
    known = [sample for sample in after.sheet.samples if reward in sample.rewards]
    ranked = sorted(known, key=lambda sample: -sample.rewards[reward])
    count = min(SHOWN, len(ranked) // 2)
    return Extremes(
        best=[_shown(sample, after, before, reward) for sample in ranked[:count]],
        worst=[_shown(sample, after, before, reward) for sample in ranked[len(ranked) - count :]],
    )


def _shown(
    sample: SampleRow, after: ContactSheet, before: ContactSheet | None, reward: str
) -> Shown:
    """A sample beside that of the base model with the same prompt and noise."""
    was = before.same(sample) if before else None
    return Shown(
        prompt=sample.prompt,
        reward=number(sample.rewards[reward]),
        picture=after.cut(sample),
        before=before.cut(was) if before and was else None,
        reward_before=number(was.rewards.get(reward)) if was else "",
    )


def contact_sheet(record: Record, name: str) -> ContactSheet | None:
    """The thumbnails of evaluation/NAME, None where there are none."""
    sheet, file = record.sheet(name), record.evaluated_pictures(name)
    if sheet is None or sheet.thumbnail is None or not file.is_file():
        return None
    return ContactSheet(file, load(file), sheet)
