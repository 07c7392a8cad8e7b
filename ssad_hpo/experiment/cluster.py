"""A study whose trials run on a Ray cluster: what it checks beforehand, and how it runs them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import optuna

from ssad_hpo import tracking
from ssad_hpo.experiment.run_folder import Cluster, Settings
from ssad_hpo.search import Objective


def check_cluster(
    cluster: Cluster, folder: Path, n_trials: int, scheduler: str, device: str, storage: str | None
) -> Cluster:
    """The cluster with its storage path made absolute; below the run folder if it has none.

    Raises:
        ValueError: for what cannot be swept so, before anything is written.
    """
    from ssad_hpo import raytune  # imported here: Ray takes seconds, and a local search needs none

    raytune.check_resources(
        n_trials,
        cluster.cpus_per_trial,
        cluster.gpus_per_trial,
        cluster.max_concurrent,
        device,
        cluster.address,
    )
    if scheduler not in raytune.SCHEDULERS:
        raise ValueError(f"scheduler: expected one of {', '.join(raytune.SCHEDULERS)}, got {scheduler!r}")
    if storage is not None and storage.startswith("sqlite"):
        raise ValueError(
            "storage: SQLite locks up when several processes write, as sweeps do that share it; expected a "
            "server's database such as postgresql://..., or none for a journal in the run folder, got "
            f"{tracking.without_password(storage)!r}"
        )
    return replace(cluster, storage_path=raytune.absolute_storage(cluster.storage_path or folder / "ray"))


def sweep_trials(settings: Settings, cluster: Cluster, study: optuna.Study, objective: Objective) -> None:
    """Bring a study to its number of trials on a cluster; see `raytune.sweep`."""
    from ssad_hpo import raytune

    raytune.sweep(
        objective,
        study,
        settings.n_trials,
        storage_path=cluster.storage_path,
        scheduler=settings.pruner,
        reduction_factor=settings.reduction_factor,
        cpus_per_trial=cluster.cpus_per_trial,
        gpus_per_trial=cluster.gpus_per_trial,
        max_concurrent=cluster.max_concurrent,
        address=cluster.address,
    )
