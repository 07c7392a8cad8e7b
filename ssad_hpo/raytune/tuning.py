"""A `tune.Tuner` whose trials are those of an Optuna study."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import optuna
import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from ssad_hpo.raytune.book import Book
from ssad_hpo.raytune.worker import KEPT, trainable
from ssad_hpo.search import Objective, is_exhausted, is_final, position, reconcile, remaining_trials
from ssad_hpo.task import Training

SCHEDULERS = ("asha", "median", "none")
MAX_FAILURES = 3  # deaths of its worker after which a trial is given up

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
        objective: whose trials they are.
        study: minimised, with a sampler such as `search.make_sampler` gives. It belongs to this searcher
            while the Tuner runs.

    Raises:
        ValueError: for a study that is maximised, or has several objectives.
    """

    def __init__(self, objective: Objective, study: optuna.Study) -> None:
        super().__init__(metric=objective.criterion, mode="min")
        self.book = Book(objective, study)
        self.callback = StudyCallback(self)
        _searchers[study.study_name] = self

    def suggest(self, trial_id: str) -> Any:
        """The parameters of Ray's next trial, or Ray's word for a grid that is through."""
        if not self.callback.at_work:
            raise ValueError(
                "search_alg: its callback is missing, and Optuna would be told nothing; give the Tuner "
                "run_config=tune.RunConfig(callbacks=[searcher.callback])"
            )
        parameters = self.book.ask(trial_id)
        return Searcher.FINISHED if parameters is None else parameters

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing: the callback, which is called next, knows more."""

    def save(self, checkpoint_path: str) -> None:
        """All that there is to know is in the study."""
        Path(checkpoint_path).write_text(self.book.study.study_name)

    def restore(self, checkpoint_path: str) -> None:
        """See `save`.

        Raises:
            ValueError: for the state of another study.
        """
        saved, own = Path(checkpoint_path).read_text(), self.book.study.study_name
        if saved != own:
            raise ValueError(f"search_alg: expected the searcher of study {saved!r}, got that of {own!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _searcher_of, (self.book.study.study_name,)


def _searcher_of(study_name: str) -> StudySearcher:
    if study_name not in _searchers:
        raise ValueError(f"search_alg: open the study {study_name!r} and make its StudySearcher first")
    return _searchers[study_name]


class StudyCallback(tune.Callback):
    """Tells the book of a searcher what Ray Tune's controller sees; part of a `StudySearcher`."""

    def __init__(self, searcher: StudySearcher) -> None:
        self._searcher = searcher
        self.at_work = False
        self.interrupted = 0  # trials that were open when the Tuner stopped
        self.storage_path: str | None = None  # where checkpoints are, if they are not to outlive their trial
        self._taken_up = False
        self._checkpoints: dict[str, list[tune.Checkpoint]] = {}

    def setup(
        self,
        stop: Any = None,
        num_samples: int | None = None,
        total_num_samples: int | None = None,
        **info: Any,
    ) -> None:
        """A Tuner begins, or goes on."""
        self.at_work, self._taken_up, self.interrupted = True, False, 0

    def on_step_begin(self, iteration: int, trials: Sequence[Trial], **info: Any) -> None:
        """Before the first suggestion: put the study and the trials that Ray took up in agreement."""
        if not self._taken_up:
            self._taken_up = True
            self._searcher.book.take_up([t.trial_id for t in trials if not t.is_finished()])

    def on_trial_start(self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any) -> None:
        """A worker has the trial."""
        self._searcher.book.started(trial.trial_id)

    def on_trial_result(
        self, iteration: int, trials: Sequence[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """A report."""
        self._searcher.book.progress(trial.trial_id, result)

    def on_checkpoint(
        self,
        iteration: int,
        trials: Sequence[Trial],
        trial: Trial,
        checkpoint: tune.Checkpoint,
        **info: Any,
    ) -> None:
        """A report's checkpoint is where all nodes reach it."""
        self._checkpoints.setdefault(trial.trial_id, []).append(checkpoint)
        if self.storage_path is not None:
            place = Path(checkpoint.path).parts[-3:]  # experiment, trial, checkpoint
            self._searcher.book.checkpointed(trial.trial_id, "/".join((self.storage_path, *place)))

    def on_trial_complete(self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any) -> None:
        """The trial returned, or a scheduler stopped it after its last report."""
        book, result, checkpoint = self._searcher.book, trial.last_result, trial.checkpoint
        name = result.get("checkpoint_dir_name")
        if checkpoint is None or name is None or Path(checkpoint.path).name != name:
            book.ended(trial.trial_id, result, None)
        elif result.get("step", 0) < book.objective.training.steps:
            book.ended(trial.trial_id, result, None)
        else:
            with checkpoint.as_directory() as folder:
                book.ended(trial.trial_id, result, Path(folder) / KEPT)
        self._discard(trial)

    def on_trial_error(self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any) -> None:
        """The trial was given up: its worker died too often, or raised what the trainable cannot catch."""
        self._searcher.book.failed(trial.trial_id, *_what_happened(trial))
        self._discard(trial)

    def on_experiment_end(self, trials: Sequence[Trial], **info: Any) -> None:
        """The Tuner stops, perhaps before its time."""
        self.interrupted = self._searcher.book.close("the sweep was stopped")
        self.at_work = False

    def _discard(self, trial: Trial) -> None:
        for checkpoint in self._checkpoints.pop(trial.trial_id, []):
            if self.storage_path is not None and checkpoint.filesystem is not None:
                with contextlib.suppress(OSError):  # what stays behind does no harm
                    checkpoint.filesystem.delete_dir(checkpoint.path)

    def __reduce__(self) -> tuple[Any, ...]:
        return _callback_of, (self._searcher.book.study.study_name,)


def _callback_of(study_name: str) -> StudyCallback:
    return _searcher_of(study_name).callback


def _what_happened(trial: Trial) -> tuple[str, str]:
    """Status and reason of a trial that Ray gave up, from the file that Ray writes about it."""
    text = Path(trial.error_file).read_text() if trial.error_file else ""
    lines = [line.strip() for line in text.rpartition("Failure # ")[2].splitlines()[1:] if line.strip()]
    if not lines:
        return "interrupted", "Ray does not say why"
    if "Traceback" in text or "ray::" in lines[0]:  # a task's error ends with what was raised
        return "failed", lines[-1]
    return "interrupted", f"its worker died {trial.num_failures} times: {lines[0]}"


def make_scheduler(name: str, criterion: str, training: Training) -> TrialScheduler | None:
    """A scheduler of Ray Tune's by name, that stops trials by the criterion at the evaluation steps.

    Args:
        name: "asha" (the first evaluation is the first rung, the better half goes on), "median" or "none".
        criterion: to be minimised.
        training: whose evaluation steps count.

    Raises:
        ValueError: for an unknown name.
    """
    first, steps = training.evaluation_steps[0], training.steps
    by: dict[str, Any] = {"time_attr": "step", "metric": criterion, "mode": "min", "grace_period": first}
    if name == "asha":
        return ASHAScheduler(max_t=steps, reduction_factor=2, **by)
    if name == "median":
        # Else trials would be paused until there are enough to compare them with.
        by["min_time_slice"] = math.inf
        return MedianStoppingRule(**by)
    if name == "none":
        return None
    raise ValueError(f"scheduler: expected one of {', '.join(SCHEDULERS)}, got {name!r}")


def sweep(
    objective: Objective,
    study: optuna.Study,
    n_trials: int,
    *,
    storage_path: str | Path,
    scheduler: str = "asha",
    cpus_per_trial: float = 1.0,
    gpus_per_trial: float = 0.0,
    max_concurrent: int | None = None,
    address: str | None = None,
) -> None:
    """Bring a study to `n_trials` finished trials on a Ray cluster; call it again to go on after a stop.

    As `search.run_search`, with the trials on all nodes. What an earlier call left open is queued again
    and goes on from its last checkpoint; what is finished stays. The driver puts the finished trials'
    scores, embeddings and best detectors into the objective's store and tells its recorder of everything.

    Args:
        objective: to be trained; its device says where, so "cuda" needs a share of a GPU.
        study: whose sampler draws the candidates; it belongs to this call.
        n_trials: in all, those finished before included.
        storage_path: a folder that every node reaches, or the URI of an object store, for checkpoints;
            those of a trial go when it is over.
        scheduler: see `make_scheduler`.
        cpus_per_trial: share of the nodes' processors; a trial gets as many threads, at least one.
        gpus_per_trial: share of a GPU; 0.25 lets four trials share one.
        max_concurrent: how many trials run at once; as many as fit if None.
        address: of a running cluster, "auto" or HOST:PORT; None starts a Ray of its own on this machine,
            reachable from this machine alone. Where Ray runs in this process already, that is used.

    Raises:
        ValueError: for a wrong argument.
        KeyboardInterrupt: on Ctrl-C, after the open trials were marked.
    """
    check_resources(n_trials, cpus_per_trial, gpus_per_trial, max_concurrent, str(objective.device), address)
    rungs = make_scheduler(scheduler, objective.criterion, objective.training)
    searcher = StudySearcher(objective, study)
    reconcile(study, objective)
    remaining = remaining_trials(study, n_trials)
    if not remaining or is_exhausted(study):
        return
    storage = absolute_storage(storage_path)
    searcher.callback.storage_path = storage
    if rungs is not None:
        _replay(rungs, study, objective.criterion)
    with _environment(), _connected(address):
        resources = {"cpu": cpus_per_trial, "gpu": gpus_per_trial}
        tune.Tuner(
            tune.with_resources(trainable(objective), resources),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=rungs,
                num_samples=remaining,
                max_concurrent_trials=max_concurrent,
                trial_dirname_creator=_folder_name,
            ),
            run_config=tune.RunConfig(
                name=study.study_name,
                storage_path=storage,
                callbacks=[searcher.callback],
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
                verbose=0,
            ),
        ).fit()
    if searcher.callback.interrupted:
        raise KeyboardInterrupt


def check_resources(
    n_trials: int,
    cpus_per_trial: float,
    gpus_per_trial: float,
    max_concurrent: int | None,
    device: str,
    address: str | None,
) -> None:
    """Raise ValueError, naming the argument of `sweep`, if it cannot be."""
    if n_trials < 1:
        raise ValueError(f"n_trials: expected at least 1, got {n_trials}")
    if not (math.isfinite(cpus_per_trial) and cpus_per_trial > 0):
        raise ValueError(f"cpus_per_trial: expected a number above 0, got {cpus_per_trial}")
    if not (math.isfinite(gpus_per_trial) and gpus_per_trial >= 0):
        raise ValueError(f"gpus_per_trial: expected a number of at least 0, got {gpus_per_trial}")
    if max_concurrent is not None and max_concurrent < 1:
        raise ValueError(f"max_concurrent: expected at least 1, got {max_concurrent}")
    if (gpus_per_trial > 0) != device.startswith("cuda"):
        raise ValueError(
            f"gpus_per_trial: expected above 0 for 'cuda' alone, got {gpus_per_trial} for {device!r}"
        )
    if address is not None and "://" in address:
        raise ValueError(
            f"address: expected 'auto' or HOST:PORT of a cluster that this machine is a node of, got "
            f"{address!r}: through a Ray Client the driver would run elsewhere, without this run's folder"
        )
    here = os.cpu_count() or 1
    if address is None and not ray.is_initialized() and cpus_per_trial > here:
        raise ValueError(f"cpus_per_trial: expected at most this machine's {here}, got {cpus_per_trial}")


def absolute_storage(storage_path: str | Path) -> str:
    """A storage path as workers need it, who work in folders of their own; a URI stays as it is."""
    return str(storage_path) if urlsplit(str(storage_path)).scheme else str(Path(storage_path).absolute())


def _folder_name(trial: Trial) -> str:
    return f"trial-{trial.trial_id}"  # Ray's own names grow with the parameters, beyond what a disk takes


def _replay(scheduler: TrialScheduler, study: optuna.Study, criterion: str) -> None:
    """Have a new scheduler compare with what earlier trials of the study reported."""
    controller: Any = SimpleNamespace(get_live_trials=list)
    for trial in study.get_trials(deepcopy=False):
        if not is_final(trial) or not trial.intermediate_values:
            continue
        stand_in: Any = SimpleNamespace(trial_id=f"before-{position(study, trial)}")
        scheduler.on_trial_add(controller, stand_in)
        for step, value in trial.intermediate_values.items():
            result = {"step": step, criterion: value}
            scheduler.on_trial_result(controller, stand_in, result)
        scheduler.on_trial_complete(controller, stand_in, result)


_ENVIRONMENT = {  # where the user has not set them
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV, JSON and TensorBoard beside MLflow
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the reason is with the trial
}


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Ray in this process: the one that runs, a cluster's, or one of its own that ends with this."""
    if ray.is_initialized():
        yield
        return
    if address is None:
        # Ray asks for a token here by itself, unless RAY_AUTH_MODE says otherwise; this is never set by us.
        ray.init(
            "local",
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    else:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
