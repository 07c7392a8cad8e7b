"""Whole studies: load, search or tune, record, evaluate, report. What command line and studies call."""

from ssad_hpo.experiment.labelled import LabelledEvaluation, evaluate_labelled
from ssad_hpo.experiment.outcome import StudyResult, load_task, open_result
from ssad_hpo.experiment.ready_objectives import TASK, ready_objective
from ssad_hpo.experiment.reporting import report_run
from ssad_hpo.experiment.run_folder import Run, RunError, open_run
from ssad_hpo.experiment.scoring import bit_depth_of, load_detector, score_images
from ssad_hpo.experiment.settings import Settings
from ssad_hpo.experiment.study import (
    NoGroundTruthError,
    StudyInterrupted,
    evaluate_run,
    resume_study,
    run_study,
    search_for,
    sync_run,
    training_for,
)
from ssad_hpo.experiment.tuning import read_trajectory

__all__ = [
    "TASK",
    "LabelledEvaluation",
    "NoGroundTruthError",
    "Run",
    "RunError",
    "Settings",
    "StudyInterrupted",
    "StudyResult",
    "bit_depth_of",
    "evaluate_labelled",
    "evaluate_run",
    "load_detector",
    "load_task",
    "open_result",
    "open_run",
    "read_trajectory",
    "ready_objective",
    "report_run",
    "resume_study",
    "run_study",
    "score_images",
    "search_for",
    "sync_run",
    "training_for",
]
