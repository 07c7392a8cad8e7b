"""What a tuning works on: the same for all starting points of a kind, and where each begins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssad_hpo.bilevel.as_it_comes import AsItComes
from ssad_hpo.bilevel.coordinates import Coordinates
from ssad_hpo.bilevel.settings import Tuning
from ssad_hpo.task import Augmentation, Task, Training


@dataclass(frozen=True)
class Problem:
    """What stays the same for all starting points of one kind of augmentation.

    Attributes:
        task: images, without labels.
        coordinates: the augmentation that is tuned.
        tuning, training: settings; the training's precision is resolved.
        device: where everything is computed.
        as_it_comes: the encoder before any training; one for all kinds.
    """

    task: Task
    coordinates: Coordinates
    tuning: Tuning
    training: Training
    device: torch.device
    as_it_comes: AsItComes

    @property
    def warm(self) -> int:
        """Training steps of the warm start."""
        return self.tuning.warm_start_steps(self.training.steps)


@dataclass(frozen=True)
class Start:
    """A starting point.

    Attributes:
        problem: that of its kind.
        point: (K,) float64, where it begins.
    """

    problem: Problem
    point: Tensor

    @property
    def augmentation(self) -> Augmentation:
        """The augmentation that it begins with."""
        return self.problem.coordinates.at(self.point)
