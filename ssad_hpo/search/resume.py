"""Running a study, and taking it up again after it was stopped, by whatever means."""

from __future__ import annotations

from collections.abc import Collection

import optuna
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from ssad_hpo.search import record
from ssad_hpo.search.objective import Objective
from ssad_hpo.search.record import first_attempt, is_final
from ssad_hpo.search.sampling import make_pruner, make_sampler, position
from ssad_hpo.search.store import trial_name
from ssad_hpo.task import Search, Status, Training


def open_study(
    storage: BaseStorage | str, study_name: str, search: Search, training: Training
) -> optuna.Study:
    """Create a study, or open it if it exists, with a sampler whose draws survive a restart.

    Args:
        search: whose sampler draws, and whose pruner stops trials.
        training: at whose evaluation steps trials are stopped.
    """
    return optuna.create_study(
        storage=storage,
        study_name=study_name,
        sampler=make_sampler(search),
        pruner=make_pruner(search, training),
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
    taken = {position(study, t) for t in drawn if is_final(t) or t.state in going}
    for trial in trials:
        if trial.state != TrialState.FAIL or is_final(trial):
            continue
        objective.store.discard(trial_name(study, trial))
        if position(study, trial) in taken:
            continue
        taken.add(position(study, trial))
        # Not skip_if_exists: it would take the failed trial itself for an existing one.
        study.enqueue_trial(trial.params, user_attrs=record.repeats(first_attempt(trial)))


def remaining_trials(study: optuna.Study, n_trials: int) -> int:
    """How many of `n_trials` are still to be run; interrupted ones count as not run."""
    trials = study.get_trials(deepcopy=False)
    return max(0, n_trials - sum(is_final(t) and not record.is_frozen(t) for t in trials))


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


def was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: interrupted while it writes, Optuna raises others in its place."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
