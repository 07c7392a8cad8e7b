"""A tuning by gradient from start to end: load, tune, record; then, where ground truth exists, evaluate.

Every starting point becomes a trial of an Optuna study as soon as it is finished, with the criteria,
scores, embeddings and detector that a trial of a search has. So whatever follows a search (selecting,
evaluating, reporting, scoring) follows a tuning as it is.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution

from ssad_hpo import data, tracking
from ssad_hpo.bilevel import DEFAULT_TRAINING, FailedStart, OuterStep, TunedStart, Tuning, prepare, tune
from ssad_hpo.criteria import VALIDATION_LOSS
from ssad_hpo.experiment.conducting import (
    DEFAULT_TRACKING,
    EXPERIMENT,
    common_settings,
    conduct,
    load_images,
)
from ssad_hpo.experiment.judging import StudyResult, load_task, open_storage
from ssad_hpo.experiment.run_folder import Run, RunError, Settings, choose_run_folder, open_run
from ssad_hpo.search import FAILURE, Candidate
from ssad_hpo.search.kept import FolderStore
from ssad_hpo.search.objective import ARTIFACTS, BUDGET, HYPERPARAMETERS
from ssad_hpo.task import Augmentation, Range, Recorder, SearchSpace, Task, Training

# User attributes of a trial that is a starting point, beside those of a search's trial.
START = "start"  # hyperparameters that it began with
COLLAPSE = "collapse"  # signs of collapse, sentences with their remedy
IMAGES = "images"  # images passed forward and backward, see `bilevel.Cost`
_TRAJECTORY_FILE = "trajectory.csv"
_LOSSES = ("training_loss", "validation_loss")


def run_tuning(
    images: Task | data.Source | str | Path,
    augmentation: Augmentation | str,
    *,
    tuning: Tuning | None = None,
    training: Training | None = None,
    run: str | Path | None = None,
    tracking_uri: str | None = DEFAULT_TRACKING,
    experiment: str = EXPERIMENT,
    device: str = "cpu",
    threads: int | None = None,
    listeners: Sequence[Recorder] = (),
    announce: Callable[[Run], None] | None = None,
) -> StudyResult:
    """Tune an augmentation by gradient while its detector trains, without labels, and judge the choice.

    The starting points are the trials of the result's study; the one lowest in `tuning.choose_by` is
    selected. The ground truth, where it exists, is read after the tuning has ended.

    Args:
        images: a task, the address of one, a folder in the published layout of MVTec AD, or a built-in
            name such as "gravel/cutavg".
        augmentation: what to tune, within its ranges; a kind's name stands for its default ranges.
        tuning: how; `Tuning()` if None. Its loss must be one of those with a name, so that the run can be
            taken up again.
        training: of each starting point's detector; `bilevel.DEFAULT_TRAINING` if None.
        run: the run folder, a path or a name below runs/; one is made up if None.
        tracking_uri: of MLflow; by default MLFLOW_TRACKING_URI or sqlite:///mlflow.db; None for none.
        experiment: of MLflow.
        device: where to train, "cpu" or "cuda".
        threads: of the processor for training; torch's own choice if None.
        listeners: told of every starting point as it moves, beside MLflow.
        announce: told of the run, with all its settings, before anything is trained.

    Returns:
        The `StudyResult`; its `evaluation` is None where there is no ground truth.

    Warns:
        CollapseWarning: if the selected starting point shows a sign of collapse, and for one that failed.

    Raises:
        ValueError: for a wrong argument; nothing is written then.
        DetectorError: if every starting point diverged or collapsed; it names the hyperparameters.
        StudyInterrupted: on Ctrl-C, with all that is done kept; `resume_tuning` goes on.
    """
    tuning, training = tuning or Tuning(), training or DEFAULT_TRAINING
    if not isinstance(tuning.loss, str):
        raise ValueError("loss: a run can only keep the name of one, got a function; use ssad_hpo.tune")
    starts = tuple(dict(start) if isinstance(start, Mapping) else float(start) for start in tuning.starts)
    tuning = replace(tuning, starts=starts)
    augmentation = Augmentation(augmentation) if isinstance(augmentation, str) else augmentation
    task, source = load_images(images)
    folder = choose_run_folder(run, task.name)
    common = common_settings(
        folder,
        task,
        source,
        device=device,
        threads=threads,
        tracking_uri=tracking_uri,
        experiment=experiment,
    )
    setting, _ = prepare(task, augmentation, tuning, training, device)
    settings = Settings(
        criterion=tuning.choose_by,
        space=SearchSpace({augmentation.kind: augmentation.hyperparameters}),
        training=setting.training,
        n_trials=len(tuning.starts),
        sampler="gradient",
        pruner="none",
        reduction_factor=0,
        grid_points=0,
        seed=training.seed,
        keep=len(tuning.starts),
        storage=None,
        tuning=tuning,
        **common,
    )
    made = Run(folder, settings)
    made.write()  # from here on there is something on disk; every argument has been checked before
    return _tune(made, task, listeners, announce)


def resume_tuning(
    run: str | Path,
    *,
    task: Task | None = None,
    listeners: Sequence[Recorder] = (),
    announce: Callable[[Run], None] | None = None,
) -> StudyResult:
    """Go on with a tuning that was stopped, by whatever means, from its last checkpoint.

    The result, trajectories included, is that of an uninterrupted tuning, bit for bit.

    Args:
        run: the run folder, or its name below runs/.
        task: the task, if the tuning was started on one in memory.
        listeners, announce: as in `run_tuning`.

    Raises:
        RunError: if there is no such run or it is a search, another process works on it, or the images
            have changed.
    """
    opened = open_run(run)
    if opened.settings.tuning is None:
        raise RunError(f"{opened.folder}: is a search, which `search --resume` (resume_study) goes on with")
    return _tune(opened, load_task(opened, task), listeners, announce)


def read_trajectory(start: Candidate) -> tuple[OuterStep, ...]:
    """Every step of the hyperparameters of a tuning's starting point, in order.

    Raises:
        FileNotFoundError: if its artifacts are gone.
    """
    with (Path(start.address) / _TRAJECTORY_FILE).open(newline="") as file:
        head, *rows = csv.reader(file)
    names = head[1:-2]
    return tuple(
        OuterStep(int(step), dict(zip(names, values, strict=True)), training_loss, validation_loss)
        for step, *numbers in rows
        for *values, training_loss, validation_loss in [list(map(float, numbers))]
    )


def _tune(
    run: Run,
    task: Task,
    listeners: Sequence[Recorder],
    announce: Callable[[Run], None] | None,
) -> StudyResult:
    """Bring a tuning to its end, then judge it."""
    settings, tuning = run.settings, run.settings.tuning
    assert tuning is not None and isinstance(tuning.loss, str)
    ((kind, hyperparameters),) = settings.space.kinds.items()

    def work(everyone: Recorder, recorder: tracking.NullRecorder) -> optuna.Study:
        study = optuna.create_study(
            storage=open_storage(run), study_name=settings.study_name, load_if_exists=True
        )

        def keep(index: int, tuned: TunedStart | FailedStart) -> None:
            # The trial comes last: should a kill come before it, the checkpoint gives the start again.
            known = index < len(study.get_trials(deepcopy=False))
            if isinstance(tuned, FailedStart):
                if not known:
                    study.add_trial(_failed_trial(settings, tuned))
                return
            if not known:
                store = FolderStore(run.artifacts)
                address = store.put(index, tuned.scores, tuned.embeddings, tuned.detector)
                _write_trajectory(Path(address), tuned.trajectory)
                study.add_trial(_trial(settings, tuned, address))
            if tuned.warnings:
                recorder.trial_tags(str(index), {COLLAPSE: "; ".join(tuned.warnings)})

        result = tune(
            task,
            Augmentation(kind, hyperparameters),
            tuning,
            settings.training,
            device=settings.device,
            recorder=everyone,
            checkpoint=run.checkpoint,
            keep=keep,
        )
        cost = {f"images_{name}": float(count) for name, count in vars(result.cost).items()}
        recorder.study_metrics({**cost, "seconds": cost.pop("images_seconds")})
        if result.warnings:
            recorder.study_tags({COLLAPSE: "; ".join(result.warnings)})
        return study

    tags = {"method": "st-ssad", "loss": tuning.loss}
    return conduct(run, work, listeners, announce, tags=tags, resume="resume_tuning")


def _trial(settings: Settings, tuned: TunedStart, address: str) -> optuna.trial.FrozenTrial:
    """A finished starting point as a trial that ran its whole budget."""
    kind, learned = tuned.augmentation.kind, tuned.augmentation.hyperparameters
    space = settings.space.kinds[kind]
    ranges = {name: given for name, given in space.items() if isinstance(given, Range)}
    return optuna.trial.create_trial(
        params={"augmentation": kind, **{f"{kind}.{name}": learned[name] for name in ranges}},
        distributions={
            "augmentation": CategoricalDistribution([kind]),
            **{f"{kind}.{name}": FloatDistribution(r.low, r.high, log=r.log) for name, r in ranges.items()},
        },
        value=tuned.value(settings.criterion),
        user_attrs={
            **tuned.criteria,
            VALIDATION_LOSS: tuned.validation_loss,
            "loss": tuned.training_loss,
            "seconds": round(tuned.cost.seconds, 3),
            IMAGES: tuned.cost.images,
            HYPERPARAMETERS: learned,
            START: tuned.start.hyperparameters,
            COLLAPSE: list(tuned.warnings),
            ARTIFACTS: address,
            BUDGET: settings.training.steps,
        },
    )


def _failed_trial(settings: Settings, failed: FailedStart) -> optuna.trial.FrozenTrial:
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.FAIL,
        params={"augmentation": failed.start.kind},
        distributions={"augmentation": CategoricalDistribution([failed.start.kind])},
        user_attrs={
            FAILURE: failed.reason,
            "seconds": round(failed.cost.seconds, 3),
            IMAGES: failed.cost.images,
            START: failed.start.hyperparameters,
            BUDGET: settings.training.steps,
        },
    )


def _write_trajectory(folder: Path, trajectory: tuple[OuterStep, ...]) -> None:
    names = list(trajectory[0].hyperparameters)
    with (folder / _TRAJECTORY_FILE).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", *names, *_LOSSES])
        for outer in trajectory:
            values = [*outer.hyperparameters.values(), outer.training_loss, outer.validation_loss]
            writer.writerow([outer.step, *map(repr, values)])  # repr gives every float back as it was
