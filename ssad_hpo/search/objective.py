"""The objective: one trial is one detector, trained and judged without labels."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch

from ssad_hpo.augment import check_fits
from ssad_hpo.criteria import CRITERIA, DegenerateError, evaluate_all
from ssad_hpo.detector import Detector, Embeddings, train, untrained_network
from ssad_hpo.search.kept import FolderStore, MemoryStore, Store
from ssad_hpo.task import Augmentation, DetectorError, Recorder, SearchSpace, Status, Task, Training

# User attributes of a trial.
HYPERPARAMETERS = "hyperparameters"  # the whole static augmentation, fixed values included
FAILURE = "failure"  # why a trial has no value: its own error, so it is not tried again
INTERRUPTED = "interrupted"  # stopped from outside; tried again on resume
BUDGET = "budget"  # training steps done by a trial that ran all of its budget
ARTIFACTS = "artifacts"  # address of what is kept, see `kept`
RETRY_OF = "retry_of"  # number of the interrupted trial that this one repeats

# What is told of every evaluation, beside its step.
METRICS = (*CRITERIA, "separability", "loss")


@dataclass(frozen=True)
class Evaluation:
    """A detector judged in the course of its training.

    Attributes:
        step: training steps done.
        loss: mean training loss since the evaluation before.
        criteria: every criterion and the unclamped "separability".
        embeddings: what they were computed from.
        detector: valid until the training goes on.
        state: from which `evaluations` goes on; see `detector.Checkpoint`.
    """

    step: int
    loss: float
    criteria: dict[str, float]
    embeddings: Embeddings
    detector: Detector
    state: dict[str, Any]

    @property
    def metrics(self) -> dict[str, float]:
        """All of `METRICS` by name."""
        return {**self.criteria, "loss": self.loss}


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
        sets = checkpoint.detector.embed_task(task.train, task.unlabeled)
        try:
            values = evaluate_all(sets.train, sets.augmented, sets.unlabeled)
        except DegenerateError as error:
            raise DetectorError(
                f"collapsed at step {checkpoint.step} under {augmentation}: {error}"
            ) from error
        yield Evaluation(
            checkpoint.step, checkpoint.loss, values, sets, checkpoint.detector, checkpoint.state
        )


def final_scores(task: Task, evaluation: Evaluation) -> torch.Tensor:
    """(N_test,) float64 anomaly scores of the unlabelled images after a whole training.

    Gives the detector its density.

    Raises:
        DetectorError: if they are not finite, or the train embeddings have no spread.
    """
    detector, sets = evaluation.detector, evaluation.embeddings
    detector.fit_density(sets.train)
    if detector.training.score == "density":
        scores = detector.density_score(sets.unlabeled)
    else:
        scores = detector.score(task.unlabeled)
    if not scores.isfinite().all():
        raise DetectorError(f"diverged: scores are not finite under {detector.augmentation}")
    return scores


class Objective:
    """A callable for `study.optimize`: train with the drawn hyperparameters, return the criterion.

    Minimise it. The criterion is reported at intermediate steps, so that pruners work. A trial that
    diverges or collapses fails with its reason in the user attribute "failure" and the study goes on.
    User attributes of a finished trial: every criterion by name, the unclamped "separability", "loss",
    "seconds", "budget" (steps), "hyperparameters" and "artifacts" (where its scores, embeddings and
    detector are; see `ssad_hpo.select`).

    Args:
        task: images, without labels.
        criterion: a key of `ssad_hpo.CRITERIA`.
        space: what to search; CutAvg over its default ranges if None.
        training: settings of every training.
        artifacts: a folder for what is kept of each trial; None keeps the best few in memory.
        keep: how many detectors to keep, the best by `criterion`; the best one by each other criterion is
            kept as well, so that any criterion can select.
        device: where to train.
        recorder: hears of every trial; see `task.Recorder`.

    Raises:
        ValueError: for an unknown criterion, keep < 1, a space with patches that do not fit, or an
            encoder that cannot take the images.
    """

    def __init__(
        self,
        task: Task,
        criterion: str = "dsv",
        space: SearchSpace | None = None,
        training: Training | None = None,
        *,
        artifacts: str | Path | None = None,
        keep: int = 3,
        device: str | torch.device = "cpu",
        recorder: Recorder | None = None,
    ) -> None:
        if criterion not in CRITERIA:
            raise ValueError(f"criterion: expected one of {', '.join(CRITERIA)}, got {criterion!r}")
        if keep < 1:
            raise ValueError(f"keep: expected at least 1 detector, got {keep}")
        self.space = space or SearchSpace("cutavg")
        height, width = task.train.shape[2:]
        for kind, hyperparameters in self.space.kinds.items():
            check_fits(Augmentation(kind, hyperparameters), height=height, width=width)
        self.task = task
        self.criterion = criterion
        self.training = training or Training()
        channels = task.train.shape[1]
        untrained_network(self.training, (channels, height, width))  # an encoder that cannot be, says so now
        self.keep = keep
        self.device = torch.device(device)
        self.recorder = recorder
        self.store: Store = MemoryStore() if artifacts is None else FolderStore(Path(artifacts))

    def __call__(self, trial: optuna.Trial) -> float:
        started = time.monotonic()
        augmentation = self.space.suggest(trial)
        trial.set_user_attr(HYPERPARAMETERS, augmentation.hyperparameters)
        try:
            self.tell_start(trial.number, augmentation)
            for evaluation in evaluations(self.task, augmentation, self.training, self.device):
                trial.report(evaluation.criteria[self.criterion], evaluation.step)
                self.tell_progress(trial.number, evaluation.step, evaluation.metrics)
                if evaluation.step < self.training.steps and trial.should_prune():
                    raise optuna.TrialPruned(f"stopped at step {evaluation.step}")
            scores = final_scores(self.task, evaluation)
            address = self.store.put(trial.number, scores, evaluation.embeddings, evaluation.detector)
            self.drop_detectors(trial.study, trial.number, evaluation.criteria)
            seconds = round(time.monotonic() - started, 3)
            kept = {"seconds": seconds, ARTIFACTS: address, BUDGET: evaluation.step}
            for name, value in {**evaluation.metrics, **kept}.items():
                trial.set_user_attr(name, value)
            self.tell_end(trial.number, "complete", evaluation.criteria)
        except optuna.TrialPruned:
            self.tell_end(trial.number, "pruned")
            raise
        except DetectorError as error:
            # The border where a study must go on: Optuna records a trial without a value as failed.
            trial.set_user_attr(FAILURE, str(error))
            self.tell_end(trial.number, "failed", reason=str(error))
            return math.nan
        except BaseException as error:
            self.tell_end(trial.number, "interrupted", reason=repr(error))
            trial.set_user_attr(INTERRUPTED, repr(error))
            raise
        return evaluation.criteria[self.criterion]

    def drop_detectors(self, study: optuna.Study, trial: int, criteria: Mapping[str, float]) -> None:
        """Have the store forget the detectors that are not worth keeping, now that a trial is finished.

        Kept are the `keep` best by the criterion and the best by each other one.

        Args:
            study: with the trials that finished before.
            trial: the number of the one that is in the store, but not yet finished in the study.
            criteria: its criteria.
        """
        finished: dict[int, Mapping[str, float]] = {
            t.number: t.user_attrs
            for t in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
            if BUDGET in t.user_attrs
        }
        finished[trial] = criteria
        best: set[int] = set()
        for name in CRITERIA:
            ranked = sorted(finished, key=lambda number: (finished[number][name], number))
            best.update(ranked[: self.keep if name == self.criterion else 1])
        self.store.drop_detectors(finished.keys() - best)

    def tell_start(self, trial: int, augmentation: Augmentation) -> None:
        """Tell the recorder, if there is one, that a trial begins."""
        if self.recorder is not None:
            params = {"augmentation": augmentation.kind, **augmentation.hyperparameters}
            tags = {"augmentation": augmentation.kind, "criterion": self.criterion, "task": self.task.name}
            self.recorder.trial_started(str(trial), params, tags)

    def tell_progress(self, trial: int, step: int, metrics: Mapping[str, float]) -> None:
        """Tell the recorder, if there is one, what was found at an evaluation step."""
        if self.recorder is not None:
            self.recorder.trial_progress(str(trial), step, metrics)

    def tell_end(
        self,
        trial: int,
        status: Status,
        metrics: Mapping[str, float] | None = None,
        reason: str | None = None,
    ) -> None:
        """Tell the recorder, if there is one, that a trial is over."""
        if self.recorder is not None:
            self.recorder.trial_ended(str(trial), status, metrics or {}, reason)
