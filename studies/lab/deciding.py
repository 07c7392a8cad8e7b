"""Kept detectors on random splits of a set's images: which calibrate, which the search sees, which are new.

All normal images that no detector was trained on are held-out or good test ones. *Drawn* splits share all of
these out at random, so that held-out and new images differ by chance alone; splits *as they come* have the
held-out images of the set, taken from its train folder, and share out the good test images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssad_hpo.calibration import Calibration
from ssad_hpo.combined import combine
from ssad_hpo.criteria import NO_EVIDENCE, p_anomalies, shift
from ssad_hpo.detector import Embeddings

Arrays = Mapping[str, np.ndarray]
# Sets of images that are scored as new ones: normal and anomalous ones that the search has not seen, normal
# ones that it had among the unlabelled, and good test images under other light and out of focus.
FRESH, ANOMALOUS, SEEN = "fresh", "anomalous", "seen"
SHIFTED = ("darker", "blurred")


@dataclass(frozen=True)
class Split:
    """Places in a set's untrained images, first the held-out ones, then the test images.

    Attributes:
        held_out, unlabeled: what the search has.
        scored: what is scored as new, by name.
        good_tests: places of good ones among the test images.
    """

    held_out: np.ndarray
    unlabeled: np.ndarray
    scored: dict[str, np.ndarray]
    good_tests: np.ndarray


def split(labels: np.ndarray, n_held_out: int, wanted: int | None, seed: int) -> Split:
    """A random split.

    Args:
        labels: (N,) of the test images.
        n_held_out: how many held-out images the set has.
        wanted: how many normal images, of all, calibrate; None leaves the set's own held-out images.
        seed: of the split.
    """
    generator = np.random.default_rng(seed)
    good = n_held_out + np.flatnonzero(labels == 0)
    own = np.arange(n_held_out)
    if wanted is None:
        held_out, rest = own, generator.permutation(good)
    else:
        pool = generator.permutation(np.concatenate([own, good]))
        held_out, rest = pool[:wanted], pool[wanted:]
    anomalous = generator.permutation(n_held_out + np.flatnonzero(labels == 1))
    seen, fresh = np.array_split(rest, 2)
    known, new = np.array_split(anomalous, 2)
    unlabeled = generator.permutation(np.concatenate([seen, known]))
    return Split(held_out, unlabeled, {FRESH: fresh, ANOMALOUS: new, SEEN: seen}, good - n_held_out)


@dataclass(frozen=True, eq=False)
class Member:
    """A kept detector on a split; what `combine` takes, and scores and embeddings of what is new."""

    scores: np.ndarray
    held_out: np.ndarray
    embeddings: Embeddings
    scored: dict[str, tuple[np.ndarray, Tensor]]
    train_scores: np.ndarray

    @classmethod
    def of(cls, arrays: Arrays, places: Split) -> Member:
        scores = np.concatenate([arrays["held_out_scores"], arrays["scores"]])
        rows = torch.from_numpy(np.concatenate([arrays["held_out"], arrays["unlabeled"]]))
        train, augmented = (torch.from_numpy(arrays[name]) for name in ("train", "augmented"))
        scored = {name: (scores[i], rows[i]) for name, i in places.scored.items()}
        for name in SHIFTED:
            rows_of = torch.from_numpy(arrays[name])[places.good_tests]
            scored[name] = (arrays[f"{name}_scores"][places.good_tests], rows_of)
        sets = Embeddings(train, augmented, rows[places.unlabeled], rows[places.held_out])
        return cls(scores[places.unlabeled], scores[places.held_out], sets, scored, arrays["train_scores"])


@dataclass(frozen=True, eq=False)
class Decider:
    """What decides: scores to calibrate by, and scores of what is new by the same detector.

    Attributes:
        calibration: of held-out images.
        scored: by the name of the set.
        head_weight: how much contrast heads count in it, 0..1.
    """

    calibration: Calibration
    scored: dict[str, Tensor]
    head_weight: float = 0.0


def deciders(members: Sequence[Member]) -> dict[str, list[Decider]]:
    """Every way to decide that is compared; the encoder as it comes is the first of the members."""
    singles = [_single(member, torch.from_numpy(member.held_out)) for member in members]
    trained = [_single(member, torch.from_numpy(member.train_scores)) for member in members]
    unlabeled = [torch.from_numpy(member.scores) for member in members]
    held_out = [torch.from_numpy(member.held_out) for member in members]
    shifts = [float(shift(u, h)) for u, h in zip(unlabeled, held_out, strict=True)]
    seen = p_anomalies(unlabeled, held_out) < NO_EVIDENCE
    return {
        "scores of train images as threshold": trained,
        "encoder as it comes": singles[:1],
        "one fine-tuned": singles[1:],
        "the choice of shift": [singles[int(np.argmin(shifts))]],
        "combined without heads": [_together(members, heads=False)],
        "combined": [_together(members, heads=seen)],
    }


def _single(member: Member, calibrating: Tensor) -> Decider:
    scored = {name: torch.from_numpy(scores) for name, (scores, _) in member.scored.items()}
    return Decider(Calibration(calibrating), scored)


def _together(members: Sequence[Member], *, heads: bool) -> Decider:
    found = combine(members, heads=heads)
    scored = {}
    for name in members[0].scored:
        parts = zip(found.parts, members, strict=True)
        scored[name] = torch.stack([part(*member.scored[name]) for part, member in parts]).mean(0)
    return Decider(Calibration(found.held_out), scored, found.head_weight)
