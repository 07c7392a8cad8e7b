"""A heat map over its image, at the image's own resolution."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssad_hpo.report.findings import Spots

_BAND = 2**20  # pixels at a time: more would take memory of several times the image
# From nothing to dark red by way of yellow: red, green, blue, and how much of the image is covered, 0..1.
_STOPS = (
    (0.0, 255, 235, 60, 0.0),
    (0.25, 255, 220, 40, 0.35),
    (0.6, 250, 110, 10, 0.55),
    (1.0, 200, 0, 20, 0.7),
)
LONGEST_SIDE = 1024  # of an image whose heat map is on a page: the page holds every picture


def overlay(image: Image.Image, values: NDArray[np.floating], low: float, high: float) -> Image.Image:
    """An image with colours where values are high; where they are not, it is as it was.

    Args:
        image: RGB, of any size; it is changed itself.
        values: (h, w), of the whole image.
        low: up to which there is no colour. high: from which it is the darkest red.

    Returns:
        The image.
    """
    at = [stop[0] for stop in _STOPS]
    levels = np.linspace(0, 1, 256)
    table = np.stack([np.interp(levels, at, [stop[i] for stop in _STOPS]) for i in range(1, 5)], 1)
    covered = table[:, 3:].astype(np.float32)
    colours = table[:, :3].astype(np.float32) * covered
    shares = np.clip((values.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1)
    wide = _stretched(shares, np.arange(image.width), image.width, axis=1)
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        band = _stretched(wide, np.arange(top, bottom), image.height, axis=0)
        places = np.rint(band * 255).astype(np.uint8)
        if places.any():
            box = (0, top, image.width, bottom)
            pixels = np.asarray(image.crop(box)).astype(np.float32)
            pixels *= 1 - covered[places]
            pixels += colours[places]
            image.paste(Image.fromarray(np.rint(pixels).astype(np.uint8)), box)
    return image


def side_by_side(spots: Spots) -> Image.Image:
    """An image and its heat map beside each other."""
    (width, height), gap = spots.image.size, max(4, spots.image.width // 64)
    sheet = Image.new("RGB", (2 * width + gap, height), "white")
    sheet.paste(spots.image, (0, 0))
    sheet.paste(spots.heat, (width + gap, 0))
    return sheet


def _stretched(
    values: NDArray[np.float32], places: NDArray[np.integer], length: int, axis: int
) -> NDArray[np.float32]:
    """Values along an axis at some of `length` pixels, whose corners are those of the values' cells."""
    count = values.shape[axis]
    at = np.clip((places + 0.5) * count / length - 0.5, 0, count - 1)
    below = np.floor(at).astype(int)
    above = np.minimum(below + 1, count - 1)
    share = (at - below).astype(np.float32)
    share = share[:, None] if axis == 0 else share[None]
    result: NDArray[np.float32] = values.take(below, axis) * (1 - share) + values.take(above, axis) * share
    return result
