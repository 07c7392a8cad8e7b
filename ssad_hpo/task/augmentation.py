"""The augmentations: their kinds, and one of them with its hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Hyperparameters = Mapping[str, "float | Range"]


@dataclass(frozen=True)
class Range:
    """An interval low..high (both included), uniform or, with `log`, log-uniform."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"Range: expected finite low < high, got {self.low}..{self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"Range: a log range needs low > 0, got {self.low}")

    def at(self, fraction: float) -> float:
        """The point a fraction (0..1) of the way from low to high, on the log scale if `log`."""
        if fraction in (0, 1):  # exactly, whatever rounding does in between
            return float(self.high if fraction else self.low)
        if self.log:
            point = self.low * (self.high / self.low) ** fraction
        else:
            point = self.low + (self.high - self.low) * fraction
        return float(min(max(point, self.low), self.high))


_AREA = Range(0.002, 0.3, log=True)
_ASPECT = Range(0.3, 3.3, log=True)

# Every hyperparameter of every augmentation and its default range. Areas are fractions of the image,
# aspects are width / height, angles are degrees. CutPaste's largest area is 0.27, not 0.3: a patch fits
# at every angle only while its diagonal does, area * (aspect + 1 / aspect) <= 1.
DEFAULT_RANGES: dict[str, dict[str, Range]] = {
    "cutout": {"patch_area": _AREA, "patch_aspect": _ASPECT},
    "cutavg": {"patch_area": _AREA, "patch_aspect": _ASPECT},
    "cutpaste": {
        "patch_area": Range(0.002, 0.27, log=True),
        "patch_aspect": _ASPECT,
        "angle": Range(-45.0, 45.0),
    },
    "cutdiff": {"patch_area": _AREA, "patch_aspect": _ASPECT},
    "rotation": {"angle": Range(15.0, 180.0)},
}


@dataclass(frozen=True)
class Augmentation:
    """A kind of f_aug with its hyperparameters: numbers (static) or ranges (drawn for every image).

    Attributes:
        kind: a key of `DEFAULT_RANGES`.
        hyperparameters: a value or a `Range` for each name that the kind has; names left out become
            the kind's default range.

    Raises:
        ValueError: for an unknown kind or name, a value that is not finite, an area or aspect that is
            not positive.
    """

    kind: str
    hyperparameters: Hyperparameters = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranges = _ranges_of(self.kind)
        _reject_unknown(self.kind, self.hyperparameters)
        values = {name: self.hyperparameters.get(name, ranges[name]) for name in ranges}
        for name, value in values.items():
            low = value.low if isinstance(value, Range) else value
            if not math.isfinite(low) or (name in ("patch_area", "patch_aspect") and low <= 0):
                raise ValueError(
                    f"{self.kind}.{name}: expected a finite number"
                    f"{'' if name == 'angle' else ' above 0'}, got {low}"
                )
        object.__setattr__(self, "hyperparameters", values)

    def __str__(self) -> str:
        def show(value: float | Range) -> str:
            return f"{value.low:g}..{value.high:g}" if isinstance(value, Range) else f"{value:.4g}"

        return f"{self.kind}({', '.join(f'{k}={show(v)}' for k, v in self.hyperparameters.items())})"


def _ranges_of(kind: str) -> dict[str, Range]:
    if kind not in DEFAULT_RANGES:
        raise ValueError(f"augmentation: expected one of {', '.join(DEFAULT_RANGES)}, got {kind!r}")
    return DEFAULT_RANGES[kind]


def _reject_unknown(kind: str, names: Mapping[str, Any]) -> None:
    known = DEFAULT_RANGES[kind]
    for name in names:
        if name not in known:
            raise ValueError(f"{kind}: expected hyperparameters {', '.join(known)}, got {name!r}")
