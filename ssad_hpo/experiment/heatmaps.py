"""Heat maps: what they need is learned when a study ends, and they are drawn over image files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ssad_hpo import data
from ssad_hpo.bounds import MOST_IMAGE_PIXELS, MOST_SEED
from ssad_hpo.combined import CombinedDetector
from ssad_hpo.detector import Detector
from ssad_hpo.experiment.outcome import StudyResult, load_task
from ssad_hpo.files import FileError, replaced
from ssad_hpo.report import LONGEST_SIDE, Spots, overlay
from ssad_hpo.search import Candidate, candidates, keep_patches
from ssad_hpo.task import DetectorError, Task

# Colours begin where one of a thousand normal patches lies, and are darkest at so many times that: normal
# images stay calm, and one scale serves all.
_CALM, _DARKEST = 0.999, 2.5


def colour_range(detector: Detector | CombinedDetector) -> tuple[float, float]:
    """From where to where heat maps have colours, in standard deviations of normal images' patches."""
    normal = detector.normal_patch_scores.flatten()
    low = float(normal.sort().values[int(_CALM * (len(normal) - 1))])
    return low, _DARKEST * max(low, 1.0)


def learn_heatmaps(result: StudyResult, task: Task) -> None:
    """Let the detectors that a study ends with, the combined ones among them, learn what heat maps need.

    It is kept with each; one that has it, or whose encoder has no feature maps, is left as it is.
    """
    for candidate in _final(result):
        try:
            _learn(candidate, task)
        except (ValueError, DetectorError):
            continue  # the study's result does not depend on it; whoever asks for maps hears why


def check_heatmaps(result: StudyResult, task: Task | None = None) -> None:
    """See to it that a study's detectors have what heat maps need; those of older studies learn it now.

    Args:
        task: its task, if that is at hand; else it is loaded again if need be.

    Raises:
        FileError: if that needs train images that are gone. ValueError: for an encoder without feature maps.
    """
    lacking = [c for c in _final(result) if c.detector().patches is None]
    if not lacking:
        return
    if task is None:
        try:
            task = load_task(result.run)
        except (ValueError, OSError) as error:
            raise FileError(
                f"{result.run.folder}: its detectors lack what heat maps need, which is learned from the "
                f"train images, and these are not to be had ({error})"
            ) from error
    for candidate in lacking:
        _learn(candidate, task)


def _final(result: StudyResult) -> list[Candidate]:
    """The selected candidate and those that are combined."""
    members = () if result.evidence is None else result.evidence.members
    numbers = {result.selected.number, *members}
    return [c for c in candidates(result.study, result.run.artifacts) if c.number in numbers]


def _learn(candidate: Candidate, task: Task) -> None:
    detector = candidate.detector()
    if detector.patches is None:
        detector.fit_patches(task.train, task.held_out)
        keep_patches(candidate.address, detector)


class Overlays:
    """Writes the heat map of every image that is scored, over the image, as a PNG of its own resolution.

    Attributes:
        low, high: the colours' range, the same for all images; see `colour_range`.

    Args:
        detector: which has what heat maps need.
        folder: where the files go, below it as the images lie below the folder that all have in common.
        places: that were named, files and folders.
        files: all that will be scored.
        bit_depth, max_pixels: as in `score_images`.

    Raises:
        ValueError: if the folder is a file, or lies in a folder of images, where its own would be scored next
            time, or if an image would be written over.
    """

    def __init__(
        self,
        detector: Detector | CombinedDetector,
        folder: Path,
        places: Sequence[Path],
        files: Sequence[Path],
        *,
        bit_depth: int = data.WHOLE_DEPTH,
        max_pixels: int = MOST_IMAGE_PIXELS,
    ) -> None:
        self.detector, self.folder = detector, _absolute(folder)
        self.low, self.high = colour_range(detector)
        self.bit_depth, self.max_pixels, self.count = bit_depth, max_pixels, 0
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"heatmaps: {folder} is a file, expected a folder")
        for place in places:
            if place.is_dir() and self.folder.is_relative_to(_absolute(place)):
                raise ValueError(f"heatmaps: {folder} lies among the images in {place}; take another folder")
        whole = [_absolute(file) for file in files]
        above = Path(os.path.commonpath([file.parent for file in whole]))
        stems = Counter(file.with_suffix("") for file in whole)
        self.outputs: dict[Path, Path] = {}
        for file, path in zip(files, whole, strict=True):
            # x.png and x.jpg beside each other keep their suffixes.
            named = path if stems[path.with_suffix("")] > 1 else path.with_suffix("")
            self.outputs[file] = self._place(named.relative_to(above))
        if len(set(self.outputs.values())) < len(set(whole)):  # x.png and x.jpg beside x.png.png: all do
            self.outputs = {f: self._place(p.relative_to(above)) for f, p in zip(files, whole, strict=True)}
        if overwritten := set(self.outputs.values()) & set(whole):
            raise ValueError(
                f"heatmaps: would write over {min(overwritten)}; take another folder than {folder}"
            )
        for output in set(self.outputs.values()):
            there = next(p for p in (output.parent, *output.parent.parents) if p.exists())
            if not there.is_dir() or (output.exists() and not output.is_file()):
                taken = output if there.is_dir() else there
                raise ValueError(f"heatmaps: {taken} is in the way; remove it or take another folder")
            output.with_name(output.name + ".partial").exists()  # raises for too long a name

    def _place(self, name: Path) -> Path:
        return self.folder / name.with_name(name.name + ".png")

    def draw(self, files: Sequence[Path], images: Tensor) -> None:
        """Write those of some files, whose images as the detector takes them are given."""
        for file, map_ in zip(files, self.detector.heatmaps(images), strict=True):
            shown = data.read_whole(file, bit_depth=self.bit_depth, max_pixels=self.max_pixels)
            path = self.outputs[file]
            path.parent.mkdir(parents=True, exist_ok=True)
            with replaced(path) as partial:
                overlay(shown, map_.numpy(), self.low, self.high).save(partial, "PNG", compress_level=1)
            self.count += 1

    def told(self) -> str:
        """What was written, and what the colours mean, in a sentence."""
        return (
            f"{self.count} heat maps in {self.folder}: yellow begins at {self.low:.1f} standard deviations "
            f"of normal patches, which one of a thousand exceeds, and red is darkest at {self.high:.1f}, the "
            "same in all images"
        )


def spots_of(
    detector: Detector | CombinedDetector,
    task: Task,
    scores: NDArray[np.floating],
    places: Sequence[int],
    files: Sequence[Path] | None,
    bit_depth: int,
) -> tuple[Spots, ...]:
    """Unlabelled images for a report, with their heat maps over them, at their own resolution.

    Args:
        detector: which has what heat maps need.
        task: of the study.
        scores: of `task.unlabeled`. places: of the images to show among these, highest first.
        files: of all unlabelled images; None shows them as the detector takes them.
        bit_depth: of grey values in files of 16 bits.
    """
    low, high = colour_range(detector)
    images, spots = task.unlabeled[torch.tensor(places)], []
    for rank, (place, map_) in enumerate(zip(places, detector.heatmaps(images), strict=True), 1):
        if files is None:
            pixels = task.unlabeled[place].expand(3, -1, -1).permute(1, 2, 0).contiguous()
            shown = Image.fromarray(pixels.numpy())
        else:
            # It was read before, under the run's own limit of pixels.
            shown = data.read_whole(files[place], bit_depth=bit_depth, max_pixels=MOST_SEED)
        shown.thumbnail((LONGEST_SIDE, LONGEST_SIDE))  # all are in memory together
        heat = overlay(shown.copy(), map_.numpy(), low, high)
        spots.append(Spots(shown, heat, f"unlabeled, rank {rank}, score {scores[place]:.3g}"))
    return tuple(spots)


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))
