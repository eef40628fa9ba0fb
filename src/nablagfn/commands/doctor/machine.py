"""Checks of the machine: packages, devices, memory, disk, the hub, W&B."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import netrc
import os
import shutil
from pathlib import Path

import torch
from packaging.requirements import Requirement

from ...families import find_family
from ...models.tune import check_speed
from ...runs.hub import hub_answers
from .. import planner
from .records import Finding, Patient

TESTED = {  # constraints.txt's, which a test compares
    "torch": "2.13.0",
    "diffusers": "0.42.1",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "safetensors": "0.8.0",
    "huggingface_hub": "2.4.0",
    "numpy": "2.4.6",
    "pydantic": "2.14.3",
}
FULL, TIGHT = 0.2e9, 2e9  # bytes of disk: too few to start with, and few
INSTALL = "pip install -c constraints.txt nablagfn"


def versions(patient: Patient) -> Finding:
    """Failure for what is missing or too old, warning for what was not tested together."""
    missing, needed = [], _requirements()
    for text in needed or ():
        wanted = Requirement(text)
        if wanted.marker is None and not wanted.specifier.contains(_version(wanted.name)):
            missing.append(f"{wanted} (here: {_version(wanted.name)})")
    if missing:
        return Finding("failure", "needed: " + ", ".join(missing), INSTALL)
    others = [f"{n} {_version(n)} ({v})" for n, v in TESTED.items() if not _same(n, v)]
    notes = ["not the tested versions: " + ", ".join(others)] if others else []
    if needed is None:
        notes.append("nablagfn runs from a checkout: what it needs at least was not checked")
    if notes:
        return Finding("warning", "; ".join(notes), f"if something fails: {INSTALL}")
    return Finding("ok", f"torch {_version('torch')}, and all as tested")


def _requirements() -> list[str] | None:
    """What nablagfn needs; None for a checkout that is not installed."""
    try:
        return importlib.metadata.requires("nablagfn") or []
    except importlib.metadata.PackageNotFoundError:
        return None


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "0"


def _same(name: str, tested: str) -> bool:
    return _version(name).partition("+")[0] == tested


def devices(patient: Patient) -> Finding:
    """What training would run on, and whether it has what the options ask for."""
    check_speed(patient.config.speed, patient.device)
    if patient.device.type == "cpu":
        text = f"CPU, {torch.get_num_threads()} threads"
        if find_family(patient.config).small(patient.config.pretrained.model):
            return Finding("ok", text)
        return Finding(
            "warning",
            text,
            "this model takes minutes per picture here: use a machine with a GPU, and a "
            "torch built for it",
        )
    count = torch.accelerator.device_count()
    name = patient.device.type
    if name == "cuda":
        name = torch.cuda.get_device_name(patient.device)
    if count > 1 and "WORLD_SIZE" not in os.environ:
        fix = f"to use them all: torchrun --nproc_per_node={count} train_nablagfn.py …"
        return Finding("ok", f"{count} x {name}", fix)
    return Finding("ok", f"{count} x {name}")


def memory(patient: Patient) -> Finding:
    """The predicted peak against what is free."""
    free = planner.free_memory(patient.device)
    if find_family(patient.config).skeleton is None:
        return Finding("ok", f"{free / 1e9:.1f} GB free; a world needs none to speak of")
    peak = planner.predict(patient.config, patient.device).peak
    text = f"{free / 1e9:.1f} GB free, predicted peak {peak / 1e9:.1f} GB"
    if peak > free:
        return Finding("warning", text, "nablagfn plan names the settings that fit")
    return Finding("ok", text)


def disk(patient: Patient) -> Finding:
    """Space and right to write at `saving.output_dir`, or where it would be made."""
    place = Path(patient.config.saving.output_dir).expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    text = f"{free / 1e9:.1f} GB free at {place}"
    if not (place.is_dir() and os.access(place, os.W_OK)):
        return Finding("failure", f"{place} cannot be written to", "set --config.saving.output_dir")
    if free < TIGHT:
        fix = "make room, or set --config.saving.output_dir"
        return Finding("failure" if free < FULL else "warning", text, fix)
    return Finding("ok", text)


def hub(patient: Patient) -> Finding:
    """Whether what is missing could be fetched."""
    if hub_answers():
        return Finding("ok", "the hub answers")
    if os.environ.get("HF_HUB_OFFLINE"):
        return Finding("ok", "not asked: HF_HUB_OFFLINE is set")
    return Finding(
        "warning",
        "the hub does not answer",
        "only what is on this machine can be used: give folders, or check the network",
    )


def wandb(patient: Patient) -> Finding:
    """Look for W&B when it is asked for; the key itself is not looked at."""
    if not patient.config.logging.use_wandb:
        return Finding("ok", "not used")
    if importlib.util.find_spec("wandb") is None:
        return Finding("failure", "wandb is not installed", "pip install 'nablagfn[wandb]'")
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return Finding("ok", f"WANDB_MODE={os.environ['WANDB_MODE']}")
    if os.environ.get("WANDB_API_KEY") or _logged_in():
        return Finding("ok", "a key is set up")
    return Finding(
        "failure", "no key is set up", "run `wandb login`, set WANDB_API_KEY or WANDB_MODE=offline"
    )


def _logged_in() -> bool:
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].rstrip("/")
    file = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
