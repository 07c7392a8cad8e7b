"""A sweep: a study brought to its number of trials on a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import optuna
import ray
from ray import tune
from ray.exceptions import AuthenticationError
from ray.tune.experiment import Trial

from ssad_hpo.raytune.schedulers import make_scheduler, replay
from ssad_hpo.raytune.searcher import StudySearcher
from ssad_hpo.raytune.storage import absolute_storage
from ssad_hpo.raytune.worker import trainable
from ssad_hpo.search import REDUCTION_FACTOR, Objective, is_exhausted, reconcile, remaining_trials
from ssad_hpo.search.objective import INTERRUPTED

MAX_FAILURES = 3  # deaths of its worker after which a trial is given up


def sweep(
    objective: Objective,
    study: optuna.Study,
    n_trials: int,
    *,
    storage_path: str | Path,
    scheduler: str = "asha",
    reduction_factor: int = REDUCTION_FACTOR,
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
        scheduler, reduction_factor: see `make_scheduler`.
        cpus_per_trial: share of the nodes' processors; a trial gets as many threads, at least one.
        gpus_per_trial: share of a GPU; 0.25 lets four trials share one.
        max_concurrent: how many trials run at once; as many as fit if None.
        address: of a running cluster, "auto" or HOST:PORT; None starts a Ray of its own on this machine,
            which asks for a token as long as RAY_AUTH_MODE does not say otherwise. Where Ray runs in this
            process already, that is used.

    Raises:
        ValueError: for a wrong argument, or a cluster that is not there or refuses this process.
        KeyboardInterrupt: on Ctrl-C, after the open trials were marked.
    """
    check_resources(n_trials, cpus_per_trial, gpus_per_trial, max_concurrent, str(objective.device), address)
    rungs = make_scheduler(scheduler, objective.criterion, objective.training, reduction_factor)
    searcher = StudySearcher(objective, study)
    reconcile(study, objective)
    remaining = remaining_trials(study, n_trials)
    if not remaining or is_exhausted(study):
        return
    storage = absolute_storage(storage_path)
    searcher.callback.storage_path = storage
    if rungs is not None:
        replay(rungs, study, objective.criterion)
    with _surroundings(), _connected(address):
        resources = {"cpu": cpus_per_trial, "gpu": gpus_per_trial}
        tune.Tuner(
            tune.with_resources(trainable(objective), resources),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=rungs,
                num_samples=remaining,
                max_concurrent_trials=max_concurrent,
                reuse_actors=True,  # a new worker process imports for seconds
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
    left = remaining_trials(study, n_trials)
    if left and not is_exhausted(study):
        trials = study.get_trials(deepcopy=False)
        last = next((t.user_attrs[INTERRUPTED] for t in reversed(trials) if INTERRUPTED in t.user_attrs), "")
        warnings.warn(
            f"{left} of {n_trials} trials were cut off through no fault of theirs and are run again when the "
            f"sweep is resumed; the last: {last}",
            stacklevel=2,
        )


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


def _folder_name(trial: Trial) -> str:
    return f"trial-{trial.trial_id}"  # Ray's own names grow with the parameters, beyond what a disk takes


_ENVIRONMENT = {  # where the user has not set them
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints a table, however quiet it is asked to be
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV, JSON and TensorBoard beside MLflow
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the reason is with the trial
}


@contextlib.contextmanager
def _surroundings() -> Iterator[None]:
    """Ray Tune's settings while it works; its handlers of signals do not outlive it."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGUSR1)} if in_main_thread else {}
    logger = logging.getLogger("ray.tune")
    level = logger.level
    # It misses files that the loggers do not write and, where the storage fails, those that restore a Tuner,
    # which no sweep needs. What becomes of a trial is with the trial.
    logger.setLevel(logging.CRITICAL)
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
        logger.setLevel(level)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Ray in this process: the one that runs, a cluster's, or one of its own that ends with this."""
    if ray.is_initialized():
        yield
        return
    if address is None:
        # Ray asks for a token here by itself, unless RAY_AUTH_MODE says otherwise; this is never set by us.
        # It has to: Ray's ports are open to the network also where it serves this machine alone.
        ray.init("local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    else:
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, AuthenticationError) as error:
            reason = str(error).partition("\n")[0].partition(". ")[0]
            raise ValueError(
                f"address: no Ray cluster at {address!r} takes this process ({reason}). Is it up, is this "
                "machine a node of it, and do RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH give its token?"
            ) from error
        if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
            warnings.warn(
                f"the Ray cluster at {address!r} asks for no token: whoever reaches its ports runs what he "
                "likes on it; start all its nodes with RAY_AUTH_MODE=token",
                stacklevel=3,
            )
    try:
        yield
    finally:
        ray.shutdown()
