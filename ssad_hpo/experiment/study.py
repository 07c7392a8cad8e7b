"""A study from start to end: load, search or tune, record; then, where ground truth exists, evaluate."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import optuna

from ssad_hpo import data, numerics, tracking, trust
from ssad_hpo.address import without_password_of
from ssad_hpo.bilevel import Tuning
from ssad_hpo.bounds import MOST_THREADS, whole
from ssad_hpo.experiment.checking import prepare_cluster, prepare_search, weights_digest
from ssad_hpo.experiment.confirming import confirm_run
from ssad_hpo.experiment.deploying import log_model
from ssad_hpo.experiment.heatmaps import learn_heatmaps
from ssad_hpo.experiment.outcome import (
    StudyResult,
    choose,
    compare_with_truth,
    load_task,
    record_result,
)
from ssad_hpo.experiment.run_folder import (
    Run,
    RunError,
    choose_run_folder,
    claimed,
    locked,
    open_run,
)
from ssad_hpo.experiment.settings import Settings, creation_facts, new_study_name
from ssad_hpo.experiment.telling import dataset_of, tags_of, tell_summary
from ssad_hpo.experiment.tuning import prepare_tuning, tune_run
from ssad_hpo.experiment.usual import search_for, training_for, tuned_training_for
from ssad_hpo.search import Objective, open_study, run_search, was_interrupted
from ssad_hpo.storage import absolute_storage, open_database
from ssad_hpo.task import Cluster, Recorder, Search, Task, Training

DEFAULT_TRACKING = "default"


class StudyInterrupted(KeyboardInterrupt):
    """Ctrl-C in a study. All that is done is kept in `run`; the message says what goes on with it."""

    def __init__(self, run: Path) -> None:
        super().__init__(f"stopped; go on with resume_study({str(run)!r})")
        self.run = run


def run_study(
    images: Task | data.Source | str | Path,
    search: Search | Tuning | None = None,
    training: Training | None = None,
    *,
    cluster: Cluster | None = None,
    run: str | Path | None = None,
    storage: str | None = None,
    tracking_uri: str | None = DEFAULT_TRACKING,
    experiment: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    listeners: Sequence[Recorder] = (),
    announce: Callable[[Run], None] | None = None,
) -> StudyResult:
    """Find augmentation hyperparameters without labels, choose a detector, and judge the choice.

    A `Search` trains many detectors with augmentations that Optuna proposes; a `Tuning` moves those of a few
    kinds by gradient, before their detectors train or while they do, from several starting points, each of
    which is a trial.
    The ground truth, where it exists, is read after all of that has ended.

    >>> from ssad_hpo import Search, Training, run_study
    >>> search, training = Search(space="rotation", n_trials=2), Training(steps=8, batch_size=4, width=2)
    >>> result = run_study("digits/4", search, training, run="digits", tracking_uri=None)
    >>> print(result.selected.augmentation.kind, len(result.aucs), result.run.folder.name)
    rotation 2 digits

    With a cluster this process draws the candidates, and alone writes to Optuna's storage, to MLflow and
    into the run folder, which is like that of a local search. A trial whose worker dies goes on elsewhere
    from its last checkpoint; a trial that fails fails alone. With several workers the candidates depend on
    who was first, and a seed fixes them no longer; each candidate's detector stays the same.

    Args:
        images: a task, the address of one, a folder in the published layout of MVTec AD, or a built-in
            name such as "gravel/cutavg".
        search: how detectors are found; by default `search_for` these images.
        training: settings of every training; by default `training_for` these images with the search's seed,
            for a tuning `tuned_training_for` them.
        cluster: where the trials of a search run on Ray; None runs them in this process.
        run: the run folder, a path or a name below runs/; one is made up if None.
        storage: URL of a database for Optuna; by default a journal file in the run folder.
        tracking_uri: of MLflow; by default MLFLOW_TRACKING_URI or sqlite:///mlflow.db; None for none.
        experiment: of MLflow, its name or "#ID"; by default the one that MLFLOW_EXPERIMENT_NAME or
            `mlflow.set_experiment` has chosen, else "ssad_hpo".
        device: where to train, "cpu" or "cuda"; by default "cuda" where a cluster's trials have a GPU, else
            "cpu".
        threads: of the processor for training, by default one: several wait for each other wherever
            something else needs the cores.
        listeners: told of every trial as it happens, beside MLflow.
        announce: told of the run, with all its settings, before the first trial.

    Returns:
        The `StudyResult`; its `evaluation` is None where there is no ground truth.

    Warns:
        CollapseWarning: if the best starting point of a tuning shows a sign of collapse, and for each that
            failed.

    Raises:
        ValueError: for a wrong argument (before anything is written), or a study in which no trial ran
            its whole budget.
        DetectorError: if every starting point of a tuning diverged or collapsed, or the encoder as it comes,
            which steps before the training need, cannot be judged.
        StudyInterrupted: on Ctrl-C, with all that is done kept; `resume_study` goes on.
    """
    task, source = data.load_images(images)
    method = search or search_for(source)
    folder = choose_run_folder(run, task.name)
    if threads is not None:
        whole("threads", threads, 1, MOST_THREADS)
    if cluster is not None:
        device = device or ("cuda" if cluster.gpus_per_trial else "cpu")
        threads = threads or max(1, int(cluster.cpus_per_trial))
        cluster = prepare_cluster(cluster, method, folder, device, storage)
    device = device or "cpu"
    height, width = task.train.shape[2:]
    method = replace(method, space=method.space.within(height=height, width=width))
    if isinstance(method, Tuning):
        training = prepare_tuning(method, training or tuned_training_for(source, method), task, device)
    else:
        training = training or replace(training_for(source), seed=method.seed)
        training = prepare_search(method, training, task, device, cluster)
    settings = Settings(
        study_name=new_study_name(folder),
        source=source,
        task_name=task.name,
        content_hash=task.content_hash,
        method=method,
        training=training,
        cluster=cluster,
        device=device,
        threads=threads or numerics.DEFAULT_THREADS,
        storage=storage and absolute_storage(storage),
        tracking_uri=_absolute_tracking_uri(tracking_uri),
        experiment=experiment or tracking.default_experiment(),
        weights_digest=weights_digest(training, task),
        **creation_facts(),
    )
    if settings.storage is not None:
        open_database(settings.storage, create=True)
    made = Run(folder, settings, trusted=True)
    made.check_addresses()
    with claimed(folder):  # from here on there is something on disk; every argument has been checked before
        made.write()
        return _conduct(made, task, listeners, announce)


def _absolute_tracking_uri(given: str | None) -> str | None:
    if given is None:
        return None
    return tracking.default_tracking_uri() if given == DEFAULT_TRACKING else tracking.absolute_uri(given)


def resume_study(
    run: str | Path,
    *,
    task: Task | None = None,
    n_trials: int | None = None,
    address: str | None = None,
    trust_addresses: bool = False,
    listeners: Sequence[Recorder] = (),
    announce: Callable[[Run], None] | None = None,
) -> StudyResult:
    """Go on with a study that was stopped, by whatever means, with the settings of its run folder.

    Finished trials stay; those that were cut off are run again, the starting points of a tuning from their
    last checkpoint. The result is that of an uninterrupted study; of a tuning bit for bit, trajectories
    included.

    Args:
        run: the run folder, or its name below runs/.
        task: the task, if the study was started on one in memory.
        n_trials: another total number of trials, of a search.
        address: another Ray cluster for the rest of a sweep.
        trust_addresses: vouch for the run's addresses; see `open_run`.
        listeners, announce: as in `run_study`.

    Raises:
        RunError: if there is no such run, another process works on it, or the images have changed.
        ValueError: for a wrong argument, or an address that needs `trust_addresses`.
    """
    opened = open_run(run, trust_addresses=trust_addresses)
    if opened.settings.cluster is None:
        numerics.check_device(opened.settings.device)
    task, settings = load_task(opened, task), opened.settings
    if settings.weights_digest != weights_digest(settings.training, task):
        raise RunError(
            f"{opened.folder}: the weights of {settings.training.encoder} are not those that the study began "
            "with; restore them or start a new study"
        )
    if n_trials is not None:
        if isinstance(settings.method, Tuning):
            raise ValueError(f"n_trials: {opened.folder} is a tuning, whose starting points are its trials")
        search = replace(settings.method, n_trials=n_trials)
        search.check_trials(settings.training)
        if n_trials == 0 and settings.n_trials:
            raise ValueError(
                f"n_trials: expected a whole number >= 1, got 0: {opened.folder} is of {settings.n_trials}"
            )
        settings = replace(settings, method=search)
    if address is not None:
        if settings.cluster is None:
            raise ValueError(f"address: {opened.folder} is a local search, and has no Ray cluster")
        from ssad_hpo import raytune

        settings = replace(settings, cluster=replace(settings.cluster, address=address))
        assert settings.cluster is not None
        raytune.check_cluster(settings.cluster, settings.device, join=True)
        trust.remember("address", address)
    resumed = replace(opened, settings=settings)
    resumed.check_addresses()
    with locked(opened.folder):
        if resumed != opened:
            resumed.write()
            shutil.rmtree(resumed.combined, ignore_errors=True)  # of fewer candidates than there will be
        return _conduct(resumed, task, listeners, announce)


def _conduct(
    run: Run, task: Task, listeners: Sequence[Recorder], announce: Callable[[Run], None] | None
) -> StudyResult:
    """Do the work of a run whose folder is locked: train and choose without labels, and only then judge."""
    settings = run.settings
    with numerics.threads(settings.threads), run.open_recorder() as recorder:
        if announce is not None:
            announce(run)
        recorder.study_started(settings.flat(), tags_of(settings), dataset_of(settings, task))
        everyone = tracking.Joined([recorder, *listeners], settings.tags)
        try:
            if settings.tuning is None:
                study = _search(run, task, everyone)
            else:
                study = tune_run(run, task, everyone, recorder)
            result = choose(run, study)
            learn_heatmaps(result, task)
            if result.combined is not None:
                result.detector().save(run.combined)
            # The work is over and the choice is made; only now may ground truth be read.
            result = compare_with_truth(result)
            record_result(recorder, result)
            tell_summary(recorder, result, task)
            log_model(recorder, result)
        except BaseException as error:
            if was_interrupted(error):
                recorder.study_ended("interrupted")
                raise StudyInterrupted(run.folder) from None
            if isinstance(error, Exception):
                reason = str(error)
                for address in settings.addresses.values():  # which a driver may repeat
                    reason = without_password_of(address, reason)
                recorder.study_ended("failed", reason)
            raise
        recorder.study_ended("complete")
    return replace(result, undelivered=run.undelivered(), lost=recorder.lost, trouble=recorder.trouble)


def _search(run: Run, task: Task, recorder: Recorder) -> optuna.Study:
    """Bring the study of a run to its number of trials, taking up what an earlier process left."""
    settings, search = run.settings, run.settings.method
    assert isinstance(search, Search)
    objective = Objective(
        task, search, settings.training, artifacts=run.artifacts, device=settings.device, recorder=recorder
    )
    # On a cluster Ray's scheduler stops the trials.
    drawing = search if settings.cluster is None else replace(search, pruner="none")
    study_name = settings.study_name
    study = run.open_study(lambda s: open_study(s, study_name, drawing, settings.training), create=True)
    if settings.cluster is None:
        run_search(study, objective)
    else:
        from ssad_hpo import raytune

        raytune.sweep(objective, study, settings.cluster)
    confirm_run(run, study, objective)
    return study


def sync_run(run: str | Path, *, trust_addresses: bool = False) -> tracking.SyncResult:
    """Deliver to MLflow what could not be delivered while the study ran.

    Raises:
        RunError: if there is no such run. ValueError: if it was made without tracking, or for an address
            that needs `trust_addresses` (see `open_run`).
    """
    opened = open_run(run, trust_addresses=trust_addresses)
    if opened.settings.tracking_uri is None:
        raise ValueError(f"{opened.folder}: was made without tracking, so there is nothing to deliver")
    opened.check_addresses("tracking_uri")
    return tracking.sync(opened.outbox, opened.settings.tracking_uri)
