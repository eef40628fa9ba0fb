"""`nablagfn evaluate RUN`: figures of the base model and every checkpoint, from the same noise.

Everything is checked before anything is loaded. Finished models are kept, so a second start goes
on where the first was cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.box import SIMPLE
from rich.table import Table

from .. import rewards
from ..config import Config, ConfigError, set_option
from ..core.types import Metadata
from ..evaluation import Evaluator, Measured, figures, per_prompt, thumbnails
from ..evaluation.certificate import Bootstrap, certificate, frontier
from ..evaluation.files import read_samples, write_samples
from ..evaluation.resampling import distinct_share, draw_of_both, resample
from ..families import find_family
from ..methods.record import Aim
from ..methods.registry import target_of
from ..metrics.intervals import Interval
from ..models.locate import critics_of
from ..prompts import PromptSet, read_prompts
from ..rewards.weights import CLIP_L, Finder
from ..runs.hub import sha256_of
from ..runs.progress import Bar
from ..runs.runfolder import RunFolder, complete_checkpoints
from ..runtime.distributed import from_main_process
from ..training.checkpoint import guard_factor, load_policy
from .assemble import (
    beta_to_resample,
    build_evaluator,
    check_names,
    some_prompts,
    sources_of,
)

IMAGES_PER_PROMPT = 16
RESAMPLES = 1_000
CONFIDENCE = 0.95
BASE = "base"
OF_ONE_PATH = ("path_kl", "drift")  # of a sampler and its noise: nothing of resampled paths
COLUMNS = 3  # models in a table


@dataclass(frozen=True)
class EvaluationRequest:
    """What is asked for; empty values stand for the defaults of the run.

    rewards: held-out rewards; None: those of `evaluation.held_out_rewards` and text alignment.
    resample: paths for each sample of a resampled model; 0: no such models.
    """

    prompts: tuple[str, ...] = ()
    prompt_file: str = ""
    num_prompts: int = 0
    images_per_prompt: int = 0
    rewards: tuple[str, ...] | None = None
    checkpoints: tuple[str, ...] = ()
    extractor: str = ""
    weights: str = ""
    batch_size: int = 0
    resample: int = 0


@dataclass(frozen=True)
class Plan:
    """A request that has been checked against its run. config: the run's, as changed by it."""

    folder: RunFolder
    config: Config
    prompts: tuple[str, ...]
    images_per_prompt: int
    held_out: tuple[str, ...]
    checkpoints: tuple[Path, ...]
    about: Mapping[str, Metadata]
    resample: int = 0

    @property
    def asked(self) -> list[str]:
        """The prompt of each sample."""
        return [prompt for prompt in self.prompts for _ in range(self.images_per_prompt)]

    @property
    def models(self) -> dict[str, Path | None]:
        """The base model and the checkpoints, oldest first, by name."""
        return {BASE: None, **{path.name: path for path in self.checkpoints}}

    def resampled(self, name: str) -> str:
        """The name of a checkpoint's resampled samples."""
        return f"{name}_resampled{self.resample}"

    @property
    def all_models(self) -> dict[str, Path | None]:
        """`models`, and the resampled ones."""
        found = self.models
        if not self.resample:
            return found
        again = {self.resampled(path.name): path for path in self.checkpoints}
        return {**found, **again}

    def paths(self, name: str) -> int:
        """How many paths are drawn for each sample of a model."""
        return self.resample if name not in self.models else 1

    @property
    def settings(self) -> dict[str, Any]:
        """What the figures depend on, beside the model."""
        trained = self.config.experiment.reward_fn
        own = find_family(self.config).own
        told = [self.about.get(prompt, {}) for prompt in self.prompts]
        sources = sources_of(" ".join((trained, *self.held_out)))
        options = self.config.reward.model_dump(mode="json", exclude_defaults=True)
        return {
            "prompts": list(self.prompts),
            "images_per_prompt": self.images_per_prompt,
            "seed": self.config.evaluation.seed,
            "extractor": "points" if own else self.config.evaluation.extractor,
            "rewards": [trained, *self.held_out],
            "trained_reward": trained,
            **({"metadata": told} if any(told) else {}),
            **({"sources": sources} if sources else {}),
            **({"reward_options": options} if options else {}),
        }

    def settings_of(self, checkpoint: Path | None) -> dict[str, Any]:
        """The same, and the digest of the model's weights."""
        weights = "" if checkpoint is None else sha256_of(checkpoint / "policy.safetensors")
        return {**self.settings, "weights": weights}


# -------------------------------------------------------------------------------- checks


def make_plan(folder: RunFolder, request: EvaluationRequest) -> Plan:
    """Check everything that can be known before anything is loaded. Raises ConfigError."""
    config = folder.config()
    if request.extractor:
        set_option(config, "evaluation.extractor", request.extractor)
    if request.weights:
        set_option(config, "reward.weights", request.weights)
    if request.batch_size:
        set_option(config, "evaluation.batch_size", request.batch_size)
    check_names(config)
    own = find_family(config).own is not None
    return Plan(
        folder,
        config,
        choose_prompts(folder, config, request),
        choose_count(config, request, own),
        choose_rewards(config, request, own),
        choose_checkpoints(folder, request.checkpoints),
        known_about(folder, request),
        choose_paths(config, request),
    )


def choose_paths(config: Config, request: EvaluationRequest) -> int:
    """K of the resampled models; 0 for none. Raises ConfigError where there is no target."""
    if request.resample:
        beta_to_resample(config, request.resample)
    return request.resample


def known_about(folder: RunFolder, request: EvaluationRequest) -> Mapping[str, Metadata]:
    """The metadata of the run's prompts, and of the file's."""
    if not request.prompt_file:
        return folder.about()
    return {**folder.about(), **read_prompts(Path(request.prompt_file).expanduser()).about}


def choose_checkpoints(folder: RunFolder, names: Sequence[str]) -> tuple[Path, ...]:
    """All complete ones, or those named, oldest first. Raises ConfigError."""
    found = {path.name: path for path in complete_checkpoints(folder.checkpoints)}
    unknown = [name for name in names if name not in found]
    if not found or unknown:
        raise ConfigError(
            f"{folder.path} has no checkpoint {unknown[0] if unknown else 'yet'}; there is: "
            + (", ".join(found) or "none")
        )
    return tuple(path for name, path in found.items() if not names or name in names)


def choose_prompts(
    folder: RunFolder, config: Config, request: EvaluationRequest
) -> tuple[str, ...]:
    """Those given, else the run's held-out prompts, else its prompts. Raises ConfigError."""
    if request.prompts and request.prompt_file:
        raise ConfigError("give --prompts or --prompt-file, not both")
    given: Sequence[str] = request.prompts
    if request.prompt_file:
        given = read_prompts(Path(request.prompt_file).expanduser()).prompts
    if not given:
        trained, held_out = folder.prompt_sets()
        given = held_out or trained
    chosen = some_prompts(PromptSet(tuple(given)), request.num_prompts)
    own = find_family(config).own
    if own:
        own.check_prompts(config, chosen)
    return chosen


def choose_count(config: Config, request: EvaluationRequest, own: bool) -> int:
    """Samples per prompt; by default those of the run in a world, whose points cost little."""
    usual = config.evaluation.images_per_prompt if own else IMAGES_PER_PROMPT
    count = request.images_per_prompt or usual
    if count < 2:
        raise ConfigError(f"--images-per-prompt {count}: give at least 2, diversity needs pairs")
    return count


def choose_rewards(config: Config, request: EvaluationRequest, own: bool) -> tuple[str, ...]:
    """Names of the held-out rewards, the trained one left out. Raises ConfigError."""
    names = request.rewards
    if own and names:
        raise ConfigError(f"--rewards {names[0]}: a world has its own reward and no other")
    if names is None:
        names = () if own else (*config.evaluation.held_out_rewards, *text_alignment(config))
    for name in names:
        try:
            rewards.check_names(name)
        except ConfigError as error:
            raise ConfigError(f"--rewards {name}: {error}") from None
    return tuple(n for n in dict.fromkeys(names) if n != config.experiment.reward_fn)


def text_alignment(config: Config) -> tuple[str, ...]:
    """The reward that tells how well pictures fit their prompts, where its weights are there."""
    critics = critics_of(config.pretrained.model)
    if critics is not None and (critics / "alignment.safetensors").is_file():
        return ("tiny-alignment",)
    there = Finder("clipscore", config.reward.weights).available(CLIP_L)
    return ("clipscore",) if there else ()


# -------------------------------------------------------------------------------- the work


def evaluate(folder: RunFolder, request: EvaluationRequest, *, show: bool = True) -> dict[str, Any]:
    """Measure a run's models and write its evaluation.json; returns what is under "evaluated".

    The work is shared by all processes; only the first writes. Raises ConfigError.
    """
    return carry_out(make_plan(folder, request), show=show)


def evaluate_run(
    run: str | Path, request: EvaluationRequest | None = None, *, show: bool = True
) -> dict[str, Any]:
    """`evaluate` by the folder's path, as `RunResult.folder` has it. Raises ConfigError."""
    return evaluate(RunFolder(Path(run)), request or EvaluationRequest(), show=show)


def carry_out(plan: Plan, *, show: bool = True) -> dict[str, Any]:
    """`evaluate` with a plan that has been made."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    main = accelerator.is_main_process
    with plan.folder.lock() if main else nullcontext():
        evaluator = build_evaluator(
            plan.config, accelerator, about=plan.about, held_out=plan.held_out
        )
        known = known_models(plan) if main else {}
        todo = from_main_process([name for name in plan.all_models if name not in known])
        whole = sum(plan.paths(name) for name in todo) * len(plan.asked)
        with Bar("evaluating", whole, show=show and main) as bar:
            for name in todo:
                bar.note(name)
                found = measure(plan, evaluator, name, bar)
                if found is not None:
                    known[name] = found
        result = summary(plan, known) if main else {}
        if main:
            before = plan.folder.read_json("evaluation.json") or {}
            plan.folder.write_json("evaluation.json", {**before, "evaluated": result})
        return from_main_process(result)


def known_models(plan: Plan) -> dict[str, Measured]:
    """The models that an earlier start has finished with the same settings."""
    found = {
        name: read_samples(plan.folder.evaluation / name, settings_for(plan, name))
        for name in plan.all_models
    }
    return {name: measured for name, measured in found.items() if measured is not None}


def settings_for(plan: Plan, name: str) -> dict[str, Any]:
    """What a model's figures depend on."""
    checkpoint, paths = plan.all_models[name], plan.paths(name)
    settings = plan.settings_of(checkpoint)
    if paths > 1:
        return {**settings, "paths": paths}
    return settings if aim_of(plan, checkpoint).beta is None else {**settings, "both": True}


def measure(plan: Plan, evaluator: Evaluator, name: str, bar: Bar) -> Measured | None:
    """Draw one model's samples and write its folder; None but on the first process."""
    checkpoint, paths = plan.all_models[name], plan.paths(name)
    if checkpoint is not None:
        load_policy(evaluator.policy, checkpoint)
    if paths > 1:
        samples = draw_of_both(evaluator, plan.asked, paths, on_done=bar.advance, keep=thumbnails)
    else:
        samples = evaluator.samples(
            plan.asked,
            reference=checkpoint is None,
            both=aim_of(plan, checkpoint).beta is not None,
            on_done=bar.advance,
            keep=thumbnails,
        )
    if not evaluator.accelerator.is_main_process:
        return None
    if paths > 1:
        assert checkpoint is not None
        beta = beta_to_resample(plan.config, paths, guard_factor(checkpoint))
        samples = resample(samples, beta, paths, plan.config.evaluation.seed)
    place = plan.folder.evaluation / name
    return write_samples(place, samples, evaluator.view, settings_for(plan, name))


def aim_of(plan: Plan, checkpoint: Path | None) -> Aim:
    """The target of a checkpoint, whose weights need the pretrained model's paths; that model has
    none."""
    if checkpoint is None:
        return Aim(None)
    return target_of(plan.config, guard_factor(checkpoint))


def summary(plan: Plan, known: dict[str, Measured]) -> dict[str, Any]:
    """The settings, and each model's figures with intervals and by prompt, base first."""
    seed = plan.config.evaluation.seed
    bootstrap = Bootstrap.of(known[BASE].prompts, RESAMPLES, CONFIDENCE, seed)
    models = [row_of(plan, name, known, bootstrap) for name in plan.models]
    settings = {**plan.settings, "resamples": RESAMPLES, "confidence": CONFIDENCE}
    best = [asdict(point) for point in frontier(known[BASE], bootstrap)]
    return {"settings": settings, "models": models, "frontier": best}


def row_of(
    plan: Plan, name: str, known: Mapping[str, Measured], bootstrap: Bootstrap
) -> dict[str, Any]:
    """One model's figures, and of a finetuned one its certificate."""
    checkpoint = plan.models[name]
    base = None if checkpoint is None else known[BASE]
    seed = plan.config.evaluation.seed
    found = figures(known[name], base, resamples=RESAMPLES, confidence=CONFIDENCE, seed=seed)
    row: dict[str, Any] = {
        "name": name,
        "update": 0 if checkpoint is None else int(name.removeprefix("update_")),
        "figures": {figure: asdict(interval) for figure, interval in found.items()},
        "prompts": per_prompt(known[name], base),
    }
    if checkpoint is None or base is None:
        return row
    target = aim_of(plan, checkpoint)
    made = certificate(known[name], base, target.beta, bootstrap, target.why)
    row["certificate"] = made.as_dict()
    if plan.resample:
        again = known[plan.resampled(name)]
        # kept samples share their few paths: the spread among them is not that of other noise
        found = figures(again, base, resamples=0, confidence=CONFIDENCE, seed=seed)
        found |= {"distinct": Interval(distinct_share(again))}
        kept = {n: asdict(figure) for n, figure in found.items() if n not in OF_ONE_PATH}
        row["resampled"] = {"paths": plan.resample, "figures": kept}
    return row


# -------------------------------------------------------------------------------- the table


def remarks(evaluated: dict[str, Any]) -> list[str]:
    """What the certificates do not bear, and why one has no target, with the updates it holds
    for."""
    updates: dict[str, list[str]] = {}
    for model in evaluated["models"]:
        made = model.get("certificate", {})
        for text in (made.get("why"), *made.get("notes", ())):
            if text:
                updates.setdefault(text, []).append(str(model["update"]))
    return [f"update {', '.join(found)}: {text}" for text, found in updates.items()]


def tables(title: str, evaluated: dict[str, Any]) -> Iterator[Table]:
    """One row per figure, one column per model, the interval below the value; a few models each,
    so that a table fits on a screen."""
    models = [column for model in evaluated["models"] for column in columns_of(model)]
    names = list(dict.fromkeys(name for model in models for name in model["figures"]))
    for start in range(0, len(models), COLUMNS):
        shown = models[start : start + COLUMNS]
        made = Table(title=title, caption=caption(evaluated["settings"]), box=SIMPLE)
        made.add_column("figure", overflow="fold", min_width=12)
        for model in shown:
            made.add_column(model["heading"], justify="right", no_wrap=True)
        for name in names:
            made.add_row(name, *(cell(model["figures"].get(name)) for model in shown))
        yield made


def columns_of(model: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A model's figures with those of its certificate, and its resampled ones."""
    heading = f"update {model['update']}" if model["update"] else model["name"]
    certified = model.get("certificate", {}).get("figures", {})
    yield {
        "heading": heading,
        "figures": model["figures"]
        | {k: v for k, v in certified.items() if k not in model["figures"]},
    }
    if "resampled" in model:
        again = model["resampled"]
        yield {"heading": f"1 of {again['paths']} paths", "figures": again["figures"]}


def cell(figure: dict[str, Any] | None) -> str:
    """The value, and its interval in a second line."""
    if figure is None:
        return ""
    known = [figure[end] for end in ("value", "low", "high") if figure[end] is not None]
    value, *ends = (f"{number + 0.0:.3g}" for number in known)  # 0 is shown without a sign
    return "\n".join((value, "…".join(ends))) if ends else value


def caption(settings: dict[str, Any]) -> str:
    """What the figures are of."""
    return (
        f"{len(settings['prompts'])} prompts x {settings['images_per_prompt']} samples, "
        f"features: {settings['extractor']}; below each figure its "
        f"{settings['confidence']:.0%} interval for other noise and the same prompts"
    )
