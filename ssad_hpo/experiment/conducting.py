"""What a search and a tuning have in common: images, settings of the run, recording, the end.

What trains and chooses comes in between, as a function; the ground truth is read after it has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import torch

from ssad_hpo import data, tracking
from ssad_hpo.experiment.judging import StudyResult, judge, record_result
from ssad_hpo.experiment.run_folder import Run, creation_facts, locked, new_study_name
from ssad_hpo.search import was_interrupted
from ssad_hpo.task import Recorder, Status, Task

DEFAULT_TRACKING = "default"
EXPERIMENT = "ssad_hpo"


class StudyInterrupted(KeyboardInterrupt):
    """Ctrl-C in a study. All that is done is kept in `run`; the message says what goes on with it."""

    def __init__(self, run: Path, resume: str = "resume_study") -> None:
        super().__init__(f"stopped; go on with {resume}({str(run)!r})")
        self.run = run


def find_source(
    place: str | Path,
    *,
    category: str | None = None,
    anomaly: str | None = None,
    image_size: int = 64,
    skip_unreadable: bool = False,
) -> data.Source:
    """The address of a built-in data set ("gravel/cutavg") or of a folder in the published layout.

    Args:
        place: a folder, or a built-in name; a folder of that name goes first.
        category, anomaly, image_size, skip_unreadable: of a folder, see `ssad_hpo.data.load_folder`.

    Raises:
        ValueError: if it is neither.
    """
    if Path(place).is_dir():
        arguments = {"category": category, "anomaly": anomaly, "image_size": image_size}
        return data.Source("folder", {"root": str(place), "skip_unreadable": skip_unreadable, **arguments})
    if category is not None or anomaly is not None:
        raise ValueError(f"{place}: there is no such folder, and only folders have a category or an anomaly")
    try:
        return data.builtin(str(place))
    except ValueError as error:
        raise ValueError(f"{place}: there is no such folder; as a built-in {error}") from error


def load_images(images: Task | data.Source | str | Path) -> tuple[Task, data.Source | None]:
    """The task, and its address; None for one that lives in memory only."""
    if isinstance(images, Task):
        return images, None
    source = images if isinstance(images, data.Source) else find_source(images)
    return data.load(source), source


def common_settings(
    folder: Path,
    task: Task,
    source: data.Source | None,
    *,
    device: str,
    threads: int | None,
    tracking_uri: str | None,
    experiment: str,
) -> dict[str, Any]:
    """The settings of a run that say nothing of how its detectors are found, by their names in `Settings`.

    Raises:
        ValueError: for threads < 1, or an unusable tracking URI.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    if tracking_uri == DEFAULT_TRACKING:
        tracking_uri = tracking.default_tracking_uri()
    elif tracking_uri is not None:
        tracking_uri = tracking.absolute_uri(tracking_uri)
    return {
        "study_name": new_study_name(folder),
        "source": source,
        "task_name": task.name,
        "content_hash": task.content_hash,
        "device": device,
        "threads": threads or torch.get_num_threads(),
        "tracking_uri": tracking_uri,
        "experiment": experiment,
        **creation_facts(),
    }


def open_recorder(run: Run) -> tracking.NullRecorder:
    """What writes a run to MLflow; with tracking off, what writes nothing."""
    settings = run.settings
    if settings.tracking_uri is None:
        return tracking.NullRecorder()
    return tracking.MlflowRecorder(
        run.outbox, settings.tracking_uri, settings.experiment, settings.study_name
    )


def undelivered(run: Run) -> int:
    """How many records MLflow did not take yet."""
    return tracking.pending(run.outbox) if run.settings.tracking_uri else 0


def conduct(
    run: Run,
    work: Callable[[Recorder, tracking.NullRecorder], optuna.Study],
    listeners: Sequence[Recorder],
    announce: Callable[[Run], None] | None,
    *,
    tags: Mapping[str, str],
    resume: str,
) -> StudyResult:
    """Do the work of a run, alone in its folder, then judge what came of it; all of it told to MLflow.

    Args:
        run: its settings are written.
        work: trains and chooses; given who is to hear of every trial, and MLflow's recorder for the rest.
        listeners: told of every trial, beside MLflow.
        announce: told of the run before the work begins.
        tags: of the study and of every trial in it.
        resume: name of the function that goes on.

    Raises:
        RunError: if another process works on the run.
        StudyInterrupted: on Ctrl-C.
    """
    settings = run.settings
    torch.set_num_threads(settings.threads)
    with locked(run.folder), open_recorder(run) as recorder:
        if announce is not None:
            announce(run)
        tags = {"task": settings.task_name, "criterion": settings.criterion, **tags}
        recorder.study_started(settings.flat(), tags)
        try:
            study = work(_Everyone([recorder, *listeners], tags), recorder)
            # The work is over; only now may ground truth be read.
            result = judge(run, study)
        except BaseException as error:
            if was_interrupted(error):
                recorder.study_ended("interrupted")
                raise StudyInterrupted(run.folder, resume) from None
            if isinstance(error, Exception):
                recorder.study_ended("failed", str(error))
            raise
        record_result(recorder, result)
        recorder.study_ended("complete")
    return replace(result, undelivered=undelivered(run), lost=recorder.lost)


class _Everyone:
    """A recorder that tells several others, with the study's own tags on every trial."""

    def __init__(self, recorders: Sequence[Recorder], tags: Mapping[str, str]) -> None:
        self.recorders = recorders
        self.tags = tags

    def trial_started(self, trial: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        for recorder in self.recorders:
            recorder.trial_started(trial, params, {**self.tags, **tags})

    def trial_progress(self, trial: str, step: int, metrics: Mapping[str, float]) -> None:
        for recorder in self.recorders:
            recorder.trial_progress(trial, step, metrics)

    def trial_ended(
        self, trial: str, status: Status, metrics: Mapping[str, float], reason: str | None = None
    ) -> None:
        for recorder in self.recorders:
            recorder.trial_ended(trial, status, metrics, reason)
