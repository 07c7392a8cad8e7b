"""The chosen detector on new images."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import Tensor

from ssad_hpo import data
from ssad_hpo.bounds import MOST_IMAGE_PIXELS
from ssad_hpo.combined import CombinedDetector, is_combined
from ssad_hpo.detector import Detector, is_detector
from ssad_hpo.experiment.heatmaps import check_heatmaps
from ssad_hpo.experiment.outcome import chosen
from ssad_hpo.experiment.run_folder import open_run

# Images decoded and scored at a time: memory stays flat, and a bad file costs no more than these.
_BLOCK = 256
T = TypeVar("T")
R = TypeVar("R")


def load_detector(
    place: str | Path,
    device: str = "cpu",
    *,
    single: bool = False,
    heatmaps: bool = False,
    trust_addresses: bool = False,
) -> Detector | CombinedDetector:
    """The detector in a folder that `save` wrote, or the one that a run ends with.

    Args:
        place: a folder, or a run.
        device: where to score.
        single: of a run that combines candidates, the selected one alone.
        heatmaps: see to it that it can make heat maps; the detectors of older runs learn what they lack from
            the run's train images, and keep it.

    Raises:
        ValueError: if it is neither, or cannot make the heat maps that are asked for, or for a run's storage
            whose address needs `trust_addresses` (see `open_run`).
    """
    folder = Path(place)
    if single and is_combined(folder):
        raise ValueError(f"single: {folder} holds a combined detector alone; give its run")
    if is_combined(folder) or is_detector(folder):
        load = CombinedDetector.load if is_combined(folder) else Detector.load
        detector = load(folder, device)
        if heatmaps:
            _ = detector.normal_patch_scores  # raises where that is lacking
        return detector
    result = chosen(place, trust_addresses=trust_addresses)
    if heatmaps:
        check_heatmaps(result)
    return result.detector(device, single=single)


def bit_depth_of(place: str | Path) -> int:
    """That of the images which a run's detectors were trained on; of a detector's folder the whole."""
    if is_detector(Path(place)) or is_combined(Path(place)):
        return data.WHOLE_DEPTH
    return open_run(place).settings.bit_depth


def files_of(places: Sequence[str | Path]) -> list[Path]:
    """Image files, and those in folders with all folders inside, in the order found."""
    paths: list[Path] = []
    for place in map(Path, places):
        paths.extend(data.find_images(place) if place.is_dir() else [place])
    return paths


def score_images(
    detector: Detector | CombinedDetector,
    places: Sequence[str | Path],
    *,
    skip_unreadable: bool = False,
    bit_depth: int = data.WHOLE_DEPTH,
    max_pixels: int = MOST_IMAGE_PIXELS,
    draw: Callable[[Sequence[Path], Tensor], None] | None = None,
) -> Iterator[tuple[Path, float]]:
    """Anomaly scores of image files, in the order found; higher is more anomalous.

    The next files are decoded while some are scored.

    Args:
        detector: with its density.
        places: image files, and folders that are searched with all folders inside.
        skip_unreadable: leave out files that cannot be read, with a warning at the end, instead of raising.
        bit_depth: of grey values in files of 16 bits, as of the images that it was trained on.
        max_pixels: of a file, which takes up to 8 bytes of memory for each while it is read.
        draw: told of some files at a time and of their images, as the detector takes them.

    Yields:
        (path, score).

    Raises:
        ValueError: if nothing is found, a file cannot be read (after those of the blocks before it), or none.
    """
    channels, height, width = detector.image_shape
    paths = files_of(places)

    def read_block(start: int) -> tuple[Tensor, list[Path], list[str]]:
        some = paths[start : start + _BLOCK]
        limits = {"bit_depth": bit_depth, "max_pixels": max_pixels}
        return data.read_images(some, (height, width), channels, skip_unreadable, **limits)

    lost: list[str] = []
    for images, read, unread in _ahead(read_block, range(0, len(paths), _BLOCK)):
        lost += unread
        if read:
            scores: np.ndarray = detector.score(images).numpy()
            if draw is not None:
                draw(read, images)
            yield from zip(read, scores.tolist(), strict=True)
    if paths and len(lost) == len(paths):
        raise data.DataError(f"none of the {len(paths)} files can be read; {lost[0]}")
    if lost:
        warnings.warn(f"{data.skipped(lost)}; {len(paths) - len(lost)} are scored", stacklevel=2)


def _ahead(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """work(item) for each item, in order; that of the next one is done while this one's is used."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
