"""A study from start to end: load, search, record; then, where ground truth exists, evaluate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import optuna
import torch

from ssad_hpo import data, tracking
from ssad_hpo.detector import check_device, resolve_precision
from ssad_hpo.experiment.cluster import check_cluster, sweep_trials
from ssad_hpo.experiment.conducting import (
    DEFAULT_TRACKING,
    EXPERIMENT,
    common_settings,
    conduct,
    load_images,
    open_recorder,
    undelivered,
)
from ssad_hpo.experiment.judging import (
    StudyResult,
    load_task,
    open_database,
    open_result,
    open_storage,
    record_result,
)
from ssad_hpo.experiment.run_folder import (
    Cluster,
    Run,
    RunError,
    Settings,
    choose_run_folder,
    locked,
    open_run,
)
from ssad_hpo.search import REDUCTION_FACTOR, Objective, make_pruner, make_sampler, open_study, run_search
from ssad_hpo.task import Recorder, SearchSpace, Task, Training


def run_study(
    images: Task | data.Source | str | Path,
    *,
    criterion: str = "dsv",
    space: SearchSpace | str | Sequence[str] | None = None,
    training: Training | None = None,
    n_trials: int = 16,
    sampler: str = "tpe",
    pruner: str = "none",
    reduction_factor: int = REDUCTION_FACTOR,
    grid_points: int = 4,
    seed: int = 0,
    keep: int = 3,
    run: str | Path | None = None,
    storage: str | None = None,
    tracking_uri: str | None = DEFAULT_TRACKING,
    experiment: str = EXPERIMENT,
    device: str = "cpu",
    threads: int | None = None,
    cluster: Cluster | None = None,
    listeners: Sequence[Recorder] = (),
    announce: Callable[[Run], None] | None = None,
) -> StudyResult:
    """Search augmentation hyperparameters without labels, choose a detector, and judge the choice.

    The ground truth, where it exists, is read after the search has ended.

    Args:
        images: a task, the address of one, a folder in the published layout of MVTec AD, or a built-in
            name such as "gravel/cutavg".
        criterion: what to minimise, a key of `ssad_hpo.CRITERIA`.
        space: the augmentations to choose among; CutAvg over its default ranges if None.
        training: settings of every training; by default those of `Training` with this `seed`.
        n_trials: how many candidates to train.
        sampler: "tpe", "random", "grid" or "gp".
        pruner: "none", "asha" or "median"; stops poor trials at the evaluation steps of the training.
        reduction_factor: of "asha": the best of every so many trials go on.
        grid_points: values per hyperparameter of the sampler "grid".
        seed: of the sampler, and of the training unless that is given.
        keep: how many of the best detectors to keep.
        run: the run folder, a path or a name below runs/; one is made up if None.
        storage: URL of a database for Optuna; by default a journal file in the run folder.
        tracking_uri: of MLflow; by default MLFLOW_TRACKING_URI or sqlite:///mlflow.db; None for none.
        experiment: of MLflow.
        device: where to train, "cpu" or "cuda".
        threads: of the processor for training; torch's own choice if None.
        cluster: run the trials on Ray, see `run_sweep`; `pruner` is then its scheduler.
        listeners: told of every trial as it happens, beside MLflow.
        announce: told of the run, with all its settings, before the first trial.

    Returns:
        The `StudyResult`; its `evaluation` is None where there is no ground truth.

    Raises:
        ValueError: for a wrong argument (before anything is written), or a study in which no trial ran
            its whole budget.
        StudyInterrupted: on Ctrl-C, with all that is done kept; `resume_study` goes on.
    """
    task, source = load_images(images)
    if n_trials < 1:
        raise ValueError(f"n_trials: expected at least 1, got {n_trials}")
    training = training or Training(seed=seed)
    height, width = task.train.shape[2:]
    folder = choose_run_folder(run, task.name)
    if cluster is None:
        check_device(device)
    else:
        cluster = check_cluster(cluster, folder, n_trials, pruner, device, storage)
    common = common_settings(
        folder, task, source, device=device, threads=threads, tracking_uri=tracking_uri, experiment=experiment
    )
    if device == "cpu" or torch.cuda.is_available():  # else the nodes with GPUs decide
        precision = resolve_precision(training, torch.device(device), height * width)
        training = replace(training, precision=precision)
    settings = Settings(
        criterion=criterion,
        space=space if isinstance(space, SearchSpace) else SearchSpace(space or "cutavg"),
        training=training,
        n_trials=n_trials,
        sampler=sampler,
        pruner=pruner,
        reduction_factor=reduction_factor,
        grid_points=grid_points,
        seed=seed,
        keep=keep,
        storage=storage,
        cluster=cluster,
        **common,
    )
    made = Run(folder, settings)
    objective = _objective(made, task)
    make_sampler(sampler, objective.space, seed, grid_points)
    make_pruner(pruner, training, reduction_factor)
    if storage is not None:
        open_database(storage)
    made.write()  # from here on there is something on disk; every argument has been checked before
    return _search(made, objective, listeners, announce)


def resume_study(
    run: str | Path,
    *,
    task: Task | None = None,
    n_trials: int | None = None,
    address: str | None = None,
    listeners: Sequence[Recorder] = (),
    announce: Callable[[Run], None] | None = None,
) -> StudyResult:
    """Go on with a study that was stopped, by whatever means, with the settings of its run folder.

    Finished trials stay; those that were cut off are run again. The result is that of an uninterrupted
    study.

    Args:
        run: the run folder, or its name below runs/.
        task: the task, if the study was started on one in memory.
        n_trials: another total number of trials.
        address: another Ray cluster for the rest of a sweep.
        listeners, announce: as in `run_study`.

    Raises:
        RunError: if there is no such run or it is a tuning, another process works on it, or the images
            have changed.
        ValueError: for a wrong argument.
    """
    opened = open_run(run)
    if opened.settings.tuning is not None:
        raise RunError(f"{opened.folder}: is a tuning, which `tune --resume` (resume_tuning) goes on with")
    task = load_task(opened, task)
    if n_trials is not None:
        if n_trials < 1:
            raise ValueError(f"n_trials: expected at least 1, got {n_trials}")
        opened = Run(opened.folder, replace(opened.settings, n_trials=n_trials))
    if address is not None:
        if opened.settings.cluster is None:
            raise ValueError(f"{opened.folder}: is a local search, and has no Ray cluster")
        cluster = replace(opened.settings.cluster, address=address)
        opened = Run(opened.folder, replace(opened.settings, cluster=cluster))
    if n_trials is not None or address is not None:
        with locked(opened.folder):
            opened.write()
    return _search(opened, _objective(opened, task), listeners, announce)


def evaluate_run(run: str | Path) -> StudyResult:
    """Judge a study's choice by the ground truth, and write the figures to MLflow.

    Raises:
        RunError: if there is no such run. ValueError: if there is no candidate, or no ground truth.
    """
    result = open_result(run)
    if result.evaluation is None:
        raise ValueError(
            f"{result.run.settings.task_name}: there is no ground truth, so nothing to evaluate; the chosen "
            f"detector is that of trial {result.selected.number}"
        )
    with locked(result.run.folder), open_recorder(result.run) as recorder:
        record_result(recorder, result)
    return replace(result, undelivered=undelivered(result.run), lost=recorder.lost)


def sync_run(run: str | Path) -> tracking.SyncResult:
    """Deliver to MLflow what could not be delivered while the study ran.

    Raises:
        RunError: if there is no such run. ValueError: if it was made without tracking.
    """
    opened = open_run(run)
    if opened.settings.tracking_uri is None:
        raise ValueError(f"{opened.folder}: was made without tracking, so there is nothing to deliver")
    return tracking.sync(opened.outbox, opened.settings.tracking_uri)


def _objective(run: Run, task: Task) -> Objective:
    settings = run.settings
    return Objective(
        task,
        settings.criterion,
        settings.space,
        settings.training,
        artifacts=run.artifacts,
        keep=settings.keep,
        device=settings.device,
    )


def _search(
    run: Run,
    objective: Objective,
    listeners: Sequence[Recorder],
    announce: Callable[[Run], None] | None,
) -> StudyResult:
    """Bring a run's study to its number of trials, then judge it."""
    settings, cluster = run.settings, run.settings.cluster

    def work(everyone: Recorder, _: tracking.NullRecorder) -> optuna.Study:
        objective.recorder = everyone
        study = open_study(
            open_storage(run),
            settings.study_name,
            objective,
            sampler=settings.sampler,
            pruner=settings.pruner if cluster is None else "none",  # Ray's scheduler stops the trials
            reduction_factor=settings.reduction_factor,
            seed=settings.seed,
            grid_points=settings.grid_points,
        )
        if cluster is None:
            run_search(study, objective, settings.n_trials)
        else:
            sweep_trials(settings, cluster, study, objective)
        return study

    return conduct(run, work, listeners, announce, tags={"sampler": settings.sampler}, resume="resume_study")
