"""A search: a trial is a detector, trained and judged without labels; trials run until none is missing."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import optuna
import torch
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from ssad_hpo.augment import NONE, check_fits
from ssad_hpo.criteria import CRITERIA
from ssad_hpo.detector import untrained_network
from ssad_hpo.judgement import Evaluation, check_criterion, evaluations, frozen_evaluation
from ssad_hpo.search import record
from ssad_hpo.search.sampling import position
from ssad_hpo.search.store import FolderStore, MemoryStore, Store, frozen_name, trial_name
from ssad_hpo.task import Augmentation, DetectorError, Recorder, Search, Status, Task, Teller, Training


def check_minimises(study: optuna.Study, criterion: str) -> None:
    """Raise ValueError for a study that is maximised, or has several objectives."""
    if study.directions != [StudyDirection.MINIMIZE]:
        directions = ", ".join(direction.name.lower() for direction in study.directions)
        raise ValueError(
            f"study: expected one that minimises {criterion}, as optuna.create_study() does, got {directions}"
        )


_adding = threading.Lock()  # not an objective's own: objectives are pickled


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
        search.check_trials(self.training)
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
    def _device_here(self) -> torch.device:
        """The device, or the CPU in a process that has no GPU, such as a sweep's driver."""
        lacks = self.device.type == "cuda" and not torch.cuda.is_available()
        return torch.device("cpu") if lacks else self.device

    @property
    def tell(self) -> Teller:
        """Tells the recorder of trials."""
        return Teller(self.recorder, criterion=self.criterion, task=self.task.name)

    def __call__(self, trial: optuna.trial.BaseTrial) -> float:
        if isinstance(trial, FrozenTrial) and record.is_frozen(trial):
            untrained = frozen_evaluation(self.task, self.search.space, self.training, self.device)
            return untrained.judged.criteria[self.criterion]
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
        if self.training.weights != "none":
            given = self.task, self.search.space, self.training, self._device_here
            add_frozen(study, lambda: frozen_evaluation(*given), self.criterion, self.store, self.tell)

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


def add_frozen(
    study: optuna.Study, evaluate: Callable[[], Evaluation], criterion: str, store: Store, tell: Teller
) -> None:
    """Add the encoder as it comes to a study that does not have it yet, as a candidate.

    Args:
        evaluate: judges it.
        criterion: of the study; store: where it is kept; tell: hears of it.
    """
    with _adding:
        if any(t.frozen for t in record.records(study)):
            return
        started, number = time.monotonic(), len(study.get_trials(deepcopy=False))
        tell.start(number, Augmentation(NONE))
        try:
            evaluation = evaluate()
        except DetectorError as error:  # as of other candidates: the study goes on
            tell.failure(number, error)
            told = record.frozen() | record.failed(str(error))
            study.add_trial(optuna.create_trial(state=TrialState.FAIL, user_attrs=told))
            return
        except BaseException as error:
            tell.failure(number, error)
            raise
        judged = evaluation.judged
        tell.progress(number, 0, evaluation.metrics)
        address = store.put(frozen_name(study), judged, evaluation.detector)
        kept = record.complete(
            judged.criteria,
            loss=evaluation.loss,
            seconds=time.monotonic() - started,
            budget=0,
            address=address,
        )
        # The recorder first, as of every trial: a kill between the two has all this done again.
        tell.end(number, "complete", judged.criteria)
        study.add_trial(
            optuna.create_trial(value=judged.criteria[criterion], user_attrs=record.frozen() | kept)
        )


def run_search(study: optuna.Study, objective: Objective) -> None:
    """Bring a study to the trials of its objective's search, taking up what an earlier process left.

    Raises:
        KeyboardInterrupt: on Ctrl-C, after the running trial was marked; call again to go on.
    """
    reconcile(study, objective)
    objective.add_frozen(study)
    remaining = remaining_trials(study, objective.search.total)
    if remaining:
        try:
            study.optimize(objective, n_trials=remaining)
        except Exception as error:
            if was_interrupted(error):
                raise KeyboardInterrupt from error
            raise


def remaining_trials(study: optuna.Study, n_trials: int) -> int:
    """How many of `n_trials` are still to be run; interrupted ones count as not run."""
    trials = study.get_trials(deepcopy=False)
    return max(0, n_trials - sum(record.is_final(t) and not record.is_frozen(t) for t in trials))


def reconcile(study: optuna.Study, objective: Objective, alive: Collection[int] = ()) -> None:
    """Close the trials that an earlier process left open, and queue their parameters again.

    Trials of the numbers `alive` are being run and stay as they are.

    Call it only while this process owns the study (its run folder is locked): then whoever ran an open
    trial is gone. A trial that was stopped from outside is repeated under a new number, with the same
    parameters; a trial that failed by its own fault is not.
    """
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        if trial.number in alive:
            continue
        # A failure of the trial's own may have been noted just before its process ended.
        status: Status = "failed" if record.failed_by_itself(trial) else "interrupted"
        reason = record.read_trial(trial).reason or "its process ended"
        if status == "interrupted":
            record.write(study, trial, record.interrupted(reason))
        # The recorder first: a kill between the two leaves the trial open, and all this is done again.
        objective.tell.end(trial.number, status, reason=reason)
        study.tell(trial.number, state=TrialState.FAIL)
    trials = study.get_trials(deepcopy=False)
    going = (TrialState.WAITING, TrialState.RUNNING)
    drawn = [t for t in trials if not record.is_frozen(t)]
    taken = {position(study, t) for t in drawn if record.is_final(t) or t.state in going}
    for trial in trials:
        if trial.state != TrialState.FAIL or record.is_final(trial):
            continue
        objective.store.discard(trial_name(study, trial))
        if position(study, trial) in taken:
            continue
        taken.add(position(study, trial))
        # Not skip_if_exists: it would take the failed trial itself for an existing one.
        study.enqueue_trial(trial.params, user_attrs=record.repeats(record.first_attempt(trial)))


def was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: interrupted while it writes, Optuna raises others in its place."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
