"""Hyperparameters as an unconstrained point: logarithms, angles in radians, or as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ssad_hpo.augment import Augmentation, Coordinate, Range, hyperparameter_of

# To a coordinate and, through which gradients flow, back.
_COORDINATES: dict[Coordinate, tuple[Callable[[float], float], Callable[[Tensor], Tensor]]] = {
    "log": (math.log, Tensor.exp),
    "linear": (float, Tensor.clone),
    "degrees": (math.radians, Tensor.rad2deg),
}


@dataclass(frozen=True)
class Coordinates:
    """The hyperparameters of an augmentation that are tuned: those given as ranges, which bound them.

    A point (K,) float64 has their coordinates, in which steps of one size mean about the same change: log
    area, log aspect, angle in radians, as the table `augment.KINDS` says. Bounds are kept by projection and
    not by a bijection such as the sigmoid: inside the bounds steps then stay what the optimizer made them,
    starting points may lie anywhere, and a hyperparameter that is driven out arrives at its bound exactly, so
    that it is seen.

    Attributes:
        augmentation: kind, ranges and fixed values.
        bounds: name -> range of each tuned hyperparameter, in the kind's order.

    Raises:
        ValueError: if no hyperparameter is a range.
    """

    augmentation: Augmentation
    bounds: dict[str, Range]

    @classmethod
    def of(cls, augmentation: Augmentation) -> Coordinates:
        bounds = {n: v for n, v in augmentation.hyperparameters.items() if isinstance(v, Range)}
        if not bounds:
            raise ValueError(f"augmentation: expected a range for what is to be tuned, got {augmentation}")
        return cls(augmentation, bounds)

    def start(self, at: float | Mapping[str, float]) -> Tensor:
        """The point of a starting point: see `Tuning.starts`.

        Raises:
            ValueError: for a name that is not tuned, or a value outside its bounds.
        """
        first = next(iter(self.bounds))
        if not isinstance(at, Mapping):
            if not 0 <= at <= 1:
                raise ValueError(f"starts: expected a fraction 0..1 of {first}'s range, got {at}")
            at = {first: self.bounds[first].at(at)}
        for name, value in at.items():
            if name not in self.bounds:
                raise ValueError(f"starts: expected values of {', '.join(self.bounds)}, got {name!r}")
            if not self.bounds[name].low <= value <= self.bounds[name].high:
                low, high = self.bounds[name].low, self.bounds[name].high
                raise ValueError(f"starts: expected {name} in {low:g}..{high:g}, got {value}")
        values = {name: at.get(name, bound.at(0.5)) for name, bound in self.bounds.items()}
        return torch.tensor([self._encode(n, v) for n, v in values.items()], dtype=torch.float64)

    def values(self, point: Tensor) -> dict[str, float | Range | Tensor]:
        """All hyperparameters for `augment.apply`, the tuned ones as scalars that carry gradients."""
        tuned = {
            name: _COORDINATES[self._coordinate(name)][1](u)
            for name, u in zip(self.bounds, point.unbind(), strict=True)
        }
        return {**self.augmentation.hyperparameters, **tuned}

    def numbers(self, point: Tensor) -> dict[str, float]:
        """The tuned hyperparameters as numbers within their bounds."""
        values = self.values(point.detach())
        # A bound's logarithm may come back a rounding error outside of the bound.
        return {n: min(max(float(values[n]), b.low), b.high) for n, b in self.bounds.items()}  # type: ignore[arg-type]

    def at(self, point: Tensor) -> Augmentation:
        """The static augmentation at a point."""
        return Augmentation(
            self.augmentation.kind, {**self.augmentation.hyperparameters, **self.numbers(point)}
        )

    @torch.no_grad()
    def project(self, point: Tensor) -> None:
        """Put every coordinate that left its bounds back to the bound, in place."""
        low, high = self._ends(point)
        point.clamp_(low, high)

    def at_bounds(self, point: Tensor, tolerance: float) -> list[tuple[str, str]]:
        """(name, "lower" or "upper") of the coordinates that lie within the tolerance of a bound."""
        low, high = self._ends(point)
        found = []
        for name, below, above in zip(self.bounds, point - low, high - point, strict=True):
            if min(below, above) <= tolerance:
                found.append((name, "lower" if below <= above else "upper"))
        return found

    def _ends(self, point: Tensor) -> tuple[Tensor, Tensor]:
        bounds = self.bounds.items()
        low = point.new_tensor([self._encode(name, bound.low) for name, bound in bounds])
        return low, point.new_tensor([self._encode(name, bound.high) for name, bound in bounds])

    def _encode(self, name: str, value: float) -> float:
        return _COORDINATES[self._coordinate(name)][0](value)

    def _coordinate(self, name: str) -> Coordinate:
        return hyperparameter_of(self.augmentation.kind, name).coordinate
