"""What a tuning is told: the loss, how its gradient is taken, how fast and from where it moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from torch import Tensor

from ssad_hpo.bounds import MOST_RATE, check_choices, check_real, check_whole, is_number
from ssad_hpo.criteria import (
    CRITERIA,
    VALIDATION_LOSS,
    contrast_alignment,
    density_pu_auc,
    discriminant_pu_auc,
    mmd,
    mmd_normalised,
    smooth_alignment,
    soft_alignment,
    two_sided_alignment,
    whitened_contrast,
)
from ssad_hpo.task import PRETRAINED, Augmentation, Range, SearchSpace

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

# Name -> validation loss of (Z_trn, Z_aug, Z_test); lower is better, differentiable in all three.
LOSSES: dict[str, Loss] = {
    "smooth_alignment": smooth_alignment,
    "soft_alignment": soft_alignment,
    "two_sided_alignment": two_sided_alignment,
    "mmd": mmd,
    "mmd_normalised": mmd_normalised,
}

# The same of (Z_trn, Z_aug, Z_test, Z_held), the last of held-out normal images.
HELD_OUT_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "contrast_alignment": contrast_alignment,
    "whitened_contrast": whitened_contrast,
    "pu_auc": discriminant_pu_auc,
    "density_pu_auc": density_pu_auc,
}
# Those without Z_aug in them: they know the hyperparameters by the virtual step alone.
INDIRECT_LOSSES = ("density_pu_auc",)
_OF_RANKS = ("pu_auc", "density_pu_auc")  # of unlabelled among held-out images: of all, or they say nothing

# Settings of hyperparameters that move while the detector trains.
_IN_TURN = (
    "order", "detector_steps", "virtual_rate", "virtual_images", "warm_start", "warm_start_on",
    "validation_unlabeled", "validation_held_out", "batch_norm", "look", "annealing",
)  # fmt: skip

BatchNorm = Literal["eval", "train"]
WarmStartOn = Literal["range", "start"]


@dataclass(frozen=True)
class Tuning:
    """How the hyperparameters of an augmentation are tuned by gradient (ST-SSAD: Yoo et al., KDD 2025).

    The detector's own settings, the number of its steps and the seed of everything are `Training`'s.

    >>> from ssad_hpo import Tuning
    >>> tuning = Tuning(space={"cutdiff": {"patch_aspect": 1}}, starts=(0.4, {"patch_area": 0.1}))
    >>> print(*tuning.augmentations)
    cutdiff(patch_area=0.002..0.3, patch_aspect=1)

    Attributes:
        space: what is tuned, of one kind or several: hyperparameters given as ranges, within them; those
            given as numbers stay. Also a kind's name, a sequence of names, a mapping as `SearchSpace` takes
            it, or an `Augmentation`.
        loss: a key of `LOSSES`, one of `HELD_OUT_LOSSES` where the task has held-out images, or any
            differentiable function of the unit embeddings of train, augmented and unlabeled images (each
            (N, D)) that returns a scalar, lower where they are better aligned.
        order: 2 lets the gradient flow through the virtual step as well, as in the paper; 1 only through
            the augmented images, in about 0.6 of a step's time. With either, two-sided alignment found as
            many areas; with 1 fewer detectors collapsed, 0 against 3 of 36
            (studies/results/st_ssad_recovery.md).
        detector_steps: training steps to each step of the hyperparameters.
        learning_rate: Adam's, of log area, log aspect and angle in radians.
        virtual_rate: step size alpha of the virtual step; 0 (with order 1) looks at the detector as it is. Of
            an encoder that trains at a share of the head's learning rate, that share of it.
        virtual_images: images of the virtual step's mini-batch, the first of the next training step's; as
            many augmented ones go with them.
        warm_start: share of a start's training steps before its hyperparameters move.
        warm_start_on: "range" warms up on hyperparameters drawn anew for every image from the whole
            bounds, of the kinds in turn, once for all starting points; "start" on each starting point's own,
            once for each.
        focus: whether the validation loss looks only at those unlabelled images that stand out against
            held-out normal ones (see `bilevel.focus`), so that few anomalies count as many would; without
            held-out images, or with a loss of ranks among them (PU-AUC), at all.
        validation_train, validation_unlabeled, validation_held_out: images of the validation loss's
            mini-batch (fewer where the task has fewer); as many augmented as train ones go with them.
        batch_norm: of the validation loss's mini-batch, "eval" (running statistics) or "train".
        starts: starting points, run in turn. A fraction (0..1) of the way along the range of the first
            tuned hyperparameter, or values by name; what is not named starts in the middle of its range. Each
            starts with every kind, values with those that have them.
        survivors: how many starting points are tuned to the end. If there are more, all are tuned for a
            `look` first, and those that are lowest in `choose_by` then go on; None for all.
        look: share of the steps after the warm start, from 0 to 1.
        choose_by: what keeps one starting point's detector, the lowest: a key of `CRITERIA`, or
            "validation_loss"; taken of the finished detectors.
        combine: how many of the best finished detectors score together in the end of a study, where there are
            held-out images; 1 for none but the kept one.
        contrast_heads: whether these also look for what tells the unlabelled images from held-out ones.
        steps_before: steps of the hyperparameters before the detector trains, down the loss of a pretrained
            encoder as it comes; what is found stays while it trains, as in a search. Then the rate falls
            along a cosine, `validation_train` says how many images are augmented in a step, `survivors` are
            those of the lowest validation loss, and what is about moving and training in turn
            (`detector_steps`, the warm start, the virtual step, `look`) must be as by default. 0 moves while
            it trains.
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
    validation_held_out: int = 64
    focus: bool = True
    starts: tuple[float | Mapping[str, float], ...] = (0.4, 0.65, 0.9)
    survivors: int | None = None
    look: float = 0.2
    choose_by: str = "dsv"
    combine: int = 1
    contrast_heads: bool = True
    steps_before: int = 0
    temperature: float = 0.5
    annealing: bool = False
    checkpoint_every: int = 25

    def __post_init__(self) -> None:
        space: Any = self.space
        if isinstance(space, Augmentation):
            space = {space.kind: space.hyperparameters}
        space = space if isinstance(space, SearchSpace) else SearchSpace(space)
        starts = [dict(s) if isinstance(s, Mapping) else s for s in self.starts]
        object.__setattr__(self, "space", space)
        object.__setattr__(self, "starts", tuple(starts))
        losses = (*LOSSES, *HELD_OUT_LOSSES)
        if not callable(self.loss) and self.loss not in losses:
            raise ValueError(f"loss: expected one of {', '.join(losses)} or a function, got {self.loss!r}")
        if self.choose_by not in (*CRITERIA, VALIDATION_LOSS):
            known = ", ".join((*CRITERIA, VALIDATION_LOSS))
            raise ValueError(f"choose_by: expected one of {known}, got {self.choose_by!r}")
        choices = {"order": (1, 2), "warm_start_on": ("range", "start"), "batch_norm": ("eval", "train")}
        check_choices(self, choices)
        steps, images = 10_000_000, 65_536
        check_whole(self, {"detector_steps": (1, steps), "checkpoint_every": (1, steps)})
        check_whole(self, {"virtual_images": (1, images), "validation_train": (2, images)})
        check_whole(self, {"validation_unlabeled": (2, images), "validation_held_out": (2, images)})
        check_whole(self, {"combine": (1, 1_000_000), "steps_before": (0, steps)})
        if self.survivors is not None:
            check_whole(self, {"survivors": (1, 1000)})
        for name in ("contrast_heads", "focus"):
            if not isinstance(given := getattr(self, name), bool):
                raise ValueError(f"{name}: expected true or false, got {given!r:.80}")
        check_real(self, dict.fromkeys(("learning_rate", "virtual_rate", "temperature"), (0, MOST_RATE)))
        if self.order == 2 and self.virtual_rate == 0:
            raise ValueError("virtual_rate: order 2 needs one above 0, got 0; use order 1")
        if self.steps_before and self.loss in INDIRECT_LOSSES:
            raise ValueError(
                f"loss: {self.loss} knows the augmentation by what it teaches the encoder, which is nothing "
                "before the training; use order 2 with steps_before=0, or another loss"
            )
        if self.order == 1 and self.loss in INDIRECT_LOSSES:
            raise ValueError(
                f"loss: {self.loss} knows the augmentation by the virtual step alone, which order 1 leaves "
                "out; use order 2 or another loss"
            )
        if self.steps_before:
            self._check_before()
        if not (is_number(self.look) and 0 < self.look < 1):
            raise ValueError(f"look: expected a share of the steps, 0 < share < 1, got {self.look!r:.80}")
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

    def _check_before(self) -> None:
        """Raise ValueError for settings that steps before the training leave without a use."""
        unused = [f.name for f in fields(self) if f.name in _IN_TURN and getattr(self, f.name) != f.default]
        if unused:
            raise ValueError(
                f"{unused[0]}: it is of hyperparameters that move while the detector trains, and has no use "
                f"with {self.steps_before} steps before the training; leave it out, or use none of these "
                "(steps_before=0, --steps-before 0)"
            )

    @property
    def tolerance(self) -> float:
        """What counts as at a bound, in the coordinates of points: a step; less where steps come to rest."""
        return self.learning_rate * (0.1 if self.steps_before else 1.0)

    @property
    def look_by(self) -> str:
        """What starting points are compared by after a look at all."""
        return VALIDATION_LOSS if self.steps_before else self.choose_by

    def last_step(self, steps: int) -> int:
        """All steps of a starting point that trains for `steps`."""
        return self.steps_before + steps

    @property
    def augmentations(self) -> tuple[Augmentation, ...]:
        """What is tuned, with its ranges, a kind each."""
        return tuple(Augmentation(kind, values) for kind, values in self.space.kinds.items())

    @property
    def total(self) -> int:
        """How many starting points there are: every start with every kind that has its hyperparameters."""
        tuned = [
            {name for name, value in augmentation.hyperparameters.items() if isinstance(value, Range)}
            for augmentation in self.augmentations
        ]
        fitting = [sum(fits_kind(start, names) for names in tuned) for start in self.starts]
        return sum(max(1, count) for count in fitting)  # one that fits nowhere is refused

    @property
    def needs_held_out(self) -> bool:
        """Whether the validation loss is of held-out images as well."""
        return isinstance(self.loss, str) and self.loss in HELD_OUT_LOSSES

    @property
    def focuses(self) -> bool:
        """Whether held-out images, where there are such, decide which unlabelled ones are looked at."""
        return self.focus and self.loss not in _OF_RANKS

    def loss_of(
        self, train: Tensor, augmented: Tensor, unlabeled: Tensor, held_out: Tensor | None = None
    ) -> Tensor:
        """The validation loss of (N, D) embeddings; some losses need those of held-out images."""
        if not isinstance(self.loss, str):
            return self.loss(train, augmented, unlabeled)
        if self.loss in LOSSES:
            return LOSSES[self.loss](train, augmented, unlabeled)
        assert held_out is not None, f"{self.loss} needs held-out images, which `prepare` has seen to"
        return HELD_OUT_LOSSES[self.loss](train, augmented, unlabeled, held_out)

    def look_steps(self, steps: int) -> int:
        """Steps, the warm start's included, after which starting points are first compared."""
        if self.steps_before:
            return self.steps_before
        warm, cycle = self.warm_start_steps(steps), self.detector_steps
        return warm + cycle * max(1, round(self.look * (steps - warm) / cycle))

    def warm_start_steps(self, steps: int) -> int:
        """Training steps of a warm start in a training of `steps`.

        Raises:
            ValueError: if they leave no step of the hyperparameters.
        """
        if self.steps_before:
            return 0
        warm = round(self.warm_start * steps)
        if steps - warm < self.detector_steps:
            raise ValueError(
                f"steps: expected at least {self.detector_steps} (detector_steps) after the warm start's "
                f"{warm}, got {steps} in all"
            )
        return warm


# What a tuning of users' own images is, chosen by studies/results/tuned_pretrained.md. From one of the two
# starts of a kind nearly every area is within the steps' reach.
PATCHES = Tuning(
    space=SearchSpace(["cutout", "cutavg", "cutdiff", "cutpaste"]),
    steps_before=12,
    learning_rate=0.25,
    validation_train=8,
    starts=(0.35, 0.75),
    survivors=2,
)
# Where normal images are held out; on three textures this loss found f_gen's kind most often.
PATCHES_HELD_OUT = replace(PATCHES, loss="whitened_contrast", choose_by="shift", combine=8)
# And while the detector trains, for `steps_before` 0: not measured one by one.
PATCHES_IN_TURN = Tuning(
    space=PATCHES.space,
    detector_steps=2,
    learning_rate=0.15,
    warm_start=0.25,
    validation_train=32,
    validation_unlabeled=64,
    starts=PATCHES.starts,
    survivors=3,
    focus=False,
)
PATCHES_IN_TURN_HELD_OUT = replace(PATCHES_IN_TURN, choose_by="shift", combine=8)
PATCHES_IN_TURN_TRAINING = replace(PRETRAINED, steps=64, batch_size=16)  # with steps that let it move


def fits_kind(start: float | Mapping[str, float], names: Set[str]) -> bool:
    """Whether a starting point can be of a kind whose tuned hyperparameters have these names."""
    return not isinstance(start, Mapping) or start.keys() <= names
