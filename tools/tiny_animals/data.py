"""Sprites, captions and composites: the data of tiny-animals.

The pictures come from four openly licensed emoji sets that npm packages carry. Each animal is
drawn in four styles; a composite places one sprite on one of eight flat named backgrounds, in one
of two sizes, mirrored or not.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64  # side of a composite, pixels
SPRITE = 128  # side of a cached sprite, pixels
CANVAS = 208  # side of the transparent canvas round a sprite, pixels
SIZES = (0.82, 0.92)  # longest side of the animal over the side of the picture
SCALE = (0.80, 0.94)  # the same, where it is random
SHIFT = 0.035  # largest random shift, as a share of the picture's side

#: npm packages (name, version) that hold the pictures.
PACKAGES = (
    ("@iconify-json/noto", "1.2.9"),
    ("@iconify-json/twemoji", "1.2.5"),
    ("@iconify-json/fluent-emoji-flat", "1.2.6"),
    ("@lobehub/fluent-emoji-3d", "1.1.0"),
)
#: Style word -> package. The first is the 3-D style that tiny-aesthetic prefers.
STYLES = {
    "glossy": "@lobehub/fluent-emoji-3d",
    "painted": "@iconify-json/noto",
    "simple": "@iconify-json/twemoji",
    "flat": "@iconify-json/fluent-emoji-flat",
}
#: Background word -> red, green, blue.
BACKGROUNDS = {
    "white": (244, 244, 240),
    "gray": (96, 100, 112),
    "red": (222, 82, 74),
    "yellow": (248, 208, 78),
    "green": (92, 184, 110),
    "blue": (76, 146, 220),
    "purple": (142, 100, 200),
    "pink": (246, 168, 200),
}
#: Animal -> code points of its drawings (poses).
ANIMALS = {
    "cat": ("1f408", "1f431"), "dog": ("1f415", "1f436"), "horse": ("1f40e", "1f434"),
    "monkey": ("1f412", "1f435"), "rabbit": ("1f407", "1f430"), "zebra": ("1f993",),
    "spider": ("1f577",), "bird": ("1f426",), "sheep": ("1f411",), "deer": ("1f98c",),
    "cow": ("1f404", "1f42e"), "goat": ("1f410",), "lion": ("1f981",),
    "tiger": ("1f405", "1f42f"), "bear": ("1f43b",), "raccoon": ("1f99d",), "fox": ("1f98a",),
    "wolf": ("1f43a",), "lizard": ("1f98e",), "beetle": ("1fab2",), "ant": ("1f41c",),
    "butterfly": ("1f98b",), "fish": ("1f41f", "1f420"), "shark": ("1f988",),
    "whale": ("1f40b", "1f433"), "dolphin": ("1f42c",), "squirrel": ("1f43f",),
    "mouse": ("1f401", "1f42d"), "rat": ("1f400",), "snake": ("1f40d",), "turtle": ("1f422",),
    "frog": ("1f438",), "chicken": ("1f414",), "duck": ("1f986",), "goose": ("1fabf",),
    "bee": ("1f41d",), "pig": ("1f416", "1f437"), "turkey": ("1f983",), "fly": ("1fab0",),
    "llama": ("1f999",), "camel": ("1f42b", "1f42a"), "bat": ("1f987",), "gorilla": ("1f98d",),
    "hedgehog": ("1f994",), "kangaroo": ("1f998",),
}  # fmt: skip
ANIMAL_NAMES = tuple(ANIMALS)
STYLE_NAMES = tuple(STYLES)
BACKGROUND_NAMES = tuple(BACKGROUNDS)
_COLOURS = np.array(list(BACKGROUNDS.values()), dtype=np.float32)


#: (animal, style) -> its sprites (poses): mode RGBa, trimmed, the longer side SPRITE pixels.
Drawings = dict[tuple[int, int], list[Image.Image]]


@dataclass(frozen=True)
class Sprites:
    """All drawings: premultiplied RGBA canvases and what they show."""

    canvases: list[Image.Image]  # mode RGBa, CANVAS x CANVAS
    table: dict[tuple[int, int], list[int]]  # (animal, style) -> indices into canvases


@dataclass(frozen=True)
class Composites:
    """A fixed set of composites: images uint8 [N, 64, 64, 3], labels int16 [N]."""

    images: np.ndarray
    animal: np.ndarray
    style: np.ndarray
    background: np.ndarray

    def labels(self) -> np.ndarray:
        """Animal, style, background: int16 [N, 3]."""
        return np.stack([self.animal, self.style, self.background], 1)


def _svg(icons: dict, chars: dict, code: str) -> str | None:
    """The SVG text of a code point in an iconify set, or None where it has none."""
    name = chars.get(code) or chars.get(code + "-fe0f") or chars.get(f"{code}-fe0f")
    seen = 0
    while name in icons.get("aliases", {}) and seen < 5:
        name, seen = icons["aliases"][name]["parent"], seen + 1
    if name not in icons["icons"]:
        return None
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="256" height="256">{icon["body"]}</svg>'
    )


def _drawing(modules: Path, package: str, code: str) -> Image.Image | None:
    """One drawing as an RGBA picture of 256x256, or None where the package lacks it."""
    import resvg_py  # only where drawings are read from npm packages, not from a pack

    root = modules / package
    if package == STYLES["glossy"]:
        for name in (code, f"{code}-fe0f"):
            path = root / "assets" / f"{name}.webp"
            if path.exists():
                return Image.open(path).convert("RGBA")
        return None
    icons = json.loads((root / "icons.json").read_text())
    svg = _svg(icons, json.loads((root / "chars.json").read_text()), code)
    if svg is None:
        return None
    return Image.open(BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")


def fitted(drawing: Image.Image) -> Image.Image:
    """Trim a drawing and fit it to SPRITE pixels; premultiplied (mode RGBa)."""
    box = drawing.getchannel("A").point(lambda a: 255 if a > 16 else 0).getbbox()
    trimmed = drawing.crop(box).convert("RGBa")
    ratio = SPRITE / max(trimmed.size)
    size = (max(1, round(trimmed.width * ratio)), max(1, round(trimmed.height * ratio)))
    return trimmed.resize(size, Image.Resampling.LANCZOS)


def _canvas(sprite: Image.Image) -> Image.Image:
    """Centre a sprite on a premultiplied canvas."""
    canvas = Image.new("RGBa", (CANVAS, CANVAS))
    canvas.paste(sprite, ((CANVAS - sprite.width) // 2, (CANVAS - sprite.height) // 2))
    return canvas


def read_drawings(modules: Path) -> Drawings:
    """Every (animal, style) with its sprites, from an unpacked ``node_modules`` folder."""
    drawings: Drawings = {}
    for a, codes in enumerate(ANIMALS.values()):
        for s, package in enumerate(STYLES.values()):
            found = [d for d in (_drawing(modules, package, c) for c in codes) if d is not None]
            if not found:
                raise ValueError(f"{package} has no picture of: {ANIMAL_NAMES[a]}")
            drawings[a, s] = [fitted(d) for d in found]
    return drawings


def on_canvases(drawings: Drawings) -> Sprites:
    """The drawings as composites take them."""
    canvases: list[Image.Image] = []
    table: dict[tuple[int, int], list[int]] = {}
    for key, found in drawings.items():
        table[key] = list(range(len(canvases), len(canvases) + len(found)))
        canvases += [_canvas(sprite) for sprite in found]
    return Sprites(canvases, table)


def load_sprites(modules: Path) -> Sprites:
    """Read all drawings from an unpacked ``node_modules`` folder."""
    return on_canvases(read_drawings(modules))


def composite(
    sprites: Sprites,
    index: int,
    background: int,
    scale: float,
    shift: tuple[float, float] = (0.0, 0.0),
    mirror: bool = False,
) -> np.ndarray:
    """Place sprite ``index`` on a flat background; uint8 [64, 64, 3]."""
    side = SPRITE / scale
    room = (CANVAS - side) / 2
    dx, dy = np.clip(np.array(shift) * side, -room, room)
    left, top = room + dx, room + dy
    box = (left, top, min(CANVAS, left + side), min(CANVAS, top + side))
    view = sprites.canvases[index].resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
    rgba = np.asarray(view, dtype=np.float32)
    if mirror:
        rgba = rgba[:, ::-1]
    picture = rgba[..., :3] + (1 - rgba[..., 3:] / 255) * _COLOURS[background]
    return np.clip(np.round(picture), 0, 255).astype(np.uint8)


def placed_at_random(
    sprites: Sprites,
    index: int,
    background: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = SCALE,
    shift: float = SHIFT,
) -> np.ndarray:
    """A composite with random size, shift and mirroring; uint8 [64, 64, 3]."""
    size = rng.uniform(*scale)
    dx, dy = rng.uniform(-shift, shift, 2).tolist()
    return composite(sprites, index, background, size, (dx, dy), bool(rng.random() < 0.5))


def build(sprites: Sprites, copies: int, at_random: bool, seed: int) -> Composites:
    """``copies`` composites of every (animal, style, background), poses in turn, shuffled.

    Not at random, the copies run through the poses, two sizes and mirroring: 8 cover all.
    """
    rng = np.random.default_rng(seed)
    labels = [
        (a, s, b, k)
        for a, s in sprites.table
        for b in range(len(BACKGROUNDS))
        for k in range(copies)
    ]
    order = rng.permutation(len(labels))
    images = np.empty((len(labels), SIZE, SIZE, 3), dtype=np.uint8)
    table = np.array(labels, dtype=np.int16)[order]
    for n, (a, s, b, k) in enumerate(table.tolist()):
        poses = sprites.table[a, s]
        if at_random:
            images[n] = placed_at_random(sprites, poses[(k + b) % len(poses)], b, rng)
        else:
            size, mirror = SIZES[k // 2 % 2], bool(k // 4 % 2)
            images[n] = composite(sprites, poses[k % len(poses)], b, size, mirror=mirror)
    return Composites(images, table[:, 0], table[:, 1], table[:, 2])


def save(data: Composites, folder: Path) -> None:
    """Write a set of composites as four npy files (memory-mappable), the images last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("animal", "style", "background", "images"):
        partial = folder / f"{name}.partial.npy"
        np.save(partial, getattr(data, name))
        os.replace(partial, folder / f"{name}.npy")


def load(folder: Path) -> Composites:
    """Read what ``save`` wrote; the images stay on disk, memory-mapped."""
    names = ("animal", "style", "background")
    rest = [np.load(folder / f"{name}.npy") for name in names]
    return Composites(np.load(folder / "images.npy", mmap_mode="r"), *rest)


def caption(animal: str, style: str | None = None, background: str | None = None) -> str:
    """For example "a glossy cat on a blue background"; style and background are optional."""
    words = f"{style} {animal}" if style else animal
    article = "an" if words[0] in "aeiou" else "a"
    return f"{article} {words}" + (f" on a {background} background" if background else "")


def random_caption(
    animal: int, style: int, background: int, rng: np.random.Generator, p_empty: float = 0.1
) -> str:
    """A caption that names the animal, and style or background half of the time each."""
    if rng.random() < p_empty:
        return ""
    name = ANIMAL_NAMES[animal]
    kind = rng.random()
    if kind < 0.15:
        return name
    if kind < 0.50:
        return caption(name)
    with_style, with_background = [(True, False), (False, True), (True, True)][rng.integers(3)]
    return caption(
        name,
        STYLE_NAMES[style] if with_style else None,
        BACKGROUND_NAMES[background] if with_background else None,
    )


def main() -> None:
    """Build and save ``modes`` (all poses, sizes, mirrorings) and ``random`` (random ones)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modules", type=Path, required=True, help="unpacked node_modules")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, copies in (("modes", 8), ("random", 16)):
        if not (args.out / name / "images.npy").exists():
            data = build(load_sprites(args.modules), copies, name == "random", args.seed)
            save(data, args.out / name)


if __name__ == "__main__":
    main()
