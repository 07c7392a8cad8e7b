"""What a search is made of, as studies call it: one judged detector, a search in memory, the truth."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import FrozenTrial

from ssad_hpo.data import Source, read_labels
from ssad_hpo.judgement import Evaluation, evaluations
from ssad_hpo.search import (
    Candidate,
    Objective,
    candidates,
    open_study,
    run_search,
)
from ssad_hpo.task import Augmentation, Sampler, Search, SearchSpace, Task, Training

Scores = NDArray[np.float64]  # (N_test,), higher is more anomalous


def trained(
    task: Task, augmentation: Augmentation, training: Training, device: str = "cpu"
) -> tuple[Evaluation, Scores]:
    """One detector as a trial trains it: its last evaluation, and its scores of the unlabelled images.

    Raises:
        DetectorError: if it diverges or collapses.
    """
    *_, last = evaluations(task, augmentation, training, device)
    return last, last.judged.scores.numpy()


@dataclass(frozen=True)
class Searched:
    """A search that has ended.

    Attributes:
        trials: all of them, by number.
        found: the candidates that reached the full budget, with their scores.
        seconds: of the search, without opening it and reading what it kept.
    """

    trials: list[FrozenTrial]
    found: list[tuple[Candidate, Scores]]
    seconds: float


def searched(
    task: Task,
    space: SearchSpace,
    training: Training,
    n_trials: int,
    *,
    sampler: Sampler = "tpe",
    reduction_factor: int | None = None,
    device: str = "cpu",
) -> Searched:
    """A search by DSV whose study lives in memory; its seed is that of the training.

    Args:
        task, space, training, device: of every trial.
        n_trials: how many.
        sampler: see `ssad_hpo.Search`.
        reduction_factor: of ASHA, which stops poor trials; None for no pruner.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = Search(space, n_trials=n_trials, sampler=sampler, seed=training.seed)
    if reduction_factor is not None:
        search = replace(search, pruner="asha", reduction_factor=reduction_factor)
    with tempfile.TemporaryDirectory() as artifacts:  # in memory only the best trials' scores are kept
        objective = Objective(task, search, training, artifacts=artifacts, device=device)
        storage = optuna.storages.InMemoryStorage()
        study = open_study(storage, "study", search, training)
        started = time.monotonic()
        run_search(study, objective)
        seconds = time.monotonic() - started
        found = [(candidate, candidate.scores()) for candidate in candidates(study)]
    return Searched(study.get_trials(deepcopy=False), found, seconds)


def truth_of(source: Source) -> NDArray[np.int8]:
    """(N_test,) 1 for an anomaly, 0 for normal; only to judge what was already chosen.

    Raises:
        ValueError: if the source has no ground truth.
    """
    truth = read_labels(source)
    if truth is None:
        raise ValueError(f"source: expected one with ground truth, got {source}")
    return truth
