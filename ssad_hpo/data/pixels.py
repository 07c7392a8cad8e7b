"""From image files to uint8 pixels, many at a time: headers, modes, and how much memory a file may take."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import (
    BmpImagePlugin,
    ExifTags,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from ssad_hpo.bounds import MOST_IMAGE_PIXELS, MOST_SEED, check_whole
from ssad_hpo.files import FileError, open_regular

# Named, so that a file under an image's suffix cannot reach PIL's other readers (EPS runs a program).
# Importing them makes them known to PIL.
_PLUGINS = (BmpImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin)
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
WHOLE_DEPTH = 16  # bits of a grey value in a file of 16 bits, unless something else is said
_BAND = 2**20  # pixels that are converted at a time
_LARGE = 2**24  # pixels; of larger images one at a time is decoded, however many threads there are
_one_large = threading.Lock()
T = TypeVar("T")
R = TypeVar("R")


class DataError(ValueError):
    """Images that cannot be used as they are: names the file or folder, the reason and the remedy."""


@dataclass(frozen=True)
class Decoding:
    """How files become pixels.

    Attributes:
        bit_depth: of grey values in files of 16 bits, 8 to 16; a camera's may be 10 or 12.
        max_pixels: of a file, before it is made smaller. While it is read, it takes up to 8 bytes a pixel.
    """

    bit_depth: int = WHOLE_DEPTH
    max_pixels: int = MOST_IMAGE_PIXELS

    def __post_init__(self) -> None:
        check_whole(self, {"bit_depth": (8, WHOLE_DEPTH), "max_pixels": (1, MOST_SEED)})


class UnreadableError(Exception):
    """Why one file gives no image, without its path.

    Attributes:
        of_content: whether the file's content is the reason, so that the same bytes will always fail;
            not so for a missing file, an exhausted machine or a limit that the user may raise.
    """

    def __init__(self, reason: str, of_content: bool) -> None:
        super().__init__(reason)
        self.of_content = of_content


def error_about(path: Path, reason: UnreadableError | str) -> DataError:
    """The error for a file that was to be read and could not be."""
    return DataError(f"{path}: {reason}. Repair or remove the file, or skip such files (skip_unreadable)")


def is_grey(file: BinaryIO) -> bool:
    """Whether an image has no colour, by its header alone or, if it has one, by its palette.

    Raises:
        UnreadableError: if that cannot be told.
    """
    with _reasons():
        image = _open(file)
        if image.mode in ("P", "PA"):
            palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
            return bool((palette == palette[:, :1]).all())
        return image.mode in ("1", "L", "LA", "I") or image.mode.startswith("I;16")


def ratio(path: Path) -> float | None:
    """Width over height as the image is shown, by its header; None of what cannot be read."""
    try:
        with _reasons(), open_regular(path) as file:
            image = _open(file)
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return image.height / image.width if turned else image.width / image.height
    except UnreadableError:
        return None


def decode_into(
    rows: np.ndarray, paths: Sequence[Path], skip_unreadable: bool, decoding: Decoding
) -> list[UnreadableError | None]:
    """Decode paths[i] into rows[i], in parallel; never more originals in memory than threads.

    Args:
        rows: (N, C, H, W) uint8, C 1 or 3.
        skip_unreadable: leave rows[i] undefined where paths[i] cannot be read instead of raising.

    Returns:
        For each path why it could not be read, or None.

    Raises:
        DataError: naming the first path that cannot be read.
    """

    def work(i: int) -> UnreadableError | None:
        try:
            rows[i] = decode(paths[i], rows.shape[1:], decoding)
        except UnreadableError as error:
            if not skip_unreadable:
                raise error_about(paths[i], error) from error
            return error
        return None

    return in_threads(work, range(len(paths)))


def in_threads(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """[work(item) for item in items] with a thread per core. Decoding and hashing free the GIL."""
    affinity = getattr(os, "sched_getaffinity", None)  # what a container may use, where known
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        return list(pool.map(work, items))


def decode(path: Path, shape: tuple[int, ...], decoding: Decoding) -> np.ndarray:
    """An image file as (C, H, W) uint8, C 1 or 3.

    Raises:
        UnreadableError: if it cannot be read, or takes more memory than it may.
    """
    channels, height, width = shape
    with _reasons(), open_regular(path) as file:
        image = _decoded(file, "L" if channels == 1 else "RGB", (width, height), decoding)
        return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def decode_whole(path: Path, decoding: Decoding) -> Image.Image:
    """An image file at its own resolution, as it is shown: RGB of 8 bits.

    Raises:
        UnreadableError: as `decode`.
    """
    with _reasons(), open_regular(path) as file:
        return _decoded(file, "RGB", None, decoding)


def decode_bytes(content: bytes, shape: tuple[int, ...], decoding: Decoding) -> np.ndarray:
    """What `decode` gives, of a file's content.

    Raises:
        UnreadableError: as `decode`.
    """
    channels, height, width = shape
    with _reasons():
        image = _decoded(io.BytesIO(content), "L" if channels == 1 else "RGB", (width, height), decoding)
        return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def _decoded(file: BinaryIO, mode: str, size: tuple[int, int] | None, decoding: Decoding) -> Image.Image:
    """The image in a file, of a width and height, or of its own."""
    image = _open(file)
    if (pixels := image.width * image.height) > decoding.max_pixels:
        raise _too_large(pixels, decoding)
    if size is not None:
        # JPEG can decode at 1/2, 1/4 or 1/8; twice the final size leaves the resize its own work.
        image.draft(None, (2 * size[0], 2 * size[1]))
    large = image.width * image.height > _LARGE
    with _one_large if large else contextlib.nullcontext():
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        image = _without_alpha(_to_8_bit(image, decoding.bit_depth))
        if image.mode != mode:
            image = image.convert(mode)
        return image if size is None else image.resize(size, Image.Resampling.BILINEAR)


def _open(file: BinaryIO) -> Image.Image:
    """As PIL's own `open`, whose warnings of large images and whose limit are one setting of all threads."""
    start = file.read(16)
    for name in _FORMATS:
        make, accepts = Image.OPEN[name]
        if accepts is not None and accepts(start) is not True:  # WebP's may be a text, which says why not
            continue
        file.seek(0)
        with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):  # not of this format
            return make(file, "")
    raise UnidentifiedImageError


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """Whatever goes wrong with a file becomes an `UnreadableError` that says so in a sentence's end."""
    try:
        yield
    except UnreadableError:
        raise
    except UnidentifiedImageError as error:
        reason = "is not a PNG, JPEG, BMP, TIFF or WebP image"
        raise UnreadableError(reason, of_content=True) from error
    except Image.DecompressionBombError as error:  # of parts of a file: tiles, frames
        raise UnreadableError("has parts of more pixels than Pillow takes", of_content=False) from error
    except FileError as error:
        raise UnreadableError(str(error).partition(": ")[2], of_content=False) from error
    except Exception as error:  # a damaged file makes PIL's decoders raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:  # PIL's own have no number
            raise UnreadableError(f"cannot be read ({error.strerror})", of_content=False) from error
        reason = f"cannot be decoded ({type(error).__name__}: {error})"
        raise UnreadableError(reason, of_content=not isinstance(error, MemoryError)) from error


def _too_large(pixels: int, decoding: Decoding) -> UnreadableError:
    reason = (
        f"has {pixels} pixels, expected at most {decoding.max_pixels}; if it may take 8 bytes of memory "
        f"for each, give max_pixels (--max-pixels {pixels})"
    )
    return UnreadableError(reason, of_content=False)


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Some rows at a time, and where they begin: copies of whole images are what takes memory."""
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _changed(image: Image.Image, mode: str, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    result = Image.new(mode, image.size)
    for top, band in _bands(image):
        result.paste(change(band), (0, top))
    return result


def _to_8_bit(image: Image.Image, bit_depth: int) -> Image.Image:
    """16-bit grey values v become round(v / 257): a fixed rule, so that no image depends on another.

    With fewer bits the largest value that they can hold becomes 255.
    """
    if image.mode == "F":
        reason = "has floating-point pixels, whose range is not known; save it with 8 or 16 bits"
        raise UnreadableError(reason, of_content=True)
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    arrays = (np.asarray(band) for _, band in _bands(image))
    extremes = [(int(values.min()), int(values.max())) for values in arrays]
    least, highest = min(low for low, _ in extremes), max(high for _, high in extremes)
    most = 2**bit_depth - 1
    if least < 0 or highest > most:
        reason = f"has values {least}..{highest}, expected {bit_depth}-bit ones, 0..{most}"
        raise UnreadableError(reason, of_content=True)

    def eighth(band: Image.Image) -> Image.Image:
        values = np.asarray(band).astype(np.int64)
        return Image.fromarray(((values * 255 + most // 2) // most).astype(np.uint8))

    return _changed(image, "L", eighth)


def _without_alpha(image: Image.Image) -> Image.Image:
    """Transparent pixels become black, whatever colour hides beneath them."""
    if image.mode not in ("LA", "PA", "RGBA") and "transparency" not in image.info:
        return image
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"

    def flat(band: Image.Image) -> Image.Image:
        black = Image.new("RGBA", band.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, band.convert("RGBA")).convert(mode)

    return _changed(image, mode, flat)
