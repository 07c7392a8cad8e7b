"""The chosen detector on new images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ssad_hpo import data
from ssad_hpo.detector import Detector
from ssad_hpo.experiment.outcome import chosen

_BLOCK = 1024  # images decoded and scored at a time, so that memory stays flat


def load_detector(place: str | Path, device: str = "cpu") -> Detector:
    """The detector in a folder that `Detector.save` wrote, or the one that a run has chosen.

    Raises:
        ValueError: if it is neither.
    """
    if (Path(place) / "detector.json").is_file():
        return Detector.load(Path(place), device)
    return chosen(place).detector(device)


def score_images(
    detector: Detector, places: Sequence[str | Path], *, skip_unreadable: bool = False
) -> Iterator[tuple[Path, float]]:
    """Anomaly scores of image files, in the order found; higher is more anomalous.

    Args:
        detector: with its density.
        places: image files, and folders that are searched with all folders inside.
        skip_unreadable: leave out files that cannot be read, with a warning, instead of raising.

    Yields:
        (path, score).

    Raises:
        ValueError: if nothing is found or a file cannot be read.
    """
    channels, *size = detector.image_shape
    paths: list[Path] = []
    for place in map(Path, places):
        paths.extend(data.find_images(place) if place.is_dir() else [place])
    for start in range(0, len(paths), _BLOCK):
        images, read = data.read_images(
            paths[start : start + _BLOCK], (size[0], size[1]), channels, skip_unreadable=skip_unreadable
        )
        scores: np.ndarray = detector.score(images).numpy()
        yield from zip(read, scores.tolist(), strict=True)
