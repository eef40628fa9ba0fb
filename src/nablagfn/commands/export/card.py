"""The model card of an export: what it is, what it was made from, how it is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from huggingface_hub import ModelCard
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure as Canvas
from PIL import Image

from ...families import family_of_run
from ...methods.registry import find_method
from ...models.locate import EMBEDDED, MOVED
from ...models.lora import FIRST_STATE
from ...report import figures, tables
from ...report.loading import how_to_load
from ...report.read import Record
from ...runs.runfolder import checkpoint_name
from .proof import Drawn, Proof

LICENCES = {  # of models on the hub that publish one and have no card at hand
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "black-forest-labs/FLUX.1-schnell": "apache-2.0",
    "black-forest-labs/FLUX.2-klein-4B": "apache-2.0",
    "black-forest-labs/FLUX.2-klein-base-4B": "apache-2.0",
    "Qwen/Qwen-Image": "apache-2.0",
    "Tongyi-MAI/Z-Image": "apache-2.0",
    "Tongyi-MAI/Z-Image-Turbo": "apache-2.0",
}
GAP = 4  # pixels between pictures
CURVES = (("probe_reward", "reward"), ("reward", "reward"), ("probe_diversity", "diversity"))


def write_card(
    folder: Path, record: Record, checkpoint: str, proofs: Sequence[Proof], drawn: Drawn
) -> None:
    """README.md, pictures.png and, where the run logged any, curves.png."""
    moved = (folder / proofs[0].form / FIRST_STATE).is_file()
    side_by_side(drawn).save(folder / "pictures.png")
    curves = write_curves(record, folder / "curves.png")
    environment = Environment(
        loader=PackageLoader("nablagfn.commands.export", "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = plain
    prompt = drawn.prompts[0]
    text = environment.get_template("card.md.j2").render(
        record=record,
        config=record.config,
        checkpoint=checkpoint,
        method=figures.method(record),
        licence=licence(record.config.pretrained.model),
        on_hub=record.config.pretrained.model not in EMBEDDED and _is_hub_name(record),
        first_state=FIRST_STATE if moved else "",
        family=family_of_run(record.config).name,
        sampler=sampler_in_words(record),
        cards=figures.cards(record) if measured(record) == checkpoint else [],
        prompts=drawn.prompts,
        proofs=proofs,
        forms=[proof.form for proof in proofs],
        code=how_to_load(
            record.config,
            prompt,
            "diffusers",
            "pytorch_lora_weights.safetensors",
            record.folder.times(),
            record.folder.lora_strengths(record.config),
            f"diffusers/{FIRST_STATE}" if moved else "",
        ),
        settings=[
            s
            for s in tables.settings(record.config)
            if s.changed and not s.key.startswith(tables.PLACES)
        ],
        curves=curves,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def sampler_in_words(record: Record) -> str:
    """The sampler that draws as the run does."""
    config = record.config
    family = family_of_run(config)
    if find_method(config.experiment.method).ode:
        return "a deterministic first-order sampler (Euler's)"
    flow = family.of_diffusers is not None and family.network != "U-Net"
    if flow or config.sampling.scheduler == "dpm-solver":
        return "a first-order SDE-DPM-Solver++" + (" on flow sigmas" if flow else "")
    eta = config.sampling.eta
    return f"the DDIM sampler with η = {eta:g}" + (" (DDPM)" if eta == 1 else "")


def measured(record: Record) -> str:
    """The checkpoint that the headline figures are of."""
    return record.final.name if record.final else checkpoint_name(record.evaluation.updates)


def plain(text: object) -> str:
    """A user's words within a table or a line: no markup, no line breaks."""
    escaped = str(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return " ".join(escaped.replace("`", "'").split())


def _is_hub_name(record: Record) -> bool:
    name = record.config.pretrained.model
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def licence(model: str) -> str:
    """The base model's licence: from its own card where it lies on this machine, else from what is
    known of a few; 'unknown' otherwise."""
    folder = EMBEDDED.get(model, Path(model).expanduser())
    card = folder / "README.md"
    if card.is_file():
        found = ModelCard(card.read_text(encoding="utf-8")).data.to_dict().get("license")
        return str(found or "unknown")
    return LICENCES.get(MOVED.get(model, model), "unknown")


def side_by_side(drawn: Drawn) -> Image.Image:
    """The pretrained model's pictures above, the finetuned one's below."""
    rows = [np.concatenate(_spaced(images, 1), 1) for images in (drawn.before, drawn.after)]
    pixels = np.concatenate(_spaced(rows, 0), 0)
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def _spaced(images: Sequence[np.ndarray] | np.ndarray, axis: int) -> list[np.ndarray]:
    """The arrays with white between them."""
    shape = list(images[0].shape)
    shape[axis] = GAP
    found = [part for image in images for part in (image, np.ones(shape))]
    return found[:-1]


def write_curves(record: Record, path: Path) -> bool:
    """Reward and diversity over the training as a PNG; False when there is nothing to draw."""
    lines = {
        label: points
        for key, label in reversed(CURVES)
        if len(points := [(r["update"], r[key]) for r in record.rows if r.get(key) is not None]) > 1
    }
    if not lines:
        return False
    with matplotlib.rc_context({"font.size": 9}):
        canvas = Canvas(figsize=(4 * len(lines), 2.6), dpi=110, layout="constrained")
        for i, (label, points) in enumerate(sorted(lines.items(), reverse=True)):
            axes = canvas.add_subplot(1, len(lines), i + 1)
            axes.plot(*zip(*points, strict=True), marker="o", ms=3, color="#2456a6")
            axes.set_xlabel("update")
            axes.set_title(label, fontsize=10)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        canvas.savefig(path)
    return True
