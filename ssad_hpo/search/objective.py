"""The objective: one trial is one detector, trained and judged without labels."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
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


@dataclass(frozen=True)
class Evaluation:
    """A detector judged in the course of its training.

    Attributes:
        step: training steps done.
        loss: mean training loss since the evaluation before.
        criteria: every criterion and the unclamped "separability".
        embeddings: what they were computed from.
        detector: valid until the training goes on.
    """

    step: int
    loss: float
    criteria: dict[str, float]
    embeddings: Embeddings
    detector: Detector


def evaluations(
    task: Task, augmentation: Augmentation, training: Training, device: str | torch.device = "cpu"
) -> Iterator[Evaluation]:
    """Train a detector and judge it at each of `training.evaluation_steps`, without labels.

    Raises:
        DetectorError: if the training diverges or the embeddings collapse; it names the hyperparameters.
        ValueError: if the augmentation does not fit into the images.
    """
    for checkpoint in train(task.train, augmentation, training, device):
        sets = checkpoint.detector.embed_task(task.train, task.unlabeled)
        try:
            values = evaluate_all(sets.train, sets.augmented, sets.unlabeled)
        except DegenerateError as error:
            raise DetectorError(
                f"collapsed at step {checkpoint.step} under {augmentation}: {error}"
            ) from error
        yield Evaluation(checkpoint.step, checkpoint.loss, values, sets, checkpoint.detector)


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
            self._tell_start(trial, augmentation)
            for evaluation in evaluations(self.task, augmentation, self.training, self.device):
                trial.report(evaluation.criteria[self.criterion], evaluation.step)
                self._tell_progress(trial, evaluation)
                if evaluation.step < self.training.steps and trial.should_prune():
                    raise optuna.TrialPruned(f"stopped at step {evaluation.step}")
            self._keep(trial, evaluation, time.monotonic() - started)
            self._tell_end(trial, "complete", evaluation.criteria)
        except optuna.TrialPruned:
            self._tell_end(trial, "pruned")
            raise
        except DetectorError as error:
            # The border where a study must go on: Optuna records a trial without a value as failed.
            trial.set_user_attr(FAILURE, str(error))
            self._tell_end(trial, "failed", reason=str(error))
            return math.nan
        except BaseException as error:
            self._tell_end(trial, "interrupted", reason=repr(error))
            trial.set_user_attr(INTERRUPTED, repr(error))
            raise
        return evaluation.criteria[self.criterion]

    def _keep(self, trial: optuna.Trial, evaluation: Evaluation, seconds: float) -> None:
        detector, sets = evaluation.detector, evaluation.embeddings
        detector.fit_density(sets.train)
        if self.training.score == "density":
            scores = detector.density_score(sets.unlabeled)
        else:
            scores = detector.score(self.task.unlabeled)
        if not scores.isfinite().all():
            raise DetectorError(f"diverged: scores are not finite under {detector.augmentation}")
        address = self.store.put(trial.number, scores, sets, detector)
        finished = {
            t.number: t.user_attrs
            for t in trial.study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
            if BUDGET in t.user_attrs
        }
        finished[trial.number] = evaluation.criteria
        self.store.drop_detectors(finished.keys() - self._best(finished))
        attributes = {
            **evaluation.criteria,
            "loss": evaluation.loss,
            "seconds": round(seconds, 3),
            ARTIFACTS: address,
            BUDGET: evaluation.step,
        }
        for name, value in attributes.items():
            trial.set_user_attr(name, value)

    def _best(self, finished: dict[int, dict[str, Any]]) -> set[int]:
        """The trials whose detectors are worth keeping: `keep` by the criterion, one by each other."""
        best: set[int] = set()
        for name in CRITERIA:
            ranked = sorted(finished, key=lambda number: (finished[number][name], number))
            best.update(ranked[: self.keep if name == self.criterion else 1])
        return best

    def _tell_start(self, trial: optuna.Trial, augmentation: Augmentation) -> None:
        if self.recorder is not None:
            params = {"augmentation": augmentation.kind, **augmentation.hyperparameters}
            tags = {"augmentation": augmentation.kind, "criterion": self.criterion, "task": self.task.name}
            self.recorder.trial_started(str(trial.number), params, tags)

    def _tell_progress(self, trial: optuna.Trial, evaluation: Evaluation) -> None:
        if self.recorder is not None:
            metrics = {**evaluation.criteria, "loss": evaluation.loss}
            self.recorder.trial_progress(str(trial.number), evaluation.step, metrics)

    def _tell_end(
        self,
        trial: optuna.Trial,
        status: Status,
        metrics: dict[str, float] | None = None,
        reason: str | None = None,
    ) -> None:
        if self.recorder is not None:
            self.recorder.trial_ended(str(trial.number), status, metrics or {}, reason)
