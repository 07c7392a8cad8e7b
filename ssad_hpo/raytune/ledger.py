"""The ledger of a sweep: which of Ray's trials is which of Optuna's, and what Optuna is told of each.

It knows no Ray. All of it is in Optuna's storage, so that a driver which was killed is followed by one that
reads the same ledger; nothing is taken from a pickle, which would lag behind.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from ssad_hpo.judgement import metric_names
from ssad_hpo.search import (
    Objective,
    check_minimises,
    is_exhausted,
    position,
    reconcile,
    record,
    records,
)
from ssad_hpo.search.store import trial_name
from ssad_hpo.task import Status

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint"  # beside a trial's parameters: the checkpoint that it goes on from
PATIENCE = 120.0  # seconds for which a database may be away, as in a restart
T = TypeVar("T")


def patiently(work: Callable[[], T], patience: float = PATIENCE) -> T:
    """Do what needs the database, again while it is out of reach, for at most `patience` seconds."""
    pause, deadline = 0.1, time.monotonic() + patience
    while True:
        try:
            return work()
        except (StorageInternalError, SQLAlchemyError) as error:
            if time.monotonic() + pause > deadline:
                raise
            reason = str(error).partition("\n")[0]
            log.warning("Optuna's storage fails, trying again in %.1f s: %s", pause, reason)
            time.sleep(pause)
            pause = min(2 * pause, 10.0)


class Ledger:
    """Asks Optuna for trials and tells it, and the objective's recorder, what becomes of them.

    Everything may be told twice (by a trial that is run again after its worker died, or that Ray takes up
    from an old snapshot); what is in the ledger already is not counted again. Of an end the recorder hears
    first: a kill between the two leaves the trial open, and the next process tells its end of both.

    Args:
        objective: whose trials they are; its task is not looked at.
        study: to be minimised. It belongs to this ledger while it is in use: open trials that are not in the
            ledger are taken for those of a process that is gone.

    Raises:
        ValueError: for a study that is maximised, or has several objectives.
    """

    def __init__(self, objective: Objective, study: optuna.Study) -> None:
        check_minimises(study, objective.criterion)
        self.objective = objective
        self.study = study
        self.asked = 0  # trials that Ray was given
        self._started: set[int] = set()
        self._told: dict[int, int] = {}  # the last step that the recorder has heard of
        self._numbers = {trial.ray_trial: trial.number for trial in records(study) if trial.ray_trial}

    def take_up(self, alive: Collection[str]) -> None:
        """Close what an earlier process left open and queue it again, but for those that are `alive`."""
        numbers = [number for trial, number in self._numbers.items() if trial in alive]
        patiently(lambda: reconcile(self.study, self.objective, numbers))

    def ask(self, ray_trial: str) -> dict[str, Any] | None:
        """A new trial's parameters, and the checkpoint that it goes on from; None if a grid is through."""
        asked: list[optuna.Trial] = []
        parameters = patiently(lambda: self._ask(ray_trial, asked))
        self.asked += parameters is not None
        return parameters

    def _ask(self, ray_trial: str, asked: list[optuna.Trial]) -> dict[str, Any] | None:
        if not asked and is_exhausted(self.study):
            return None
        if not asked:  # else the database failed after it had the trial
            asked.append(self.study.ask())
        (trial,) = asked
        self._numbers[ray_trial] = trial.number
        augmentation = self.objective.search.space.suggest(trial)
        record.write(self.study, trial, record.on_ray(ray_trial) | record.drawn(augmentation))
        checkpoint = self._checkpoint_of_earlier_attempt(trial.number)
        return dict(trial.params) | ({CHECKPOINT: checkpoint} if checkpoint else {})

    def _checkpoint_of_earlier_attempt(self, number: int) -> str | None:
        trials = self.study.get_trials(deepcopy=False)
        if record.first_attempt(trials[number]) == number:
            return None
        place = position(self.study, trials[number])
        for trial in reversed(trials[:number]):
            checkpoint = record.read_trial(trial).checkpoint
            if checkpoint is not None and position(self.study, trial) == place:
                return checkpoint
        return None

    def started(self, ray_trial: str) -> None:
        """A trial runs; told once, also if it has to be run again."""
        trial = patiently(lambda: self._open(ray_trial))
        if trial is not None and trial.number not in self._started:
            self._started.add(trial.number)
            self.objective.tell.start(trial.number, self.objective.search.space.augmentation(trial.params))

    def progress(self, ray_trial: str, result: Mapping[str, Any]) -> None:
        """A trial has reported "step" and metrics; what is not finite is told to the recorder alone."""
        trial = patiently(lambda: self._open(ray_trial))
        step = result["step"]
        if trial is None or "reason" in result:
            return
        if step <= max(self._told.get(trial.number, 0), *trial.intermediate_values, 0):
            return
        value = result[self.objective.criterion]
        if math.isfinite(value):
            store = self.study._storage  # `Trial.report` needs the object that `ask` gave; it may be gone
            patiently(lambda: store.set_trial_intermediate_value(trial._trial_id, step, value))
        self._told[trial.number] = step
        self.objective.tell.progress(trial.number, step, _metrics(result))

    def checkpointed(self, ray_trial: str, address: str) -> None:
        """A trial has a checkpoint from which it can be gone on with."""
        trial = patiently(lambda: self._open(ray_trial))
        if trial is not None:
            self._keep(trial, record.checkpointed(address))

    def ended(self, ray_trial: str, result: Mapping[str, Any], kept: Path | None) -> None:
        """A trial is over, by itself or stopped by a scheduler after the report `result`.

        Args:
            result: its last report: as for `progress`, or with a "status" and a "reason".
            kept: the folder with the scores, embeddings and detector of a trial that ran its whole budget.
        """
        trial = patiently(lambda: self._open(ray_trial))
        if trial is None:
            return
        self.progress(ray_trial, result)  # a scheduler that stops a trial keeps its last report from us
        value = result.get(self.objective.criterion, math.nan)
        whole = result.get("step", 0) >= self.objective.training.steps
        if "reason" in result:
            self._fail(trial, result["status"], result["reason"])
        elif not math.isfinite(value):
            augmentation = self.objective.search.space.augmentation(trial.params)
            self._fail(
                trial, "failed", f"diverged: {self.objective.criterion} is {value} under {augmentation}"
            )
        elif not whole:
            self.objective.tell.end(trial.number, "pruned", reason=f"stopped at step {result.get('step', 0)}")
            self._tell(trial, TrialState.PRUNED)
        elif kept is None:
            self._fail(trial, "interrupted", "the checkpoint of its last report is missing")
        else:
            self._complete(trial, result, kept)

    def failed(self, ray_trial: str, status: Status, reason: str) -> None:
        """A trial ended without a last report: "failed" by its own fault, or "interrupted" from outside."""
        trial = patiently(lambda: self._open(ray_trial))
        if trial is not None:
            self._fail(trial, status, reason)

    def close(self, reason: str) -> int:
        """Mark all that is still open as interrupted; how many trials that were."""
        still_open = patiently(lambda: self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]))
        for trial in still_open:
            self._fail(trial, "interrupted", reason)
        return len(still_open)

    def _complete(self, trial: FrozenTrial, result: Mapping[str, Any], kept: Path) -> None:
        try:
            address = self.objective.store.adopt(trial_name(self.study, trial), kept)
        except OSError as error:
            self._fail(trial, "interrupted", f"its artifacts could not be kept: {error}")
            return
        metrics = _metrics(result)
        criteria = {name: value for name, value in metrics.items() if name != "loss"}
        patiently(lambda: self.objective.drop_detectors(self.study, trial.number, address, criteria))
        whole = record.complete(
            criteria,
            loss=metrics["loss"],
            seconds=result["seconds"],
            budget=result["step"],
            address=address,
        )
        self._keep(trial, whole)
        self.objective.tell.end(trial.number, "complete", metrics)
        self._tell(trial, TrialState.COMPLETE, result[self.objective.criterion])

    def _fail(self, trial: FrozenTrial, status: Status, reason: str) -> None:
        why = record.failed if status == "failed" else record.interrupted
        self._keep(trial, why(reason))
        if trial.number in self._started:
            self.objective.tell.end(trial.number, status, reason=reason)
        self._tell(trial, TrialState.FAIL)

    def _open(self, ray_trial: str) -> FrozenTrial | None:
        """The trial if it is not finished in the ledger; one that is, Ray runs again for nothing."""
        number = self._numbers.get(ray_trial)
        if number is None:
            return None
        trial = self.study.get_trials(deepcopy=False)[number]
        return None if trial.state.is_finished() else trial

    def _keep(self, trial: FrozenTrial, attributes: record.Attributes) -> None:
        patiently(lambda: record.write(self.study, trial, attributes))

    def _tell(self, trial: FrozenTrial, state: TrialState, value: float | None = None) -> None:
        # A connection may break after the database has taken it: what is told is not told again.
        patiently(lambda: self.study.tell(trial.number, value, state, skip_if_finished=True))


def _metrics(result: Mapping[str, Any]) -> dict[str, float]:
    return {name: result[name] for name in metric_names() if name in result}
