"""A pretrained encoder as it comes, and what it makes of a task's images: what tunes before a training."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ssad_hpo.bilevel.cost import Cost
from ssad_hpo.bilevel.focus import standing_out
from ssad_hpo.bilevel.settings import Tuning
from ssad_hpo.judgement import Evaluation, frozen_evaluation
from ssad_hpo.task import Task, Training


@dataclass(frozen=True)
class AsItComes:
    """The encoder before any training, judged; of one tuning, made when it is asked for.

    Attributes:
        task, tuning, training, device: as of a `Problem`.
    """

    task: Task
    tuning: Tuning
    training: Training
    device: torch.device

    @property
    def evaluation(self) -> Evaluation:
        """It, judged as a candidate is.

        Raises:
            DetectorError: if embeddings or scores are not finite, or the embeddings collapsed.
        """
        return self._judged[0]

    @property
    def cost(self) -> Cost:
        """Of judging it; without the seconds where an earlier process did."""
        images = sum(map(len, self.task.sets().values())) + len(self.task.train)
        _, seconds = vars(self).get("_judged", (None, 0.0))
        return Cost(forward=images, seconds=seconds)

    @cached_property
    def _judged(self) -> tuple[Evaluation, float]:
        began = time.monotonic()
        training = replace(self.training, precision="float32")  # as steps of the hyperparameters are
        evaluation = frozen_evaluation(self.task, self.tuning.space, training, self.device)
        return evaluation, time.monotonic() - began

    @cached_property
    def embeddings(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Unit rows of train images, of the unlabelled ones that are looked at, and of held-out ones.

        Raises:
            DetectorError: as `evaluation`.
        """
        judged = self.evaluation.judged
        sets, unlabeled = judged.embeddings, judged.embeddings.unlabeled
        if judged.held_out is not None and self.tuning.focuses:
            unlabeled = unlabeled[standing_out(judged.scores, judged.held_out)]
        # Copies are plain tensors, which gradients can be taken beside.
        learned, seen = (rows.to(self.device, copy=True) for rows in (sets.train, unlabeled))
        return learned, seen, None if sets.held_out is None else sets.held_out.to(self.device, copy=True)
