"""The augmentations f_aug, batched: a table of kinds, and drawing the noise apart from applying it.

All work on float images (N, C, H, W) in [0, 1], on their device, before normalisation. Every image gets
its own position, angle and, for ranges, its own hyperparameters. Drawing is separate from applying: the
noise of an image does not depend on the hyperparameters, so two candidates with one seed differ in their
hyperparameters alone, and the result is differentiable in hyperparameters that are given as tensors.

Sizes are fractions: a patch of area A and aspect R is sqrt(A R) of the image wide and sqrt(A / R) high.
Angles are degrees, counter-clockwise.
"""

from ssad_hpo.augment.augmentation import Augmentation, Hyperparameters
from ssad_hpo.augment.color import jitter
from ssad_hpo.augment.drawing import Value, apply, augment, check_fits, draw_noise, fits
from ssad_hpo.augment.kinds import KINDS, NONE, Coordinate, Hyperparameter, Kind, hyperparameter_of, kind_of
from ssad_hpo.augment.ranges import Range

__all__ = [
    "KINDS",
    "NONE",
    "Augmentation",
    "Coordinate",
    "Hyperparameter",
    "Hyperparameters",
    "Kind",
    "Range",
    "Value",
    "apply",
    "augment",
    "check_fits",
    "draw_noise",
    "fits",
    "hyperparameter_of",
    "jitter",
    "kind_of",
]
