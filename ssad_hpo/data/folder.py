"""Image folders -> Task: the published layout of MVTec AD and MPDD, or a plain pair of folders.

Both halves of a task are ordered by the digest of each image's final pixels, so that names, folders
and the order of a directory cannot reach anything that sees a Task.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssad_hpo.bounds import MOST_IMAGE_PIXELS
from ssad_hpo.data.cache import DecodedSet, FileContent, decode_set, identify
from ssad_hpo.data.dataset import DataSet
from ssad_hpo.data.pixels import WHOLE_DEPTH, DataError, Decoding
from ssad_hpo.data.reading import check_image_size, common_size, find_images, skipped
from ssad_hpo.task import Task

IMAGE_SIZE = 256  # pixels of the shorter side, unless asked for otherwise
# Of fewer train images a quarter would be less than 50: too few for criteria, too many for the training.
_USUAL_SHARE, _LEAST_TO_SHARE = 0.25, 200
# What the brightest pixel of a 12-bit image in a 16-bit file comes to; of 10 bits it is 4.
_DARK = 16
_StrPath = str | os.PathLike[str]


class CategoryError(DataError):
    """A choice among categories is needed; the message lists them."""


@dataclass(frozen=True)
class _Half:
    """`train`, `unlabeled` or held-out: its folder, its images and their ground truth, if known."""

    folder: Path
    paths: list[Path]
    labels: list[int] | None = None


@dataclass(frozen=True)
class _Reading:
    """How the images of a task are read, and what is set aside; see `load_folder`."""

    image_size: int
    keep_ratio: bool
    decoding: Decoding
    skip_unreadable: bool
    held_out: _StrPath | None
    held_out_share: float | None


def load_folder(
    root: _StrPath,
    category: str | None = None,
    anomaly: str | None = None,
    *,
    image_size: int = IMAGE_SIZE,
    keep_ratio: bool = True,
    bit_depth: int = WHOLE_DEPTH,
    max_pixels: int = MOST_IMAGE_PIXELS,
    skip_unreadable: bool = False,
    held_out: _StrPath | None = None,
    held_out_share: float | None = 0.0,
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
        held_out: a folder of normal images that no detector is trained on; see `Task.held_out`.
        held_out_share: the share of train that is set aside for that instead, see `Task.set_aside`; None is a
            quarter of 200 images or more, and nothing of fewer.

    Returns:
        The task, named CATEGORY or CATEGORY/ANOMALY, and its labels, if there are any.

    Raises:
        CategoryError: if `root` has several categories and none, or an unknown one, is named.
        DataError: for a missing or empty folder, fewer than two images, an unreadable file.
        ValueError: for an image_size that cannot be.
    """
    name, train, unlabeled = _find_halves(root, category, anomaly)
    how = _Reading(
        image_size, keep_ratio, Decoding(bit_depth, max_pixels), skip_unreadable, held_out, held_out_share
    )
    return _load(name, train, unlabeled, how)


def load_folders(
    train: _StrPath,
    unlabeled: _StrPath,
    *,
    image_size: int = IMAGE_SIZE,
    keep_ratio: bool = True,
    bit_depth: int = WHOLE_DEPTH,
    max_pixels: int = MOST_IMAGE_PIXELS,
    skip_unreadable: bool = False,
    held_out: _StrPath | None = None,
    held_out_share: float | None = 0.0,
) -> DataSet:
    """Two plain folders: images of normal data, and the mixture; searched with all folders inside.

    Images are read, and some set aside, as in `load_folder`. There is no ground truth. The task is named
    "images".

    Raises:
        DataError: as `load_folder`, or if an image file lies in two of the folders.
    """
    normal, mixture = (_Half(Path(folder), find_images(folder)) for folder in (train, unlabeled))
    how = _Reading(
        image_size, keep_ratio, Decoding(bit_depth, max_pixels), skip_unreadable, held_out, held_out_share
    )
    return _load("images", normal, mixture, how)


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


def _folders_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _choose_category(root: _StrPath, category: str | None) -> Path:
    top = Path(os.path.abspath(root))  # so that even "." has a name
    categories = find_categories(top) or [top.name]
    if category is None and len(categories) == 1:
        category = categories[0]
    if category not in categories:
        raise CategoryError(
            f"category: expected one of the categories in {root} ({', '.join(categories)}), got {category!r}"
        )
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


def _load(name: str, train: _Half, unlabeled: _Half, how: _Reading) -> DataSet:
    halves = {"train": train, "unlabeled": unlabeled}
    if how.held_out is not None:
        if how.held_out_share:
            raise DataError("held_out_share: there is a folder of held-out images already; leave one out")
        halves["held_out"] = _Half(Path(how.held_out), find_images(how.held_out))
    _check_apart(halves)
    decoded = _decode(list(halves.values()), how)
    lost = [
        f"{path} {images.unreadable[content.digest]}"
        for half, (contents, images) in zip(halves.values(), decoded, strict=True)
        for path, content in zip(half.paths, contents, strict=True)
        if content.digest in images.unreadable
    ]
    if lost:
        warnings.warn(f"{name}: {skipped(lost)}", stacklevel=3)
    images = dict(zip(halves, (images for _, images in decoded), strict=True))
    for doubt in _doubts(images):
        warnings.warn(f"{name}: {doubt}", stacklevel=3)
    task = Task(name, **{half: torch.from_numpy(read.pixels) for half, read in images.items()})
    share = _share(how.held_out, how.held_out_share, len(train.paths))  # as `holds_out` counts them
    if share:
        task = task.set_aside(share)
    if unlabeled.labels is None:
        return DataSet(task)
    (contents, read) = decoded[1]
    rows = [
        (read.digests[content.digest], label)
        for content, label in zip(contents, unlabeled.labels, strict=True)
        if content.digest in read.digests
    ]
    return DataSet(task, np.array([label for _, label in sorted(rows)], np.int8))


def unlabeled_files(loader: str, **given: Any) -> list[Path]:
    """The files of the unlabelled images of `load_folder` or `load_folders`, in their order, to show them."""
    if loader == "folders":
        halves = [_Half(Path(given[name]), find_images(given[name])) for name in ("train", "unlabeled")]
    else:
        halves = list(_find_halves(given["root"], given.get("category"), given.get("anomaly"))[1:])
    if (held_out := given.get("held_out")) is not None:
        halves.append(_Half(Path(held_out), find_images(held_out)))
    decoding = Decoding(given.get("bit_depth", WHOLE_DEPTH), given.get("max_pixels", MOST_IMAGE_PIXELS))
    size, ratio = given.get("image_size", IMAGE_SIZE), given.get("keep_ratio", True)
    how = _Reading(size, ratio, decoding, given.get("skip_unreadable", False), None, None)
    files, read = _decode(halves, how)[1]
    pairs = zip(files, halves[1].paths, strict=True)
    return [p for _, p in sorted((read.digests[f.digest], p) for f, p in pairs if f.digest in read.digests)]


def holds_out(loader: str, **arguments: Any) -> bool:
    """Whether `load_folder` ("folder") or `load_folders` ("folders") holds images out with these values."""
    held_out, share = arguments.get("held_out"), arguments.get("held_out_share", 0.0)
    if held_out is not None or share is not None:
        return held_out is not None or share > 0
    if loader == "folders":
        paths = find_images(arguments["train"])
    else:
        _, train, _ = _find_halves(arguments["root"], arguments.get("category"), arguments.get("anomaly"))
        paths = train.paths
    return bool(_share(None, None, len(paths)))


def _share(held_out: _StrPath | None, share: float | None, count: int) -> float:
    if share is None:
        return _USUAL_SHARE if held_out is None and count >= _LEAST_TO_SHARE else 0.0
    return share


def _check_apart(halves: Mapping[str, _Half]) -> None:
    """Raise DataError if a file lies in two halves."""
    places: dict[str, str] = {}
    for name, half in halves.items():
        for path in half.paths:
            first = places.setdefault(os.path.realpath(path), name)
            if first != name:
                raise DataError(f"{path}: is in {first} and in {name}; give folders that share no image")


def _doubts(images: Mapping[str, DecodedSet]) -> Iterator[str]:
    """What is likely to be a mistake with images that can be read."""
    for first, second in itertools.combinations(images, 2):
        known = set(images[first].digests.values())
        shared = sum(digest in known for digest in images[second].digests.values())
        if shared:
            yield (
                f"{shared} of {len(images[second].digests)} {second} images have the same content as one in "
                f"{first}; what is to be judged should not have been trained on"
            )
    for name, half in images.items():
        dark = sum(int(image.max()) <= _DARK for image in half.pixels)
        if 2 * dark >= len(half.pixels):
            yield (
                f"{dark} of {len(half.pixels)} {name} images are nearly black; where 16 bits hold only "
                "10 or 12, give bit_depth (--bit-depth 12)"
            )


def _decode(halves: Sequence[_Half], how: _Reading) -> list[tuple[list[FileContent], DecodedSet]]:
    """For each half, train first, the contents of its files and their images."""
    check_image_size(how.image_size)
    for half in halves:
        _check_count(half.folder, len(half.paths))
    contents = [identify(half.folder, half.paths) for half in halves]
    channels = 1 if all(content.grey is not False for one in contents for content in one) else 3
    size = how.image_size, how.image_size
    if how.keep_ratio:
        size = common_size(halves[0].paths, how.image_size)
    decoded = []
    for half, files in zip(halves, contents, strict=True):
        images = decode_set(half.paths, files, size, channels, how.skip_unreadable, how.decoding)
        _check_count(half.folder, len(images.pixels))
        decoded.append((files, images))
    return decoded


def _check_count(folder: Path, count: int) -> None:
    if count < 2:
        raise DataError(f"{folder}: expected at least 2 readable images in it, found {count}")
