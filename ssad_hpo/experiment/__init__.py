"""Whole studies: load, search or tune, record, evaluate, report. What command line and studies call."""

from ssad_hpo.experiment.conducting import StudyInterrupted, find_source
from ssad_hpo.experiment.judging import StudyResult, load_task, open_result
from ssad_hpo.experiment.ready import TASK, ready_objective
from ssad_hpo.experiment.reporting import report_run
from ssad_hpo.experiment.run_folder import Cluster, Run, RunError, Settings, open_run
from ssad_hpo.experiment.scoring import load_detector, score_images
from ssad_hpo.experiment.study import evaluate_run, resume_study, run_study, sync_run
from ssad_hpo.experiment.sweep import run_sweep
from ssad_hpo.experiment.tuning import read_trajectory, resume_tuning, run_tuning

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
    "read_trajectory",
    "ready_objective",
    "report_run",
    "resume_study",
    "resume_tuning",
    "run_study",
    "run_sweep",
    "run_tuning",
    "score_images",
    "sync_run",
]
