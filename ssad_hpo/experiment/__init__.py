"""Whole studies: load, search, record, evaluate, report. What the command line and the studies call."""

from ssad_hpo.experiment.judging import StudyResult, load_task, open_result
from ssad_hpo.experiment.ready import TASK, ready_objective
from ssad_hpo.experiment.reporting import report_run
from ssad_hpo.experiment.run_folder import Cluster, Run, RunError, Settings, open_run
from ssad_hpo.experiment.scoring import load_detector, score_images
from ssad_hpo.experiment.sources import find_source
from ssad_hpo.experiment.study import (
    StudyInterrupted,
    evaluate_run,
    resume_study,
    run_study,
    sync_run,
)
from ssad_hpo.experiment.sweep import run_sweep

__all__ = [
    "TASK",
    "Cluster",
    "Run",
    "RunError",
    "Settings",
    "StudyInterrupted",
    "StudyResult",
    "evaluate_run",
    "find_source",
    "load_detector",
    "load_task",
    "open_result",
    "open_run",
    "ready_objective",
    "report_run",
    "resume_study",
    "run_study",
    "run_sweep",
    "score_images",
    "sync_run",
]
