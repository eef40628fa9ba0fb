"""The quality gate of tiny-animals: 450 samples, judged by the independent classifier.

Prints JSON: the share of samples whose animal the classifier recognises, and how the styles and
backgrounds that the prompts leave open are distributed. Saves grids of pictures for the eye.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import data
import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from torch import Tensor

from nablagfn.rewards.critics import AestheticCritic, AlignmentCritic, AnimalClassifier

NAMED = ("cat", "dog", "horse", "lion", "fox", "turtle", "duck", "bee", "pig", "whale")


Pipeline = StableDiffusionPipeline | StableDiffusion3Pipeline


def load_pipeline(folder: Path, device: torch.device | None = None) -> Pipeline:
    """The pipeline, quiet and without a safety checker, on CUDA where there is one."""
    kind = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    if kind == "StableDiffusion3Pipeline":
        pipe = StableDiffusion3Pipeline.from_pretrained(
            folder, text_encoder_3=None, tokenizer_3=None
        )
        pipe.scheduler = memoryless(pipe)
    else:
        pipe = StableDiffusionPipeline.from_pretrained(
            folder, safety_checker=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def memoryless(pipe: StableDiffusion3Pipeline) -> DPMSolverMultistepScheduler:
    """The posterior sampler on α = 1 − σ, a flow model's DDPM."""
    return DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++",
        solver_order=1,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=pipe.scheduler.config.shift,
        final_sigmas_type="zero",
    )


def draw(
    pipe: Pipeline,
    prompts: list[str],
    steps: int,
    guidance: float,
    seed: int,
    batch: int = 45,
) -> Tensor:
    """Samples float [N, 3, 64, 64] in [0, 1] by DDIM with eta = 1 (that is, DDPM), or by its like
    for a flow model, whose pipeline draws the noise of its steps from torch's own generator."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    flow = isinstance(pipe, StableDiffusion3Pipeline)
    own = {"max_sequence_length": 1} if flow else {"eta": 1.0}
    parts = []
    for i in range(0, len(prompts), batch):
        result = pipe(
            prompts[i : i + batch],
            num_inference_steps=steps,
            guidance_scale=guidance,
            **own,
            generator=generator,
            output_type="pt",
        )
        parts.append(result.images.float().cpu())
    return torch.cat(parts)


def spread(labels: list[str], names: tuple[str, ...]) -> dict[str, Any]:
    """Frequencies relative to uniform (1 = as often as the others), least and most."""
    counts = Counter(labels)
    ratio = {n: round(counts[n] * len(names) / len(labels), 3) for n in names}
    return {"least": min(ratio.values()), "most": max(ratio.values()), **ratio}


def judge(
    images: Tensor, folder: Path, prompts: list[str], wanted: list[str], most: int | None = 8
) -> dict[str, Any]:
    """All figures about samples whose prompts name only the animals ``wanted``.

    Of the misses, the ``most`` frequent animals are named; None: all that have one.
    """
    critics = folder / "critics"
    found = AnimalClassifier.from_folder(critics).predict(images)
    right = [a == b for a, b in zip(found["animal"], wanted, strict=True)]
    misses = Counter(w for w, ok in zip(wanted, right, strict=True) if not ok)
    with torch.no_grad():
        look = AestheticCritic.from_folder(critics)(images)
        fit = AlignmentCritic.from_folder(critics)(images, prompts)
    return {
        "recognised": round(float(np.mean(right)), 4),
        "misses": dict(misses.most_common(most)),
        "style": spread(found["style"], data.STYLE_NAMES),
        "background": spread(found["background"], data.BACKGROUND_NAMES),
        "aesthetic": [round(float(look.mean()), 3), round(float(look.std()), 3)],
        "alignment": [round(float(fit.mean()), 3), round(float(fit.std()), 3)],
    }


def named(pipe, folder: Path, steps: int, guidance: float) -> tuple[Tensor, dict[str, float]]:
    """Samples whose prompts name everything, and how often each part is as named."""
    wanted = [
        (animal, style, data.BACKGROUND_NAMES[(i + 4 * (j % 2) + j // 2) % 8])
        for j, style in enumerate(data.STYLE_NAMES)
        for i, animal in enumerate(NAMED)
    ]
    images = draw(pipe, [data.caption(*w) for w in wanted], steps, guidance, seed=5, batch=40)
    found = AnimalClassifier.from_folder(folder / "critics").predict(images)
    shares = {
        head: float(np.mean([w[i] == f for w, f in zip(wanted, found[head], strict=True)]))
        for i, head in enumerate(("animal", "style", "background"))
    }
    return images, shares


def save_grid(images: Tensor, columns: int, path: Path) -> None:
    """Pictures [N, 3, H, W] in [0, 1], row by row, as one PNG."""
    n, _, height, width = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * height, columns * width, 3), 255, dtype=np.uint8)
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for k in range(n):
        top, left = k // columns * height, k % columns * width
        sheet[top : top + height, left : left + width] = pixels[k]
    Image.fromarray(sheet).save(path, optimize=True)


def main() -> None:
    """Draw, judge, print, save."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--folder", type=Path, required=True, help="the pipeline's folder")
    p.add_argument("--out", type=Path, required=True, help="folder for grids and gate.json")
    p.add_argument("--critics", type=Path, help="the folder that has the critics, if another")
    p.add_argument("--steps", type=int, nargs="*", default=[20, 50])
    p.add_argument("--guidance", type=float, nargs="*", default=[2.0])
    p.add_argument("--each", type=int, default=10, help="samples per animal")
    p.add_argument("--threads", type=int, default=0)
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(args.folder)
    wanted = list(data.ANIMAL_NAMES) * args.each
    prompts = [data.caption(animal) for animal in wanted]
    figures = {}
    for steps in args.steps:
        for guidance in args.guidance:
            started = time.monotonic()
            images = draw(pipe, prompts, steps, guidance, seed=3)
            seconds = round(time.monotonic() - started, 1)
            name = f"steps{steps}-guidance{guidance:g}"
            home = args.critics or args.folder
            figures[name] = {"seconds": seconds, **judge(images, home, prompts, wanted)}
            save_grid(images, 45 if args.each > 4 else 15, args.out / f"{name}.png")
            pictures, shares = named(pipe, home, steps, guidance)
            figures[name]["named"] = shares
            save_grid(pictures, len(NAMED), args.out / f"{name}-named.png")
            print(json.dumps({name: figures[name]}), flush=True)
    (args.out / "gate.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
