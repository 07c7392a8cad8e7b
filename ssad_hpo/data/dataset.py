"""What a loader gives: a task and, where it is known, its ground truth, each to be handed on by itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ssad_hpo.task import Task


@dataclass(frozen=True, eq=False)
class DataSet:
    """Images and their ground truth. Searches take the `task` alone.

    Attributes:
        task: images, without labels.
        labels: (N_test,) int8, 1 anomaly, 0 normal, in the order of `task.unlabeled`; only for judging a
            choice already made. None where there is no ground truth.

    Raises:
        ValueError: for labels of another shape, type or value.
    """

    task: Task
    labels: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.labels is None:
            return
        expected, shape, dtype = (len(self.task.unlabeled),), self.labels.shape, self.labels.dtype
        if shape != expected or dtype != np.int8 or not np.isin(self.labels, (0, 1)).all():
            some = ", ".join(map(str, np.unique(self.labels)[:3]))
            raise ValueError(
                f"labels: expected {expected} int8 of 0 and 1, got {shape} {dtype} such as {some}"
            )
