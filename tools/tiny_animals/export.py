"""Assemble the trained parts into a StableDiffusionPipeline folder with its critics."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from train_unet import Policy, build_scheduler, build_tokenizer
from train_vae import build as build_vae

HALF = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model")


def assemble(work: Path) -> StableDiffusionPipeline:
    """The pipeline from the checkpoints in ``work``."""
    vae = build_vae()
    stages = ("vae-polish.pt", "vae-decoder.pt", "vae.pt")
    weights = next(work / name for name in stages if (work / name).exists())
    vae.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    tokenizer = build_tokenizer()
    policy = Policy(tokenizer)
    policy.load_state_dict(torch.load(work / "policy.pt", map_location="cpu", weights_only=True))
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=policy.text.eval(),
        tokenizer=tokenizer,
        unet=policy.unet.eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def halve(path: Path) -> None:
    """Rewrite a safetensors file in half precision."""
    weights = load_file(path)
    save_file(
        {k: v.half().contiguous() for k, v in weights.items()}, path, metadata={"format": "pt"}
    )


@contextlib.contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A folder to fill, which then takes the place of ``out``, with its card and samples."""
    partial, old = out.with_name(out.name + ".partial"), out.with_name(out.name + ".old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    yield partial
    for extra in ("README.md", "samples.png"):
        if (out / extra).exists():
            shutil.copy(out / extra, partial / extra)
    if out.exists():
        os.replace(out, old)
    os.replace(partial, out)
    shutil.rmtree(old, ignore_errors=True)


def export(work: Path, out: Path) -> None:
    """Write the folder beside its place, then swap it in."""
    with beside(out) as partial:
        assemble(work).save_pretrained(partial, safe_serialization=True)
        for name in HALF:
            halve(partial / f"{name}.safetensors")
        if (work / "critics").exists():
            shutil.copytree(work / "critics", partial / "critics")
            for path in (partial / "critics").glob("*.safetensors"):
                halve(path)


def main() -> None:
    """Export."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    export(args.work, args.out)


if __name__ == "__main__":
    main()
