"""Train the three critics (`nablagfn.rewards.critics`) on composites and decoded composites."""

from __future__ import annotations

import os
from pathlib import Path

import data
import numpy as np
import torch
import torch.nn.functional as F
from common import Average, Run, device_for, parser, to_images
from muon import Muon
from torch import Tensor, nn

from nablagfn.rewards.critics import AestheticCritic, AlignmentCritic, AnimalClassifier

GLOSSY = data.STYLE_NAMES.index("glossy")
WORDS = (
    "a",
    "an",
    "on",
    "background",
    *data.ANIMAL_NAMES,
    *data.STYLE_NAMES,
    *data.BACKGROUND_NAMES,
)
LABELS = {
    "animal": data.ANIMAL_NAMES,
    "style": data.STYLE_NAMES,
    "background": data.BACKGROUND_NAMES,
}


def build_quads(modules: Path, path: Path, copies: int, seed: int) -> None:
    """Write quads.npy [45 * 8 * copies, 4, 64, 64, 3]: the same scene in the four styles."""
    if path.exists():
        return
    sprites = data.load_sprites(modules)
    count = len(data.ANIMALS) * len(data.BACKGROUNDS) * copies
    quads = np.empty((count, len(data.STYLES), data.SIZE, data.SIZE, 3), dtype=np.uint8)
    for n in range(count):
        animal, background, copy = scene(n)
        for style in range(len(data.STYLES)):
            poses = sprites.table[animal, style]
            rng = np.random.default_rng((seed, n))  # the same placement in all styles
            quads[n, style] = data.placed_at_random(
                sprites, poses[copy % len(poses)], background, rng, (0.74, 0.98), 0.06
            )
    partial = path.with_suffix(".partial.npy")
    np.save(partial, quads)
    os.replace(partial, path)


def scene(n: int) -> tuple[int, int, int]:
    """Animal, background and copy of quad number n."""
    n, background = divmod(n, len(data.BACKGROUNDS))
    copy, animal = divmod(n, len(data.ANIMALS))
    return animal, background, copy


@torch.no_grad()
def decode_quads(work: Path, device: torch.device) -> np.ndarray:
    """The quads, encoded, made noisy and decoded by the VAE (cached); same shape."""
    from train_vae import build, mean_of

    path = work / "quads-decoded.npy"
    if path.exists():
        return np.load(path)
    vae = build().to(device)
    vae.load_state_dict(torch.load(work / "vae.pt", map_location=device, weights_only=True))
    quads = np.load(work / "quads.npy")
    flat, out = (
        quads.reshape(-1, data.SIZE, data.SIZE, 3),
        np.empty_like(quads).reshape(-1, 64, 64, 3),
    )
    torch.manual_seed(1)
    for i in range(0, len(flat), 64):
        z = mean_of(vae, to_images(flat[i : i + 64], device))
        z = z + 0.5 * torch.rand(len(z), 1, 1, 1, device=device) * torch.randn_like(z)
        y = (vae.decode(z).sample / 2 + 0.5).clamp(0, 1) * 255
        out[i : i + 64] = y.round().byte().permute(0, 2, 3, 1).cpu().numpy()
    partial = path.with_suffix(".partial.npy")
    np.save(partial, out.reshape(quads.shape))
    os.replace(partial, path)
    return out.reshape(quads.shape)


def blur_and_noise(x: Tensor, most_noise: float) -> Tensor:
    """Blur a random share of each picture's sharpness away and add noise; [B, 3, 64, 64]."""
    factor = int(torch.randint(2, 6, ()))
    small = F.adaptive_avg_pool2d(x, data.SIZE // factor)
    soft = F.interpolate(small, x.shape[-2:], mode="bilinear", align_corners=False)
    amount = (torch.rand(len(x), 1, 1, 1, device=x.device) * 2 - 1).clamp(min=0)
    x = torch.lerp(x, soft, amount)
    level = most_noise * (torch.rand(len(x), 1, 1, 1, device=x.device) * 2 - 1).clamp(min=0)
    return x + level * torch.randn_like(x)


def warp(x: Tensor) -> Tensor:
    """Random rotation (12 degrees), scale (15 %) and shift (10 %), borders repeated."""
    n = len(x)
    angle = (torch.rand(n, device=x.device) * 2 - 1) * 0.21
    scale = 1 + (torch.rand(n, device=x.device) * 2 - 1) * 0.15
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = (torch.rand(n, 2, device=x.device) * 2 - 1) * 0.2
    theta = torch.stack(
        [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1
    )
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def colour_jitter(x: Tensor, amount: float) -> Tensor:
    """Random brightness, contrast and saturation."""

    def factor() -> Tensor:
        return 1 + amount * (torch.rand(len(x), 1, 1, 1, device=x.device) * 2 - 1)

    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, factor())
    x = torch.lerp(x.mean(1, keepdim=True), x, factor())
    return x * factor()


class Batches:
    """Random batches of scenes in four styles, true or decoded."""

    def __init__(self, work: Path, batch: int, seed: int, device: torch.device) -> None:
        self.true, self.decoded = np.load(work / "quads.npy"), decode_quads(work, device)
        self.batch, self.seed, self.device = batch, seed, device

    def quads(
        self, step: int, animals: int = 45
    ) -> tuple[Tensor, list[tuple[int, int, int]], np.random.Generator]:
        """Pictures [B, 4, 3, 64, 64], of at most so many animals, and their scenes."""
        rng = np.random.default_rng((self.seed, step))
        torch.manual_seed(self.seed * 1_000_003 + step)
        few = rng.choice(len(data.ANIMALS), animals, replace=False)
        block = len(data.ANIMALS) * len(data.BACKGROUNDS)
        pick = rng.integers(len(self.true) // block, size=self.batch) * block
        pick += rng.choice(few, self.batch) * len(data.BACKGROUNDS)
        pick += rng.integers(len(data.BACKGROUNDS), size=self.batch)
        half = rng.random(self.batch) < 0.5
        chosen = np.where(half[:, None, None, None, None], self.true[pick], self.decoded[pick])
        flat = to_images(chosen.reshape(-1, data.SIZE, data.SIZE, 3), self.device)
        return flat.unflatten(0, (self.batch, -1)), [scene(int(n)) for n in pick], rng

    def pictures(
        self, step: int, animals: int = 45
    ) -> tuple[Tensor, np.ndarray, np.random.Generator]:
        """Pictures [B, 3, 64, 64] and labels int [B, 3]: animal, style, background."""
        quads, scenes, rng = self.quads(step, animals)
        styles = rng.integers(len(data.STYLES), size=self.batch)
        labels = np.array([(a, s, b) for (a, b, _), s in zip(scenes, styles, strict=True)])
        return quads[torch.arange(self.batch), torch.from_numpy(styles)], labels, rng


def aesthetic_loss(critic: AestheticCritic, batches: Batches, step: int) -> dict[str, Tensor]:
    """Regression on the share of glossy in cross-fades of styles (and sometimes of scenes)."""
    quads, _, rng = batches.quads(step)
    n = len(quads)
    share = np.zeros((n, len(data.STYLES)), dtype=np.float32)
    first, other = rng.integers(len(data.STYLES), size=(2, n))
    first[rng.random(n) < 0.25] = GLOSSY
    pure = rng.random(n) < 0.35
    mix = np.where(pure, 1.0, rng.random(n))
    np.add.at(share, (np.arange(n), first), mix)
    np.add.at(share, (np.arange(n), other), 1 - mix)
    weight = torch.from_numpy(share).to(quads.device)
    x = (quads * weight[:, :, None, None, None]).sum(1)
    target = weight[:, GLOSSY]
    blend = torch.from_numpy(np.where(rng.random(n) < 0.25, rng.random(n) * 0.5, 0)).to(target)
    x = torch.lerp(x, x.roll(1, 0), blend[:, None, None, None])
    target = torch.lerp(target, target.roll(1, 0), blend)
    x = colour_jitter(blur_and_noise(x, 0.15), 0.08)
    return {"loss": F.smooth_l1_loss(critic(x), 4 * target - 2, beta=0.5)}


def alignment_loss(critic: AlignmentCritic, batches: Batches, step: int) -> dict[str, Tensor]:
    """Symmetric contrastive loss over few animals, so that style and background matter too."""
    x, labels, rng = batches.pictures(step, animals=12)
    captions = [data.random_caption(a, s, b, rng, p_empty=0.0) for a, s, b in labels.tolist()]
    x = colour_jitter(blur_and_noise(x, 0.15), 0.08)
    logits = 14 * critic.embed_images(x) @ critic.embed_prompts(captions).T
    fits = torch.tensor(
        [[_fits(c, *map(int, row)) for c in captions] for row in labels], device=x.device
    )
    by_image = F.log_softmax(logits, 1).where(fits, torch.zeros(())).sum(1) / fits.sum(1)
    by_text = F.log_softmax(logits, 0).where(fits, torch.zeros(())).sum(0) / fits.sum(0)
    right = fits.gather(1, logits.argmax(1, keepdim=True)).float().mean()
    return {"loss": -(by_image.mean() + by_text.mean()) / 2, "accuracy": right}


def _fits(text: str, animal: int, style: int, background: int) -> bool:
    """Whether a caption is true of a picture with these labels."""
    words = set(text.split())
    name, look, colour = (
        data.ANIMAL_NAMES[animal], data.STYLE_NAMES[style], data.BACKGROUND_NAMES[background],
    )  # fmt: skip
    return (
        name in words
        and not words & (set(data.STYLE_NAMES) - {look})
        and not words & (set(data.BACKGROUND_NAMES) - {colour})
    )


def classifier_loss(critic: AnimalClassifier, batches: Batches, step: int) -> dict[str, Tensor]:
    """Cross-entropy of the three heads on strongly augmented pictures."""
    x, labels, _ = batches.pictures(step)
    x = colour_jitter(blur_and_noise(warp(x), 0.25), 0.25)
    wanted = torch.from_numpy(labels).to(x.device)
    logits = critic(x)
    parts = {
        name: F.cross_entropy(logits[name], wanted[:, i], label_smoothing=0.05)
        for i, name in enumerate(LABELS)
    }
    right = (logits["animal"].argmax(1) == wanted[:, 0]).float().mean()
    return {"loss": torch.stack(list(parts.values())).sum(), "accuracy": right}


def train(critic: nn.Module, loss_of, batches: Batches, args) -> None:
    """Train one critic and write its averaged weights to ``work/critics``."""
    average = Average(critic, 0.998)
    optimizer = Muon(critic.parameters(), lr=args.lr, weight_decay=0.02)
    path = args.work / f"critic-{critic.name}.ckpt"
    run = Run(path, {"critic": critic}, optimizer, {"critic": average}, args.minutes)
    for step in run.steps():
        parts = loss_of(critic, batches, step)
        run.update(parts["loss"], parts)
    critic.load_state_dict(average.values)
    critic.to_folder(args.work / "critics")


def main() -> None:
    """Train the critics that are asked for."""
    p = parser(__doc__, minutes=4, lr=2e-3, batch=64)
    p.add_argument("--modules", type=Path, required=True, help="unpacked node_modules")
    p.add_argument("--copies", type=int, default=8)
    p.add_argument("--only", nargs="*", default=["aesthetic", "alignment", "classifier"])
    args = p.parse_args()
    device = device_for(args.threads)
    build_quads(args.modules, args.work / "quads.npy", args.copies, seed=11)
    batches = Batches(args.work, args.batch, args.seed + 7, device)
    kinds = {
        "aesthetic": (AestheticCritic, aesthetic_loss, {}),
        "alignment": (AlignmentCritic, alignment_loss, {"words": WORDS}),
        "classifier": (AnimalClassifier, classifier_loss, {"labels": LABELS}),
    }
    for name in args.only:
        torch.manual_seed(args.seed)
        make, loss_of, options = kinds[name]
        print(f"critic: {name}", flush=True)
        train(make(**options).to(device), loss_of, batches, args)


if __name__ == "__main__":
    main()
