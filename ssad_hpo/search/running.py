"""Running a study and taking it up again after it was stopped, by whatever means."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from ssad_hpo.search.kept import FolderStore
from ssad_hpo.search.objective import FAILURE, INTERRUPTED, RETRY_OF, Objective
from ssad_hpo.search.sampling import (
    REDUCTION_FACTOR,
    EnumeratedSampler,
    is_final,
    make_pruner,
    make_sampler,
    position,
)
from ssad_hpo.task import Status


def open_journal(path: Path) -> JournalStorage:
    """Optuna's storage in a journal file, whose owner this process must be.

    A torn last line (a kill in mid-write) and the lock file of a dead owner would both stop Optuna; both
    are cleared away here, which is only right while nobody else has the file open.
    """
    if path.exists():
        _cut_torn_line(path)
        for stale in path.parent.glob(path.name + ".lock*"):
            stale.unlink(missing_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))


def _cut_torn_line(path: Path) -> None:
    with path.open("rb+") as journal:
        content = journal.read()
        whole = content.rfind(b"\n") + 1
        last = content[:whole].rstrip(b"\n").rpartition(b"\n")[2]
        try:
            json.loads(last or b"{}")
        except ValueError:  # no JSON, or (zeros, after a loss of power) no text at all
            whole -= len(last) + 1
        journal.truncate(whole)


def open_study(
    storage: BaseStorage | str,
    study_name: str,
    objective: Objective,
    *,
    sampler: str = "tpe",
    pruner: str = "none",
    reduction_factor: int = REDUCTION_FACTOR,
    seed: int = 0,
    grid_points: int = 4,
) -> optuna.Study:
    """Create a study, or open it if it exists, with a sampler whose draws survive a restart.

    Args:
        storage: a storage, or its URL.
        study_name: of the study.
        objective: whose space is searched.
        sampler, pruner: by name, see `make_sampler` and `make_pruner`.
        reduction_factor: of the pruner "asha".
        seed: of the sampler.
        grid_points: of the sampler "grid".
    """
    return optuna.create_study(
        storage=storage,
        study_name=study_name,
        sampler=make_sampler(sampler, objective.space, seed, grid_points),
        pruner=make_pruner(pruner, objective.training, reduction_factor),
        direction="minimize",
        load_if_exists=True,
    )


def reconcile(study: optuna.Study, objective: Objective, alive: Collection[int] = ()) -> None:
    """Close the trials that an earlier process left open, and queue their parameters again.

    Trials of the numbers `alive` are being run and stay as they are.

    Call it only while this process owns the study (its run folder is locked): then whoever ran an open
    trial is gone. A trial that was stopped from outside is repeated under a new number, with the same
    parameters; a trial that failed by its own fault is not.
    """
    storage = study._storage  # the only way to give a finished trial an attribute
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        if trial.number in alive:
            continue
        # A failure of the trial's own may have been noted just before its process ended.
        status: Status = "failed" if FAILURE in trial.user_attrs else "interrupted"
        reason = trial.user_attrs.get(FAILURE, "its process ended")
        if status == "interrupted":
            storage.set_trial_user_attr(trial._trial_id, INTERRUPTED, reason)
        study.tell(trial.number, state=TrialState.FAIL)
        if objective.recorder is not None:
            objective.recorder.trial_ended(str(trial.number), status, {}, reason)
    trials = study.get_trials(deepcopy=False)
    going = (TrialState.WAITING, TrialState.RUNNING)
    taken = {position(study, t) for t in trials if is_final(t) or t.state in going}
    for trial in trials:
        if trial.state != TrialState.FAIL or is_final(trial):
            continue
        if isinstance(objective.store, FolderStore):
            objective.store.discard(trial.number)
        if position(study, trial) in taken:
            continue
        taken.add(position(study, trial))
        first = trial.user_attrs.get(RETRY_OF, trial.number)
        # Not skip_if_exists: it would take the failed trial itself for an existing one.
        study.enqueue_trial(trial.params, user_attrs={RETRY_OF: first})


def remaining_trials(study: optuna.Study, n_trials: int) -> int:
    """How many of `n_trials` are still to be run; interrupted ones count as not run."""
    return max(0, n_trials - sum(is_final(t) for t in study.get_trials(deepcopy=False)))


def run_search(study: optuna.Study, objective: Objective, n_trials: int) -> None:
    """Bring a study to `n_trials` finished trials, taking up what an earlier process left.

    Raises:
        ValueError: if n_trials < 1.
        KeyboardInterrupt: on Ctrl-C, after the running trial was marked; call again to go on.
    """
    if n_trials < 1:
        raise ValueError(f"n_trials: expected at least 1, got {n_trials}")
    reconcile(study, objective)
    if isinstance(study.sampler, EnumeratedSampler):
        n_trials = min(n_trials, len(study.sampler.candidates))
    remaining = remaining_trials(study, n_trials)
    if remaining:
        try:
            study.optimize(objective, n_trials=remaining)
        except Exception as error:
            if was_interrupted(error):
                raise KeyboardInterrupt from error
            raise


def was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: interrupted while it writes, Optuna raises others in its place."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
