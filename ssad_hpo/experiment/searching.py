"""The work of a search: train candidates here or on a cluster, until all of its trials are there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import optuna
import torch

from ssad_hpo.address import without_password
from ssad_hpo.bilevel import Tuning
from ssad_hpo.detector import check_device, resolve_precision
from ssad_hpo.experiment.run_folder import Run
from ssad_hpo.search import Objective, open_study, run_search
from ssad_hpo.task import Cluster, Recorder, Search, Task, Training


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
    height, width = task.train.shape[2:]
    precision = resolve_precision(training, torch.device(device), height * width)
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
    raytune.check_cluster(cluster, device)
    if storage is not None and storage.startswith("sqlite"):
        raise ValueError(
            "storage: SQLite locks up when several processes write, as sweeps do that share it; expected a "
            "server's database such as postgresql://..., or none for a journal in the run folder, got "
            f"{without_password(storage)!r}"
        )
    place = raytune.absolute_checkpoint_path(cluster.checkpoint_path or folder / "ray")
    return replace(cluster, checkpoint_path=place)


def search_run(run: Run, task: Task, recorder: Recorder) -> optuna.Study:
    """Bring the study of a run to its number of trials, taking up what an earlier process left."""
    settings, search = run.settings, run.settings.method
    assert isinstance(search, Search)
    objective = Objective(
        task, search, settings.training, artifacts=run.artifacts, device=settings.device, recorder=recorder
    )
    local = settings.cluster is None
    # On a cluster Ray's scheduler stops the trials.
    drawing = search if local else replace(search, pruner="none")
    study = open_study(run.open_storage(create=True), settings.study_name, drawing, settings.training)
    if settings.cluster is None:
        run_search(study, objective)
    else:
        from ssad_hpo import raytune

        raytune.sweep(objective, study, settings.cluster)
    return study
