"""A sweep: a study brought to its number of trials on a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial

import optuna
import ray
from ray import tune
from ray.exceptions import AuthenticationError
from ray.tune.experiment import Trial

from ssad_hpo.address import without_password
from ssad_hpo.raytune.checkpoints import absolute_checkpoint_path, below, discard_untold
from ssad_hpo.raytune.reaching import check_answers, check_here, check_room
from ssad_hpo.raytune.schedulers import make_scheduler, replay
from ssad_hpo.raytune.searcher import StudySearcher, discard_left
from ssad_hpo.raytune.token import prepare_token
from ssad_hpo.raytune.worker import trainable
from ssad_hpo.search import Objective, is_exhausted, reconcile, records, remaining_trials
from ssad_hpo.task import Cluster

MAX_FAILURES = 3  # deaths of its worker after which a trial is given up


def sweep(objective: Objective, study: optuna.Study, cluster: Cluster) -> None:
    """Bring a study to its search's trials on a Ray cluster; call it again to go on after a stop.

    As `search.run_search`, with the trials on all nodes. What an earlier call left open is queued again
    and goes on from its last checkpoint; what is finished stays. The driver puts the finished trials'
    scores, embeddings and best detectors into the objective's store and tells its recorder of everything.
    Where Ray runs in this process already, that is used. A Ray of its own asks for a token as long as
    RAY_AUTH_MODE does not say otherwise.

    Args:
        objective: to be trained; its device says where, so "cuda" needs a share of a GPU. The pruner of its
            search is Ray's scheduler.
        study: whose sampler draws the candidates; it belongs to this call.
        cluster: where the trials run; its checkpoint path must be given. The checkpoints of a trial go when
            it is over.

    Raises:
        ValueError: for a wrong argument, or a cluster that is not there or refuses this process.
        KeyboardInterrupt: on Ctrl-C, after the open trials were marked.
    """
    check_cluster(cluster, str(objective.device))
    if cluster.checkpoint_path is None:
        raise ValueError("checkpoint_path: expected a folder or a URI that all nodes reach, got none")
    search, n_trials = objective.search, objective.search.total
    rungs = make_scheduler(search, objective.training)
    searcher = StudySearcher(objective, study)
    reconcile(study, objective)
    objective.add_frozen(study)
    discard_left(study)
    remaining = remaining_trials(study, n_trials)
    if not remaining or is_exhausted(study):
        return
    checkpoint_path = absolute_checkpoint_path(cluster.checkpoint_path)
    searcher.callback.checkpoint_path, searcher.callback.cluster = checkpoint_path, cluster
    if rungs is not None:
        replay(rungs, study, objective.criterion)
    with surroundings(), connected(cluster.address):
        check_room(cluster)
        if cluster.address is not None and os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
            warnings.warn(
                f"the Ray cluster at {cluster.address!r} asks for no token: whoever reaches its ports runs "
                "what he likes on it; start all its nodes with RAY_AUTH_MODE=token",
                stacklevel=2,
            )
        resources = {"cpu": cluster.cpus_per_trial, "gpu": cluster.gpus_per_trial}
        tune.Tuner(
            tune.with_resources(trainable(objective), resources),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=rungs,
                num_samples=remaining,
                max_concurrent_trials=cluster.max_concurrent,
                reuse_actors=True,  # a new worker process imports for seconds
                trial_dirname_creator=_folder_name,
            ),
            run_config=tune.RunConfig(
                name=study.study_name,
                storage_path=checkpoint_path,
                callbacks=[searcher.callback],
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
                verbose=0,
            ),
        ).fit()
    discard_left(study)
    # Ctrl-C may also come when no trial is open: then Ray has asked for fewer than it was to.
    if searcher.callback.interrupted or (searcher.ledger.asked < remaining and not is_exhausted(study)):
        raise KeyboardInterrupt
    left = remaining_trials(study, n_trials)
    if not left or is_exhausted(study):
        discard_untold(below(checkpoint_path, study.study_name))
    else:
        reasons = [trial.reason for trial in records(study) if trial.status == "interrupted"]
        warnings.warn(
            f"{left} of {n_trials} trials were cut off through no fault of theirs and are run again when the "
            f"sweep is resumed; the last: {reasons[-1] if reasons else ''}",
            stacklevel=2,
        )


def check_cluster(cluster: Cluster, device: str, *, join: bool = False) -> None:
    """Raise ValueError, naming the setting of a cluster, if no trial can train on the device there.

    With `join` a cluster that this process has not joined is joined for a moment, to see what its nodes have.
    """
    address, gpus = cluster.address, cluster.gpus_per_trial
    if (gpus > 0) != device.startswith("cuda"):
        raise ValueError(f"gpus_per_trial: expected above 0 for 'cuda' alone, got {gpus} for {device!r}")
    if address is not None and ("://" in address or "@" in address):
        raise ValueError(
            f"address: expected 'auto' or HOST:PORT of a cluster that this machine is a node of, got "
            f"{without_password(address)!r}: through a Ray Client the driver would run elsewhere, without "
            "this run's folder"
        )
    if ray.is_initialized():
        check_room(cluster)
    elif address is None:
        check_here(cluster)
    else:
        check_answers(address)
        if join:
            with connected(address):
                check_room(cluster)


def _folder_name(trial: Trial) -> str:
    return f"trial-{trial.trial_id}"  # Ray's own names grow with the parameters, beyond what a disk takes


_ENVIRONMENT = {  # where the user has not set them
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints a table, however quiet it is asked to be
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV, JSON and TensorBoard beside MLflow
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the reason is with the trial
}
_lock = threading.Lock()
_before: list[tuple[int, list[str]]] = []  # for each sweep that works: level of logs, added variables


@contextlib.contextmanager
def surroundings() -> Iterator[None]:
    """Ray Tune's settings while it works; its handlers of signals do not outlive it.

    Of sweeps in several threads the first sets what belongs to the process, and the last restores it.
    """
    logger = logging.getLogger("ray.tune")
    with _lock:
        added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
        _before.append((logger.level, list(added)))
        # It misses files that the loggers do not write and, where the storage fails, those that restore a
        # Tuner, which no sweep needs. What becomes of a trial is with the trial.
        logger.setLevel(logging.CRITICAL)
        os.environ.update(added)
    try:
        with _own_handlers(signal.SIGINT, signal.SIGUSR1):
            yield
    finally:
        with _lock:
            level, names = _before.pop()
            if not _before:  # what the first one found
                for name in names:
                    os.environ.pop(name, None)
                logger.setLevel(level)


@contextlib.contextmanager
def _own_handlers(*numbers: int) -> Iterator[None]:
    """Handlers of signals that Ray replaces are there again afterwards."""
    in_main_thread = threading.current_thread() is threading.main_thread()  # others cannot set them
    found = {number: signal.getsignal(number) for number in numbers} if in_main_thread else {}
    try:
        yield
    finally:
        for number, handler in found.items():
            if handler is not None:  # one that is not Python's
                signal.signal(number, handler)


_joining = threading.Lock()
_leaving: list[threading.Event] = []  # for the thread in which a Ray of one's own was started
_joined: list[str | None] = []  # the address that each sweep asked for which works in the Ray joined here


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Callable[[], bool]]:
    """Ray in this process: the one that runs, a cluster's, or one of its own that ends with this.

    Of sweeps in several threads the first joins, and the last leaves. Yields a function that says whether it
    runs on for others: for the user who has joined it, or for another sweep.
    """
    with _own_handlers(signal.SIGTERM):
        with _joining:
            theirs = not _joined and ray.is_initialized()  # the user's own, which is left as it is
            if not theirs:
                if not _joined:
                    _join(address)
                _joined.append(address)
        try:
            yield lambda: theirs or len(_joined) > 1
        finally:
            with _joining:
                if not theirs:
                    _joined.remove(address)
                    if not _joined:
                        ray.shutdown()
                        while _leaving:
                            _leaving.pop().set()


def _join(address: str | None) -> None:
    if address is None:
        # Ray asks for a token here by itself, unless RAY_AUTH_MODE says otherwise; this is never set by us.
        # It has to: Ray's ports are open to the network also where it serves this machine alone.
        prepare_token()
        begin = partial(
            ray.init, "local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
        )
        if threading.current_thread() is threading.main_thread():
            begin()
        else:
            _in_a_thread_that_lasts(begin)
    else:
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, AuthenticationError, RuntimeError) as error:
            if "Version mismatch" in str(error):
                raise ValueError(
                    f"address: the Ray cluster at {address!r} and this process do not go together "
                    f"({' '.join(str(error).split()):.300}); use the same Ray and Python on all nodes"
                ) from error
            reason = str(error).partition("\n")[0].partition(". ")[0]
            raise ValueError(
                f"address: no Ray cluster at {address!r} takes this process ({reason}). Is it up, is this "
                "machine a node of it, and do RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH give its token?"
            ) from error


def _in_a_thread_that_lasts(begin: Callable[[], object]) -> None:
    """Start Ray where a sweep is not in the main thread.

    Ray's processes die with the thread that has started them, and a minute later this whole process, perhaps
    in the middle of another sweep.
    """
    begun, leaving = Future[object](), threading.Event()

    def last() -> None:
        try:
            begun.set_result(begin())
        except BaseException as error:
            begun.set_exception(error)
        else:
            leaving.wait()

    threading.Thread(target=last, name="ray", daemon=True).start()
    begun.result()
    _leaving.append(leaving)
