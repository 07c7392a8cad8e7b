"""An interval of numbers, of which a value is drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """An interval low..high (both included), uniform or, with `log`, log-uniform.

    >>> from ssad_hpo import Range
    >>> Range(0.01, 1, log=True).at(0.5), Range(-45, 45).at(0.5)
    (0.1, 0.0)

    Raises:
        ValueError: for ends that are not finite or span nothing, or a log range that reaches 0.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.low, int | float) and isinstance(self.high, int | float)):
            raise ValueError(f"Range: expected two numbers, got {self.low!r}..{self.high!r}")
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
