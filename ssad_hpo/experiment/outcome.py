"""The result of a study: the choice, and its comparison with the ground truth where there is one.

Selecting comes first and sees no label; only then is the ground truth read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import optuna

from ssad_hpo import data
from ssad_hpo.evaluate import StudyEvaluation, auc, evaluate_candidates
from ssad_hpo.experiment.run_folder import Run, RunError, locked, open_run
from ssad_hpo.search import Candidate, candidates, select
from ssad_hpo.task import StudyRecorder, Task


@dataclass(frozen=True)
class StudyResult:
    """What came out of a study.

    Attributes:
        run: its folder and settings.
        study: Optuna's study.
        selected: the candidate with the lowest criterion; chosen without labels.
        aucs: AUC of every candidate by trial number; None where there is no ground truth.
        evaluation: selected, oracle, random and worst AUC; None where there is no ground truth.
        undelivered: records that did not reach MLflow yet; `sync_run` delivers them.
        lost: records that could not even be kept for it, as on a full disk.
    """

    run: Run
    study: optuna.Study
    selected: Candidate
    aucs: dict[int, float] | None
    evaluation: StudyEvaluation | None
    undelivered: int = 0
    lost: int = 0


def load_task(run: Run, task: Task | None = None) -> Task:
    """The task of a run, loaded again and recognised by its content.

    Raises:
        RunError: if it lived in memory and is not given, or its images have changed.
    """
    if task is None:
        if run.settings.source is None:
            raise RunError(f"{run.folder}: its images lived in memory; give the task again")
        task = data.load(run.settings.source)
    if task.content_hash != run.settings.content_hash:
        raise RunError(
            f"{run.folder}: the images of {run.settings.task_name} are not those that the study began with; "
            "restore them or start a new study"
        )
    return task


def chosen(run: str | Path, *, trust_addresses: bool = False) -> Candidate:
    """The candidate that a run has chosen; reads neither images nor ground truth.

    Raises:
        RunError: if there is no such run. ValueError: if it has no candidate yet, or for a storage whose
            address needs `trust_addresses` (see `open_run`).
    """
    opened = open_run(run, trust_addresses=trust_addresses)
    with locked(opened.folder):
        return select(_study_of(opened), opened.settings.criterion, opened.artifacts)


def open_result(run: str | Path, *, trust_addresses: bool = False) -> StudyResult:
    """The result of a study as its folder has it; nothing is trained, nothing recorded.

    Raises:
        RunError: if there is no such run, or its images have changed. ValueError: if it has no
            candidate yet, or for a storage whose address needs `trust_addresses` (see `open_run`).
    """
    opened = open_run(run, trust_addresses=trust_addresses)
    with locked(opened.folder):
        study = _study_of(opened)
        selected = select(study, opened.settings.criterion, opened.artifacts)
        return compare_with_truth(opened, study, selected)


def compare_with_truth(run: Run, study: optuna.Study, selected: Candidate) -> StudyResult:
    """Read the ground truth, if there is any, and compare the candidate that was selected with the others."""
    criterion = run.settings.criterion
    if run.settings.source is None:
        return StudyResult(run, study, selected, None, None)
    load_task(run)  # the ground truth of other images than those that were scored would mislead silently
    labels = data.read_labels(run.settings.source)
    if labels is None or len(set(labels.tolist())) < 2:
        return StudyResult(run, study, selected, None, None)
    choices = candidates(study, run.artifacts)
    aucs = {c.number: auc(labels, c.scores()) for c in choices}
    values = {c.number: c.criteria[criterion] for c in choices}
    return StudyResult(run, study, selected, aucs, evaluate_candidates(aucs, values, selected.number))


def record_result(recorder: StudyRecorder, result: StudyResult) -> None:
    """Tell MLflow of the choice, and of its comparison with the ground truth."""
    criterion = result.run.settings.criterion
    recorder.study_metrics(
        {
            "selected_trial": result.selected.number,
            f"{criterion}_selected": result.selected.criteria[criterion],
        }
    )
    if result.aucs is not None and result.evaluation is not None:
        for number, value in result.aucs.items():
            recorder.trial_metrics(str(number), {"auc": value})
        recorder.study_metrics(result.evaluation.metrics())


def _study_of(run: Run) -> optuna.Study:
    try:
        return optuna.load_study(study_name=run.settings.study_name, storage=run.open_storage())
    except KeyError as error:
        raise RunError(f"{run.folder}: its study was stopped before its first trial; resume it") from error
