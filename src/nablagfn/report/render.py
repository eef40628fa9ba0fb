"""One self-contained HTML file: of one run, or of several side by side."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from ..config import ConfigError, drawn_with
from ..models.lora import FIRST_STATE
from ..runs.advice import advise
from ..runs.runfolder import RunFolder, write_atomic
from . import figures, tables
from .canvas import Plot
from .curves import curves, evaluated_curves
from .frontier import Point, checkpoint_frontier, run_frontier
from .kl_frontier import Spent, kl_by_step, kl_frontier
from .levels import levels
from .loading import how_to_load
from .pictures import Picture, embed
from .read import FigureRow, PointRow, Record, TargetFile, read, read_target

THUMBNAIL = 420  # width of a run's pictures in a comparison


@dataclass(frozen=True)
class Frame:
    """A grid of the slider, and when it was drawn."""

    label: str
    picture: Picture


@dataclass(frozen=True)
class Compared:
    """A run of a comparison."""

    number: int
    name: str
    method: str
    scale: str
    reward: str
    outcome: figures.Outcome
    cost: figures.TrainingCost
    picture: Picture | None


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("nablagfn.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["script"] = script
    environment.globals["script_hash"] = script_hash
    environment.filters["number"] = figures.number
    environment.filters["interval"] = figures.interval
    return environment


def script() -> Markup:
    """The slider's program. The page forbids every other script by its hash."""
    return Markup((Path(__file__).parent / "templates" / "slider.js").read_text(encoding="utf-8"))


def script_hash() -> str:
    """Return the hash that the page's Content-Security-Policy allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script().encode()).digest()).decode()


def build(folder: RunFolder) -> Path:
    """Write RUN/report.html. Raises ConfigError when the folder holds no run, or a damaged one."""
    write_atomic(folder.report, run_page(read(folder)))
    return folder.report


def compare(folders: Sequence[RunFolder], out: Path, target: Path | None = None) -> Path:
    """Write a comparison of several runs. Raises ConfigError as `build` does.

    target: a folder of `nablagfn target`, whose frontier is drawn above the runs.
    """
    if out.is_dir():
        raise ConfigError(f"--out={out} is a folder: give the name of the file to write")
    records = [read(folder) for folder in folders]
    best = shared_target(target, records).frontier if target is not None else []
    write_atomic(out, comparison_page(records, best))
    return out


def shared_target(folder: Path, records: Sequence[Record]) -> TargetFile:
    """What `nablagfn target` wrote there. Raises ConfigError where it is of another model or reward
    than some run; the sampler's steps may differ."""
    found = read_target(folder)
    for record in records:
        own = drawn_with(record.config)
        for key in ("model", "reward"):
            if found.settings.get(key) != own[key]:
                raise ConfigError(f"--target={folder} is of another {key} than {record.name}")
    return found


def run_page(record: Record) -> str:
    """The report of one run."""
    evaluated = record.evaluation.evaluated
    return (
        _environment()
        .get_template("run.html.j2")
        .render(
            run=record,
            config=record.config,
            method=figures.method(record),
            cards=figures.cards(record),
            source=figures.outcome(record).source,
            settings_of=evaluated.settings if evaluated and record.models else None,
            advice=advise(record.rows, record.diagnostics),
            pair=before_after(record),
            frames=frames(record),
            frontier=checkpoint_frontier(checkpoint_points(record)),
            evaluated=evaluated_curves(record.models, evaluated.settings.confidence)
            if evaluated
            else [],
            curves=curves(record.rows),
            levels=levels(record.diagnostics),
            extremes=tables.extremes(record),
            prompts=tables.per_prompt(record),
            plane=run_plane(record),
            step_kl=step_kl(record),
            certificate=record.final.certificate if record.final else None,
            certified=tables.certificate(record),
            reached=tables.reached(record),
            perfect=embed(record.target_pictures) if record.target_pictures else None,
            code=code(record),
            settings=tables.settings(record.config),
            cost=figures.cost(record),
        )
    )


def comparison_page(records: Sequence[Record], best: Sequence[PointRow] = ()) -> str:
    """Several runs side by side. best: the frontier above them, else that of the first with one."""
    runs = [compared(i + 1, record) for i, record in enumerate(records)]
    return (
        _environment()
        .get_template("comparison.html.j2")
        .render(
            runs=runs,
            frontier=run_frontier(run_points(records, runs)),
            plane=compared_plane(records, runs, best),
            base=shared_base(records),
            keys=tables.differing(records),
            differences=tables.differences(records),
            sources=sorted({run.outcome.source for run in runs if run.outcome.source}),
            rewards=sorted({run.reward for run in runs}),
            models=sorted({record.config.pretrained.model for record in records}),
        )
    )


def before_after(record: Record) -> list[tuple[str, Picture]]:
    """The same-seed grids that the run has: title, picture."""
    titles = {"before": "before: the pretrained model", "after": "after: finetuned"}
    found = [(title, embed(record.folder.grids / f"{name}.png")) for name, title in titles.items()]
    return [(title, picture) for title, picture in found if picture]


def frames(record: Record) -> list[Frame]:
    """The fixed-seed grids over training."""
    update = {int(row["epoch"]): row["update"] for row in record.rows if row.get("epoch")}
    found = []
    for epoch, path in record.grids():
        picture = embed(path)
        label = f"epoch {epoch}, update {update[epoch]}" if epoch in update else f"epoch {epoch}"
        if picture:
            found.append(Frame("the pretrained model" if epoch == 0 else label, picture))
    return found


def checkpoint_points(record: Record) -> list[Point]:
    """The evaluated models in the plane of gain and diversity."""
    found = []
    for model in record.models:
        gain, kept = figures.gain(record, model), figures.kept(record, model)
        if gain and kept:
            found.append(Point(gain, kept, "base" if model.update == 0 else str(model.update)))
    return found


def run_points(records: Sequence[Record], runs: Sequence[Compared]) -> list[Point]:
    """The runs in the plane of gain and diversity, by their numbers."""
    return [
        Point(
            gain=run.outcome.gain,
            kept=run.outcome.kept,
            label=str(run.number),
            group=run.method,
            scale=record.config.model.reward_scale if figures.has_prior(record) else None,
        )
        for record, run in zip(records, runs, strict=True)
        if run.outcome.gain and run.outcome.kept
    ]


def run_plane(record: Record) -> Plot | None:
    """The run's checkpoints in the plane of KL and reward, under the best there is."""
    return kl_frontier(record.best, checkpoints_spent(record))


def checkpoints_spent(record: Record) -> list[Spent]:
    """Each evaluated checkpoint's path KL and reward."""
    return [
        Spent(model.figures["path_kl"], model.figures["reward"], str(model.update), "this run")
        for model in record.models
        if model.update and {"path_kl", "reward"} <= model.figures.keys()
    ]


def step_kl(record: Record) -> Plot | None:
    """Where along the path the result's KL is spent."""
    made = record.final.certificate if record.final else None
    return kl_by_step(made.step_kl, record.folder.times()) if made and made.step_kl else None


def compared_plane(
    records: Sequence[Record], runs: Sequence[Compared], best: Sequence[PointRow]
) -> Plot | None:
    """The runs in the plane of KL and reward, by their numbers; None for several rewards."""
    if len({run.reward for run in runs}) > 1:
        return None
    found = [
        Spent(FigureRow(value=run.outcome.path_kl), run.outcome.reward, str(run.number), run.method)
        for run in runs
        if run.outcome.path_kl is not None and run.outcome.reward is not None
    ]
    return kl_frontier(best or shared_best(records), found, "plane")


def shared_best(records: Sequence[Record]) -> list[PointRow]:
    """The best reward for each KL of the first run that knows it; empty where that is not the
    others', for another model, reward or prompts."""
    drawn = [drawn_with(record.config) for record in records]
    evaluated = [record.evaluation.evaluated for record in records]
    prompts = {tuple(found.settings.prompts) for found in evaluated if found}
    same = all(own[key] == drawn[0][key] for own in drawn for key in ("model", "reward"))
    if not same or len(prompts) > 1:
        return []
    return next((record.best for record in records if record.best), [])


def compared(number: int, record: Record) -> Compared:
    scale = f"{record.config.model.reward_scale:g}" if figures.has_prior(record) else "–"
    return Compared(
        number=number,
        name=record.name,
        method=figures.method(record),
        scale=scale,
        reward=record.config.experiment.reward_fn,
        outcome=figures.outcome(record),
        cost=figures.cost(record),
        picture=embed(record.folder.grids / "after.png", THUMBNAIL),
    )


def shared_base(records: Sequence[Record]) -> Picture | None:
    """The pretrained model's grid, where all runs have the same."""
    files = [record.folder.grids / "before.png" for record in records]
    if not all(file.is_file() for file in files):
        return None
    return embed(files[0], THUMBNAIL) if len({file.read_bytes() for file in files}) == 1 else None


def code(record: Record) -> str:
    """How to draw with the run's LoRA; empty without a checkpoint, and in a world."""
    weights = record.folder.checkpoints / record.result
    if not record.result or not (weights / "pytorch_lora_weights.safetensors").is_file():
        return ""
    prompt = next(iter(record.prompts), "a cat")
    folder = record.folder
    strengths = folder.lora_strengths(record.config)
    first = weights / FIRST_STATE
    return how_to_load(
        record.config,
        prompt,
        str(weights),
        "",
        folder.times(),
        strengths,
        str(first) if first.is_file() else "",
    )
