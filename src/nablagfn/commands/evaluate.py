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
from ..evaluation.files import read_samples, write_samples
from ..families import find_family
from ..methods.build import build_kernel
from ..models.locate import critics_of
from ..prompts import PromptSet, read_prompts
from ..rewards.weights import CLIP_L, Finder
from ..runs.hub import sha256_of
from ..runs.progress import Bar
from ..runs.runfolder import RunFolder, complete_checkpoints
from ..runtime.distributed import from_main_process, set_backend_flags
from ..training.checkpoint import load_policy
from .assemble import (
    build_extractor,
    build_policy,
    build_recogniser,
    build_reward,
    build_view,
    check_names,
)

IMAGES_PER_PROMPT = 16
RESAMPLES = 1_000
CONFIDENCE = 0.95
BASE = "base"
COLUMNS = 4  # models in a table


@dataclass(frozen=True)
class Request:
    """What is asked for; empty values stand for the defaults of the run.

    rewards: held-out rewards; None: those of `evaluation.held_out_rewards` and text alignment.
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

    @property
    def asked(self) -> list[str]:
        """The prompt of each sample."""
        return [prompt for prompt in self.prompts for _ in range(self.images_per_prompt)]

    @property
    def models(self) -> dict[str, Path | None]:
        """The base model and the checkpoints, oldest first, by name."""
        return {BASE: None, **{path.name: path for path in self.checkpoints}}

    @property
    def settings(self) -> dict[str, Any]:
        """What the figures depend on, beside the model."""
        trained = self.config.experiment.reward_fn
        own = find_family(self.config).own
        told = [self.about.get(prompt, {}) for prompt in self.prompts]
        return {
            "prompts": list(self.prompts),
            "images_per_prompt": self.images_per_prompt,
            "seed": self.config.evaluation.seed,
            "extractor": "points" if own else self.config.evaluation.extractor,
            "rewards": [trained, *self.held_out],
            "trained_reward": trained,
            **({"metadata": told} if any(told) else {}),
        }

    def settings_of(self, checkpoint: Path | None) -> dict[str, Any]:
        """The same, and the digest of the model's weights."""
        weights = "" if checkpoint is None else sha256_of(checkpoint / "policy.safetensors")
        return {**self.settings, "weights": weights}


# -------------------------------------------------------------------------------- checks


def make_plan(folder: RunFolder, request: Request) -> Plan:
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
    )


def known_about(folder: RunFolder, request: Request) -> Mapping[str, Metadata]:
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


def choose_prompts(folder: RunFolder, config: Config, request: Request) -> tuple[str, ...]:
    """Those given, else the run's held-out prompts, else its prompts. Raises ConfigError."""
    if request.prompts and request.prompt_file:
        raise ConfigError("give --prompts or --prompt-file, not both")
    given: Sequence[str] = request.prompts
    if request.prompt_file:
        given = read_prompts(Path(request.prompt_file).expanduser()).prompts
    if not given:
        trained, held_out = folder.prompt_sets()
        given = held_out or trained
    chosen = PromptSet(tuple(dict.fromkeys(given)))
    if request.num_prompts < 0:
        raise ConfigError(f"--num-prompts {request.num_prompts}: give 1 or more, or 0 for all")
    if 0 < request.num_prompts < len(chosen):
        chosen = PromptSet(chosen.spread(request.num_prompts))
    own = find_family(config).own
    if own:
        own.check_prompts(config, chosen.prompts)
    return chosen.prompts


def choose_count(config: Config, request: Request, own: bool) -> int:
    """Samples per prompt; by default those of the run in a world, whose points cost little."""
    usual = config.evaluation.images_per_prompt if own else IMAGES_PER_PROMPT
    count = request.images_per_prompt or usual
    if count < 2:
        raise ConfigError(f"--images-per-prompt {count}: give at least 2, diversity needs pairs")
    return count


def choose_rewards(config: Config, request: Request, own: bool) -> tuple[str, ...]:
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


def evaluate(folder: RunFolder, request: Request, *, show: bool = True) -> dict[str, Any]:
    """Measure a run's models and write its evaluation.json; returns what is under "evaluated".

    The work is shared by all processes; only the first writes. Raises ConfigError.
    """
    return carry_out(make_plan(folder, request), show=show)


def carry_out(plan: Plan, *, show: bool = True) -> dict[str, Any]:
    """`evaluate` with a plan that has been made."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    main = accelerator.is_main_process
    with plan.folder.lock() if main else nullcontext():
        evaluator = build_evaluator(plan, accelerator)
        known = known_models(plan) if main else {}
        todo = from_main_process([name for name in plan.models if name not in known])
        with Bar("evaluating", len(todo) * len(plan.asked), show=show and main) as bar:
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


def build_evaluator(plan: Plan, accelerator: Accelerator) -> Evaluator:
    """Load in the order of cost: rewards and extractor first, the model last."""
    config, device = plan.config, accelerator.device
    set_backend_flags(config)
    reward = build_reward(config, device)
    held_out = rewards.resolve_all(plan.held_out, device, config.reward.weights)
    view = build_view(config, build_extractor(config, device))
    several = accelerator.num_processes > 1
    policy = build_policy(config, device, shard=config.training.shard_base and several)
    return Evaluator(
        accelerator,
        policy,
        reward,
        build_kernel(config, policy),
        batch_size=config.evaluation.batch_size or config.sampling.batch_size,
        seed=config.evaluation.seed,
        view=view,
        recogniser=build_recogniser(config, device),
        held_out=held_out,
        about=plan.about,
    )


def known_models(plan: Plan) -> dict[str, Measured]:
    """The models that an earlier start has finished with the same settings."""
    found = {
        name: read_samples(plan.folder.evaluation / name, plan.settings_of(checkpoint))
        for name, checkpoint in plan.models.items()
    }
    return {name: measured for name, measured in found.items() if measured is not None}


def measure(plan: Plan, evaluator: Evaluator, name: str, bar: Bar) -> Measured | None:
    """Draw one model's samples and write its folder; None but on the first process."""
    checkpoint = plan.models[name]
    if checkpoint is not None:
        load_policy(evaluator.policy, checkpoint)
    samples = evaluator.samples(
        plan.asked, reference=checkpoint is None, on_done=bar.advance, keep=thumbnails
    )
    if not evaluator.accelerator.is_main_process:
        return None
    place = plan.folder.evaluation / name
    return write_samples(place, samples, evaluator.view, plan.settings_of(checkpoint))


def summary(plan: Plan, known: dict[str, Measured]) -> dict[str, Any]:
    """The settings, and each model's figures with intervals and by prompt, base first."""
    models = []
    for name, checkpoint in plan.models.items():
        base = None if checkpoint is None else known[BASE]
        found = figures(
            known[name],
            base,
            resamples=RESAMPLES,
            confidence=CONFIDENCE,
            seed=plan.config.evaluation.seed,
        )
        models.append(
            {
                "name": name,
                "update": 0 if checkpoint is None else int(name.removeprefix("update_")),
                "figures": {figure: asdict(interval) for figure, interval in found.items()},
                "prompts": per_prompt(known[name], base),
            }
        )
    settings = {**plan.settings, "resamples": RESAMPLES, "confidence": CONFIDENCE}
    return {"settings": settings, "models": models}


# -------------------------------------------------------------------------------- the table


def tables(title: str, evaluated: dict[str, Any]) -> Iterator[Table]:
    """One row per figure, one column per model, the interval below the value; a few models each,
    so that a table fits on a screen."""
    models = evaluated["models"]
    names = list(dict.fromkeys(name for model in models for name in model["figures"]))
    for start in range(0, len(models), COLUMNS):
        shown = models[start : start + COLUMNS]
        made = Table(title=title, caption=caption(evaluated["settings"]), box=SIMPLE)
        made.add_column("figure", overflow="fold")
        for model in shown:
            heading = f"update {model['update']}" if model["update"] else model["name"]
            made.add_column(heading, justify="right", no_wrap=True)
        for name in names:
            made.add_row(name, *(cell(model["figures"].get(name)) for model in shown))
        yield made


def cell(figure: dict[str, Any] | None) -> str:
    """The value, and its interval in a second line."""
    if figure is None:
        return ""
    text = f"{figure['value']:.3g}"
    return text if figure["low"] is None else f"{text}\n{figure['low']:.3g}…{figure['high']:.3g}"


def caption(settings: dict[str, Any]) -> str:
    """What the figures are of."""
    return (
        f"{len(settings['prompts'])} prompts x {settings['images_per_prompt']} samples, "
        f"features: {settings['extractor']}; below each figure its "
        f"{settings['confidence']:.0%} interval for other noise and the same prompts"
    )
