"""Image files: which there are in a folder, what size they are made, and reading new ones to be scored."""

from __future__ import annotations

import os
import statistics
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ssad_hpo.bounds import MOST_IMAGE_PIXELS, MOST_PIXELS, whole
from ssad_hpo.data.pixels import (
    WHOLE_DEPTH,
    DataError,
    Decoding,
    UnreadableError,
    decode_bytes,
    decode_into,
    decode_whole,
    error_about,
    in_threads,
    ratio,
)

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
_NEARLY_SQUARE = 1.25  # ratio of sides up to which images become squares
_LONGEST = 4  # times the shorter side


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """The image files in a folder and all folders inside it, sorted by path.

    An image is a file named .png, .jpg, .jpeg, .bmp, .tif, .tiff or .webp, in any case; others are counted in
    a warning. Files and folders whose name begins with a dot are ignored.

    Raises:
        DataError: if there is no such folder, or no image in it.
    """
    top = Path(folder)
    if not top.is_dir():
        raise DataError(f"{top}: expected a folder of images, there is no such folder")
    try:
        files = list(_files(top, frozenset()))
    except OSError as error:
        raise DataError(f"{error.filename}: the folder cannot be read ({error.strerror})") from error
    found = sorted(path for path in files if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise DataError(f"{top}: expected images ({', '.join(sorted(_SUFFIXES))}) in it, found none")
    if others := Counter(path.suffix.lower() for path in files if path.suffix.lower() not in _SUFFIXES):
        kinds = ", ".join(
            f"{count} {suffix or 'without a suffix'}" for suffix, count in others.most_common(5)
        )
        count = others.total()
        warnings.warn(f"{top}: left out {count} files that are not named as images ({kinds})", stacklevel=2)
    return found


def _files(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:  # a link that leads in a circle
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            # Of a link that leads nowhere, or to itself, a sentence is said when it is read.
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                yield from _files(Path(entry.path), above | {real})
            else:
                yield Path(entry.path)


def read_images(
    paths: Sequence[str | os.PathLike[str]],
    image_size: int | tuple[int, int],
    channels: int,
    skip_unreadable: bool = False,
    *,
    bit_depth: int = WHOLE_DEPTH,
    max_pixels: int = MOST_IMAGE_PIXELS,
) -> tuple[torch.Tensor, list[Path], list[str]]:
    """Read images in the order given, as `load_folder` reads them; for scoring new images.

    Args:
        paths: files. The first frame counts, EXIF orientation is honoured.
        image_size: height and width of the result, pixels, one number for both of a square; images are
            squeezed to that.
        channels: 1 (colour becomes luminance) or 3 (grey becomes three equal channels).
        skip_unreadable: leave out files that cannot be read, instead of raising.
        bit_depth: of grey values in files of 16 bits; a camera's may be 10 or 12.
        max_pixels: of a file, which takes up to 8 bytes of memory for each while it is read.

    Returns:
        (N, channels, height, width) uint8, the N paths that were read, and what could not be with its reason.

    Raises:
        DataError: naming the first file that cannot be read, unless `skip_unreadable`.
        ValueError: for a size or number of channels that cannot be.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    for side in (height, width):
        check_image_size(side)
    decoding = Decoding(bit_depth, max_pixels)
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 or 3, got {channels}")
    files = [Path(path) for path in paths]
    rows = np.empty((len(files), channels, height, width), np.uint8)
    reasons = decode_into(rows, files, skip_unreadable, decoding)
    read = [i for i, reason in enumerate(reasons) if reason is None]
    lost = [f"{files[i]} {reason}" for i, reason in enumerate(reasons) if reason is not None]
    for kept, i in enumerate(read):  # close the gaps in place: never a second copy of the result
        if kept != i:
            rows[kept] = rows[i]
    return torch.from_numpy(rows[: len(read)]), [files[i] for i in read], lost


def read_contents(
    contents: Sequence[bytes],
    shape: tuple[int, int, int],
    *,
    bit_depth: int = WHOLE_DEPTH,
    first: int = 0,
) -> np.ndarray:
    """What is in image files, (N, C, H, W) uint8, as `read_images` reads them from paths.

    Args:
        first: the place of the first among all, for messages.

    Raises:
        DataError: naming the place of one that cannot be read.
    """
    decoding = Decoding(bit_depth)
    rows = np.empty((len(contents), *shape), np.uint8)

    def work(i: int) -> None:
        try:
            rows[i] = decode_bytes(contents[i], shape, decoding)
        except UnreadableError as error:
            raise DataError(f"image {first + i} {error}") from error

    in_threads(work, range(len(contents)))
    return rows


def read_whole(
    path: str | os.PathLike[str], *, bit_depth: int = WHOLE_DEPTH, max_pixels: int = MOST_IMAGE_PIXELS
) -> Image.Image:
    """An image as it is shown, at its own resolution: RGB.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        return decode_whole(Path(path), Decoding(bit_depth, max_pixels))
    except UnreadableError as error:
        raise error_about(Path(path), error) from error


def skipped(lost: Sequence[str]) -> str:
    """What is said of files that could not be read: how many, and some with the reason."""
    return f"skipped {len(lost)} unreadable images: {'; '.join(lost[:3])}{'; ...' if len(lost) > 3 else ''}"


def check_image_size(image_size: int) -> None:
    """Raises ValueError for anything but a whole number of pixels that a network can take."""
    if not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f"image_size: expected a whole number of pixels >= 1, got {image_size!r:.80}")
    whole("image_size", image_size, 1, MOST_PIXELS)


def common_size(paths: Sequence[Path], image_size: int) -> tuple[int, int]:
    """Height and width that images of one shape are resized to: the shorter side becomes `image_size`.

    The ratio is the median of the files', and a square's where it is near to 1; files that cannot be read
    have no say.
    """
    ratios = [found for found in in_threads(ratio, paths) if found is not None]
    median = statistics.median(ratios) if ratios else 1.0
    longer = round(image_size * min(max(median, 1 / median), _LONGEST) / 8) * 8
    if max(median, 1 / median) <= _NEARLY_SQUARE:
        return image_size, image_size
    return (image_size, longer) if median > 1 else (longer, image_size)
