"""Detectors judged without labels, in the course of their training or at its end: wherever any are made."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ssad_hpo.calibration import Calibration
from ssad_hpo.criteria import CRITERIA, DegenerateError, check_sets, evaluate_all, measured
from ssad_hpo.detector import Detector, Embeddings, train, untrained_detector
from ssad_hpo.encoder import FrozenOutputs
from ssad_hpo.task import Augmentation, DetectorError, SearchSpace, Task, Training

# What frozen stages make of a task's images, for all detectors that are judged by them; gone with the task.
_SHARED: WeakKeyDictionary[Task, FrozenOutputs] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Judged:
    """What is known of a detector without labels.

    Attributes:
        criteria: every criterion (lower is better) that the task has images for, the standard errors that are
            known, and the unclamped "separability".
        embeddings: the sets that they were computed from.
        scores: (N_test,) float64 anomaly scores of the unlabelled images, higher is more anomalous.
        held_out: (N_held,) those of held-out normal images; None where there are none.
    """

    criteria: dict[str, float]
    embeddings: Embeddings
    scores: Tensor
    held_out: Tensor | None = None


def check_criterion(name: str, criterion: str, task: Task) -> None:
    """Raise ValueError for a criterion that there is not, or that a task lacks the images for."""
    if criterion not in CRITERIA:
        raise ValueError(f"{name}: expected one of {', '.join(CRITERIA)}, got {criterion!r}")
    if "held_out" in CRITERIA[criterion].needs:
        check_held_out(name, criterion, task)


def check_held_out(name: str, measure: str, task: Task) -> None:
    """Raise ValueError for a measure of held-out images on a task that has none."""
    if task.held_out is None:
        raise ValueError(
            f"{name}: {measure} is of held-out normal images, and {task.name} has none; give a folder of "
            "them (held_out, --held-out), a share of train (held_out_share, --held-out-share), or n_held_out "
            "of a built-in data set"
        )


def judge(detector: Detector, task: Task, step: int | None = None) -> Judged:
    """Judge a detector by its embeddings of the task's images, and score those that it did not see.

    Gives the detector its densities, and its calibration where there are held-out images.

    Args:
        detector: whose network may go on being trained afterwards.
        task: images, without labels.
        step: training steps done, for messages.

    Raises:
        DetectorError: if embeddings or scores are not finite, or the embeddings collapsed; it names the
            hyperparameters.
    """
    when = "" if step is None else f" at step {step}"
    shared = _SHARED.setdefault(task, FrozenOutputs())
    learned = detector.learn(task.train, shared)
    (unlabeled, scores), normal = detector.look(task.unlabeled, shared), None
    held_out = None
    if task.held_out is not None:
        normal, held_out = detector.look(task.held_out, shared)
    sets = Embeddings(learned, detector.embed_augmented(task.train), unlabeled, normal)
    try:
        check_sets(sets.train, sets.augmented, sets.unlabeled)
        detector.fit_density(sets.train)
        if scores is None:
            scores = detector.finite(detector.density_score(unlabeled))
            held_out = None if normal is None else detector.finite(detector.density_score(normal))
        detector.calibration = None if held_out is None else Calibration(held_out)
        criteria = evaluate_all(sets.train, sets.augmented, sets.unlabeled, scores, held_out)
    except DegenerateError as error:
        raise DetectorError(f"collapsed{when} under {detector.augmentation}: {error}") from error
    return Judged(criteria, sets, scores, held_out)


def metric_names() -> tuple[str, ...]:
    """What is told of every evaluation, beside its step."""
    return (*measured(), "loss")


@dataclass(frozen=True)
class Evaluation:
    """A detector judged in the course of its training.

    Attributes:
        step: training steps done.
        loss: mean training loss since the evaluation before.
        judged: what is known of it without labels.
        detector: valid until the training goes on.
        state: from which `evaluations` goes on; see `detector.Checkpoint`.
    """

    step: int
    loss: float
    judged: Judged
    detector: Detector
    state: dict[str, Any]

    @property
    def metrics(self) -> dict[str, float]:
        """All of `metric_names` by name."""
        return {**self.judged.criteria, "loss": self.loss}


def evaluations(
    task: Task,
    augmentation: Augmentation,
    training: Training,
    device: str | torch.device = "cpu",
    state: dict[str, Any] | None = None,
) -> Iterator[Evaluation]:
    """Train a detector and judge it at each of `training.evaluation_steps`, without labels.

    With the `state` of an evaluation of this same training it goes on after that.

    Raises:
        DetectorError: if the training diverges or the embeddings collapse; it names the hyperparameters.
        ValueError: if the augmentation does not fit into the images.
    """
    for checkpoint in train(task.train, augmentation, training, device, state):
        judged = judge(checkpoint.detector, task, checkpoint.step)
        yield Evaluation(checkpoint.step, checkpoint.loss, judged, checkpoint.detector, checkpoint.state)


def frozen_evaluation(
    task: Task, space: SearchSpace, training: Training, device: str | torch.device
) -> Evaluation:
    """A pretrained encoder as it comes, without a step of training, judged like a detector.

    Criteria of augmented images take the first kind of the space.
    """
    channels, height, width = task.train.shape[1:]
    augmentation = Augmentation(*next(iter(space.kinds.items())))
    detector = untrained_detector(training, (channels, height, width), augmentation, torch.device(device))
    return Evaluation(0, math.log(2), judge(detector, task), detector, {})
