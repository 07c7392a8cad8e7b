"""A combination as a detector: it scores new images, and is kept in one folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ssad_hpo.bounds import is_number, whole
from ssad_hpo.calibration import MOST_BYTES, Calibrated, Calibration, take_calibration, tensors_of
from ssad_hpo.combined.combination import Part, Scale
from ssad_hpo.combined.heads import Head
from ssad_hpo.detector import Detector, maps_of
from ssad_hpo.encoder import FrozenOutputs
from ssad_hpo.files import FileError, read_json, read_tensors, reading, write_tensors
from ssad_hpo.task import DetectorError

_FORMAT = 1
_SETTINGS_FILE, _WEIGHTS_FILE = "combined.json", "combined.safetensors"
_AT_ONCE = 256  # images that all detectors look at before the next come
_MOST_MEMBERS = 10_000
_HEADER_BYTES = 2**22  # of the file of heads: some 100 for each


@dataclass(frozen=True, eq=False)
class CombinedDetector(Calibrated):
    """Several detectors that score images together; a detector in every respect, at their joint cost.

    Attributes:
        detectors: of the same image shape.
        parts: how the scores of each enter; from `combine`.
        calibration: of its own scores, what its decisions rest on; None in folders of older versions.
    """

    detectors: tuple[Detector, ...]
    parts: tuple[Part, ...]
    calibration: Calibration | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that it takes."""
        return self.detectors[0].image_shape

    @torch.inference_mode()
    def score(self, images: Tensor) -> Tensor:
        """Anomaly scores (N,) float64 of (N, C, H, W) uint8 images; higher is more anomalous.

        The mean of its members' scores, each in standard deviations of the held-out images, whose mean is 0.

        Raises:
            ValueError: if the images are of another type or shape.
            DetectorError: if embeddings or scores are not finite.
        """
        found = []
        for some in images.split(_AT_ONCE):
            shared = FrozenOutputs()  # candidates of one search differ above their frozen stages alone
            total = torch.zeros(len(some), dtype=torch.float64)
            for detector, part in zip(self.detectors, self.parts, strict=True):
                embeddings, scores = detector.embed_and_score(some, shared)
                total += part(scores, embeddings)
            found.append(total / len(self.detectors))
        joint = torch.cat(found)
        if not joint.isfinite().all():
            raise DetectorError("diverged: scores of the combined detector are not finite")
        return joint

    @torch.inference_mode()
    def heatmaps(self, images: Tensor) -> Tensor:
        """Where images are anomalous: the mean of the detectors' heat maps; see `Detector.heatmaps`.

        Args:
            images: (N, C, H, W) uint8 of `image_shape`.

        Returns:
            (N, H, W) float32 on the CPU; higher is more anomalous.

        Raises:
            ValueError: if the images are of another type or shape, or a detector lacks its patches' density.
        """
        found = []
        for some in images.split(_AT_ONCE):
            shared = FrozenOutputs()
            total = torch.zeros(len(some), *self.image_shape[1:])
            for detector in self.detectors:
                total += detector.heatmaps(some, shared)
            found.append(total / len(self.detectors))
        return torch.cat(found)

    @property
    def normal_patch_scores(self) -> Tensor:
        """(K, h, w) of normal images, which the colours of heat maps are scaled by."""
        each = [detector.normal_patch_scores for detector in self.detectors]
        finest = max((scores.shape[1:] for scores in each), key=lambda size: size.numel())
        return torch.stack([maps_of(scores, (finest[0], finest[1])) for scores in each]).mean(0)

    def fit_patches(self, train: Tensor, held_out: Tensor | None = None) -> None:
        """Learn what patches of normal images look like to those detectors that do not know yet."""
        for detector in self.detectors:
            if detector.patches is None:
                detector.fit_patches(train, held_out)

    def save(self, folder: Path) -> None:
        """Write the detectors and how they are combined into a folder, safetensors and JSON, all or nothing.

        Raises:
            ValueError: as `Detector.save`.
        """
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        heads, scales = {}, []
        for i, (detector, part) in enumerate(zip(self.detectors, self.parts, strict=True)):
            detector.save(partial / _member(i))
            kept = {"scores": [part.scale.centre, part.scale.spread]}
            if part.head is not None and part.head_scale is not None:
                heads[f"head.{i}"] = part.head.weights
                scale = part.head_scale
                kept["head"] = [part.head.bias, scale.centre, scale.spread, part.head_weight]
            scales.append(kept)
        write_tensors(heads | tensors_of(self.calibration), partial / _WEIGHTS_FILE)
        text = json.dumps({"format": _FORMAT, "parts": scales}, indent=2)
        (partial / _SETTINGS_FILE).write_text(text, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> CombinedDetector:
        """Read a detector that `save` wrote.

        Raises:
            FileNotFoundError: if the folder holds none.
            ValueError: if its files are of another format, damaged, or have numbers that are not finite.
        """
        if not is_combined(folder):
            raise FileNotFoundError(f"{folder}: holds no combined detector (no {_SETTINGS_FILE})")
        with reading(
            folder, "cannot be read as a combined detector", "restore it from a copy, or resume its run"
        ):
            settings = read_json(folder / _SETTINGS_FILE)
            if settings.get("format") != _FORMAT:
                raise FileError(f"{folder}: expected a combined detector of format {_FORMAT}")
            kept = settings["parts"]
            whole("parts", len(kept), 1, _MOST_MEMBERS)
            detectors = tuple(Detector.load(folder / _member(i), device) for i in range(len(kept)))
            most = _HEADER_BYTES + MOST_BYTES + 8 * sum(d.network.features for d in detectors)
            weights = read_tensors(folder / _WEIGHTS_FILE, most)
            calibration = take_calibration(weights)
            return cls(detectors, _read_parts(weights, kept, detectors), calibration)


def is_combined(folder: Path) -> bool:
    """Whether a folder holds a combined detector."""
    return (folder / _SETTINGS_FILE).is_file()


def _member(place: int) -> str:
    return f"member-{place:03d}"


def _read_parts(
    weights: dict[str, Tensor], kept: Sequence[dict[str, list[float]]], detectors: Sequence[Detector]
) -> tuple[Part, ...]:
    parts = []
    for i, (numbers, detector) in enumerate(zip(kept, detectors, strict=True)):
        centre, spread = numbers["scores"]
        part = Part(Scale(centre, spread))
        if "head" in numbers:
            bias, head_centre, head_spread, weight = numbers["head"]
            head = weights[f"head.{i}"]
            if head.shape != (detector.network.features,) or head.dtype != torch.float64:
                raise ValueError(f"head.{i}: expected {detector.network.features} float64 numbers")
            part = Part(part.scale, Head(head, bias), Scale(head_centre, head_spread), weight)
            if not (is_number(weight) and 0 <= weight <= 1):
                raise ValueError(f"head.{i}: expected a weight in 0..1, got {weight!r:.40}")
        finite = all(is_number(value) for values in numbers.values() for value in values)
        if not finite or (part.head is not None and not part.head.weights.isfinite().all()):
            raise ValueError(f"part {i} has numbers that are not finite")
        if not all(scale.spread > 0 for scale in (part.scale, part.head_scale) if scale is not None):
            raise ValueError(f"part {i} has a spread that is not above 0")
        parts.append(part)
    if len({detector.image_shape for detector in detectors}) > 1:
        raise ValueError("its detectors take images of different shapes")
    normal = [next(iter(d.patches.maps.values())).normal for d in detectors if d.patches is not None]
    if len({len(distances) for distances in normal}) > 1:
        raise ValueError("its detectors scale their heat maps by different normal images")
    return tuple(parts)
