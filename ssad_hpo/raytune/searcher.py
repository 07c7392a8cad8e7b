"""Ray Tune's side of an Optuna study: a searcher that draws its trials, a callback that tells of them."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from pyarrow.fs import FileSystem
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from ssad_hpo.raytune.checkpoints import below
from ssad_hpo.raytune.ledger import CHECKPOINT, Ledger
from ssad_hpo.raytune.reaching import LOOK_AGAIN, warn_without_room
from ssad_hpo.raytune.worker import KEPT
from ssad_hpo.search import Objective, is_final, record
from ssad_hpo.task import Cluster, Status

_searchers: weakref.WeakValueDictionary[str, StudySearcher] = weakref.WeakValueDictionary()


class StudySearcher(Searcher):
    """Ray Tune's trials as trials of an Optuna study, on which `ssad_hpo.select` then works.

    `tune.OptunaSearch` is not used: it leaves trials open in Optuna that report nan, tells those that a
    scheduler stopped as complete, and falls behind its own database when it is restored. Here all is told
    by `callback`, which has to be among the callbacks of the Tuner's RunConfig.

    To restore a Tuner, open the study again, make its searcher, and then call `tune.Tuner.restore`: what
    that unpickles is found to be this searcher, by the study's name. Neither images nor addresses of
    databases are in the pickle.

    Args:
        study: minimised, with a sampler such as `search.make_sampler` gives. It belongs to this searcher
            while the Tuner runs.

    Raises:
        ValueError: for a study that is maximised, or has several objectives.
    """

    def __init__(self, objective: Objective, study: optuna.Study) -> None:
        super().__init__(metric=objective.criterion, mode="min")
        self.ledger = Ledger(objective, study)
        self.callback = StudyCallback(self)
        _searchers[study.study_name] = self

    def suggest(self, trial_id: str) -> Any:
        """The parameters of Ray's next trial, or Ray's word for a grid that is through."""
        if not self.callback.at_work:
            raise ValueError(
                "search_alg: its callback is missing, and Optuna would be told nothing; give the Tuner "
                "run_config=tune.RunConfig(callbacks=[searcher.callback])"
            )
        parameters = self.ledger.ask(trial_id)
        return Searcher.FINISHED if parameters is None else parameters

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing: the callback, which is called next, knows more."""

    def save(self, checkpoint_path: str) -> None:
        """All that there is to know is in the study."""
        Path(checkpoint_path).write_text(self.ledger.study.study_name)

    def restore(self, checkpoint_path: str) -> None:
        """See `save`.

        Raises:
            ValueError: for the state of another study.
        """
        saved, own = Path(checkpoint_path).read_text(), self.ledger.study.study_name
        if saved != own:
            raise ValueError(f"search_alg: expected the searcher of study {saved!r}, got that of {own!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _searcher_of, (self.ledger.study.study_name,)


def _searcher_of(study_name: str) -> StudySearcher:
    if study_name not in _searchers:
        raise ValueError(f"search_alg: open the study {study_name!r} and make its StudySearcher first")
    return _searchers[study_name]


class StudyCallback(tune.Callback):
    """Tells the ledger of a searcher what Ray Tune's controller sees; part of a `StudySearcher`."""

    def __init__(self, searcher: StudySearcher) -> None:
        self._searcher = searcher
        self.at_work = False
        self.interrupted = 0  # trials that were open when the Tuner stopped
        # Where checkpoints are, if they are not to outlive their trial.
        self.checkpoint_path: str | None = None
        self.cluster: Cluster | None = None  # whose nodes the trials need
        self._taken_up = False
        self._looked = time.monotonic()
        self._checkpoints: dict[str, list[tune.Checkpoint]] = {}

    def setup(self, *args: Any, **info: Any) -> None:
        """A Tuner begins, or goes on."""
        self.at_work, self._taken_up, self.interrupted = True, False, 0

    def on_step_begin(self, iteration: int, trials: Sequence[Trial], **info: Any) -> None:
        """Before the first suggestion: put the study and the trials that Ray took up in agreement."""
        if not self._taken_up:
            self._taken_up = True
            self._searcher.ledger.take_up([t.trial_id for t in trials if not t.is_finished()])
        if self.cluster is not None and time.monotonic() - self._looked > LOOK_AGAIN:
            self._looked = time.monotonic()
            if not any(trial.status == Trial.RUNNING for trial in trials):
                warn_without_room(self.cluster)

    def on_trial_start(self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any) -> None:
        """A worker has the trial."""
        self._searcher.ledger.started(trial.trial_id)

    def on_trial_result(
        self, iteration: int, trials: Sequence[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """A report."""
        self._searcher.ledger.progress(trial.trial_id, result)

    def on_checkpoint(
        self, iteration: int, trials: Sequence[Trial], trial: Trial, checkpoint: tune.Checkpoint, **info: Any
    ) -> None:
        """A report's checkpoint is where all nodes reach it."""
        self._checkpoints.setdefault(trial.trial_id, []).append(checkpoint)
        if self.checkpoint_path is not None:
            place = Path(checkpoint.path).parts[-3:]  # experiment, trial, checkpoint
            self._searcher.ledger.checkpointed(trial.trial_id, below(self.checkpoint_path, *place))

    def on_trial_complete(self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any) -> None:
        """The trial returned, or a scheduler stopped it after its last report."""
        ledger, result, checkpoint = self._searcher.ledger, trial.last_result, trial.checkpoint
        name = result.get("checkpoint_dir_name")
        if checkpoint is None or name is None or Path(checkpoint.path).name != name:
            ledger.ended(trial.trial_id, result, None)
        elif result.get("step", 0) < ledger.objective.training.steps:
            ledger.ended(trial.trial_id, result, None)
        else:
            with checkpoint.as_directory() as folder:
                ledger.ended(trial.trial_id, result, Path(folder) / KEPT)
        self._discard(trial)

    def on_trial_error(self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any) -> None:
        """The trial was given up: its worker died too often, or raised what the trainable cannot catch."""
        self._searcher.ledger.failed(trial.trial_id, *_what_happened(trial))
        self._discard(trial)

    def on_experiment_end(self, trials: Sequence[Trial], **info: Any) -> None:
        """The Tuner stops, perhaps before its time."""
        self.interrupted = self._searcher.ledger.close("the sweep was stopped")
        self.at_work = False

    def _discard(self, trial: Trial) -> None:
        """Remove the checkpoints of a trial that is over, and of the trial that it repeats."""
        checkpoints = self._checkpoints.pop(trial.trial_id, [])
        if self.checkpoint_path is None:
            return
        with contextlib.suppress(OSError):  # what stays behind does no harm
            for checkpoint in checkpoints:
                _delete(checkpoint.filesystem, checkpoint.path)
            if CHECKPOINT in trial.config:
                _delete_all_beside(trial.config[CHECKPOINT])

    def __reduce__(self) -> tuple[Any, ...]:
        return _callback_of, (self._searcher.ledger.study.study_name,)


def _callback_of(study_name: str) -> StudyCallback:
    return _searcher_of(study_name).callback


def discard_left(study: optuna.Study) -> None:
    """Remove the checkpoints of trials that are over which a driver that was killed could not remove.

    Those are of attempts that were cut off and have come to an end since, and of the last trial that ended:
    its kill may have come before its checkpoints went.
    """
    trials = study.get_trials(deepcopy=False)
    over = [trial for trial in trials if is_final(trial)]
    repeated = {record.first_attempt(trial) for trial in over}
    left = [t for t in trials if not is_final(t) and record.first_attempt(t) in repeated]
    ended = {trial.datetime_complete: trial for trial in over if trial.datetime_complete is not None}
    left += [ended[max(ended)]] if ended else []
    for trial in left:
        checkpoint = record.read_trial(trial).checkpoint
        if checkpoint is not None:
            with contextlib.suppress(OSError):  # most are gone already; what stays behind does no harm
                _delete_all_beside(checkpoint)


def _delete_all_beside(address: str) -> None:
    """Delete the folder of a trial, which holds all its checkpoints, by the address of one."""
    checkpoint = tune.Checkpoint(address)
    _delete(checkpoint.filesystem, Path(checkpoint.path).parent.as_posix())


def _delete(filesystem: FileSystem | None, folder: str) -> None:
    if filesystem is not None:
        filesystem.delete_dir(folder)


# In what Ray writes of a worker that could not begin, and of an end that could not be told.
_NOT_OF_A_TRIAL = ("raised in its creation task", "_TuneStopTrialError")


def _what_happened(trial: Trial) -> tuple[Status, str]:
    """Status and reason of a trial that Ray gave up, from the file that Ray writes about it."""
    text = Path(trial.error_file).read_text() if trial.error_file else ""
    lines = [line.strip() for line in text.rpartition("Failure # ")[2].splitlines()[1:] if line.strip()]
    if not lines:
        return "interrupted", "Ray does not say why"
    if "Traceback" in text or "ray::" in lines[0]:  # a task's error ends with what was raised
        its_own = not any(mark in line for mark in _NOT_OF_A_TRIAL for line in lines)
        return "failed" if its_own else "interrupted", lines[-1]
    deaths = "once" if trial.num_failures == 1 else f"{trial.num_failures} times"
    where = "Ray's logs on its node say why, in session_latest/logs/worker-*.err"
    return "interrupted", f"its worker died {deaths}: {lines[0]} {where}"
