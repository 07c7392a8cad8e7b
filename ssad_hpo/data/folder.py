"""Image folders -> Task: the published layout of MVTec AD and MPDD, or a plain pair of folders.

Both halves of a task are ordered by the digest of each image's final pixels, so that names, folders
and the order of a directory cannot reach anything that sees a Task.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ssad_hpo.bounds import MOST_IMAGE_PIXELS
from ssad_hpo.data.cache import DecodedSet, FileContent, decode_set, identify
from ssad_hpo.data.dataset import DataSet
from ssad_hpo.data.decode import (
    DataError,
    check_image_size,
    common_size,
    find_images,
    skipped,
)
from ssad_hpo.data.pixels import WHOLE_DEPTH, Decoding
from ssad_hpo.task import Task

# What the brightest pixel of a 12-bit image in a 16-bit file comes to; of 10 bits it is 4.
_DARK = 16
_StrPath = str | os.PathLike[str]


class CategoryError(DataError):
    """A choice among categories is needed; `categories` lists them."""

    categories: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Half:
    """`train` or `unlabeled`: its folder, its images and their ground truth, if known."""

    folder: Path
    paths: list[Path]
    labels: list[int] | None = None


def load_folder(
    root: _StrPath,
    category: str | None = None,
    anomaly: str | None = None,
    *,
    image_size: int = 256,
    keep_ratio: bool = True,
    bit_depth: int = WHOLE_DEPTH,
    max_pixels: int = MOST_IMAGE_PIXELS,
    skip_unreadable: bool = False,
) -> DataSet:
    """A category in the published layout of MVTec AD and MPDD; `ground_truth/` masks are ignored.

    `train` is CATEGORY/train/good (or the images that lie directly in train/). `unlabeled` is all of
    CATEGORY/test. Images become squares, or all of one
    rectangle if they are tall or wide; 1 channel if all of them are grey, else
    3; 16-bit grey v becomes round(v / 257), transparent pixels black.

    Labels: images of test/good are normal, those of every other folder in test/ are anomalies. Identical
    images with different labels, should there be any, are listed normal first. There are none without
    test/good, or with images directly in test/.

    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from ssad_hpo import load_folder
    >>> for i, name in enumerate(["train/good/0", "train/good/1", "test/good/0", "test/crack/0"]):
    ...     path = Path("cloth", f"{name}.png")
    ...     path.parent.mkdir(parents=True, exist_ok=True)
    ...     Image.new("L", (34, 30), i).save(path)
    >>> cloth = load_folder("cloth", image_size=16)
    >>> cloth.task.train.shape, sorted(cloth.labels.tolist())
    (torch.Size([2, 1, 16, 16]), [0, 1])

    Args:
        root: a folder of categories, or one category (it has train/ itself).
        category: which one; not needed if there is only one.
        anomaly: only test/good and test/ANOMALY, a benchmark pair. None for all of test/.
        image_size: height and width, pixels; of tall or wide images the shorter side.
        keep_ratio: whether images that are tall or wide (by the median of train) stay so, up to 1 : 4, else
            they are squeezed into squares.
        bit_depth: of grey values in files of 16 bits; a camera's may be 10 or 12.
        max_pixels: of a file, which takes up to 8 bytes of memory for each while it is read.
        skip_unreadable: leave out files that cannot be read, with a warning, instead of raising.

    Returns:
        The task, named CATEGORY or CATEGORY/ANOMALY, and its labels, if there are any.

    Raises:
        CategoryError: if `root` has several categories and none, or an unknown one, is named.
        DataError: for a missing or empty folder, fewer than two images, an unreadable file.
        ValueError: for an image_size that cannot be.
    """
    name, train, unlabeled = _find_halves(root, category, anomaly)
    return _load(
        name, train, unlabeled, image_size, keep_ratio, Decoding(bit_depth, max_pixels), skip_unreadable
    )


def load_folders(
    train: _StrPath,
    unlabeled: _StrPath,
    *,
    image_size: int = 256,
    keep_ratio: bool = True,
    bit_depth: int = WHOLE_DEPTH,
    max_pixels: int = MOST_IMAGE_PIXELS,
    skip_unreadable: bool = False,
) -> DataSet:
    """Two plain folders: images of normal data, and the mixture; searched with all folders inside.

    Images are read as in `load_folder`. There is no ground truth. The task is named "images".

    Raises:
        DataError: as `load_folder`, or if an image file lies in both folders.
    """
    normal, mixture = (_Half(Path(folder), find_images(folder)) for folder in (train, unlabeled))
    shared = {os.path.realpath(path) for path in normal.paths}
    for path in mixture.paths:
        if os.path.realpath(path) in shared:
            raise DataError(f"{path}: is in train and in unlabeled; give two folders that share no image")
    decoding = Decoding(bit_depth, max_pixels)
    return _load("images", normal, mixture, image_size, keep_ratio, decoding, skip_unreadable)


def find_categories(root: _StrPath) -> list[str]:
    """The names of the categories in `root`, sorted; [] if it is itself a category.

    Raises:
        DataError: if there is no such folder, or neither a category nor a folder of categories.
    """
    top = Path(root)
    if not top.is_dir():
        raise DataError(f"{top}: expected a folder of images, there is no such folder")
    if (top / "train").is_dir():
        return []
    categories = [name for name in _folders_in(top) if (top / name / "train").is_dir()]
    if not categories:
        raise DataError(f"{top}: expected train/good and test/ in it, or categories that have them")
    return categories


def find_anomalies(root: _StrPath, category: str | None = None) -> list[str]:
    """The kinds of anomalies that a category's test/ has folders of, sorted. For benchmarks only.

    Raises:
        CategoryError, DataError: as `load_folder`.
    """
    test = _choose_category(root, category) / "test"
    return [name for name in _folders_in(test) if name != "good"] if test.is_dir() else []


def _folders_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _choose_category(root: _StrPath, category: str | None) -> Path:
    top = Path(os.path.abspath(root))  # so that even "." has a name
    categories = find_categories(top) or [top.name]
    if category is None and len(categories) == 1:
        category = categories[0]
    if category not in categories:
        error = CategoryError(
            f"category: expected one of the categories in {root} ({', '.join(categories)}), got {category!r}"
        )
        error.categories = tuple(categories)
        raise error
    return top if (top / "train").is_dir() else top / category


def _find_halves(root: _StrPath, category: str | None, anomaly: str | None) -> tuple[str, _Half, _Half]:
    place = _choose_category(root, category)
    good, test = place / "train" / "good", place / "test"
    if good.is_dir() or not any(path.parent == good.parent for path in find_images(good.parent)):
        train = _Half(good, find_images(good))
    else:  # images directly in train/
        train = _Half(good.parent, [p for p in find_images(good.parent) if p.parent == good.parent])
    paths = find_images(test)
    kinds = [path.relative_to(test).parts[0] if path.parent != test else "" for path in paths]
    known = "good" in kinds and "" not in kinds
    if anomaly is None:
        labels = [int(kind != "good") for kind in kinds] if known else None
        return _shown(place.name), train, _Half(test, paths, labels)
    if not known or anomaly == "good" or anomaly not in kinds:
        found = ", ".join(sorted({kind for kind in kinds if kind not in ("", "good")})) or "none"
        raise DataError(f"anomaly: expected a folder beside {test}/good (found: {found}), got {anomaly!r}")
    pair = [(path, kind) for path, kind in zip(paths, kinds, strict=True) if kind in ("good", anomaly)]
    labels = [int(kind == anomaly) for _, kind in pair]
    return f"{_shown(place.name)}/{_shown(anomaly)}", train, _Half(test, [path for path, _ in pair], labels)


def _shown(name: str) -> str:
    """A folder's name for people and databases: what cannot be printed or is no UTF-8 by its number."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def _load(
    name: str,
    train: _Half,
    unlabeled: _Half,
    image_size: int,
    keep_ratio: bool,
    decoding: Decoding,
    skip_unreadable: bool,
) -> DataSet:
    halves = (train, unlabeled)
    decoded = _decode_halves(train, unlabeled, image_size, keep_ratio, decoding, skip_unreadable)
    lost = [
        f"{path} {images.unreadable[content.digest]}"
        for half, (contents, images) in zip(halves, decoded, strict=True)
        for path, content in zip(half.paths, contents, strict=True)
        if content.digest in images.unreadable
    ]
    if lost:
        warnings.warn(f"{name}: {skipped(lost)}", stacklevel=3)
    (_, train_images), (contents, unlabeled_images) = decoded
    for doubt in _doubts(train_images, unlabeled_images):
        warnings.warn(f"{name}: {doubt}", stacklevel=3)
    task = Task(name, torch.from_numpy(train_images.pixels), torch.from_numpy(unlabeled_images.pixels))
    if unlabeled.labels is None:
        return DataSet(task)
    rows = [
        (unlabeled_images.digests[content.digest], label)
        for content, label in zip(contents, unlabeled.labels, strict=True)
        if content.digest in unlabeled_images.digests
    ]
    return DataSet(task, np.array([label for _, label in sorted(rows)], np.int8))


def _doubts(train: DecodedSet, unlabeled: DecodedSet) -> Iterator[str]:
    """What is likely to be a mistake with images that can be read."""
    known = set(train.digests.values())
    shared = sum(digest in known for digest in unlabeled.digests.values())
    if shared:
        yield (
            f"{shared} of {len(unlabeled.digests)} unlabeled images have the same content as one in train; "
            "what is to be judged should not have been trained on"
        )
    for half, images in (("train", train.pixels), ("unlabeled", unlabeled.pixels)):
        dark = sum(int(image.max()) <= _DARK for image in images)
        if 2 * dark >= len(images):
            yield (
                f"{dark} of {len(images)} {half} images are nearly black; where 16 bits hold only "
                "10 or 12, give bit_depth (--bit-depth 12)"
            )


def _decode_halves(
    train: _Half,
    unlabeled: _Half,
    image_size: int,
    keep_ratio: bool,
    decoding: Decoding,
    skip_unreadable: bool,
) -> list[tuple[list[FileContent], DecodedSet]]:
    """For each half the contents of its files and their images."""
    check_image_size(image_size)
    halves = (train, unlabeled)
    for half in halves:
        _check_count(half.folder, len(half.paths))
    contents = [identify(half.folder, half.paths) for half in halves]
    channels = 1 if all(content.grey is not False for both in contents for content in both) else 3
    size = image_size, image_size
    if keep_ratio:
        size = common_size(train.paths, image_size)
    decoded = []
    for half, files in zip(halves, contents, strict=True):
        images = decode_set(half.paths, files, size, channels, skip_unreadable, decoding)
        _check_count(half.folder, len(images.pixels))
        decoded.append((files, images))
    return decoded


def _check_count(folder: Path, count: int) -> None:
    if count < 2:
        raise DataError(f"{folder}: expected at least 2 readable images in it, found {count}")
