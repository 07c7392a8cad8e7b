"""The best candidates of a sweep trained again with other seeds, on the cluster that trained them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
import ray
import torch
from ray.exceptions import RayError, RayTaskError

from ssad_hpo.raytune.reaching import LOOK_AGAIN, check_room, warn_without_room
from ssad_hpo.raytune.sweeping import MAX_FAILURES, connected, surroundings
from ssad_hpo.raytune.worker import arrays_of, taken_weights, task_of, weights_of
from ssad_hpo.search import Objective
from ssad_hpo.search.reseeding import (
    Again,
    Reseeded,
    keep,
    left_to_confirm,
    tell_interruption,
    tell_start,
    train_again,
)
from ssad_hpo.task import Cluster, Search, Training


def confirm(study: optuna.Study, objective: Objective, cluster: Cluster) -> None:
    """As `search.confirm`, with the trainings on all nodes, which have what trials have.

    A training whose worker dies is done again elsewhere; one that diverges or collapses fails alone.

    Raises:
        ValueError: for a cluster that is not there or refuses this process.
        ConnectionError: for a training that the cluster did not bring to an end; nothing is kept of it, so
            that a later call does it again.
        KeyboardInterrupt: on Ctrl-C, with all that is done kept.
    """
    waiting = left_to_confirm(study, objective.search, objective.training)
    if not waiting:
        return
    with surroundings(), connected(cluster.address) as runs_on:
        check_room(cluster)
        task, running = objective.task, dict[Any, Again]()
        started = ray.remote(_train_again).options(
            num_cpus=cluster.cpus_per_trial, num_gpus=cluster.gpus_per_trial, max_retries=MAX_FAILURES
        )
        given = (task.name, objective.search, objective.training, str(objective.device))
        threads, at_once = max(1, int(cluster.cpus_per_trial)), cluster.max_concurrent or len(waiting)
        try:
            place, weights = ray.put(arrays_of(task)), ray.put(weights_of(objective))
            while waiting or running:
                while waiting and len(running) < at_once:
                    again = waiting.pop(0)
                    tell_start(objective, again)
                    running[started.remote(place, weights, *given, again, threads)] = again
                done, _ = ray.wait(list(running), timeout=LOOK_AGAIN)
                if not done:
                    warn_without_room(cluster)
                for reference in done:
                    found = _result_of(reference, running[reference])
                    keep(study, objective, running.pop(reference), found)
        except BaseException as error:
            for again in running.values():
                tell_interruption(objective, again, repr(error))
            if running and runs_on():  # else they end with it
                with contextlib.suppress(RayError, OSError):  # there may be no cluster any more
                    # To cancel what has just ended can abort this whole process.
                    for reference in ray.wait(list(running), num_returns=len(running), timeout=0)[1]:
                        ray.cancel(reference, force=True)
            if isinstance(error, RayError):
                raise _cut_off(
                    error, "the best trials were not all trained again with other seeds"
                ) from error
            raise


def _train_again(
    images: Mapping[str, np.ndarray],
    weights: Mapping[str, np.ndarray] | None,
    task_name: str,
    search: Search,
    training: Training,
    device: str,
    again: Again,
    threads: int,
) -> Reseeded:
    """One training, in a worker."""
    torch.set_num_threads(threads)
    with taken_weights(training, weights):
        return train_again(task_of(task_name, **images), search, training, device, again)


def _result_of(reference: Any, again: Again) -> Reseeded:
    """What a training came to, a failure of its own included, which its worker gives back like a success.

    Raises:
        ConnectionError: if it came to no end. That says nothing of the candidate: locally, too, all but a
            `DetectorError` ends the command.
    """
    try:
        found: Reseeded = ray.get(reference)
        return found
    except (RayError, OSError) as error:
        what = f"trial {again.trial} was not trained again with seed {again.seed}"
        raise _cut_off(error, what) from _raised(error)


def _cut_off(error: BaseException, what: str) -> ConnectionError:
    """What is told of a fault of the cluster, or of a worker on it."""
    raised = _raised(error)
    reason = str(raised).strip().partition("\n")[0] or "Ray does not say why"
    return ConnectionError(
        f"{what}, since the Ray cluster failed ({type(raised).__name__}: {reason:.200}); mend it, and go on "
        "with --resume"
    )


def _raised(error: BaseException) -> BaseException:
    """What a worker raised, if it is behind an error of Ray's, which quotes whole tracebacks."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    return error
