"""A pretrained encoder as it comes, and what it makes of a task's images: what tunes before a training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

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

    @cached_property
    def evaluation(self) -> Evaluation:
        """It, judged as a candidate is.

        Raises:
            DetectorError: if embeddings or scores are not finite, or the embeddings collapsed.
        """
        training = replace(self.training, precision="float32")  # as steps of the hyperparameters are
        return frozen_evaluation(self.task, self.tuning.space, training, self.device)

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

    @property
    def images(self) -> int:
        """Passed forward to judge it."""
        return sum(map(len, self.task.sets().values())) + len(self.task.train)
