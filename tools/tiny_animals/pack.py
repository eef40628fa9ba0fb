"""Pack the drawings of tiny-animals into one small file, for machines without npm and resvg.

    python pack.py --modules node_modules --out .data/tiny-animals.zip

The file is a zip of WebP pictures, ``horse/glossy/0.webp`` and so on: each drawing trimmed and
fitted as composites take it, premultiplied, without loss, so that composites made from it are
those made from the npm packages, bit for bit: 2.04 MB, in two minutes. To be read it needs
Pillow only. The drawings keep their licences (see the model card): do not pass the file on
without their attributions.
"""

from __future__ import annotations

import argparse
import os
import zipfile
from io import BytesIO
from pathlib import Path

import data
from PIL import Image


def _bytes_of(sprite: Image.Image) -> bytes:
    """A premultiplied sprite as lossless WebP; its four channels are stored as they are."""
    stream = BytesIO()
    raw = Image.frombytes("RGBA", sprite.size, sprite.tobytes())
    raw.save(stream, "WEBP", lossless=True, exact=True, quality=100, method=6)
    return stream.getvalue()


def _sprite_of(content: bytes) -> Image.Image:
    """The inverse of ``_bytes_of``; a WebP without transparency comes back opaque."""
    raw = Image.open(BytesIO(content)).convert("RGBA")
    return Image.frombytes("RGBa", raw.size, raw.tobytes())


def save_pack(drawings: data.Drawings, path: Path) -> None:
    """Write the file beside its place, then move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with zipfile.ZipFile(partial, "w") as file:
        for (a, s), found in drawings.items():
            for n, sprite in enumerate(found):
                name = f"{data.ANIMAL_NAMES[a]}/{data.STYLE_NAMES[s]}/{n}.webp"
                file.writestr(zipfile.ZipInfo(name), _bytes_of(sprite))
    os.replace(partial, path)


def load_pack(path: Path) -> data.Drawings:
    """Read what ``save_pack`` wrote; SystemExit with one line where that is not possible."""
    try:
        with zipfile.ZipFile(path) as file:
            names = [name.split("/") for name in file.namelist()]
            contents = [file.read("/".join(name)) for name in names]
    except (OSError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{path}: no whole pack ({error}); write it again with pack.py") from None
    drawings: data.Drawings = {}
    for (animal, style, _), content in zip(names, contents, strict=True):
        key = data.ANIMAL_NAMES.index(animal), data.STYLE_NAMES.index(style)
        drawings.setdefault(key, []).append(_sprite_of(content))
    return drawings


def main() -> None:
    """Pack, read again, print the size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modules", type=Path, required=True, help="unpacked node_modules")
    parser.add_argument("--out", type=Path, default=Path(".data/tiny-animals.zip"))
    args = parser.parse_args()
    save_pack(data.read_drawings(args.modules), args.out)
    count = sum(map(len, load_pack(args.out).values()))
    print(f"{args.out}: {count} drawings, {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
