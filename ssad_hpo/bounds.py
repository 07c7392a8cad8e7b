"""Checks of settings: numbers that a machine can hold, and choices; each names the setting and what came."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

MOST_THREADS = 1024
MOST_PIXELS = 4096  # on a side of an image
MOST_IMAGE_PIXELS = 2**30 // 12  # of an image file, unless its user takes more; as much as Pillow's own limit
MOST_ARRAY_BYTES = 4 * 2**30  # of an npz file's arrays, likewise
MOST_RATE = 1e30  # float32 ends at 3e38
# torch takes seeds below 2^64; ours leave room for the steps and streams that are added to them.
MOST_SEED = 2**63 - 1


def check_whole(settings: object, bounds: Mapping[str, tuple[int, int]]) -> None:
    """Raise ValueError, naming the setting, for one that is no whole number or out of its bounds."""
    for name, (least, most) in bounds.items():
        whole(name, getattr(settings, name), least, most)


def whole(name: str, value: Any, least: int, most: int) -> None:
    """Raise ValueError for a value that is no whole number in least..most."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected a whole number >= {least}, got {value!r:.80}")
    if value > most:
        raise ValueError(f"{name}: expected at most {most}, got {value!r:.80}")


def check_real(settings: object, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Raise ValueError, naming the setting, for one that is no finite number or out of its bounds."""
    for name, (least, most) in bounds.items():
        real(name, getattr(settings, name), least, most)


def real(name: str, value: Any, least: float, most: float) -> None:
    """Raise ValueError for a value that is no finite number in least..most."""
    if not is_number(value) or value < least:
        raise ValueError(f"{name}: expected a finite number >= {least:g}, got {value!r:.80}")
    if value > most:
        raise ValueError(f"{name}: expected at most {most:g}, got {value!r:.80}")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def check_text(settings: object, *names: str) -> None:
    """Raise ValueError, naming the setting, for one that is no text."""
    for name in names:
        if not isinstance(value := getattr(settings, name), str):
            raise ValueError(f"{name}: expected a text, got {value!r:.80}")


def check_choices(settings: object, choices: Mapping[str, Sequence[Any]]) -> None:
    """Raise ValueError, naming the setting, for one that is not among its choices."""
    for name, known in choices.items():
        if getattr(settings, name) not in known:
            expected = ", ".join(map(str, known))
            raise ValueError(f"{name}: expected one of {expected}, got {getattr(settings, name)!r:.80}")
