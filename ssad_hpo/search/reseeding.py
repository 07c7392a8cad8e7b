"""The best candidates trained again with other seeds, to see how much of a choice is the seed's. Label-free.

A seed decides initial weights, the order of images and where augmentation falls. Trials share one, so that
they differ by their hyperparameters alone; whether a choice among them is more than that seed's luck, other
seeds say. What they find is kept with the study, a training at a time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import optuna
import torch

from ssad_hpo.augment import NONE
from ssad_hpo.bounds import MOST_SEED, is_number
from ssad_hpo.detector import train
from ssad_hpo.files import reading
from ssad_hpo.judgement import frozen_evaluation, judge
from ssad_hpo.search.objective import Objective
from ssad_hpo.search.selection import Candidate, candidates, ranked
from ssad_hpo.task import Augmentation, DetectorError, Search, Task, Training

FURTHER_SEEDS = 2  # of each candidate, beside the search's own: the least that a spread can be seen by
_ATTRIBUTE = "reseeded"  # of the study; those of a finished trial can no longer be set


@dataclass(frozen=True)
class Again:
    """A training that is to be done once more with another seed.

    Attributes:
        trial: number of the candidate.
        seed: the other one.
        augmentation: of the candidate.
    """

    trial: int
    seed: int
    augmentation: Augmentation

    @property
    def key(self) -> str:
        """What recorders know it by; no trial is called so."""
        return f"{self.trial}, seed {self.seed}"


@dataclass(frozen=True)
class Reseeded:
    """What came of such a training.

    Attributes:
        criteria: as those of a candidate; empty if it failed.
        loss: mean cross-entropy of its last stretch of training; None if it failed.
        seconds: of wall-clock time.
        reason: why it failed; None if it did not.
    """

    criteria: Mapping[str, float]
    loss: float | None
    seconds: float
    reason: str | None = None


def further_seeds(training: Training) -> tuple[int, ...]:
    """The seeds that candidates are trained with once more: those that follow the training's own."""
    return tuple((training.seed + further) % (MOST_SEED + 1) for further in range(1, FURTHER_SEEDS + 1))


def to_confirm(study: optuna.Study, search: Search, artifacts: Path | None = None) -> list[Candidate]:
    """The candidates that are trained again, the best first: `search.confirm` of them, or all there are."""
    if not search.confirm:
        return []
    return ranked(candidates(study, artifacts), search.criterion)[: search.confirm]


def left_to_confirm(study: optuna.Study, search: Search, training: Training) -> list[Again]:
    """The trainings that no call has done yet, the best candidate's first."""
    known = read_reseeded(study)
    return [
        Again(candidate.number, seed, candidate.augmentation)
        for candidate in to_confirm(study, search)
        for seed in further_seeds(training)
        if (candidate.number, seed) not in known
    ]


def confirm(study: optuna.Study, objective: Objective) -> None:
    """Train the best candidates of a finished search again, here; a later call goes on after a stop.

    Raises:
        KeyboardInterrupt: on Ctrl-C, with all that is done kept.
    """
    for again in left_to_confirm(study, objective.search, objective.training):
        tell_start(objective, again)
        try:
            found = train_again(objective.task, objective.search, objective.training, objective.device, again)
        except BaseException as error:
            tell_interruption(objective, again, repr(error))
            raise
        keep(study, objective, again, found)


def train_again(
    task: Task, search: Search, training: Training, device: str | torch.device, again: Again
) -> Reseeded:
    """Train a candidate with another seed and judge it, without labels, at its end.

    The encoder as it comes is not trained: the seed moves the augmented images that it is judged by.
    """
    started, training = time.monotonic(), replace(training, seed=again.seed)
    try:
        if again.augmentation.kind == NONE:
            evaluation = frozen_evaluation(task, search.space, training, device)
            criteria, loss = evaluation.judged.criteria, evaluation.loss
        else:
            *_, last = train(task.train, again.augmentation, training, device)
            criteria, loss = judge(last.detector, task, last.step).criteria, last.loss
    except DetectorError as error:
        return Reseeded({}, None, round(time.monotonic() - started, 3), str(error))
    return Reseeded(criteria, loss, round(time.monotonic() - started, 3))


def tell_start(objective: Objective, again: Again) -> None:
    """Tell the objective's recorder of a training that begins."""
    if objective.recorder is not None:
        params = {"augmentation": again.augmentation.kind, **again.augmentation.hyperparameters}
        own = {"repeats": str(again.trial), "seed": str(again.seed)}
        # No tag of the kind, by which views of a study's trials know them.
        tags = {"criterion": objective.criterion, "task": objective.task.name, **own}
        objective.recorder.trial_started(again.key, params, tags)


def tell_interruption(objective: Objective, again: Again, reason: str) -> None:
    """Tell the objective's recorder that a training was stopped from outside."""
    if objective.recorder is not None:
        objective.recorder.trial_ended(again.key, "interrupted", {}, reason)


def keep(study: optuna.Study, objective: Objective, again: Again, found: Reseeded) -> None:
    """Keep what came of a training with the study, after the recorder was told of it."""
    # The recorder first, as of trials: a kill between the two has all this done again, to the same values.
    if objective.recorder is not None:
        if found.reason is None:
            step = 0 if again.augmentation.kind == NONE else objective.training.steps
            metrics = {**found.criteria, **({} if found.loss is None else {"loss": found.loss})}
            objective.recorder.trial_progress(again.key, step, metrics)
            objective.recorder.trial_ended(again.key, "complete", found.criteria)
        else:
            objective.recorder.trial_ended(again.key, "failed", {}, found.reason)
    study.set_user_attr(f"{_ATTRIBUTE} {again.trial} {again.seed}", asdict(found))


def read_reseeded(study: optuna.Study) -> dict[tuple[int, int], Reseeded]:
    """What came of the trainings that were done again, by (trial, seed).

    Raises:
        FileError: if the study does not hold what `keep` wrote.
    """
    found = {}
    remedy = "restore it from a copy, or search again"
    for name, kept in study.user_attrs.items():
        if not name.startswith(f"{_ATTRIBUTE} "):
            continue
        with reading(f"study {study.study_name!r}", f"cannot be read at {name!r}", remedy):
            _, trial, seed = name.split()
            read = Reseeded(**kept)
            numbers = [*read.criteria.values(), *([read.loss] if read.reason is None else []), read.seconds]
            if not all(is_number(number) for number in numbers) or (read.reason is None) != bool(
                read.criteria
            ):
                raise ValueError("expected finite numbers, or a reason")
            found[int(trial), int(seed)] = read
    return found
