"""What of a search can be wrong is found before anything is written or trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ssad_hpo.address import without_password
from ssad_hpo.bilevel import Tuning
from ssad_hpo.detector import check_device, resolve_precision, untrained_network
from ssad_hpo.encoder import NONE, digest_of
from ssad_hpo.search import Objective
from ssad_hpo.task import Cluster, Search, Task, Training


def prepare_search(
    search: Search, training: Training, task: Task, device: str, cluster: Cluster | None
) -> Training:
    """The training with its precision resolved, after whatever cannot be was refused.

    Raises:
        ValueError: for a wrong setting.
    """
    if cluster is None:
        check_device(device)
    Objective(task, search, training)
    if device != "cpu" and not torch.cuda.is_available():
        return training  # the nodes with GPUs decide
    channels, height, width = task.train.shape[1:]
    depthwise = untrained_network(training, (channels, height, width)).depthwise
    precision = resolve_precision(training, torch.device(device), height * width, depthwise=depthwise)
    return replace(training, precision=precision)


def prepare_cluster(
    cluster: Cluster, method: Search | Tuning, folder: Path, device: str, storage: str | None
) -> Cluster:
    """The cluster with its checkpoint path made absolute; below the run folder if it has none.

    Raises:
        ValueError: for what cannot be, before anything is written.
    """
    from ssad_hpo import raytune  # imported here: Ray takes seconds, and a local search needs none

    if isinstance(method, Tuning):
        raise ValueError("cluster: a tuning runs in this process alone, got a cluster; use a Search")
    raytune.check_cluster(cluster, device, join=True)
    if storage is not None and storage.startswith("sqlite"):
        raise ValueError(
            "storage: SQLite locks up when several processes write, as sweeps do that share it; expected a "
            "server's database such as postgresql://..., or none for a journal in the run folder, got "
            f"{without_password(storage)!r}"
        )
    place = raytune.absolute_checkpoint_path(cluster.checkpoint_path or folder / "ray")
    return replace(cluster, checkpoint_path=place)


def weights_digest(training: Training, task: Task) -> str | None:
    """SHA-256 of the pretrained encoder that a training begins with; None of one that is drawn by a seed."""
    if training.weights == NONE:
        return None
    channels, height, width = task.train.shape[1:]
    return digest_of(untrained_network(training, (channels, height, width)).encoder)
