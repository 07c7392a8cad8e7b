"""What makes pseudo-anomalies: an augmentation by its kind and sizes, or any function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ssad_hpo.augment import augment
from ssad_hpo.task import Augmentation


@dataclass(frozen=True)
class Transform:
    """An f_aug beyond `Augmentation`'s kinds, for experiments: any function, known by its name alone.

    Attributes:
        name: tells it from others, so it should say the function's settings too.
        function: of (N, C, H, W) float images in [0, 1] and a generator on their device; gives images of
            the same shape and range. It may draw from that generator only.
    """

    name: str
    function: Callable[[Tensor, torch.Generator], Tensor] = field(repr=False)


def pseudo_anomalies(images: Tensor, f_aug: Augmentation | Transform, generator: torch.Generator) -> Tensor:
    """(N, C, H, W) float images in [0, 1], each changed by f_aug; all randomness is the generator's.

    Raises:
        ValueError: if a patch of an `Augmentation` does not fit the images.
    """
    if isinstance(f_aug, Transform):
        return f_aug.function(images, generator)
    return augment(images, f_aug, generator)
