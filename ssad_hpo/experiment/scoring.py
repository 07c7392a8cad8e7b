"""The chosen detector on new images."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ssad_hpo import data
from ssad_hpo.bounds import MOST_IMAGE_PIXELS
from ssad_hpo.combined import CombinedDetector, is_combined
from ssad_hpo.detector import Detector, is_detector
from ssad_hpo.experiment.outcome import chosen
from ssad_hpo.experiment.run_folder import open_run

# Images decoded and scored at a time: memory stays flat, and a bad file costs no more than these.
_BLOCK = 256


def load_detector(
    place: str | Path, device: str = "cpu", *, single: bool = False, trust_addresses: bool = False
) -> Detector | CombinedDetector:
    """The detector in a folder that `save` wrote, or the one that a run ends with.

    Args:
        place: a folder, or a run.
        device: where to score.
        single: of a run that combines candidates, the selected one alone.

    Raises:
        ValueError: if it is neither, or for a run's storage whose address needs `trust_addresses` (see
            `open_run`).
    """
    folder = Path(place)
    if is_combined(folder):
        return CombinedDetector.load(folder, device)
    if is_detector(folder):
        return Detector.load(folder, device)
    result = chosen(place, trust_addresses=trust_addresses)
    return result.detector(device, single=single)


def bit_depth_of(place: str | Path) -> int:
    """That of the images which a run's detectors were trained on; of a detector's folder the whole."""
    if is_detector(Path(place)) or is_combined(Path(place)):
        return data.WHOLE_DEPTH
    source = open_run(place).settings.source
    return data.WHOLE_DEPTH if source is None else source.arguments.get("bit_depth", data.WHOLE_DEPTH)


def score_images(
    detector: Detector | CombinedDetector,
    places: Sequence[str | Path],
    *,
    skip_unreadable: bool = False,
    bit_depth: int = data.WHOLE_DEPTH,
    max_pixels: int = MOST_IMAGE_PIXELS,
) -> Iterator[tuple[Path, float]]:
    """Anomaly scores of image files, in the order found; higher is more anomalous.

    Args:
        detector: with its density.
        places: image files, and folders that are searched with all folders inside.
        skip_unreadable: leave out files that cannot be read, with a warning at the end, instead of raising.
        bit_depth: of grey values in files of 16 bits, as of the images that it was trained on.
        max_pixels: of a file, which takes up to 8 bytes of memory for each while it is read.

    Yields:
        (path, score).

    Raises:
        ValueError: if nothing is found, a file cannot be read (after those of the blocks before it), or none.
    """
    channels, height, width = detector.image_shape
    paths: list[Path] = []
    for place in map(Path, places):
        paths.extend(data.find_images(place) if place.is_dir() else [place])
    lost: list[str] = []
    for start in range(0, len(paths), _BLOCK):
        images, read, unread = data.read_readable(
            paths[start : start + _BLOCK],
            (height, width),
            channels,
            skip_unreadable,
            bit_depth=bit_depth,
            max_pixels=max_pixels,
        )
        lost += unread
        if read:
            scores: np.ndarray = detector.score(images).numpy()
            yield from zip(read, scores.tolist(), strict=True)
    if paths and len(lost) == len(paths):
        raise data.DataError(f"none of the {len(paths)} files can be read; {lost[0]}")
    if lost:
        warnings.warn(f"{data.skipped(lost)}; {len(paths) - len(lost)} are scored", stacklevel=2)
