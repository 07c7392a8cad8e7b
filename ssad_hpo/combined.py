"""Several candidates that work together instead of a choice of one.

Each candidate's scores are put on one scale by those of held-out normal images, and averaged. To that is
added what a contrast head makes of its embeddings: a linear function that tells the unlabelled images, some
of which are anomalies, from held-out normal ones (Blanchard, Lee and Scott, JMLR 2010). No label has a part
in it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ssad_hpo.bounds import whole
from ssad_hpo.detector import Detector, Embeddings
from ssad_hpo.files import FileError, open_regular, read_json, reading
from ssad_hpo.task import DetectorError

_FOLDS = 5  # of the heads: no image is scored by a head that was fitted to it
_RIDGE = 0.1  # of the mean eigenvalue of the embeddings' covariance
_LEAST_SCORE = 1e-12  # of a logarithm
_FORMAT = 1
_SETTINGS_FILE, _WEIGHTS_FILE = "combined.json", "combined.safetensors"
_MOST_MEMBERS = 10_000


class Scored(Protocol):
    """A candidate as it is kept: `search.Kept`.

    Attributes:
        scores, held_out: anomaly scores of the unlabelled and of the held-out images.
        embeddings: of the same images.
    """

    @property
    def scores(self) -> np.ndarray: ...

    @property
    def held_out(self) -> np.ndarray | None: ...

    @property
    def embeddings(self) -> Embeddings: ...


@dataclass(frozen=True, eq=False)
class Head:
    """A linear function of unit embeddings: `embeddings @ weights + bias`, higher is more anomalous.

    Attributes:
        weights: (D,) float64.
        bias: a number.
    """

    weights: Tensor
    bias: float

    def __call__(self, embeddings: Tensor) -> Tensor:
        return embeddings.double() @ self.weights + self.bias


@dataclass(frozen=True, eq=False)
class Scale:
    """Where the scores of held-out images lie: a score becomes (score - centre) / spread."""

    centre: float
    spread: float

    @classmethod
    def of(cls, held_out: Tensor) -> Scale:
        spread = float(held_out.std(correction=0))
        if not spread > 0:
            raise DetectorError("combined: the scores of the held-out images are all the same")
        return cls(float(held_out.mean()), spread)

    def __call__(self, scores: Tensor) -> Tensor:
        return (scores - self.centre) / self.spread


@dataclass(frozen=True, eq=False)
class Part:
    """How one candidate's scores and embeddings enter a combination."""

    scale: Scale
    head: Head | None = None
    head_scale: Scale | None = None


@dataclass(frozen=True, eq=False)
class Combination:
    """What several candidates make of the images together.

    Attributes:
        parts: one for each of them.
        scores: (N_test,) float64 anomaly scores of the unlabelled images, higher is more anomalous; in units
            of the held-out images' standard deviation.
        held_out: (N_held,) those of the held-out images.
    """

    parts: tuple[Part, ...]
    scores: Tensor
    held_out: Tensor


def combine(candidates: Sequence[Scored], *, heads: bool = True) -> Combination:
    """Let candidates work together.

    The score of an image is the mean of the candidates' logarithmic scores, each in standard deviations from
    the mean of the held-out images, and, with `heads`, the mean of their contrast heads in the same units.

    Args:
        candidates: one or more, with scores of held-out images.
        heads: whether contrast heads join. They know anomalies that the unlabelled images hold, hardly
            others.

    Raises:
        ValueError: for no candidate, or one without held-out images.
        DetectorError: if held-out images all have the same score.
    """
    if not candidates:
        raise ValueError("candidates: expected at least one to combine, got none")
    parts, unlabeled, held_out = [], [], []
    for candidate in candidates:
        if candidate.held_out is None or candidate.embeddings.held_out is None:
            raise ValueError("candidates: a combination needs held-out normal images, and there are none")
        logs = _log(candidate.held_out)
        scale = Scale.of(logs)
        scores, normal = scale(_log(candidate.scores)), scale(logs)
        part = Part(scale)
        if heads:
            head, of_unlabeled, of_held_out = contrast_head(
                candidate.embeddings.unlabeled, candidate.embeddings.held_out
            )
            head_scale = Scale.of(of_held_out)
            scores, normal = scores + head_scale(of_unlabeled), normal + head_scale(of_held_out)
            part = Part(scale, head, head_scale)
        parts.append(part)
        unlabeled.append(scores)
        held_out.append(normal)
    return Combination(tuple(parts), torch.stack(unlabeled).mean(0), torch.stack(held_out).mean(0))


def contrast_head(unlabeled: Tensor, held_out: Tensor) -> tuple[Head, Tensor, Tensor]:
    """A ridge regression of unlabelled (+1) against held-out (-1) embeddings, of equal total weight.

    Fitted in five folds. The ridge is a tenth of the mean eigenvalue of the weighted covariance.

    Args:
        unlabeled, held_out: (N, D) unit embeddings.

    Returns:
        The mean of the folds' heads, for other images; and the scores of these images, each by the head of
        the fold that it was left out of, higher is more anomalous.
    """
    sets = unlabeled.double(), held_out.double()
    folds = [torch.arange(len(rows)) % min(_FOLDS, len(unlabeled), len(held_out)) for rows in sets]
    scores = [torch.zeros(len(rows), dtype=torch.float64) for rows in sets]
    heads = []
    for fold in range(int(folds[0].max()) + 1):
        kept = [rows[places != fold] for rows, places in zip(sets, folds, strict=True)]
        heads.append(_ridge(*kept))
        for values, rows, places in zip(scores, sets, folds, strict=True):
            values[places == fold] = heads[-1](rows[places == fold])
    mean = Head(torch.stack([h.weights for h in heads]).mean(0), sum(h.bias for h in heads) / len(heads))
    return mean, *scores


def _ridge(unlabeled: Tensor, held_out: Tensor) -> Head:
    rows = torch.cat([unlabeled, held_out])
    targets = torch.cat([rows.new_ones(len(unlabeled)), -rows.new_ones(len(held_out))])
    weight = torch.where(targets > 0, 0.5 / len(unlabeled), 0.5 / len(held_out))
    centre = weight @ rows
    rest = rows - centre
    weighted = rest * weight[:, None]
    covariance = rest.T @ weighted
    ridge = _RIDGE * covariance.diagonal().mean()
    covariance.diagonal().add_(ridge.clamp_min(torch.finfo(ridge.dtype).tiny))
    weights = torch.linalg.solve(covariance, weighted.T @ targets)  # the targets' weighted mean is 0
    return Head(weights, -float(centre @ weights))


def _log(scores: np.ndarray | Tensor) -> Tensor:
    return torch.as_tensor(scores, dtype=torch.float64).clamp_min(_LEAST_SCORE).log()


@dataclass(frozen=True, eq=False)
class CombinedDetector:
    """Several detectors that score images together; a detector in every respect, at their joint cost.

    Attributes:
        detectors: of the same image shape.
        parts: how the scores of each enter; from `combine`.
    """

    detectors: tuple[Detector, ...]
    parts: tuple[Part, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that it takes."""
        return self.detectors[0].image_shape

    @torch.inference_mode()
    def score(self, images: Tensor) -> Tensor:
        """Anomaly scores (N,) float64 of (N, C, H, W) uint8 images; higher is more anomalous.

        In standard deviations of the held-out images' scores, where 0 is their mean.

        Raises:
            ValueError: if the images are of another type or shape.
            DetectorError: if embeddings or scores are not finite.
        """
        total = torch.zeros(len(images), dtype=torch.float64)
        for detector, part in zip(self.detectors, self.parts, strict=True):
            embeddings = detector.embed(images)
            of_density = detector.training.score == "density"
            scores = detector.density_score(embeddings) if of_density else detector.score(images)
            total += part.scale(_log(scores))
            if part.head is not None and part.head_scale is not None:
                total += part.head_scale(part.head(embeddings))
        if not total.isfinite().all():
            raise DetectorError("diverged: scores of the combined detector are not finite")
        return total / len(self.detectors)

    def save(self, folder: Path) -> None:
        """Write the detectors and how they are combined into a folder, safetensors and JSON, all or nothing.

        Raises:
            ValueError: as `Detector.save`.
        """
        from safetensors.torch import save_file

        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        heads, scales = {}, []
        for i, (detector, part) in enumerate(zip(self.detectors, self.parts, strict=True)):
            detector.save(partial / _member(i))
            kept = {"scores": [part.scale.centre, part.scale.spread]}
            if part.head is not None and part.head_scale is not None:
                heads[f"head.{i}"] = part.head.weights
                kept["head"] = [part.head.bias, part.head_scale.centre, part.head_scale.spread]
            scales.append(kept)
        save_file(heads, partial / _WEIGHTS_FILE)
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
            return cls(detectors, _read_parts(folder, kept, detectors))


def is_combined(folder: Path) -> bool:
    """Whether a folder holds a combined detector."""
    return (folder / _SETTINGS_FILE).is_file()


def _member(place: int) -> str:
    return f"member-{place:03d}"


def _read_parts(
    folder: Path, kept: Sequence[dict[str, list[float]]], detectors: Sequence[Detector]
) -> tuple[Part, ...]:
    from safetensors.torch import load

    with open_regular(folder / _WEIGHTS_FILE) as file:
        weights = load(file.read())
    parts = []
    for i, (numbers, detector) in enumerate(zip(kept, detectors, strict=True)):
        centre, spread = numbers["scores"]
        part = Part(Scale(centre, spread))
        if "head" in numbers:
            bias, *scale = numbers["head"]
            head = weights[f"head.{i}"]
            if head.shape != (detector.network.features,) or head.dtype != torch.float64:
                raise ValueError(f"head.{i}: expected {detector.network.features} float64 numbers")
            part = Part(part.scale, Head(head, bias), Scale(*scale))
        numbers_of = torch.tensor([value for values in numbers.values() for value in values])
        if not numbers_of.isfinite().all() or (part.head and not part.head.weights.isfinite().all()):
            raise ValueError(f"part {i} has numbers that are not finite")
        if not all(scale.spread > 0 for scale in (part.scale, part.head_scale) if scale is not None):
            raise ValueError(f"part {i} has a spread that is not above 0")
        parts.append(part)
    if len({detector.image_shape for detector in detectors}) > 1:
        raise ValueError("its detectors take images of different shapes")
    return tuple(parts)
