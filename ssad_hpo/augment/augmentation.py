"""One augmentation with its hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ssad_hpo.augment.kinds import hyperparameter_of, kind_of
from ssad_hpo.augment.ranges import Range, check_size
from ssad_hpo.bounds import is_number

Hyperparameters = Mapping[str, float | Range]


@dataclass(frozen=True)
class Augmentation:
    """A kind of f_aug with its hyperparameters: numbers (static) or ranges (drawn for every image).

    >>> from ssad_hpo import Augmentation, Range
    >>> print(Augmentation("cutavg", {"patch_area": 0.05, "patch_aspect": 1}))
    cutavg(patch_area=0.05, patch_aspect=1)
    >>> print(Augmentation("cutpaste", {"patch_area": Range(0.01, 0.1, log=True)}))
    cutpaste(patch_area=0.01..0.1, patch_aspect=0.3..3.3, angle=-45..45)

    Attributes:
        kind: a key of `augment.KINDS`.
        hyperparameters: a value or a `Range` for each name that the kind has; names left out become
            the kind's default range.

    Raises:
        ValueError: for an unknown kind or name, a value that is not finite, one that is not positive
            where only a positive one makes sense.
    """

    kind: str
    hyperparameters: Hyperparameters = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.hyperparameters:
            hyperparameter_of(self.kind, name)
        values = {}
        for name, known in kind_of(self.kind).hyperparameters.items():
            value = values[name] = self.hyperparameters.get(name, known.range)
            low, positive = value.low if isinstance(value, Range) else value, known.coordinate == "log"
            if not is_number(low) or (positive and low <= 0):
                expected = "a finite number above 0" if positive else "a finite number"
                raise ValueError(f"{self.kind}.{name}: expected {expected}, got {low!r:.40}")
            check_size(f"{self.kind}.{name}", low)
        object.__setattr__(self, "hyperparameters", values)

    def __str__(self) -> str:
        def show(value: float | Range) -> str:
            return f"{value.low:g}..{value.high:g}" if isinstance(value, Range) else f"{value:.4g}"

        return f"{self.kind}({', '.join(f'{k}={show(v)}' for k, v in self.hyperparameters.items())})"
