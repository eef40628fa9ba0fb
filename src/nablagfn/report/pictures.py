"""Pictures of a run as data: URLs, small enough that a report can be sent around."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..config import ConfigError
from .read import SampleRow, Sheet

WIDTH, HEIGHT = 1600, 4000  # at most, in pixels
QUALITY = 85  # of lossy WebP; small pictures are kept without loss
SMALL = 300_000  # pixels up to which they are


@dataclass(frozen=True)
class Picture:
    """An embedded picture and its size, so that a page does not jump while it loads."""

    url: str
    width: int
    height: int


def load(path: Path) -> Image.Image:
    """A picture file. Raises ConfigError when it is damaged."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}): write it anew, or move it away and it is left out"
        ) from None


def encode(image: Image.Image, width: int = WIDTH) -> Picture:
    """Encode it as WebP, scaled down to at most `width` x HEIGHT."""
    scale = min(1.0, width / image.width, HEIGHT / image.height)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    lossless = image.width * image.height <= SMALL
    image.save(buffer, "WEBP", quality=QUALITY, lossless=lossless)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/webp;base64,{data}", image.width, image.height)


def embed(path: Path, width: int = WIDTH) -> Picture | None:
    """A picture file, or None when it is not there."""
    return encode(load(path), width) if path.is_file() else None


@dataclass(frozen=True)
class ContactSheet:
    """Thumbnails of many samples in one picture."""

    path: Path
    image: Image.Image
    sheet: Sheet

    def same(self, sample: SampleRow) -> SampleRow | None:
        """This sheet's sample from the same prompt and noise."""
        key = (sample.index, sample.prompt)
        return next((own for own in self.sheet.samples if (own.index, own.prompt) == key), None)

    def cut(self, sample: SampleRow) -> Picture:
        """A sample's thumbnail. Raises ConfigError when the sheet is too small to hold it."""
        assert self.sheet.thumbnail is not None
        width, height = self.sheet.thumbnail
        row, column = divmod(self.sheet.samples.index(sample), self.sheet.columns)
        left, top = column * (width + self.sheet.gap), row * (height + self.sheet.gap)
        if left + width > self.image.width or top + height > self.image.height:
            raise ConfigError(
                f"{self.path} has no place for sample {sample.index} of samples.json: run "
                "`nablagfn evaluate` again"
            )
        return encode(self.image.crop((left, top, left + width, top + height)))
