"""Image files as an exported detector takes them. Needs NumPy and Pillow alone: copy it to where it runs."""

from __future__ import annotations

import os
from typing import IO

import numpy as np
from PIL import Image, ImageOps


def prepare(file: str | os.PathLike[str] | IO[bytes], height: int, width: int, channels: int) -> np.ndarray:
    """(1, C, H, W) uint8 of an image file of 8 bits, as `ssad-hpo score` reads it.

    A JPEG larger than twice the size is decoded at 1/2, 1/4 or 1/8, as Pillow's `draft` chooses; EXIF
    orientation is honoured; transparent pixels become black; then Pillow's BILINEAR filter, which looks at
    all pixels that a smaller one covers (antialiasing), squeezes the image to the size. Other resizing gives
    other scores: OpenCV's INTER_LINEAR, for one, leaves pixels out.

    Args:
        file: a path, or an open file.
        height, width, channels: of the detector; they are in the exported file's metadata.
    """
    with Image.open(file) as opened:
        opened.draft(None, (2 * width, 2 * height))
        opened.load()
        image: Image.Image = opened
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            black = Image.new("RGBA", image.size, (0, 0, 0, 255))
            grey = image.mode in ("1", "L", "LA")
            image = Image.alpha_composite(black, image.convert("RGBA")).convert("L" if grey else "RGB")
        image = image.convert("L" if channels == 1 else "RGB")
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(1, height, width, channels).transpose(0, 3, 1, 2).copy()
