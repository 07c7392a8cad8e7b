"""Scores of several candidates on one scale, that of held-out images, averaged; and their contrast heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ssad_hpo.combined.heads import Head, contrast_head, head_weight
from ssad_hpo.criteria import differ
from ssad_hpo.detector import Embeddings
from ssad_hpo.task import DetectorError

LEAST_SCORE = 1e-12  # of a logarithm


class Scored(Protocol):
    """A candidate as it is kept: `search.Kept`.

    Attributes:
        scores, held_out: anomaly scores of the unlabelled and of the held-out images.
        embeddings: of the same images, and of the train ones.
    """

    @property
    def scores(self) -> np.ndarray: ...

    @property
    def held_out(self) -> np.ndarray | None: ...

    @property
    def embeddings(self) -> Embeddings: ...


@dataclass(frozen=True, eq=False)
class Scale:
    """Where the scores of held-out images lie: a score becomes (score - centre) / spread."""

    centre: float
    spread: float

    @classmethod
    def of(cls, held_out: Tensor) -> Scale:
        if not differ(held_out):
            raise DetectorError("combined: the scores of the held-out images are all the same")
        return cls(float(held_out.mean()), float(held_out.std(correction=0)))

    def __call__(self, scores: Tensor) -> Tensor:
        return (scores - self.centre) / self.spread


@dataclass(frozen=True, eq=False)
class Part:
    """How one candidate's scores and embeddings enter a combination.

    Attributes:
        scale: of its logarithmic scores.
        head, head_scale: its contrast head; None where heads do not count.
        head_weight: how much the head counts, 0..1.
    """

    scale: Scale
    head: Head | None = None
    head_scale: Scale | None = None
    head_weight: float = 0.0

    def __call__(self, scores: np.ndarray | Tensor, embeddings: Tensor) -> Tensor:
        """(N,) float64 of new images: of the candidate's scores of them and its embeddings."""
        total = self.scale(logarithms(scores))
        if self.head is not None and self.head_scale is not None:
            total = total + self.head_weight * self.head_scale(self.head(embeddings))
        return total


@dataclass(frozen=True, eq=False)
class Combination:
    """What several candidates make of the images together.

    Attributes:
        parts: one for each of them.
        scores: (N_test,) float64 anomaly scores of the unlabelled images, higher is more anomalous: means of
            candidates' scores, each in standard deviations of the held-out images, so that 0 is these images'
            mean, but 1 not their standard deviation.
        held_out: (N_held,) those of the held-out images.
    """

    parts: tuple[Part, ...]
    scores: Tensor
    held_out: Tensor

    @property
    def head_weight(self) -> float:
        """How much contrast heads count beside the candidates' own scores, 0..1."""
        return self.parts[0].head_weight


def combine(candidates: Sequence[Scored], *, heads: bool = True) -> Combination:
    """Let candidates work together.

    The score of an image is the mean of the candidates' logarithmic scores, each in standard deviations from
    the mean of the held-out images, and, with `heads`, the mean of their contrast heads in the same units,
    as much as `head_weight` trusts them. Heads are fitted to images that the first part finds suspicious.

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
    scales, unlabeled, held_out = [], [], []
    for candidate in candidates:
        if candidate.held_out is None or candidate.embeddings.held_out is None:
            raise ValueError("candidates: a combination needs held-out normal images, and there are none")
        logs = logarithms(candidate.held_out)
        scales.append(Scale.of(logs))
        unlabeled.append(scales[-1](logarithms(candidate.scores)))
        held_out.append(scales[-1](logs))
    scores, normal = torch.stack(unlabeled).mean(0), torch.stack(held_out).mean(0)
    plain = Combination(tuple(Part(scale) for scale in scales), scores, normal)
    if not heads:
        return plain
    found = [contrast_head(candidate.embeddings, scores) for candidate in candidates]
    head_scales = [Scale.of(of_held_out) for _, _, of_held_out in found]
    scaled = zip(head_scales, found, strict=True)
    both = [(scale(u), scale(h)) for scale, (_, u, h) in scaled]
    of_unlabeled, of_held_out = (torch.stack(rows).mean(0) for rows in zip(*both, strict=True))
    weight = head_weight(of_unlabeled, of_held_out)
    if weight == 0:
        return plain
    parts = [
        Part(scale, head[0], head_scale, weight)
        for scale, head, head_scale in zip(scales, found, head_scales, strict=True)
    ]
    return Combination(tuple(parts), scores + weight * of_unlabeled, normal + weight * of_held_out)


def can_be_combined(held_out: np.ndarray | Tensor) -> bool:
    """Whether a candidate's scores of the held-out images differ, so that they are a scale for others."""
    return differ(logarithms(held_out))


def logarithms(scores: np.ndarray | Tensor) -> Tensor:
    """(N,) float64 of anomaly scores, which are not negative."""
    return torch.as_tensor(scores, dtype=torch.float64).clamp_min(LEAST_SCORE).log()
