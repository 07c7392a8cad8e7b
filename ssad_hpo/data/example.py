"""A folder of example images, for whoever has none at hand: a brick wall, and stains and misplaced bricks."""

from __future__ import annotations

import csv
import os
import tempfile
from pathlib import Path

import torch
from PIL import Image

from ssad_hpo.augment import Augmentation, Range, augment
from ssad_hpo.bounds import MOST_SEED, whole
from ssad_hpo.data.testbed import crops_of, photograph_of
from ssad_hpo.files import folder_locked

# Two kinds of defect: a dark stain, and a piece of the wall in the wrong place.
_DEFECTS = (
    Augmentation(
        "cutdiff", {"patch_area": Range(0.01, 0.05, log=True), "patch_aspect": Range(0.5, 2, log=True)}
    ),
    Augmentation(
        "cutpaste",
        {
            "patch_area": Range(0.02, 0.08, log=True),
            "patch_aspect": Range(0.4, 2.5, log=True),
            "angle": Range(-45, 45),
        },
    ),
)
_PIXELS = 160
_COUNTS = {"good": (240, 0.0), "stream": (96, 0.25), "new": (48, 0.25)}  # images, share of defects
_LABELS = "labels.csv"


def write_example(folder: str | Path, seed: int = 0) -> dict[str, int]:
    """Make a folder of images to try things with: `good`, `stream`, `new` and `labels.csv`.

    Random crops of scikit-image's photograph of a brick wall, 160 x 160 pixels, grey, as PNG. A quarter of
    those in `stream` and `new` has a defect, and only `labels.csv` (path,label; 1 is a defect) says which.

    Args:
        folder: to be made; must not be there yet.
        seed: of crops and defects.

    Returns:
        How many images each folder has.

    Raises:
        ValueError: for a folder that is there already or cannot be, or a wrong seed.
    """
    folder = Path(folder)
    whole("seed", seed, 0, MOST_SEED)
    there = f"{folder}: is there already; name a folder that is not"
    if folder.exists() or folder.is_symlink():
        raise ValueError(there)
    if not folder.absolute().parent.is_dir():
        raise ValueError(f"{folder}: expected a name in a folder that is there")
    generator = torch.Generator().manual_seed(seed)
    wall, rows = photograph_of("brick"), []
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.absolute().parent) as draft:
        for name, (count, share) in _COUNTS.items():
            images = crops_of(wall, count, _PIXELS, generator)
            defective = torch.randperm(count, generator=generator)[: round(share * count)]
            for defect, which in zip(_DEFECTS, defective.chunk(len(_DEFECTS)), strict=False):
                changed = augment(images[which].float() / 255, defect, generator)
                images[which] = (changed * 255).round().to(torch.uint8)
            place = Path(draft) / "images" / name
            place.mkdir(parents=True)
            for index, image in enumerate(images):
                path = Path(name) / f"{index:03d}.png"
                Image.fromarray(image[0].numpy()).save(place.parent / path)
                rows.append((path.as_posix(), int(index in defective.tolist())))
        with (Path(draft) / "images" / _LABELS).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["path", "label"])
            writer.writerows(row for row in rows if not row[0].startswith("good/"))
        with folder_locked(folder.absolute().parent):
            if os.path.lexists(folder):  # another process was faster
                raise ValueError(there)
            os.rename(Path(draft) / "images", folder)
    return {name: count for name, (count, _) in _COUNTS.items()}
