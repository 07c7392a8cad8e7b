"""From image files to uint8 pixels: which files are images, how each mode becomes grey or RGB."""

from __future__ import annotations

import contextlib
import os
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ssad_hpo.bounds import MOST_PIXELS, whole
from ssad_hpo.files import FileError, open_regular

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
# Named, so that a file under an image's suffix cannot reach PIL's other readers (EPS runs a program).
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
WHOLE_DEPTH = 16  # bits of a grey value in a file of 16 bits, unless something else is said

_NEARLY_SQUARE = 1.25  # ratio of sides up to which images become squares
_LONGEST = 4  # times the shorter side
T = TypeVar("T")
R = TypeVar("R")


class DataError(ValueError):
    """Images that cannot be used as they are: names the file or folder, the reason and the remedy."""


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
            if entry.is_dir():
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
) -> tuple[torch.Tensor, list[Path]]:
    """Read images in the order given, as `load_folder` reads them; for scoring new images.

    Args:
        paths: at least one file. The first frame counts, EXIF orientation is honoured.
        image_size: height and width of the result, pixels, one number for both of a square; images are
            squeezed to that.
        channels: 1 (colour becomes luminance) or 3 (grey becomes three equal channels).
        skip_unreadable: leave out files that cannot be read, with a warning, instead of raising.
        bit_depth: of grey values in files of 16 bits; a camera's may be 10 or 12.

    Returns:
        (N, channels, height, width) uint8, and the N paths that were read.

    Raises:
        DataError: naming the first file that cannot be read, or if none can be.
        ValueError: for no paths, or a size or number of channels that cannot be.
    """
    if not paths:
        raise ValueError("paths: expected at least one image file, got none")
    images, read, lost = read_readable(paths, image_size, channels, skip_unreadable, bit_depth=bit_depth)
    if not read:
        raise DataError(f"paths: none of the {len(paths)} files can be read; {lost[0]}")
    if lost:
        warnings.warn(skipped(lost), stacklevel=2)
    return images, read


def skipped(lost: Sequence[str]) -> str:
    """What is said of files that could not be read: how many, and some with the reason."""
    return f"skipped {len(lost)} unreadable images: {'; '.join(lost[:3])}{'; ...' if len(lost) > 3 else ''}"


def read_readable(
    paths: Sequence[str | os.PathLike[str]],
    image_size: int | tuple[int, int],
    channels: int,
    skip_unreadable: bool = True,
    *,
    bit_depth: int = WHOLE_DEPTH,
) -> tuple[torch.Tensor, list[Path], list[str]]:
    """As `read_images`, also where nothing can be read; what could not be is told with its reason."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    for side in (height, width):
        check_image_size(side)
    check_bit_depth(bit_depth)
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 or 3, got {channels}")
    files = [Path(path) for path in paths]
    rows = np.empty((len(files), channels, height, width), np.uint8)
    reasons = decode_into(rows, files, skip_unreadable, bit_depth)
    read = [i for i, reason in enumerate(reasons) if reason is None]
    lost = [f"{files[i]} {reason}" for i, reason in enumerate(reasons) if reason is not None]
    for kept, i in enumerate(read):  # close the gaps in place: never a second copy of the result
        if kept != i:
            rows[kept] = rows[i]
    return torch.from_numpy(rows[: len(read)]), [files[i] for i in read], lost


def check_image_size(image_size: int) -> None:
    """Raises ValueError for anything but a whole number of pixels that a network can take."""
    if not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f"image_size: expected a whole number of pixels >= 1, got {image_size!r:.80}")
    whole("image_size", image_size, 1, MOST_PIXELS)


def check_bit_depth(bit_depth: int) -> None:
    """Raises ValueError for anything but 8 to 16 bits."""
    whole("bit_depth", bit_depth, 8, WHOLE_DEPTH)


def decode_into(
    rows: np.ndarray, paths: Sequence[Path], skip_unreadable: bool, bit_depth: int = WHOLE_DEPTH
) -> list[UnreadableError | None]:
    """Decode paths[i] into rows[i], in parallel; never more originals in memory than threads.

    Args:
        rows: (N, C, H, W) uint8, C 1 or 3.
        paths: N files.
        skip_unreadable: leave rows[i] undefined where paths[i] cannot be read instead of raising.
        bit_depth: of grey values in files of 16 bits.

    Returns:
        For each path why it could not be read, or None.

    Raises:
        DataError: naming the first path that cannot be read.
    """

    def work(i: int) -> UnreadableError | None:
        try:
            rows[i] = _decode(paths[i], rows.shape[1:], bit_depth)
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


def common_size(paths: Sequence[Path], image_size: int) -> tuple[int, int]:
    """Height and width that images of one shape are resized to: the shorter side becomes `image_size`.

    The ratio is the median of the files', and a square's where it is near to 1; files that cannot be read
    have no say.
    """
    ratios = [ratio for ratio in in_threads(_ratio, paths) if ratio is not None]
    ratio = statistics.median(ratios) if ratios else 1.0
    longer = round(image_size * min(max(ratio, 1 / ratio), _LONGEST) / 8) * 8
    if max(ratio, 1 / ratio) <= _NEARLY_SQUARE:
        return image_size, image_size
    return (image_size, longer) if ratio > 1 else (longer, image_size)


def _ratio(path: Path) -> float | None:
    """Width over height as the image is shown, by its header."""
    try:
        with _reasons(), open_regular(path) as file:
            image = _open(file)
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return image.height / image.width if turned else image.width / image.height
    except UnreadableError:
        return None


def _decode(path: Path, shape: tuple[int, ...], bit_depth: int) -> np.ndarray:
    channels, height, width = shape
    with _reasons(), open_regular(path) as file:
        image = _open(file)
        # JPEG can decode at 1/2, 1/4 or 1/8; twice the final size leaves the resize its own work.
        image.draft(None, (2 * width, 2 * height))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        image = _without_alpha(_to_8_bit(image, bit_depth)).convert("L" if channels == 1 else "RGB")
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(image).reshape(height, width, channels)
        return pixels.transpose(2, 0, 1)


def _open(file: BinaryIO) -> Image.Image:
    image = Image.open(file, formats=_FORMATS)
    # PIL warns from its limit on and refuses from twice the limit; a warning would not save the memory.
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise _too_large()
    return image


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
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large() from error
    except FileError as error:
        raise UnreadableError(str(error).partition(": ")[2], of_content=False) from error
    except Exception as error:  # a damaged file makes PIL's decoders raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:  # PIL's own have no number
            raise UnreadableError(f"cannot be read ({error.strerror})", of_content=False) from error
        reason = f"cannot be decoded ({type(error).__name__}: {error})"
        raise UnreadableError(reason, of_content=not isinstance(error, MemoryError)) from error


def _too_large() -> UnreadableError:
    limit = f"{Image.MAX_IMAGE_PIXELS} pixels (the limit is PIL.Image.MAX_IMAGE_PIXELS)"
    return UnreadableError(f"has more than {limit}", of_content=False)


def _to_8_bit(image: Image.Image, bit_depth: int) -> Image.Image:
    """16-bit grey values v become round(v / 257): a fixed rule, so that no image depends on another.

    With fewer bits the largest value that they can hold becomes 255.
    """
    if image.mode == "F":
        reason = "has floating-point pixels, whose range is not known; save it with 8 or 16 bits"
        raise UnreadableError(reason, of_content=True)
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.int64)
    most = 2**bit_depth - 1
    if values.min() < 0 or values.max() > most:
        reason = f"has values {values.min()}..{values.max()}, expected {bit_depth}-bit ones, 0..{most}"
        raise UnreadableError(reason, of_content=True)
    return Image.fromarray(((values * 255 + most // 2) // most).astype(np.uint8))


def _without_alpha(image: Image.Image) -> Image.Image:
    """Transparent pixels become black, whatever colour hides beneath them."""
    if image.mode not in ("LA", "PA", "RGBA") and "transparency" not in image.info:
        return image
    grey = image.mode in ("1", "L", "LA")
    image = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return flat.convert("L" if grey else "RGB")
