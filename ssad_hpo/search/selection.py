"""Choosing among the trials of a study, by a criterion alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import optuna
import torch

from ssad_hpo.augment import NONE
from ssad_hpo.criteria import CRITERIA, VALIDATION_LOSS
from ssad_hpo.detector import Detector
from ssad_hpo.search.record import TrialRecord, records
from ssad_hpo.search.store import Kept, load_scores, open_kept
from ssad_hpo.task import Augmentation

_SHOWN = ("dsv", "shift", "pu_auc")  # criteria in a candidate's short description
# Share of a coin's cross-entropy from which on a training counts as having learned nothing.
_CHANCE = 0.9


@dataclass(frozen=True, repr=False)
class Candidate:
    """A trial that ran its whole budget, and may be chosen.

    Printed, it is short: number, augmentation and the criteria that are asked for most.

    Attributes:
        number: of the trial.
        augmentation: kind and hyperparameters of its f_aug.
        criteria: every criterion (lower is better) and the unclamped "separability"; of a tuned one also
            its "validation_loss" (lower is better).
        loss: mean cross-entropy of its last stretch of training; that of a coin is log 2 = 0.693.
        budget: its training steps; 0 of the pretrained encoder as it comes, whose augmentation is "none".
        address: where its scores, embeddings and detector are.
    """

    number: int
    augmentation: Augmentation
    criteria: Mapping[str, float]
    loss: float
    budget: int
    address: str

    def __repr__(self) -> str:
        values = ", ".join(f"{n} {self.criteria[n]:.4g}" for n in _SHOWN if n in self.criteria)
        return f"Candidate({self.number}: {self.augmentation}, {values}, loss {self.loss:.3g})"

    def _repr_html_(self) -> str:
        """A small table for notebooks."""
        rows = {"trial": str(self.number), "f_aug": str(self.augmentation), "loss": f"{self.loss:.3g}"}
        rows |= {name: f"{value:.4g}" for name, value in self.criteria.items()}
        cells = "".join(f"<tr><th>{name}</th><td>{escape(text)}</td></tr>" for name, text in rows.items())
        return f"<table>{cells}</table>"

    @property
    def title(self) -> str:
        """What it was trained with, in words."""
        return "the encoder as it comes" if self.augmentation.kind == NONE else str(self.augmentation)

    @property
    def learned(self) -> bool:
        """Whether its training told augmented images from normal ones, clearly better than a coin does."""
        return self.augmentation.kind == NONE or self.loss < _CHANCE * math.log(2)

    def scores(self) -> np.ndarray:
        """(N_test,) float64 anomaly scores of the unlabelled images, higher is more anomalous."""
        return load_scores(self.address)

    def kept(self, device: str | torch.device = "cpu", *, arrays_alone: bool = False) -> Kept:
        """Scores, embeddings and, if it was kept and is wanted, the detector."""
        return open_kept(self.address, device, arrays_alone=arrays_alone)

    def detector(self, device: str | torch.device = "cpu") -> Detector:
        """The trained detector.

        Raises:
            FileNotFoundError: if it was not among those kept; the message gives the remedy.
        """
        detector = self.kept(device).detector
        if detector is None:
            raise FileNotFoundError(
                f"trial {self.number}: its detector was not among the best and was not kept; "
                "search again with a larger keep"
            )
        return detector


def candidates(study: optuna.Study, artifacts: Path | None = None) -> list[Candidate]:
    """The trials that may be chosen: those that ran their whole budget, the largest one in the study.

    A pruned trial never competes, whatever its value: it was judged on a smaller budget.

    Args:
        study: run with an `Objective`.
        artifacts: where the artifacts folder is now, if it was moved since.
    """
    finished = [t for t in records(study) if t.status == "complete" and (t.budget or t.frozen)]
    whole = max((trial.budget or 0 for trial in finished), default=0)
    return [_candidate(trial, artifacts) for trial in finished if trial.budget == whole or trial.frozen]


def select(study: optuna.Study, criterion: str = "dsv", artifacts: Path | None = None) -> Candidate:
    """Choose a candidate without labels: the lowest criterion; of equal ones the earliest trial.

    Args:
        study: run with an `Objective` on any criterion.
        criterion: a key of `ssad_hpo.CRITERIA`, or "validation_loss" among the starts of a tuning.
        artifacts: where the artifacts folder is now, if it was moved since.

    Raises:
        ValueError: for an unknown criterion, or a study without a trial that ran its whole budget.
    """
    choices = candidates(study, artifacts)
    known = [*CRITERIA]
    starts = [candidate for candidate in choices if VALIDATION_LOSS in candidate.criteria]
    if not choices or starts:
        known.append(VALIDATION_LOSS)
    if criterion not in known:
        raise ValueError(f"criterion: expected one of {', '.join(known)}, got {criterion!r}")
    if not choices:
        states = Counter(trial.status for trial in records(study))
        found = ", ".join(f"{count} {state}" for state, count in states.items()) or "none"
        raise ValueError(f"study: no trial ran its whole budget, so there is nothing to select ({found})")
    if criterion == VALIDATION_LOSS:  # the encoder as it comes, beside them, has none
        choices = starts
    without = [candidate.number for candidate in choices if criterion not in candidate.criteria]
    if without:
        raise ValueError(f"criterion: trial {without[0]} was not judged by {criterion}; choose another")
    return ranked(choices, criterion)[0]


def ranked(choices: Sequence[Candidate], criterion: str) -> list[Candidate]:
    """Candidates from the best to the worst by a criterion that all have; of equal ones the earlier first."""
    return sorted(choices, key=lambda candidate: (candidate.criteria[criterion], candidate.number))


def _candidate(trial: TrialRecord, artifacts: Path | None) -> Candidate:
    assert (
        trial.augmentation and trial.loss is not None and trial.budget is not None and trial.address
    )  # it is complete
    address = trial.address if artifacts is None else str(artifacts / Path(trial.address).name)
    return Candidate(trial.number, trial.augmentation, trial.criteria, trial.loss, trial.budget, address)
