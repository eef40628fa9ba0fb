"""RUN/evaluation/NAME/: the samples of one evaluated model. A folder is complete or not there.

samples.json          what each sample is and scored; the settings that made it
features.safetensors  {"features": [n, D], "step_kl": [n, N]}
pictures.png          thumbnails in the order of the samples; in a world, target beside samples
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..core.types import View
from .figures import Measured
from .pictures import GAP
from .samples import Sample

COLUMNS = 16  # thumbnails in a row


def write_samples(
    folder: Path, samples: Sequence[Sample], view: View, settings: dict[str, Any]
) -> Measured:
    """Write the folder anew; it appears under its name when it is whole. Returns what is in it."""
    measured = Measured.of(samples, view)
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    images = torch.stack([sample.image for sample in samples])
    columns = min(COLUMNS, len(samples))
    view.save(images, measured.prompts, temporary / "pictures.png", columns)
    tensors = {"features": measured.features, "step_kl": measured.step_kl}
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary / "features.safetensors")
    record = {
        "columns": columns,
        "thumbnail": [images.shape[3], images.shape[2]] if images.ndim == 4 else None,
        "gap": GAP,
        "settings": settings,
        "measures": measured.others,
        "samples": [_row(sample, settings["trained_reward"]) for sample in samples],
    }
    text = json.dumps(record, ensure_ascii=False)
    (temporary / "samples.json").write_text(text, encoding="utf-8")
    _replace(temporary, folder)
    return measured


def _row(sample: Sample, trained: str) -> dict[str, Any]:
    return {
        "index": sample.index,
        "prompt": sample.prompt,
        "rewards": {trained: sample.reward, **sample.held_out},
        "recognised": sample.recognised,
        "path_kl": _number(sample.path_kl),
        "log_ratio": _number(sample.log_ratio),
        "log_ratio_base": _number(sample.log_ratio_base),
        "transport_cost": _number(sample.transport_cost),
    }


def _number(value: float) -> float | None:
    """None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value


def _asked(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The columns that not all models have: those of paths without noise are others."""
    if rows and rows[0].get("transport_cost") is not None:
        return ["transport_cost"]
    told = [name for name in ("log_ratio_base",) if rows and rows[0].get(name) is not None]
    return ["path_kl", "log_ratio", *told]


def _replace(new: Path, folder: Path) -> None:
    """The old folder goes out of sight first, so that a crash leaves no half of it."""
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        os.replace(folder, aside)
    os.replace(new, folder)
    shutil.rmtree(aside, ignore_errors=True)


def read_samples(folder: Path, settings: dict[str, Any]) -> Measured | None:
    """What `write_samples` returned; None when the folder is missing, damaged, or was made with
    other settings."""
    try:
        record = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
        if record["settings"] != settings:
            return None
        rows, trained = record["samples"], settings["trained_reward"]
        columns = {
            "reward": [row["rewards"][trained] for row in rows],
            **{
                f"reward_{name}": [row["rewards"][name] for row in rows]
                for name in settings["rewards"]
                if name != trained
            },
            **{
                name: [math.nan if row[name] is None else row[name] for row in rows]
                for name in ("recognised", *_asked(rows))
            },
        }
        tensors = load_file(folder / "features.safetensors")
        return Measured(
            tuple(row["prompt"] for row in rows),
            tensors["features"],
            {name: torch.tensor(v, dtype=torch.float64) for name, v in columns.items()},
            record["measures"],
            tensors["step_kl"],
        )
    except Exception:  # a damaged file may fail in many ways; the samples are drawn again
        return None
