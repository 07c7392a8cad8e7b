"""The 36 embedded tasks of the talk's tables: train sets that several tasks share, and their candidates.

Chosen before any result was seen: textures gravel, brick and grass, each with f_gen CutOut, CutAvg,
CutPaste and CutDiff at areas 0.02 and 0.1 (aspect 0.5 to 2) and with crops of the two other textures as
anomalies (30 tasks); digits 1, 4 and 7 against turned and against other digits, under Rotation (6 tasks).
Candidates: areas 0.005, 0.02, 0.06 and 0.2 at aspects 0.5 and 2 (CutPaste's angle drawn for every
image), angles 30 to 180 in six steps for Rotation; and one random dynamic detector.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from ssad_hpo.data import Source, builtin
from ssad_hpo.task import Augmentation, Training
from studies.lab.selector_tables import RANDOM_DYNAMIC

AREAS, ASPECTS, ANGLES = (0.005, 0.02, 0.06, 0.2), (0.5, 2.0), (30.0, 60.0, 90.0, 120.0, 150.0, 180.0)
PATCHES = ("cutout", "cutavg", "cutdiff", "cutpaste")
F_GEN_AREAS = (0.02, 0.1)
TEXTURES, DIGITS = ("gravel", "brick", "grass"), (1, 4, 7)


@dataclass(frozen=True)
class TrainSet:
    """Train images that several tasks share; `sources` are those tasks, for one data seed."""

    name: str
    sources: tuple[Source, ...]
    kinds: tuple[str, ...]
    training: Training


def texture_sets(seed: int, training: Training) -> Iterator[TrainSet]:
    for texture in TEXTURES:
        names = [f"{texture}/{kind}/{area}" for kind in PATCHES for area in F_GEN_AREAS]
        names += [f"{texture}/{other}" for other in TEXTURES if other != texture]
        yield TrainSet(texture, tuple(_seeded(builtin(n), seed) for n in names), PATCHES, training)


def digit_sets(seed: int, training: Training) -> Iterator[TrainSet]:
    for digit in DIGITS:
        names = (f"digits/{digit}/rotated", f"digits/{digit}")
        sources = tuple(_seeded(builtin(n), seed) for n in names)
        yield TrainSet(f"digits-{digit}", sources, ("rotation",), training)


def with_held_out(source: Source) -> Source:
    """The task with 64 held-out images as the unlabelled normal ones are; of the few digits 40."""
    numbers = {"n_held_out": 64}
    if source.loader == "semantic":
        numbers = {"n_train": 70, "n_unlabeled": 60, "n_held_out": 40}
    return Source(source.loader, {**source.arguments, **numbers})


def _seeded(source: Source, seed: int) -> Source:
    return Source(source.loader, {**source.arguments, "seed": seed})


def candidates(kind: str) -> Iterator[tuple[str, Augmentation]]:
    """Name and augmentation of every candidate of a kind, the random dynamic one last."""
    if kind == "rotation":
        for angle in ANGLES:
            yield f"{angle:g}", Augmentation(kind, {"angle": angle})
    else:
        for area, aspect in itertools.product(AREAS, ASPECTS):
            yield f"{area:g}x{aspect:g}", Augmentation(kind, {"patch_area": area, "patch_aspect": aspect})
    yield RANDOM_DYNAMIC, Augmentation(kind)
