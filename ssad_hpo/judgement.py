"""A finished detector, judged without labels: for searches, sweeps and tunings alike."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ssad_hpo.criteria import DegenerateError, check_sets, evaluate_all
from ssad_hpo.detector import Detector, Embeddings
from ssad_hpo.task import DetectorError, Task


@dataclass(frozen=True, eq=False)
class Judged:
    """What is known of a detector without labels.

    Attributes:
        criteria: every criterion (lower is better), and the unclamped "separability".
        embeddings: the three sets that they were computed from.
        scores: (N_test,) float64 anomaly scores of the unlabelled images, higher is more anomalous.
    """

    criteria: dict[str, float]
    embeddings: Embeddings
    scores: Tensor


def judge(detector: Detector, task: Task, step: int | None = None) -> Judged:
    """Judge a detector by its embeddings of the task's images, and score the unlabelled ones.

    Gives the detector its density.

    Args:
        detector: whose network may go on being trained afterwards.
        task: images, without labels.
        step: training steps done, for messages.

    Raises:
        DetectorError: if embeddings or scores are not finite, or the embeddings collapsed; it names the
            hyperparameters.
    """
    when = "" if step is None else f" at step {step}"
    sets = detector.embed_task(task.train, task.unlabeled)
    try:
        check_sets(sets.train, sets.augmented, sets.unlabeled)
        scores = _scores(detector, task, sets)
        criteria = evaluate_all(sets.train, sets.augmented, sets.unlabeled, scores)
    except DegenerateError as error:
        raise DetectorError(f"collapsed{when} under {detector.augmentation}: {error}") from error
    return Judged(criteria, sets, scores)


def _scores(detector: Detector, task: Task, sets: Embeddings) -> Tensor:
    """Anomaly scores of the unlabelled images; gives the detector its density."""
    detector.fit_density(sets.train)
    if detector.training.score == "density":
        scores = detector.density_score(sets.unlabeled)
    else:
        scores = detector.score(task.unlabeled)
    if not scores.isfinite().all():
        raise DetectorError(f"diverged: scores are not finite under {detector.augmentation}")
    return scores
