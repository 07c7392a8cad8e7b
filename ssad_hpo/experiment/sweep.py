"""The sweep: a study as `run_study` makes one, on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ssad_hpo import data
from ssad_hpo.experiment.conducting import DEFAULT_TRACKING, EXPERIMENT
from ssad_hpo.experiment.judging import StudyResult
from ssad_hpo.experiment.run_folder import Cluster, Run
from ssad_hpo.experiment.study import run_study
from ssad_hpo.search import REDUCTION_FACTOR
from ssad_hpo.task import Recorder, SearchSpace, Task, Training


def run_sweep(
    images: Task | data.Source | str | Path,
    *,
    criterion: str = "dsv",
    space: SearchSpace | str | Sequence[str] | None = None,
    training: Training | None = None,
    n_trials: int = 16,
    sampler: str = "tpe",
    scheduler: str = "asha",
    reduction_factor: int = REDUCTION_FACTOR,
    address: str | None = None,
    cpus_per_trial: float = 1.0,
    gpus_per_trial: float = 0.0,
    max_concurrent: int | None = None,
    storage_path: str | Path | None = None,
    grid_points: int = 4,
    seed: int = 0,
    keep: int = 3,
    run: str | Path | None = None,
    storage: str | None = None,
    tracking_uri: str | None = DEFAULT_TRACKING,
    experiment: str = EXPERIMENT,
    listeners: Sequence[Recorder] = (),
    announce: Callable[[Run], None] | None = None,
) -> StudyResult:
    """Search as `run_study` does, with the trials on the nodes of a Ray cluster.

    This process draws the candidates, and alone writes to Optuna's storage, to MLflow and into the run
    folder, which is like that of a local search: `resume_study`, `evaluate_run`, `report_run` and the rest
    work on it. A trial whose worker dies goes on elsewhere from its last checkpoint; a trial that fails
    fails alone. With several workers the candidates depend on who was first, and a seed fixes them no
    longer; each candidate's detector stays the same.

    Args:
        images, criterion, space, training, n_trials, sampler, reduction_factor, grid_points, seed, keep, run,
            tracking_uri, experiment, listeners, announce: as in `run_study`.
        scheduler: "asha", "median" or "none"; stops poor trials at the evaluation steps of the training.
        address: of a Ray cluster that this machine is a node of, "auto" or HOST:PORT; None starts a Ray
            on this machine alone.
        cpus_per_trial: processors of a trial, which gets as many threads, at least one.
        gpus_per_trial: share of a GPU; above 0 the trials train on "cuda".
        max_concurrent: how many trials run at once; as many as fit if None.
        storage_path: a folder that every node reaches, or the URI of an object store, for the checkpoints
            of the trials that run; below the run folder if None.
        storage: URL of a database server for Optuna; by default a journal file in the run folder.

    Raises:
        ValueError, StudyInterrupted: as `run_study`.
    """
    return run_study(
        images,
        criterion=criterion,
        space=space,
        training=training,
        n_trials=n_trials,
        sampler=sampler,
        pruner=scheduler,
        reduction_factor=reduction_factor,
        grid_points=grid_points,
        seed=seed,
        keep=keep,
        run=run,
        storage=storage,
        tracking_uri=tracking_uri,
        experiment=experiment,
        device="cuda" if gpus_per_trial else "cpu",
        threads=max(1, int(cpus_per_trial)) if cpus_per_trial > 0 else None,
        cluster=Cluster(address, str(storage_path or ""), cpus_per_trial, gpus_per_trial, max_concurrent),
        listeners=listeners,
        announce=announce,
    )
