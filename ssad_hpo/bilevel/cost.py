"""What a tuning costs, in images."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Images passed through a network, one by one; exact.

    Attributes:
        forward: images passed forward, to train, for validation losses and to judge finished detectors.
        backward: images passed backward.
        second: images whose backward pass was itself differentiated, for second order. One does the work
            of about one more pass forward and one more backward.
        seconds: of wall-clock time, those before a resume included.
    """

    forward: int = 0
    backward: int = 0
    second: int = 0
    seconds: float = 0.0

    @property
    def images(self) -> int:
        """All passes together, forward and backward, a second derivative counted as one of each."""
        return self.forward + self.backward + 2 * self.second

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward + other.forward,
            self.backward + other.backward,
            self.second + other.second,
            self.seconds + other.seconds,
        )
