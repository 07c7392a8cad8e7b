"""The table of augmentations: a kind is a function and a row here, and every other room reads the row.

CONTRIBUTING.md has the recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from ssad_hpo.augment import functions
from ssad_hpo.augment.ranges import Range

# Uniform numbers that each image has. By convention 0 to 2 draw hyperparameters, 3 is for a sign, 4 and 5 for
# a place (x, y), 6 and 7 for a second one.
NOISE = 8

Coordinate = Literal["log", "linear", "degrees"]
# (images, values, noise, temperature) -> images: see `augment.apply`; of values each is (N,), by name. What
# it gives is clamped to [0, 1].
Function = Callable[[Tensor, Mapping[str, Tensor], Tensor, float], Tensor]


@dataclass(frozen=True)
class Hyperparameter:
    """What is known of a hyperparameter before anybody gives it a value.

    Attributes:
        low, high: its default range, both included.
        coordinate: in what steps of one size mean about the same change: "log" (a positive number, by its
            logarithm), "linear" (as it is) or "degrees" (an angle). The default range is log-uniform or
            uniform accordingly, and tuning by gradient moves this coordinate.
        vanishes: whether images hardly change at its lower end, where a tuning may be drawn to.
        column: which of an image's uniform numbers draws it; None for its place in the kind's row.

    Raises:
        ValueError: for an unknown coordinate, or ends of which no `Range` can be made.
    """

    low: float
    high: float
    coordinate: Coordinate
    vanishes: bool = False
    column: int | None = None

    def __post_init__(self) -> None:
        if self.coordinate not in get_args(Coordinate):
            expected = ", ".join(get_args(Coordinate))
            raise ValueError(f"coordinate: expected one of {expected}, got {self.coordinate!r}")
        assert self.range  # ends that make no range say so now, and not when they are first asked for

    @property
    def range(self) -> Range:
        """The default range."""
        return Range(self.low, self.high, log=self.coordinate == "log")


@dataclass(frozen=True)
class Kind:
    """A row of `KINDS`.

    Attributes:
        function: changes a batch of images.
        hyperparameters: by name, in the order in which they are shown.
        must_fit: whether it has a patch, of `patch_area` and `patch_aspect` (and `angle`), which must lie
            within the image.

    Raises:
        ValueError: if two hyperparameters are drawn by one number, or a patch has no size.
    """

    function: Function
    hyperparameters: Mapping[str, Hyperparameter]
    must_fit: bool = False

    def __post_init__(self) -> None:
        columns = list(self.columns.values())
        if len(set(columns)) < len(columns) or not set(columns) <= set(range(NOISE)):
            raise ValueError(f"column: expected another one of 0..{NOISE - 1} for each, got {columns}")
        if self.must_fit and not {"patch_area", "patch_aspect"} <= self.hyperparameters.keys():
            raise ValueError("must_fit: needs patch_area and patch_aspect among the hyperparameters")

    @property
    def columns(self) -> dict[str, int]:
        """Which of an image's uniform numbers draws each hyperparameter."""
        return {
            name: i if hyperparameter.column is None else hyperparameter.column
            for i, (name, hyperparameter) in enumerate(self.hyperparameters.items())
        }


# Areas are fractions of the image, aspects are width / height.
_ASPECT = Hyperparameter(0.3, 3.3, "log")
_PATCH = {"patch_area": Hyperparameter(0.002, 0.3, "log", vanishes=True), "patch_aspect": _ASPECT}

KINDS: dict[str, Kind] = {
    "cutout": Kind(functions.cutout, _PATCH, must_fit=True),
    "cutavg": Kind(functions.cutavg, _PATCH, must_fit=True),
    "cutpaste": Kind(
        functions.cutpaste,
        {
            # Not 0.3: a patch fits at every angle only while its diagonal does, and that is while
            # area * (aspect + 1 / aspect) <= 1.
            "patch_area": Hyperparameter(0.002, 0.27, "log", vanishes=True),
            "patch_aspect": _ASPECT,
            "angle": Hyperparameter(-45.0, 45.0, "degrees"),
        },
        must_fit=True,
    ),
    "cutdiff": Kind(functions.cutdiff, _PATCH),
    # Drawn by the number that draws CutPaste's angle as well.
    "rotation": Kind(
        functions.rotation, {"angle": Hyperparameter(15.0, 180.0, "degrees", vanishes=True, column=2)}
    ),
}


# Of the encoder as it comes, which is trained with no augmentation: not among the kinds that are searched.
NONE = "none"
_NONE = Kind(functions.unchanged, {})


def kind_of(name: str) -> Kind:
    """The row of a kind, or of "none".

    Raises:
        ValueError: for an unknown kind, naming the known ones.
    """
    if name == NONE:
        return _NONE
    if name not in KINDS:
        raise ValueError(f"augmentation: expected one of {', '.join(KINDS)}, got {name!r}")
    return KINDS[name]


def hyperparameter_of(kind: str, name: str) -> Hyperparameter:
    """What is known of a kind's hyperparameter.

    Raises:
        ValueError: for an unknown kind or hyperparameter, naming the known ones.
    """
    known = kind_of(kind).hyperparameters
    if name not in known:
        raise ValueError(f"{kind}: expected hyperparameters {', '.join(known)}, got {name!r}")
    return known[name]
