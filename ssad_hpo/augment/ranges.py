"""An interval of numbers, of which a value is drawn."""

from __future__ import annotations

from dataclasses import dataclass

from ssad_hpo.bounds import is_number

# Beyond these, float32 has no such number, or arithmetic on it ends in inf.
_LARGEST, _SMALLEST = 1e6, 1e-6


@dataclass(frozen=True)
class Range:
    """An interval low..high (both included), uniform or, with `log`, log-uniform.

    >>> from ssad_hpo import Range
    >>> Range(0.01, 1, log=True).at(0.5), Range(-45, 45).at(0.5)
    (0.1, 0.0)

    Raises:
        ValueError: for ends that are not finite, beyond what float32 can work with or span nothing, or a log
            range that reaches 0.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (is_number(self.low) and is_number(self.high) and self.low < self.high):
            raise ValueError(f"Range: expected finite low < high, got {self.low!r:.40}..{self.high!r:.40}")
        if self.log and self.low <= 0:
            raise ValueError(f"Range: a log range needs low > 0, got {self.low}")
        if not isinstance(self.log, bool):
            raise ValueError(f"Range: expected log to be true or false, got {self.log!r:.40}")
        for end in (self.low, self.high):
            check_size("Range", end)

    def at(self, fraction: float) -> float:
        """The point a fraction (0..1) of the way from low to high, on the log scale if `log`."""
        if fraction in (0, 1):  # exactly, whatever rounding does in between
            return float(self.high if fraction else self.low)
        if self.log:
            point = self.low * (self.high / self.low) ** fraction
        else:
            point = self.low + (self.high - self.low) * fraction
        return float(min(max(point, self.low), self.high))


def check_size(name: str, value: float) -> None:
    """Raise ValueError for a number that float32 cannot work with: beyond 1e6, or nearer to 0 than 1e-6."""
    if value and not _SMALLEST <= abs(value) <= _LARGEST:
        raise ValueError(f"{name}: expected numbers of {_SMALLEST:g} to {_LARGEST:g}, got {value:g}")
