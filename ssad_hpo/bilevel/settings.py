"""What a tuning is told: the loss, how its gradient is taken, how fast and from where it moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ssad_hpo.bounds import MOST_RATE, check_choices, check_real, check_whole, is_number
from ssad_hpo.criteria import (
    CRITERIA,
    VALIDATION_LOSS,
    mmd,
    mmd_normalised,
    smooth_alignment,
    soft_alignment,
    two_sided_alignment,
)
from ssad_hpo.task import Augmentation, SearchSpace

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

# Name -> validation loss of (Z_trn, Z_aug, Z_test); lower is better, differentiable in all three.
LOSSES: dict[str, Loss] = {
    "smooth_alignment": smooth_alignment,
    "soft_alignment": soft_alignment,
    "two_sided_alignment": two_sided_alignment,
    "mmd": mmd,
    "mmd_normalised": mmd_normalised,
}

BatchNorm = Literal["eval", "train"]
WarmStartOn = Literal["range", "start"]


@dataclass(frozen=True)
class Tuning:
    """How the hyperparameters of an augmentation are tuned by gradient (ST-SSAD: Yoo et al., KDD 2025).

    The detector's own settings, the number of its steps and the seed of everything are `Training`'s.

    >>> from ssad_hpo import Tuning
    >>> tuning = Tuning(space={"cutdiff": {"patch_aspect": 1}}, starts=(0.4, {"patch_area": 0.1}))
    >>> print(tuning.augmentation)
    cutdiff(patch_area=0.002..0.3, patch_aspect=1)

    Attributes:
        space: what is tuned, one kind: hyperparameters given as ranges, within them; those given as numbers
            stay. Also a kind's name, a mapping as `SearchSpace` takes it, or an `Augmentation`.
        loss: a key of `LOSSES`, or any differentiable function of the unit embeddings of train, augmented
            and unlabeled images (each (N, D)) that returns a scalar, lower where they are better aligned.
        order: 2 lets the gradient flow through the virtual step as well, as in the paper; 1 only through
            the augmented images, in about 0.6 of a step's time. With either, two-sided alignment found as
            many areas; with 1 fewer detectors collapsed, 0 against 3 of 36
            (studies/results/st_ssad_recovery.md).
        detector_steps: training steps to each step of the hyperparameters.
        learning_rate: Adam's, of log area, log aspect and angle in radians.
        virtual_rate: step size alpha of the virtual step; 0 (with order 1) looks at the detector as it is.
        virtual_images: images of the virtual step's mini-batch, the first of the next training step's; as
            many augmented ones go with them.
        warm_start: share of a start's training steps before its hyperparameters move.
        warm_start_on: "range" warms up on hyperparameters drawn anew for every image from the whole
            bounds, once for all starting points; "start" on each starting point's own, once for each.
        validation_train, validation_unlabeled: images of the validation loss's mini-batch (fewer where
            the task has fewer); as many augmented as train ones go with them.
        batch_norm: of the validation loss's mini-batch, "eval" (running statistics) or "train".
        starts: starting points, run in turn. A fraction (0..1) of the way along the range of the first
            tuned hyperparameter, or values by name; what is not named starts in the middle of its range.
        choose_by: what keeps one starting point's detector, the lowest: a key of `CRITERIA`, or
            "validation_loss"; taken of the finished detectors.
        temperature: softness of patch edges while tuning, in pixels; the finished detector is judged with
            hard ones. CutDiff and Rotation have no edge.
        annealing: whether the detector's learning rate falls along a cosine to 0, as in plain training.
        checkpoint_every: steps of the hyperparameters between two checkpoints.

    Raises:
        ValueError: naming the setting that is out of its range.
    """

    space: SearchSpace = field(default_factory=lambda: SearchSpace("cutavg"))
    loss: str | Loss = "two_sided_alignment"
    order: Literal[1, 2] = 1
    detector_steps: int = 4
    learning_rate: float = 0.03
    virtual_rate: float = 0.03
    virtual_images: int = 16
    warm_start: float = 0.3
    warm_start_on: WarmStartOn = "range"
    validation_train: int = 48
    validation_unlabeled: int = 96
    batch_norm: BatchNorm = "eval"
    starts: tuple[float | Mapping[str, float], ...] = (0.4, 0.65, 0.9)
    choose_by: str = "dsv"
    temperature: float = 0.5
    annealing: bool = False
    checkpoint_every: int = 25

    def __post_init__(self) -> None:
        space: Any = self.space
        if isinstance(space, Augmentation):
            space = {space.kind: space.hyperparameters}
        space = space if isinstance(space, SearchSpace) else SearchSpace(space)
        if len(space.kinds) != 1:
            raise ValueError(f"space: expected the one kind to tune, got {', '.join(space.kinds)}")
        starts = [dict(s) if isinstance(s, Mapping) else s for s in self.starts]
        object.__setattr__(self, "space", space)
        object.__setattr__(self, "starts", tuple(starts))
        if not callable(self.loss) and self.loss not in tuple(LOSSES):
            raise ValueError(f"loss: expected one of {', '.join(LOSSES)} or a function, got {self.loss!r}")
        if self.choose_by not in (*CRITERIA, VALIDATION_LOSS):
            known = ", ".join((*CRITERIA, VALIDATION_LOSS))
            raise ValueError(f"choose_by: expected one of {known}, got {self.choose_by!r}")
        choices = {"order": (1, 2), "warm_start_on": ("range", "start"), "batch_norm": ("eval", "train")}
        check_choices(self, choices)
        steps, images = 10_000_000, 65_536
        check_whole(self, {"detector_steps": (1, steps), "checkpoint_every": (1, steps)})
        check_whole(self, {"virtual_images": (1, images), "validation_train": (2, images)})
        check_whole(self, {"validation_unlabeled": (2, images)})
        check_real(self, dict.fromkeys(("learning_rate", "virtual_rate", "temperature"), (0, MOST_RATE)))
        if self.order == 2 and self.virtual_rate == 0:
            raise ValueError("virtual_rate: order 2 needs one above 0, got 0; use order 1")
        if not (is_number(self.warm_start) and 0 <= self.warm_start < 1):
            raise ValueError(
                f"warm_start: expected a share of the steps, 0 <= share < 1, got {self.warm_start}"
            )
        if not self.starts:
            raise ValueError("starts: expected at least one starting point, got none")
        if len(self.starts) > 1000:
            raise ValueError(f"starts: expected at most 1000 starting points, got {len(self.starts)}")
        for start in self.starts:
            if not all(map(is_number, start.values() if isinstance(start, Mapping) else [start])):
                raise ValueError(f"starts: expected finite numbers, got {start!r:.80}")

    @property
    def augmentation(self) -> Augmentation:
        """What is tuned, with its ranges."""
        ((kind, hyperparameters),) = self.space.kinds.items()
        return Augmentation(kind, hyperparameters)

    @property
    def loss_function(self) -> Loss:
        """The validation loss as a function."""
        return LOSSES[self.loss] if isinstance(self.loss, str) else self.loss

    def warm_start_steps(self, steps: int) -> int:
        """Training steps of a warm start in a training of `steps`.

        Raises:
            ValueError: if they leave no step of the hyperparameters.
        """
        warm = round(self.warm_start * steps)
        if steps - warm < self.detector_steps:
            raise ValueError(
                f"steps: expected at least {self.detector_steps} (detector_steps) after the warm start's "
                f"{warm}, got {steps} in all"
            )
        return warm
