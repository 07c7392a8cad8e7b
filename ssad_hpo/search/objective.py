"""The objective: one trial is one detector, trained and judged without labels."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.study import StudyDirection

from ssad_hpo.augment import NONE, check_fits
from ssad_hpo.criteria import CRITERIA, measured
from ssad_hpo.detector import Detector, train, untrained_detector, untrained_network
from ssad_hpo.judgement import Judged, check_criterion, judge
from ssad_hpo.search import record
from ssad_hpo.search.store import FolderStore, MemoryStore, Store, frozen_name, trial_name
from ssad_hpo.task import Augmentation, DetectorError, Recorder, Search, Task, Teller, Training


def metric_names() -> tuple[str, ...]:
    """What is told of every evaluation, beside its step."""
    return (*measured(), "loss")


@dataclass(frozen=True)
class Evaluation:
    """A detector judged in the course of its training.

    Attributes:
        step: training steps done.
        loss: mean training loss since the evaluation before.
        judged: what is known of it without labels.
        detector: valid until the training goes on.
        state: from which `evaluations` goes on; see `detector.Checkpoint`.
    """

    step: int
    loss: float
    judged: Judged
    detector: Detector
    state: dict[str, Any]

    @property
    def metrics(self) -> dict[str, float]:
        """All of `metric_names` by name."""
        return {**self.judged.criteria, "loss": self.loss}


def evaluations(
    task: Task,
    augmentation: Augmentation,
    training: Training,
    device: str | torch.device = "cpu",
    state: dict[str, Any] | None = None,
) -> Iterator[Evaluation]:
    """Train a detector and judge it at each of `training.evaluation_steps`, without labels.

    With the `state` of an evaluation of this same training it goes on after that.

    Raises:
        DetectorError: if the training diverges or the embeddings collapse; it names the hyperparameters.
        ValueError: if the augmentation does not fit into the images.
    """
    for checkpoint in train(task.train, augmentation, training, device, state):
        judged = judge(checkpoint.detector, task, checkpoint.step)
        yield Evaluation(checkpoint.step, checkpoint.loss, judged, checkpoint.detector, checkpoint.state)


def check_minimises(study: optuna.Study, criterion: str) -> None:
    """Raise ValueError for a study that is maximised, or has several objectives."""
    if study.directions != [StudyDirection.MINIMIZE]:
        directions = ", ".join(direction.name.lower() for direction in study.directions)
        raise ValueError(
            f"study: expected one that minimises {criterion}, as optuna.create_study() does, got {directions}"
        )


_adding = threading.Lock()  # not an objective's own: objectives are pickled


def frozen_evaluation(
    task: Task, search: Search, training: Training, device: str | torch.device
) -> Evaluation:
    """A pretrained encoder as it comes, without a step of training, judged like a detector.

    Criteria of augmented images take the first kind of the search's space.
    """
    channels, height, width = task.train.shape[1:]
    augmentation = Augmentation(*next(iter(search.space.kinds.items())))
    detector = untrained_detector(training, (channels, height, width), augmentation, torch.device(device))
    return Evaluation(0, math.log(2), judge(detector, task), detector, {})


class Objective:
    """A callable for `study.optimize`: train with the drawn hyperparameters, return the criterion.

    Minimise it. The criterion is reported at intermediate steps, so that pruners work. A trial that
    diverges or collapses fails with its reason in the user attribute "failure" and the study goes on.
    What is kept of a finished trial is a `TrialRecord`; `ssad_hpo.select` chooses among them.

    >>> import optuna
    >>> from ssad_hpo import Objective, Search, Training, controlled_data, select
    >>> task = controlled_data(image_size=16, n_train=20, n_unlabeled=14).task
    >>> objective = Objective(task, Search(space="cutout"), Training(steps=8, batch_size=4, width=2))
    >>> study = optuna.create_study()
    >>> study.optimize(objective, n_trials=2)
    >>> print(select(study).augmentation.kind, len(select(study).scores()))
    cutout 14

    In a space without ranges a point that the study has trained is not trained again: the trial is pruned.
    A trial outside of a study (`optuna.trial.FixedTrial`, a `FrozenTrial` such as `study.best_trial`) is
    trained for its value, and nothing of it is kept or recorded.

    Args:
        task: images, without labels.
        search: the space, the criterion and how many detectors to keep; `Search()` if None.
        training: settings of every training; `Training()` if None.
        artifacts: a folder for what is kept of each trial; None keeps the best few in memory.
        device: where to train.
        recorder: hears of every trial; see `task.Recorder`.

    Raises:
        ValueError: for an unknown criterion, a space with patches that do not fit, or an encoder that
            cannot take the images.
    """

    def __init__(
        self,
        task: Task,
        search: Search | None = None,
        training: Training | None = None,
        *,
        artifacts: str | Path | None = None,
        device: str | torch.device = "cpu",
        recorder: Recorder | None = None,
    ) -> None:
        search, (channels, height, width) = search or Search(), task.train.shape[1:]
        self.task = task
        self.search = replace(search, space=search.space.within(height=height, width=width))
        self.training = training or Training()
        check_criterion("criterion", self.criterion, task)
        for kind, hyperparameters in self.search.space.kinds.items():
            check_fits(Augmentation(kind, hyperparameters), height=height, width=width)
        untrained_network(self.training, (channels, height, width))  # an encoder that cannot be, says so now
        self.device = torch.device(device)
        self.recorder = recorder
        self.store: Store = MemoryStore() if artifacts is None else FolderStore(Path(artifacts))

    @property
    def criterion(self) -> str:
        """What is minimised."""
        return self.search.criterion

    @property
    def tell(self) -> Teller:
        """Tells the recorder of trials."""
        return Teller(self.recorder, criterion=self.criterion, task=self.task.name)

    def __call__(self, trial: optuna.trial.BaseTrial) -> float:
        if not isinstance(trial, optuna.Trial):
            *_, last = evaluations(self.task, self.search.space.suggest(trial), self.training, self.device)
            return last.judged.criteria[self.criterion]
        check_minimises(trial.study, self.criterion)
        self.add_frozen(trial.study)
        started = time.monotonic()
        augmentation = self.search.space.suggest(trial)
        self._check_new(trial, augmentation)
        record.write(trial.study, trial, record.drawn(augmentation))
        try:
            self.tell.start(trial.number, augmentation)
            for evaluation in evaluations(self.task, augmentation, self.training, self.device):
                trial.report(evaluation.judged.criteria[self.criterion], evaluation.step)
                self.tell.progress(trial.number, evaluation.step, evaluation.metrics)
                if evaluation.step < self.training.steps and trial.should_prune():
                    raise optuna.TrialPruned(f"stopped at step {evaluation.step}")
            judged = evaluation.judged
            address = self.store.put(trial_name(trial.study, trial), judged, evaluation.detector)
            self.drop_detectors(trial.study, trial.number, address, judged.criteria)
            kept = record.complete(
                judged.criteria,
                loss=evaluation.loss,
                seconds=time.monotonic() - started,
                budget=evaluation.step,
                address=address,
            )
            record.write(trial.study, trial, kept)
            self.tell.end(trial.number, "complete", judged.criteria)
        except optuna.TrialPruned as pruned:
            self.tell.end(trial.number, "pruned", reason=str(pruned))
            raise
        except DetectorError as error:
            # The border where a study must go on: Optuna records a trial without a value as failed.
            record.write(trial.study, trial, record.failed(str(error)))
            self.tell.failure(trial.number, error)
            return math.nan
        except BaseException as error:
            self.tell.failure(trial.number, error)
            record.write(trial.study, trial, record.interrupted(repr(error)))
            raise
        return judged.criteria[self.criterion]

    def add_frozen(self, study: optuna.Study) -> None:
        """Add a pretrained encoder as it comes to a study that does not have it yet, as a candidate."""
        with _adding:
            if self.training.weights == "none" or any(t.frozen for t in record.records(study)):
                return
            started, number = time.monotonic(), len(study.get_trials(deepcopy=False))
            self.tell.start(number, Augmentation(NONE))
            evaluation = frozen_evaluation(self.task, self.search, self.training, self.device)
            judged = evaluation.judged
            self.tell.progress(number, 0, evaluation.metrics)
            address = self.store.put(frozen_name(study), judged, evaluation.detector)
            kept = record.complete(
                judged.criteria,
                loss=evaluation.loss,
                seconds=time.monotonic() - started,
                budget=0,
                address=address,
            )
            # The recorder first, as of every trial: a kill between the two has all this done again.
            self.tell.end(number, "complete", judged.criteria)
            study.add_trial(
                optuna.create_trial(value=judged.criteria[self.criterion], user_attrs=record.frozen() | kept)
            )

    def _check_new(self, trial: optuna.Trial, augmentation: Augmentation) -> None:
        """Raise TrialPruned if the space has no ranges and the study has trained this point of it."""
        if self.search.space.is_continuous:
            return
        for other in record.records(trial.study):
            whole = other.status == "complete" and other.budget == self.training.steps
            if whole and other.augmentation == augmentation:
                raise optuna.TrialPruned(f"its only hyperparameters were trained as trial {other.number}")

    def drop_detectors(
        self, study: optuna.Study, number: int, address: str, criteria: Mapping[str, float]
    ) -> None:
        """Have the store forget the detectors that are not worth keeping, now that a trial is finished.

        Kept are the `search.keep` best by the criterion, those to combine, those of which one may be chosen
        by other seeds, the encoder as it comes, and the best by each other one.

        Args:
            study: with the trials that finished before.
            number: of the one that is in the store, but not yet finished in the study.
        """
        told = [t for t in record.records(study) if t.status == "complete" and t.address is not None]
        finished = {trial.number: (str(trial.address), trial.criteria) for trial in told}
        finished[number] = address, criteria
        order = sorted(finished)  # of equal ones the earlier trial is the better, as in `select`
        best = {str(trial.address) for trial in told if trial.frozen}
        for name in CRITERIA:
            # A trial of an older run may lack a criterion that came later.
            judged = [kept for kept in order if name in finished[kept][1]]
            ranked = sorted(judged, key=lambda kept: finished[kept][1][name])
            ended_with = max(self.search.keep, self.search.combine, self.search.confirm)
            count = ended_with if name == self.criterion else 1
            best.update(finished[kept][0] for kept in ranked[:count])
        self.store.drop_detectors({kept for kept, _ in finished.values()} - best)
