"""Addresses of data sets: what a study's file holds, so that a task and its labels can be had again."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssad_hpo.augment import KINDS, Augmentation
from ssad_hpo.bounds import MOST_IMAGE_PIXELS
from ssad_hpo.data import folder, testbed
from ssad_hpo.data.dataset import DataSet
from ssad_hpo.data.pixels import WHOLE_DEPTH
from ssad_hpo.task import SearchSpace, Task

# A new data set is a loader and a row here; CONTRIBUTING.md has the recipe.
LOADERS: dict[str, Callable[..., DataSet]] = {
    "controlled": testbed.controlled_data,
    "semantic": testbed.semantic_data,
    "folder": folder.load_folder,
    "folders": folder.load_folders,
}
_FOLDER_ARGUMENTS = ("root", "train", "unlabeled", "held_out")
# Left out of a folder's address where they are the default, so that it is the same as that of an older run.
_LEFT_OUT = {
    "bit_depth": WHOLE_DEPTH,
    "max_pixels": MOST_IMAGE_PIXELS,
    "held_out": None,
    "held_out_share": 0.0,
}

_OLD_IMAGE_SIZE = 128  # the default while sources did not keep it


@dataclass(frozen=True)
class Source:
    """Where a task comes from: a loader's name and its arguments, as plain JSON values.

    Attributes:
        loader: a key of `LOADERS`.
        arguments: of that function, by name. Folders become absolute, so that a study can be resumed
            from another directory; an `Augmentation` becomes {kind: hyperparameters}.

    Raises:
        ValueError: for an unknown loader, an argument that it does not have, one that it needs and
            that is missing, or a value that is not plain.
    """

    loader: str
    arguments: dict[str, Any]

    def __post_init__(self) -> None:
        if self.loader not in LOADERS:
            raise ValueError(f"loader: expected one of {', '.join(LOADERS)}, got {self.loader!r}")
        plain = dict(self.arguments)
        try:
            inspect.signature(LOADERS[self.loader]).bind(**plain)
            for name, value in plain.items():
                if isinstance(value, Augmentation):
                    plain[name] = SearchSpace({value.kind: value.hyperparameters}).to_json()
                elif name in _FOLDER_ARGUMENTS and (name, value) != ("held_out", None):
                    plain[name] = os.path.abspath(value)
            plain = json.loads(json.dumps(plain))
            if self.loader in ("folder", "folders"):  # whose size is kept: a default may change
                plain = {n: v for n, v in plain.items() if n not in _LEFT_OUT or v != _LEFT_OUT[n]}
                plain.setdefault("image_size", folder.IMAGE_SIZE)
        except TypeError as error:
            raise ValueError(f"arguments: {error} (loader {self.loader!r})") from error
        object.__setattr__(self, "arguments", plain)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and values; `from_json` gives the same source back."""
        return {"loader": self.loader, "arguments": self.arguments}

    @classmethod
    def from_json(cls, source: Mapping[str, Any]) -> Source:
        """The source that `to_json` wrote."""
        arguments = dict(source["arguments"])
        if source["loader"] in ("folder", "folders"):
            arguments.setdefault("image_size", _OLD_IMAGE_SIZE)
        return cls(source["loader"], arguments)


def load(source: Source) -> Task:
    """The task at an address; the same one each time while its files do not change.

    Raises:
        ValueError: as the loader's function; for folders the `DataError` among them.
    """
    return _load(source).task


def read_labels(source: Source) -> np.ndarray | None:
    """Ground truth of `load(source)`, only for judging a choice that was already made.

    Returns:
        (N_test,) int8, 1 anomaly, 0 normal, in the order of `unlabeled`; None where there is none.

    Raises:
        ValueError: as `load`.
    """
    return _load(source).labels


def _load(source: Source) -> DataSet:
    return LOADERS[source.loader](**_arguments(source))


def _arguments(source: Source) -> dict[str, Any]:
    arguments = dict(source.arguments)
    if source.loader == "controlled" and "anomaly" in arguments:
        if isinstance(arguments["anomaly"], str):
            return arguments  # another texture's name
        ((kind, hyperparameters),) = SearchSpace.from_json(arguments["anomaly"]).kinds.items()
        arguments["anomaly"] = Augmentation(kind, hyperparameters)
    return arguments


def _of_size() -> list[str]:
    """Kinds of augmentation that an area makes an anomaly of."""
    return [
        name for name, kind in KINDS.items() if {"patch_area", "patch_aspect"} <= set(kind.hyperparameters)
    ]


def builtin(name: str) -> Source:
    """The address of a built-in data set.

    "gravel/cutavg" is a texture (gravel, brick, grass) with anomalies of a kind (cutout, cutavg,
    cutpaste, cutdiff) that cover 0.05 of an image; "gravel/cutavg/0.01" has smaller ones; "gravel/brick"
    has crops of brick as anomalies. "digits/4" has fours as normal and other digits as anomalies;
    "digits/4/rotated" has turned fours. The name of a loader stands for its defaults.

    Raises:
        ValueError: listing what there is.
    """
    match name.split("/"):
        case [loader] if loader in LOADERS:
            return Source(loader, {})
        case ["digits", digit, *rest] if digit in tuple("0123456789") and rest in ([], ["rotated"]):
            return Source("semantic", {"normal": int(digit), "anomalies": rest[0] if rest else "others"})
        case [texture, other] if {texture, other} <= set(testbed.TEXTURES) and texture != other:
            return Source("controlled", {"texture": texture, "anomaly": other})
        case [texture, kind, *rest] if texture in testbed.TEXTURES and kind in _of_size() and len(rest) < 2:
            area = _area(rest[0]) if rest else testbed.DEFAULT_AREA
            if area is not None:
                anomaly = Augmentation(kind, {"patch_area": area, "patch_aspect": testbed.ASPECT})
                return Source("controlled", {"texture": texture, "anomaly": anomaly})
    raise ValueError(
        "data set: expected TEXTURE/KIND, TEXTURE/KIND/AREA or TEXTURE/TEXTURE (textures "
        f"{', '.join(testbed.TEXTURES)}; kinds {', '.join(_of_size())}; areas between 0 and 1), digits/DIGIT "
        f"or digits/DIGIT/rotated, got {name!r}"
    )


def _area(text: str) -> float | None:
    try:
        area = float(text)
    except ValueError:
        return None
    return area if 0 < area < 1 else None


def find_source(
    place: str | Path,
    *,
    category: str | None = None,
    anomaly: str | None = None,
    image_size: int = folder.IMAGE_SIZE,
    keep_ratio: bool = True,
    bit_depth: int = WHOLE_DEPTH,
    max_pixels: int = MOST_IMAGE_PIXELS,
    skip_unreadable: bool = False,
    held_out: str | Path | None = None,
    held_out_share: float | None = None,
) -> Source:
    """The address of a built-in data set ("gravel/cutavg") or of a folder in the published layout.

    Args:
        place: a folder, or a built-in name; a folder of that name goes first.
        category, anomaly, image_size, keep_ratio, bit_depth, max_pixels, skip_unreadable, held_out,
            held_out_share: of a folder, see `load_folder`.

    Raises:
        ValueError: if it is neither.
    """
    if Path(place).is_dir():
        arguments = {
            "root": str(place),
            "category": category,
            "anomaly": anomaly,
            "image_size": image_size,
            "keep_ratio": keep_ratio,
            "bit_depth": bit_depth,
            "max_pixels": max_pixels,
            "skip_unreadable": skip_unreadable,
            "held_out": held_out,
            "held_out_share": held_out_share,
        }
        return Source("folder", arguments)
    if category is not None or anomaly is not None:
        raise ValueError(f"{place}: there is no such folder, and only folders have a category or an anomaly")
    try:
        return builtin(str(place))
    except ValueError as error:
        raise ValueError(f"{place}: there is no such folder; as a built-in {error}") from error


def holds_out(source: Source) -> bool:
    """Whether a task at an address will have held-out images; nothing but names of files is read.

    Raises:
        ValueError: as `load`, for folders that are not there.
    """
    arguments = source.arguments
    if source.loader in ("folder", "folders"):
        return folder.holds_out(source.loader, **arguments)
    return bool(arguments.get("n_held_out"))


def unlabeled_files(source: Source) -> list[Path] | None:
    """The files of `load(source).unlabeled` in their order, to show them; None for built-in data sets.

    Raises:
        ValueError: as `load`.
    """
    if source.loader not in ("folder", "folders"):
        return None
    return folder.unlabeled_files(source.loader, **source.arguments)


def load_images(images: Task | Source | str | Path) -> tuple[Task, Source | None]:
    """The task at an address or in memory, and its address; None for one that lives in memory only."""
    if isinstance(images, Task):
        return images, None
    source = images if isinstance(images, Source) else find_source(images)
    return load(source), source
