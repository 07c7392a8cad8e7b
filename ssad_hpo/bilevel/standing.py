"""How the detector of a descent stands: judged without labels and with hard edges, as any detector is."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ssad_hpo.bilevel.cost import Cost
from ssad_hpo.bilevel.ways import Way
from ssad_hpo.criteria import VALIDATION_LOSS, DegenerateError
from ssad_hpo.detector import Detector
from ssad_hpo.judgement import Judged, judge
from ssad_hpo.task import DetectorError


@dataclass(frozen=True, eq=False)
class Standing:
    """A detector in the course of a tuning, or at its end.

    Attributes:
        detector: with its density; valid until the way goes on.
        judged: its criteria, embeddings and scores.
        validation_loss: the tuning's loss over all images.
        cost: of judging.
    """

    detector: Detector
    judged: Judged
    validation_loss: float
    cost: Cost

    def value(self, choose_by: str) -> float:
        """What starting points are compared by, lower is better: a criterion or "validation_loss"."""
        return self.validation_loss if choose_by == VALIDATION_LOSS else self.judged.criteria[choose_by]


def standing_of(way: Way) -> Standing:
    """Judge the detector of a starting point; its network is in evaluation mode afterwards.

    Raises:
        DetectorError: if it diverged or collapsed; it names the hyperparameters.
    """
    began, problem, augmentation = time.monotonic(), way.problem, way.augmentation
    task, training = problem.task, problem.training
    channels, height, width = task.train.shape[1:]
    detector = Detector(way.network.eval(), augmentation, training, (channels, height, width))
    judged = judge(detector, task, way.trained)
    sets = judged.embeddings
    try:
        loss = problem.tuning.loss_of(sets.train, sets.augmented, sets.unlabeled, sets.held_out)
    except DegenerateError as error:
        raise DetectorError(f"collapsed at step {way.trained} under {augmentation}: {error}") from error
    passed = len(sets.train) + len(sets.augmented) + len(sets.unlabeled)
    passed += 0 if sets.held_out is None else len(sets.held_out)
    return Standing(detector, judged, float(loss), Cost(forward=passed, seconds=time.monotonic() - began))
