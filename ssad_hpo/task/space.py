"""The search space: kinds of augmentation, and ranges of their hyperparameters."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ssad_hpo.augment import NONE, Augmentation, Hyperparameters, Range, fits

if TYPE_CHECKING:
    import optuna

_AREA, _SMALLER = "patch_area", 0.95


@dataclass(frozen=True)
class SearchSpace:
    """The augmentations to choose among and the ranges of their hyperparameters.

    A kind's hyperparameters exist only where the kind is chosen (a conditional space); their names are
    "KIND.NAME", beside the parameter "augmentation".

    >>> from ssad_hpo import Range, SearchSpace
    >>> space = SearchSpace({"cutout": {"patch_aspect": 1}, "rotation": {"angle": Range(20, 90)}})
    >>> for candidate in space.grid(2):
    ...     print(candidate)
    {'augmentation': 'cutout', 'cutout.patch_area': 0.002}
    {'augmentation': 'cutout', 'cutout.patch_area': 0.3}
    {'augmentation': 'rotation', 'rotation.angle': 20.0}
    {'augmentation': 'rotation', 'rotation.angle': 90.0}

    Attributes:
        kinds: for each kind a value or `Range` for any of its hyperparameters (default ranges for the
            others). Also accepts one kind's name, or a sequence of names.

    Raises:
        ValueError: for an empty space, an unknown kind or hyperparameter.
    """

    kinds: Mapping[str, Hyperparameters]

    def __init__(self, kinds: str | Sequence[str] | Mapping[str, Hyperparameters]) -> None:
        if isinstance(kinds, str):
            kinds = [kinds]
        if not isinstance(kinds, Mapping):
            kinds = {kind: {} for kind in kinds}
        if not kinds:
            raise ValueError("SearchSpace: expected at least one augmentation, got none")
        if NONE in kinds:
            raise ValueError(f"SearchSpace: expected kinds that change images, got {NONE!r}")
        whole = {kind: Augmentation(kind, given).hyperparameters for kind, given in kinds.items()}
        object.__setattr__(self, "kinds", whole)

    def within(self, *, height: int, width: int) -> SearchSpace:
        """This space for images of a size: patch areas that nobody chose end where the largest patch fits.

        Only tall and wide images need it, in which a turned patch soon reaches over the border.
        """
        kinds: dict[str, Hyperparameters] = {}
        for kind, values in self.kinds.items():
            area, usual = values.get(_AREA), Augmentation(kind).hyperparameters.get(_AREA)
            while (
                isinstance(area, Range)
                and values[_AREA] == usual
                and not fits(Augmentation(kind, {**values, _AREA: area}), height=height, width=width)
                and area.high * _SMALLER > area.low
            ):
                area = replace(area, high=area.high * _SMALLER)
            kinds[kind] = values if area is None else {**values, _AREA: area}
        return self if kinds == self.kinds else SearchSpace(kinds)

    @property
    def is_continuous(self) -> bool:
        """Whether any hyperparameter has a range; if none has, there is one candidate of each kind."""
        return any(isinstance(v, Range) for values in self.kinds.values() for v in values.values())

    def suggest(self, trial: optuna.trial.BaseTrial) -> Augmentation:
        """Draw one static augmentation through an Optuna trial (or anything with its `suggest_*`)."""
        kind = trial.suggest_categorical("augmentation", list(self.kinds))
        values = {
            name: trial.suggest_float(f"{kind}.{name}", value.low, value.high, log=value.log)
            if isinstance(value, Range)
            else value
            for name, value in self.kinds[kind].items()
        }
        return Augmentation(kind, values)

    def augmentation(self, params: Mapping[str, Any]) -> Augmentation:
        """The static augmentation that drawn parameters ("augmentation", "KIND.NAME") stand for."""
        kind = params["augmentation"]
        fixed = {n: v for n, v in self.kinds[kind].items() if not isinstance(v, Range)}
        drawn = {n: params[f"{kind}.{n}"] for n in self.kinds[kind] if n not in fixed}
        return Augmentation(kind, {**fixed, **drawn})

    def grid_size(self, points: int) -> int:
        """How many candidates `grid` gives."""
        ranges = [sum(isinstance(v, Range) for v in values.values()) for values in self.kinds.values()]
        return sum(points**count for count in ranges)

    def grid(self, points: int) -> list[dict[str, Any]]:
        """Every combination of `points` values per range (ends included), kind by kind, no doubles."""
        if points < 2:
            raise ValueError(f"points: expected at least 2 values per hyperparameter, got {points}")
        candidates = []
        for kind, hyperparameters in self.kinds.items():
            ranges = {f"{kind}.{n}": v for n, v in hyperparameters.items() if isinstance(v, Range)}
            axes = [[r.at(i / (points - 1)) for i in range(points)] for r in ranges.values()]
            for values in itertools.product(*axes):
                candidates.append({"augmentation": kind, **dict(zip(ranges, values, strict=True))})
        return candidates

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and numbers; `from_json` gives the same space back."""
        return {
            kind: {n: asdict(v) if isinstance(v, Range) else v for n, v in values.items()}
            for kind, values in self.kinds.items()
        }

    @classmethod
    def from_json(cls, kinds: Mapping[str, Mapping[str, Any]]) -> SearchSpace:
        """The space that `to_json` wrote."""
        return cls(
            {
                kind: {n: Range(**v) if isinstance(v, Mapping) else float(v) for n, v in values.items()}
                for kind, values in kinds.items()
            }
        )
