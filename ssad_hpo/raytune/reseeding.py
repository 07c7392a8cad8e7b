"""The best candidates of a sweep trained again with other seeds, on the cluster that trained them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
import ray
import torch
from ray.exceptions import RayError

from ssad_hpo.raytune.reaching import check_room
from ssad_hpo.raytune.sweeping import MAX_FAILURES, connected, surroundings
from ssad_hpo.raytune.worker import arrays_of, task_of
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

    A training whose worker dies is done again elsewhere; one that fails, fails alone.

    Raises:
        ValueError: for a cluster that is not there or refuses this process.
        KeyboardInterrupt: on Ctrl-C, with all that is done kept.
    """
    waiting = left_to_confirm(study, objective.search, objective.training)
    if not waiting:
        return
    with surroundings(), connected(cluster.address):
        check_room(cluster)
        task, running = objective.task, dict[Any, Again]()
        place = ray.put(arrays_of(task))
        started = ray.remote(_train_again).options(
            num_cpus=cluster.cpus_per_trial, num_gpus=cluster.gpus_per_trial, max_retries=MAX_FAILURES
        )
        given = (task.name, objective.search, objective.training, str(objective.device))
        threads, at_once = max(1, int(cluster.cpus_per_trial)), cluster.max_concurrent or len(waiting)
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    again = waiting.pop(0)
                    tell_start(objective, again)
                    running[started.remote(place, *given, again, threads)] = again
                for done in ray.wait(list(running))[0]:
                    keep(study, objective, running.pop(done), _result_of(done))
        except BaseException as error:
            for reference, again in running.items():
                ray.cancel(reference, force=True)
                tell_interruption(objective, again, repr(error))
            raise


def _train_again(
    images: Mapping[str, np.ndarray],
    task_name: str,
    search: Search,
    training: Training,
    device: str,
    again: Again,
    threads: int,
) -> Reseeded:
    """One training, in a worker."""
    torch.set_num_threads(threads)
    return train_again(task_of(task_name, **images), search, training, device, again)


def _result_of(reference: Any) -> Reseeded:
    try:
        found: Reseeded = ray.get(reference)
        return found
    except RayError as error:  # its worker died too often, or raised: this training fails alone
        reason = str(error).strip().rpartition("\n")[2]
        return Reseeded({}, None, 0.0, f"{type(error).__name__}: {reason}")
