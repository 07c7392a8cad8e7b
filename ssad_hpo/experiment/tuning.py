"""The work of a tuning: its starting points become trials of a study as soon as they are finished.

They have the criteria, scores, embeddings and detector that trials of a search have. So whatever follows
a search (selecting, evaluating, reporting, scoring) follows a tuning as it is.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution

from ssad_hpo.bilevel import (
    EndedStart,
    FailedStart,
    OuterStep,
    StoppedStart,
    TunedStart,
    Tuning,
    TuningResult,
    prepare,
    tune,
)
from ssad_hpo.criteria import CRITERIA, VALIDATION_LOSS
from ssad_hpo.encoder import NONE
from ssad_hpo.experiment.run_folder import Run
from ssad_hpo.files import open_regular, reading
from ssad_hpo.search import Candidate, FolderStore, add_frozen, record, select
from ssad_hpo.task import Range, Recorder, StudyRecorder, Task, Teller, Training

COLLAPSE = "collapse"  # the tag of MLflow's runs that tells signs of collapse
_TRAJECTORY_FILE = "trajectory.csv"
_LOSSES = ("training_loss", "validation_loss")


def prepare_tuning(tuning: Tuning, training: Training, task: Task, device: str) -> Training:
    """The training with its precision resolved, after whatever cannot be was refused.

    Raises:
        ValueError: for a wrong setting.
    """
    if not isinstance(tuning.loss, str):
        raise ValueError("loss: a run can only keep the name of one, got a function; use ssad_hpo.tune")
    return prepare(task, tuning, training, device)[0].problem.training


def tune_run(run: Run, task: Task, recorder: Recorder, study_recorder: StudyRecorder) -> optuna.Study:
    """Bring the tuning of a run to its end, from its last checkpoint.

    Args:
        recorder: told of every starting point as it moves.
        study_recorder: told what it cost, and of signs of collapse.
    """
    settings, tuning = run.settings, run.settings.tuning
    assert tuning is not None
    name = settings.study_name
    study = run.open_study(
        lambda found: optuna.create_study(storage=found, study_name=name, load_if_exists=True), create=True
    )

    def keep(index: int, ended: EndedStart) -> None:
        # The trial comes last: should a kill come before it, the checkpoint gives the start again.
        if index >= len(study.get_trials(deepcopy=False)):
            study.add_trial(_trial(run, index, ended))
        if isinstance(ended, TunedStart) and ended.warnings:
            study_recorder.trial_tags(str(index), {COLLAPSE: "; ".join(ended.warnings)})

    result = tune(
        task,
        tuning,
        settings.training,
        device=settings.device,
        recorder=recorder,
        checkpoint=run.checkpoint,
        keep=keep,
    )
    _add_as_it_comes(run, study, result, Teller(recorder, task=task.name))
    cost = {f"images_{name}": float(count) for name, count in vars(result.cost).items()}
    study_recorder.study_metrics({"seconds": cost.pop("images_seconds"), **cost})
    if result.warnings and select(study, settings.criterion).number == result.chosen:
        study_recorder.study_tags({COLLAPSE: "; ".join(result.warnings)})
    return study


def _add_as_it_comes(run: Run, study: optuna.Study, result: TuningResult, tell: Teller) -> None:
    """The pretrained encoder as it comes, as a last candidate beside the starting points, as in a search."""
    settings = run.settings
    if settings.training.weights != NONE and settings.criterion in CRITERIA:
        store = FolderStore(run.artifacts)
        add_frozen(study, lambda: result.as_it_comes.evaluation, settings.criterion, store, tell)


def _trial(run: Run, index: int, ended: EndedStart) -> optuna.trial.FrozenTrial:
    """A starting point that ended, as a trial; what is kept of it is put into the run's store."""
    settings, kind = run.settings, ended.start.kind
    begun = record.started_at(ended.start, seconds=ended.cost.seconds, images=ended.cost.images)
    if isinstance(ended, FailedStart):
        return optuna.trial.create_trial(
            state=optuna.trial.TrialState.FAIL,
            params={"augmentation": kind},
            distributions={"augmentation": CategoricalDistribution([kind])},
            user_attrs=begun | record.failed(ended.reason),
        )
    tuned = {n: r for n, r in settings.method.space.kinds[kind].items() if isinstance(r, Range)}
    learned = ended.augmentation.hyperparameters
    params = {"augmentation": kind, **{f"{kind}.{name}": learned[name] for name in tuned}}
    distributions = {
        "augmentation": CategoricalDistribution([kind]),
        **{f"{kind}.{name}": FloatDistribution(r.low, r.high, log=r.log) for name, r in tuned.items()},
    }
    begun |= record.drawn(ended.augmentation)
    if isinstance(ended, StoppedStart):
        return optuna.trial.create_trial(
            state=optuna.trial.TrialState.PRUNED,
            params=params,
            distributions=distributions,
            # The criterion's by step, which before the training nothing has.
            intermediate_values={ended.step: ended.value} if ended.step else {},
            user_attrs=begun,
        )
    address = FolderStore(run.artifacts).put(f"trial-{index:05d}", ended.judged, ended.detector)
    _write_trajectory(Path(address), ended.trajectory)
    complete = record.complete(
        {**ended.criteria, VALIDATION_LOSS: ended.validation_loss},
        loss=ended.training_loss,
        seconds=ended.cost.seconds,
        budget=settings.training.steps,
        address=address,
    )
    return optuna.trial.create_trial(
        params=params,
        distributions=distributions,
        value=ended.value(settings.criterion),
        user_attrs=begun | complete | record.collapsed(ended.warnings),
    )


def _write_trajectory(folder: Path, trajectory: tuple[OuterStep, ...]) -> None:
    names = list(trajectory[0].hyperparameters)
    with (folder / _TRAJECTORY_FILE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", *names, *_LOSSES])
        for outer in trajectory:
            trained = "" if outer.training_loss is None else repr(outer.training_loss)  # none before it
            # repr gives every float back as it was.
            values = [*map(repr, outer.hyperparameters.values()), trained, repr(outer.validation_loss)]
            writer.writerow([outer.step, *values])


def read_trajectory(start: Candidate) -> tuple[OuterStep, ...]:
    """Every step of the hyperparameters of a tuning's starting point, in order.

    Raises:
        FileNotFoundError: if its artifacts are gone.
    """
    path = Path(start.address) / _TRAJECTORY_FILE
    with reading(path, "cannot be read as a tuning's trajectory", "restore it from a copy, or tune again"):
        with open_regular(path) as file:
            head, *rows = csv.reader(file.read().decode().splitlines())
        steps = [_outer_step(head[1:-2], row) for row in rows]
        if not steps:
            raise ValueError("expected at least one step")
        return tuple(steps)


def _outer_step(names: list[str], row: list[str]) -> OuterStep:
    """A row of a trajectory's file; it has no training loss before the training."""
    step, *texts, training, validation = row
    values = dict(zip(names, map(float, texts), strict=True))
    trained = float(training) if training else None
    outer = OuterStep(int(step), values, trained, float(validation))
    if not all(map(math.isfinite, (*values.values(), trained or 0.0, outer.validation_loss))):
        raise ValueError("expected finite numbers")
    return outer
