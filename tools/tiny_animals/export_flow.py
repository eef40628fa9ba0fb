"""Assemble tiny-animals-flow: a StableDiffusion3Pipeline that shares parts with tiny-animals.

    python export_flow.py --work WORK --out src/nablagfn/assets/tiny-animals-flow

The autoencoder's weights and the tokenizer are links to the neighbouring folder, and the second
text encoder is one to the first: nothing stands twice in a checkout. A wheel holds copies.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from export import beside, halve
from train_flow import SHIPPED, build_scheduler, build_text_encoder, build_transformer
from transformers import CLIPTokenizer

HALF = ("transformer/diffusion_pytorch_model", "text_encoder/model")
VAE = "vae/diffusion_pytorch_model.safetensors"
LINKS = {
    VAE: f"../../{SHIPPED.name}/{VAE}",
    "tokenizer": f"../{SHIPPED.name}/tokenizer",
    "tokenizer_2": f"../{SHIPPED.name}/tokenizer",
    "text_encoder_2": "text_encoder",
}


def assemble(weights: Path) -> StableDiffusion3Pipeline:
    """The pipeline of averaged weights (``flow.pt``)."""
    network = build_transformer()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    encoder = build_text_encoder()
    tokenizer = CLIPTokenizer.from_pretrained(SHIPPED / "tokenizer")
    vae = AutoencoderKL.from_pretrained(SHIPPED / "vae", dtype=torch.float32).eval()
    # This pipeline needs a shift; and where the weights came from is no path of a machine.
    vae.register_to_config(shift_factor=0.0, _name_or_path=SHIPPED.name)
    return StableDiffusion3Pipeline(
        transformer=network.eval(),
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def export(weights: Path, out: Path) -> None:
    """Write the folder beside its place, then swap it in."""
    with beside(out) as partial:
        assemble(weights).save_pretrained(partial, safe_serialization=True)
        for name in HALF:
            halve(partial / f"{name}.safetensors")
        for name, target in LINKS.items():
            place = partial / name
            shutil.rmtree(place) if place.is_dir() else place.unlink()
            place.symlink_to(target, target_is_directory=name != VAE)


def main() -> None:
    """Export."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    export(args.work / "flow.pt", args.out)


if __name__ == "__main__":
    main()
