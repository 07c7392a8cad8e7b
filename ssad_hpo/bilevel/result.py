"""What a tuning gives back: the detectors of its starting points, the one that was kept, and the cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ssad_hpo.augment import hyperparameter_of
from ssad_hpo.bilevel.as_it_comes import AsItComes
from ssad_hpo.bilevel.coordinates import Coordinates
from ssad_hpo.bilevel.cost import Cost
from ssad_hpo.criteria import VALIDATION_LOSS
from ssad_hpo.detector import Detector, Embeddings
from ssad_hpo.judgement import Judged
from ssad_hpo.task import Augmentation

# Mean training loss, as a share of log 2 (that of a coin), from which on the two classes count as not told
# apart. A choice, not yet measured on real tasks.
_CHANCE = 0.9


class CollapseWarning(UserWarning):
    """A tuning ended where its result means little; the message names the sign and the remedy."""


@dataclass(frozen=True)
class OuterStep:
    """One step of the hyperparameters.

    Attributes:
        step: training steps done, the warm start's included; of one before the training its number.
        hyperparameters: the tuned ones by name, as they were when the losses were taken.
        training_loss: mean cross-entropy of the training steps since the outer step before; None before the
            training.
        validation_loss: L_val of a mini-batch, after the virtual step if there is one.
    """

    step: int
    hyperparameters: dict[str, float]
    training_loss: float | None
    validation_loss: float


@dataclass(frozen=True, eq=False)
class TunedStart:
    """One starting point, tuned to the end.

    Attributes:
        start: the augmentation that it began with.
        augmentation: the learned one, static.
        trajectory: every step of the hyperparameters, in order.
        detector: finished, with its density.
        judged: its criteria, embeddings and scores of the finished detector.
        training_loss: mean cross-entropy over the last tenth of the outer steps, or of a training after them.
        validation_loss: the tuning's loss of the finished detector, over all images.
        warnings: signs of collapse, each with its remedy; empty where there are none.
        cost: of this starting point alone, without a shared warm start.
    """

    start: Augmentation
    augmentation: Augmentation
    trajectory: tuple[OuterStep, ...]
    detector: Detector
    judged: Judged
    training_loss: float
    validation_loss: float
    warnings: tuple[str, ...]
    cost: Cost

    @property
    def criteria(self) -> dict[str, float]:
        """Every criterion and "separability" of the finished detector."""
        return self.judged.criteria

    @property
    def embeddings(self) -> Embeddings:
        """Of train, hard augmented and unlabeled images under the detector."""
        return self.judged.embeddings

    @property
    def scores(self) -> Tensor:
        """(N_test,) float64 anomaly scores of the unlabeled images, higher is more anomalous."""
        return self.judged.scores

    def value(self, choose_by: str) -> float:
        """What starting points are compared by, lower is better: a criterion or "validation_loss"."""
        return self.validation_loss if choose_by == VALIDATION_LOSS else self.criteria[choose_by]


@dataclass(frozen=True)
class FailedStart:
    """One starting point that could not be tuned to the end.

    Attributes:
        start: the augmentation that it began with.
        reason: a sentence that names the step and the hyperparameters that made it diverge or collapse.
        cost: as a `TunedStart`'s.
    """

    start: Augmentation
    reason: str
    cost: Cost


@dataclass(frozen=True)
class StoppedStart:
    """One starting point that did not go on after the first look at all of them.

    Attributes:
        start: the augmentation that it began with.
        augmentation: where it was, static.
        step: training steps done, the warm start's included; 0 if it was compared before the training.
        value: what it was compared by, lower is better.
        cost: as a `TunedStart`'s.
    """

    start: Augmentation
    augmentation: Augmentation
    step: int
    value: float
    cost: Cost


EndedStart = TunedStart | StoppedStart | FailedStart


@dataclass(frozen=True, eq=False)
class TuningResult:
    """All starting points of a tuning, and the one that was kept without labels.

    Attributes:
        starts: in the order in which they ran; at least one was tuned to the end.
        choose_by: what the kept one is lowest in.
        cost: of everything, what starting points share included.
        as_it_comes: the encoder before any training, judged when it is asked for.
    """

    starts: tuple[EndedStart, ...]
    choose_by: str
    cost: Cost
    as_it_comes: AsItComes

    @property
    def tuned(self) -> tuple[TunedStart, ...]:
        """The starting points that were tuned to the end."""
        return tuple(start for start in self.starts if isinstance(start, TunedStart))

    @property
    def chosen(self) -> int:
        """Index of the kept starting point among all; of equal ones the first."""
        return self.starts.index(self.kept)

    @property
    def kept(self) -> TunedStart:
        """The starting point that was kept."""
        return min(self.tuned, key=lambda start: start.value(self.choose_by))

    @property
    def augmentation(self) -> Augmentation:
        """The learned augmentation."""
        return self.kept.augmentation

    @property
    def detector(self) -> Detector:
        """The detector of the kept starting point."""
        return self.kept.detector

    @property
    def warnings(self) -> tuple[str, ...]:
        """Signs of collapse of the kept starting point."""
        return self.kept.warnings


def last_training_loss(trajectory: tuple[OuterStep, ...]) -> float:
    """Mean training loss over the last tenth of the outer steps, at least one."""
    last = [step.training_loss for step in trajectory[-max(1, len(trajectory) // 10) :]]
    return sum(loss for loss in last if loss is not None) / len(last)


def collapse_signs(
    coordinates: Coordinates, point: Tensor, training_loss: float, tolerance: float, *, before: bool = False
) -> tuple[str, ...]:
    """Why the end of a tuning means little: a hyperparameter at its bound, or classes not told apart.

    Args:
        coordinates, point: where the hyperparameters ended.
        training_loss: as `last_training_loss`.
        tolerance: what counts as at the bound, in the point's coordinates.
        before: whether they moved before any training.
    """
    kind = coordinates.augmentation.kind
    signs = []
    for name, side in coordinates.at_bounds(point, tolerance):
        bound = coordinates.bounds[name]
        end = bound.low if side == "lower" else bound.high
        vanishing = side == "lower" and hyperparameter_of(kind, name).vanishes
        keep_up = "" if before else "let the detector keep up (a longer warm_start, more detector_steps), "
        remedy = (
            f"augmented images may have merged with normal ones: start higher, {keep_up}or use another loss, "
            "'two_sided_alignment' or, with held-out images, 'whitened_contrast'"
            if vanishing
            else "it may have run away: start elsewhere, or widen its range if the bound is too tight"
        )
        signs.append(f"{kind}.{name} ended at its {side} bound {end:g}; {remedy}")
    if training_loss > _CHANCE * math.log(2):
        signs.append(
            f"the detector cannot tell augmented images from normal ones (training loss {training_loss:.3f}, "
            f"a coin has {math.log(2):.3f}); start from a stronger augmentation, train for more steps, or "
            "tune another kind"
        )
    return tuple(signs)
