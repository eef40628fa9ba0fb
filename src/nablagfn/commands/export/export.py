"""`nablagfn export RUN`: write, prove, describe; the folder appears when all of that is done."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...config import Config, ConfigError
from ...core.grids import times_of
from ...families import Family, find_family
from ...models.latent import LatentPolicy, quiet
from ...models.lora import FIRST_STATE, MEAN
from ...prompts import PromptSet
from ...report.loading import stock_of
from ...report.read import Record, read
from ...runs.progress import Bar
from ...runs.runfolder import RunFolder
from ...runtime.distributed import process_state
from ...training.checkpoint import load_policy
from ..assemble import build_policy
from .card import write_card
from .proof import Drawn, Proof, difference, draw

PICTURES = 4  # drawn by each form


@dataclass(frozen=True)
class Trained:
    """The model that was trained. device: where it drew; it is kept in the computer's memory
    meanwhile. name: of its run. times: of its steps. strengths: of the LoRA in each of them; none:
    1 in all."""

    policy: LatentPolicy
    device: torch.device
    config: Config
    name: str
    times: Sequence[float]
    strengths: tuple[float, ...]
    drawn: Drawn


@dataclass(frozen=True)
class Exported:
    """What was written, and how it was proved."""

    folder: Path
    proofs: list[Proof]


@contextlib.contextmanager
def _enough_memory() -> Iterator[None]:
    """Raises ConfigError where the GPU has too little for a model in float32."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise ConfigError(
            "the model in float32, in which an export is proved, does not fit on this GPU; in the "
            "computer's memory: CUDA_VISIBLE_DEVICES= nablagfn export …"
        ) from None


@_enough_memory()
def export(
    folder: RunFolder,
    *,
    checkpoint: str = "",
    form: str = "diffusers",
    out: Path | None = None,
    show_progress: bool = True,
) -> Exported:
    """Write OUT/FORM for each form, and OUT/README.md; default OUT: RUN/export/CHECKPOINT.

    Raises ConfigError for a run in a world, without a (such) checkpoint, or damaged; when OUT
    exists; and when a form draws other pictures than the trained model.
    """
    record = read(folder)
    family = find_family(record.config)
    if not family.export_forms:
        raise ConfigError(
            f"{folder.path} is a run in {record.config.pretrained.model}: {family.no_export}"
        )
    chosen = folder.checkpoint(checkpoint)
    target = out or folder.path / "export" / chosen.name
    if target.exists():
        raise ConfigError(f"{target} is there already: remove it, or give another --out")
    forms = _forms(family, record.config, form)
    config = _in_float32(record.config)
    trained = _trained(family, config, chosen, record)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with Bar("exporting", len(forms), show=show_progress) as bar:
            proofs = []
            for name in forms:
                proofs.append(_prove(name, family, trained, partial / name))
                bar.advance()
        write_card(partial, record, chosen.name, proofs, trained.drawn)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Exported(target, proofs)


def _forms(family: Family, config: Config, form: str) -> list[str]:
    """The names of the forms asked for. Raises ConfigError for one that the family has not, or that
    cannot hold a LoRA whose strength varies."""
    varies = config.model.lora_variation
    if form == "all":
        return [name for name, of in family.export_forms.items() if not (varies and of.always)]
    if form not in family.export_forms:
        raise ConfigError(
            f"--format {form}: a {family.name} model is exported as "
            f"{', '.join(family.export_forms)}, or all"
        )
    if varies and family.export_forms[form].always:
        raise ConfigError(
            f"--format {form}: with {varies} the LoRA does not act alike in all steps, and weights "
            "that it is part of do: take diffusers"
        )
    return [form]


def _in_float32(config: Config) -> Config:
    """Other programs choose a precision of their own; the proof is in the finest."""
    config = config.model_copy(deep=True)
    config.training.mixed_precision = "no"
    return config


def _trained(family: Family, config: Config, checkpoint: Path, record: Record) -> Trained:
    """The model of a checkpoint by the trainer's own file, and its pictures."""
    policy = build_policy(config, process_state().device)
    assert isinstance(policy, LatentPolicy)
    load_policy(policy, checkpoint)
    prompts = PromptSet(record.prompts or ("a cat",)).spread(PICTURES)
    times = times_of(config.sampling, policy)
    with policy.reference():
        before = draw(policy.pipeline, family, config, prompts, times)
    strengths = policy.lora_strengths(times)
    after = draw(policy.pipeline, family, config, prompts, times, strengths, policy.first.mean)
    device, drawn = policy.device, Drawn(prompts, before, after)
    for part in (policy.network, policy.vae, *policy.encoders().values()):
        part.to("cpu")  # room for what is loaded afresh
    return Trained(policy, device, config, record.name, times, strengths, drawn)


def _placed(pipeline: Any, trained: Trained) -> Any:
    """A fresh pipeline where the trained one drew, or each part while it is needed, as in the
    run."""
    if trained.config.speed.offload_text_encoder and trained.device.type != "cpu":
        pipeline.enable_model_cpu_offload(device=trained.device)
        return pipeline
    return pipeline.to(trained.device)


def _mean_in(folder: Path, device: torch.device) -> Tensor | None:
    """The mean of the first state as it was written; None: 0."""
    file = folder / FIRST_STATE
    return load_file(file)[MEAN].to(device) if file.is_file() else None


def _prove(name: str, family: Family, trained: Trained, folder: Path) -> Proof:
    """Write one form, load it afresh, and compare. Raises ConfigError when they differ."""
    folder.mkdir()
    form, drawn = family.export_forms[name], trained.drawn
    with quiet():
        stock = stock_of(family, trained.config, trained.times)
        form.write(trained.policy, trained.config, folder, trained.name, stock)
        trained.policy.save_first_state(folder)
        fresh = _placed(form.load(trained.config, folder), trained)
    again = draw(
        fresh,
        family,
        trained.config,
        drawn.prompts,
        trained.times,
        trained.strengths,
        _mean_in(folder, trained.device),
    )
    change = difference(drawn.after, drawn.before)
    proof = Proof(name, difference(again, drawn.after), change)
    proof.check()
    return proof
