"""`nablagfn target`: the target p_pretrained·exp(βr) of a run, before any training.

Samples of the pretrained model are kept piece by piece, so that a second start goes on where the
first was cut, and more images per prompt go on from fewer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ..config import Config, ConfigError, drawn_with
from ..core.types import Metadata
from ..evaluation import Evaluator, thumbnails
from ..evaluation.certificate import Bootstrap, FrontierPoint, frontier
from ..evaluation.draws import DrawnSamples, Draws, Piece, pieces
from ..evaluation.target import TargetRow, resampled, spread, target_row, warnings
from ..families import find_family
from ..methods.registry import check_settings, target_of
from ..metrics import tilting
from ..metrics.tilting import PromptRows
from ..prompts import PromptSet
from ..report.kl_frontier import save_frontier
from ..runs.progress import Bar
from ..runs.runfolder import RunFolder, run_folder
from ..runtime.distributed import from_main_process
from .assemble import (
    build_evaluator,
    build_prompts,
    build_view,
    check_names,
    some_prompts,
    sources_of,
)
from .evaluate import CONFIDENCE, RESAMPLES, cell

IMAGES_PER_PROMPT = 64
MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of 1/std(r): the usual β
SHOWN_PROMPTS, SHOWN_IMAGES = 4, 8  # of the picture
COLUMNS = 3  # targets in a table
FAR = 12.0  # nats, of which nobody draws enough images
SD = "sd"
PLOT, PICTURES = "frontier.png", "pictures.png"
FILES = ("target.json", PLOT, PICTURES)


@dataclass(frozen=True)
class Budget:
    """How far to go: KL in nats, or a gain of the mean reward, in standard deviations if in_sd."""

    kl: float | None = None
    gain: float | None = None
    in_sd: bool = False

    @staticmethod
    def read(kl: float | None, gain: str) -> Budget:
        """From the command line: `--kl 2`, or `--gain 1sd` or 0.4. Raises ConfigError."""
        if kl is not None and gain:
            raise ConfigError("give --kl or --gain, not both")
        if kl is not None and not 0 < kl < math.inf:
            raise ConfigError(f"--kl {kl:g}: give nats, more than 0")
        if not gain:
            return Budget(kl)
        in_sd = gain.lower().endswith(SD)
        try:
            value = float(gain[: -len(SD)] if in_sd else gain)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise ConfigError(
                f"--gain {gain}: give standard deviations (1sd) or reward (0.4), more than 0"
            )
        return Budget(gain=value, in_sd=in_sd)


@dataclass(frozen=True)
class TargetRequest:
    """What is asked for; empty values stand for the defaults.

    betas: by default MULTIPLES of 1/std(r). images_per_prompt: 64; in a world those of
    evaluation.images_per_prompt. num_prompts: so many of the prompts, evenly spread; 0: all. out:
    the folder.
    """

    betas: tuple[float, ...] = ()
    images_per_prompt: int = 0
    num_prompts: int = 0
    budget: Budget = Budget()
    out: Path | None = None


@dataclass(frozen=True)
class TargetPlan:
    """A request that has been checked. images: per prompt."""

    config: Config
    prompts: tuple[str, ...]
    about: Mapping[str, Metadata]
    images: int
    request: TargetRequest
    folder: Path

    @property
    def settings(self) -> dict[str, Any]:
        """What the draws depend on."""
        config = self.config
        told = [self.about.get(prompt, {}) for prompt in self.prompts]
        return {
            **drawn_with(config),
            "reward's source": sources_of(config.experiment.reward_fn),
            "prompts": list(self.prompts),
            "metadata": told if any(told) else [],
            "seed": config.evaluation.seed,
            "extractor": config.evaluation.extractor,
        }


@dataclass(frozen=True)
class TargetResult:
    """What `nablagfn target` found. base: the pretrained model itself (β = 0). chosen: the β of a
    budget, or that of the picture. frontier: the best reward for each KL. settings: `drawn_with`.
    """

    folder: Path
    base: TargetRow
    rows: tuple[TargetRow, ...]
    chosen: float | None
    frontier: tuple[FrontierPoint, ...]
    std: float
    images_per_prompt: int
    prompts: tuple[str, ...]
    warnings: tuple[str, ...]
    settings: dict[str, Any]

    @property
    def files(self) -> list[str]:
        """The names of what was written."""
        return [name for name in FILES if (self.folder / name).is_file()]

    def as_dict(self) -> dict[str, Any]:
        """target.json, without NaN."""
        found = {k: v for k, v in asdict(self).items() if k != "folder"}
        clean: dict[str, Any] = json.loads(json.dumps(found), parse_constant=lambda constant: None)
        return clean


# -------------------------------------------------------------------------------- checks


def plan_target(config: Config, request: TargetRequest, run: RunFolder | None = None) -> TargetPlan:
    """Check everything that can be known before anything is loaded. Raises ConfigError.

    run: whose prompts are taken, the held-out ones where there are any.
    """
    check_settings(config)
    check_names(config)
    bad = [beta for beta in request.betas if not 0 < beta < math.inf]
    if bad:
        raise ConfigError(f"--betas {bad[0]:g}: give numbers above 0")
    own = find_family(config).own is not None
    usual = config.evaluation.images_per_prompt if own else IMAGES_PER_PROMPT
    images = request.images_per_prompt or usual
    if images < 4:
        raise ConfigError(f"--images-per-prompt {images}: give 4 or more")
    kl = request.budget.kl
    if kl is not None and kl > math.log(images) - 1:
        advice = "ask for less"
        if kl < FAR:
            advice = f"raise --images-per-prompt to {math.ceil(math.exp(kl + 1))}"
        raise ConfigError(
            f"--kl {kl:g}: {images} images per prompt show no more than log M − 1 = "
            f"{math.log(images) - 1:.2f} nats; {advice}"
        )
    known = prompts_of(config, run)
    chosen = some_prompts(known, request.num_prompts)
    folder = request.out or folder_of(config, run)
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise ConfigError(f"--out {folder}: {place} is a file, give a folder")
    return TargetPlan(config, chosen, known.about, images, request, folder)


def prompts_of(config: Config, run: RunFolder | None) -> PromptSet:
    """Those that are measured."""
    if run is None:
        return build_prompts(config).evaluation
    trained, held_out = run.prompt_sets()
    return PromptSet(tuple(trained), tuple(held_out), run.about()).evaluation


def folder_of(config: Config, run: RunFolder | None) -> Path:
    """RUN/target, or target_MODEL_REWARD beside the runs."""
    if run is not None:
        return run.path / "target"
    model = config.pretrained.model.replace("/", "-")
    place = run_folder(config, "").path
    reward = place.name.rpartition("_seed")[0]
    return place.with_name("_".join(dict.fromkeys(("target", model, reward))))


# -------------------------------------------------------------------------------- the work


def state_target(
    config: Config, request: TargetRequest, run: RunFolder | None = None, *, show: bool = True
) -> TargetResult:
    """Draw what is missing, and state the target; every process returns the same. ConfigError."""
    return carry_out(plan_target(config, request, run), show=show)


def carry_out(plan: TargetPlan, *, show: bool = True) -> TargetResult:
    """`state_target` with a plan that has been made."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    main = accelerator.is_main_process
    draws, wanted = Draws(plan.folder / "draws"), list(pieces(len(plan.prompts), plan.images))
    if main:
        draws.check(plan.settings)
    todo = from_main_process([piece for piece in wanted if not draws.has(piece)])
    evaluator = build_evaluator(plan.config, accelerator, about=plan.about) if todo else None
    with RunFolder(plan.folder).lock() if main else nullcontext():
        if main:
            draws.open(plan.settings)
        if evaluator is not None:
            draw(plan, evaluator, draws, todo, show=show)
        result = finish(plan, draws.together(wanted)) if main else None
    found = from_main_process(result)
    assert found is not None
    return found


def draw(
    plan: TargetPlan, evaluator: Evaluator, draws: Draws, todo: Sequence[Piece], *, show: bool
) -> None:
    """Draw the pieces in order, shared by all processes; the first writes."""
    count, main = len(plan.prompts), evaluator.accelerator.is_main_process
    whole = sum(count * (piece.last - piece.first) for piece in todo)
    with Bar("drawing", whole, show=show and main) as bar:
        for piece in todo:
            samples = evaluator.samples(
                piece.asked(plan.prompts),
                reference=True,
                labelled=True,
                first=piece.first * count,
                on_done=bar.advance,
                keep=thumbnails,
            )
            if main:
                draws.write(piece, samples)


def finish(plan: TargetPlan, drawn: DrawnSamples) -> TargetResult:
    """Figures, picture and plot of the draws. Raises ConfigError for rewards without a spread."""
    result = summary(plan, drawn)
    for name in (PLOT, PICTURES):  # of another β, perhaps
        (plan.folder / name).unlink(missing_ok=True)
    RunFolder(plan.folder).write_json("target.json", result.as_dict())
    save_frontier(result.frontier, plan.folder / PLOT)
    if result.chosen is not None:
        save_picture(plan, drawn, result.chosen)
    return result


def summary(plan: TargetPlan, drawn: DrawnSamples) -> TargetResult:
    """The target at every β. Raises ConfigError."""
    reward, groups = drawn.measured.scores["reward"], PromptRows.of(drawn.measured.prompts)
    if not bool(reward.isfinite().all()):
        raise ConfigError(
            f"config.experiment.reward_fn={plan.config.experiment.reward_fn!r}: some scores are "
            "not finite, see nablagfn check-reward"
        )
    std = spread(reward)
    if not bool((reward[groups.rows] != reward[groups.rows[:, :1]])[groups.there].any()):
        raise ConfigError(
            f"config.experiment.reward_fn={plan.config.experiment.reward_fn!r} scores all samples "
            "of a prompt alike: at every β the target is the pretrained model"
        )
    bootstrap = Bootstrap.of(
        drawn.measured.prompts, RESAMPLES, CONFIDENCE, plan.config.evaluation.seed
    )
    budget = beta_of(plan.request.budget, reward, groups, std)
    betas = plan.request.betas or tuple(float(f"{multiple / std:.2g}") for multiple in MULTIPLES)
    if budget is not None:
        betas = (*betas, budget)
    rows = tuple(target_row(drawn, beta, bootstrap) for beta in sorted(set(betas)))
    return TargetResult(
        folder=plan.folder,
        base=target_row(drawn, 0.0, bootstrap),
        rows=rows,
        chosen=budget if budget is not None else of_picture(plan.config, rows, reward, groups),
        frontier=tuple(frontier(drawn.measured, bootstrap)),
        std=std,
        images_per_prompt=plan.images,
        prompts=plan.prompts,
        warnings=(*no_aim(plan.config), *warnings(rows, plan.images, len(plan.prompts))),
        settings=drawn_with(plan.config),
    )


def no_aim(config: Config) -> list[str]:
    """Why a run with this config would not aim at the target, if it would not."""
    aim = target_of(config)
    return [] if aim.beta is not None else [f"a run would not aim at this: {aim.why}"]


def beta_of(budget: Budget, reward: Tensor, groups: PromptRows, std: float) -> float | None:
    """The β of a budget; None without one. Raises ConfigError where the samples do not reach it."""
    try:
        if budget.kl is not None:
            return tilting.beta_of_kl(reward, budget.kl, groups)
        if budget.gain is not None:
            gain = budget.gain * (std if budget.in_sd else 1)
            wanted = float(tilting.plain_mean(reward, groups)) + gain
            return tilting.beta_of_reward(reward, wanted, groups)
    except ValueError as error:
        raise ConfigError(f"{error}: raise --images-per-prompt, or ask for less") from None
    return None


def of_picture(
    config: Config, rows: Sequence[TargetRow], reward: Tensor, groups: PromptRows
) -> float | None:
    """The run's own β where the samples show it, else the largest whose effective samples are
    twice as many as the picture shows, so that few are there twice."""
    own = config.model.reward_scale
    if float(tilting.target_kl(reward, own, groups)) <= tilting.most_kl(groups):
        return own
    shown = [row for row in rows if row.reliable]
    many = [row.beta for row in shown if row.ess.value * groups.fewest >= 2 * SHOWN_IMAGES]
    return max(many, default=min((row.beta for row in shown), default=None))


def save_picture(plan: TargetPlan, drawn: DrawnSamples, beta: float) -> None:
    """pictures.png: of some prompts the pretrained model's samples, and below them a perfect
    finetune's; in a world its target beside these, at the world's own β."""
    view = build_view(plan.config)
    place = plan.folder / PICTURES
    images = drawn.images
    if images.ndim != 4:
        if beta == plan.config.model.reward_scale:
            rows = resampled(drawn, beta, plan.images, plan.config.evaluation.seed)
            view.save(images[rows], [drawn.measured.prompts[i] for i in rows], place, 1)
        return
    columns = min(SHOWN_IMAGES, plan.images)
    prompts = PromptSet(plan.prompts).spread(min(SHOWN_PROMPTS, len(plan.prompts)))
    perfect = resampled(drawn, beta, columns, plan.config.evaluation.seed).tolist()
    found: list[int] = []
    for prompt in prompts:
        place_of = plan.prompts.index(prompt)
        own = [i for i, asked in enumerate(drawn.measured.prompts) if asked == prompt]
        found += own[:columns] + perfect[place_of * columns : (place_of + 1) * columns]
    view.save(
        images[found].float() / 255, [drawn.measured.prompts[i] for i in found], place, columns
    )


# -------------------------------------------------------------------------------- the table


def tables(result: TargetResult) -> Iterator[Table]:
    """One column per β, the interval below the value; a few each, so that they fit on a screen."""
    rows = [result.base, *result.rows]
    for start in range(0, len(rows), COLUMNS):
        shown = rows[start : start + COLUMNS]
        made = Table(
            title="the target p_pretrained·exp(βr), drawn from the pretrained model",
            caption=(
                f"{len(result.prompts)} prompts x {result.images_per_prompt} images, "
                f"std(r) {result.std:.3g}; 95% intervals for other noise and the same prompts"
            ),
            box=SIMPLE,
        )
        made.add_column("figure", no_wrap=True)
        for row in shown:
            made.add_column(f"β = {row.beta:.3g}", justify="right", no_wrap=True)
        cells = [figures_of(row) for row in shown]
        for name in figures_of(result.base):
            made.add_row(escape(name), *(own.get(name, "–") for own in cells))
        yield made


def figures_of(row: TargetRow) -> dict[str, str]:
    """A target's figures in words; none where the samples do not show it."""
    if not row.reliable:
        return {}
    found = {
        "E*[r]": cell(asdict(row.reward)),
        "gain, std(r)": f"{row.gain:+.2f}",
        "KL*, nats": cell(asdict(row.kl)),
        "ESS": f"{row.ess.value:.0%}",
        "diversity": cell(asdict(row.diversity)),
    }
    if row.recognised is not None:
        found["recognised"] = f"{row.recognised.value:.1%}"
    return found | {name: f"{share.value:.1%}" for name, share in row.shares.items()}
