"""Whole studies: load, search or tune, record, evaluate, report. What command line and studies call."""

from ssad_hpo.experiment.certainty import how_sure
from ssad_hpo.experiment.confirming import Confirmation, trainings_to_come
from ssad_hpo.experiment.deploying import register_run
from ssad_hpo.experiment.evaluating import (
    LabelledEvaluation,
    NoGroundTruthError,
    evaluate_labelled,
    evaluate_run,
)
from ssad_hpo.experiment.heatmaps import Overlays
from ssad_hpo.experiment.outcome import (
    StudyResult,
    finished_starts,
    finished_trials,
    load_task,
    open_result,
)
from ssad_hpo.experiment.ready_objectives import TASK, ready_objective
from ssad_hpo.experiment.reporting import report_run
from ssad_hpo.experiment.run_folder import Run, RunError, open_run
from ssad_hpo.experiment.scoring import bit_depth_of, files_of, load_detector, score_images
from ssad_hpo.experiment.settings import Settings
from ssad_hpo.experiment.study import StudyInterrupted, resume_study, run_study, sync_run
from ssad_hpo.experiment.tuning import read_trajectory
from ssad_hpo.experiment.usual import search_for, training_for, tuned_training_for, tuning_for

__all__ = [
    "TASK",
    "Confirmation",
    "LabelledEvaluation",
    "NoGroundTruthError",
    "Overlays",
    "Run",
    "RunError",
    "Settings",
    "StudyInterrupted",
    "StudyResult",
    "bit_depth_of",
    "evaluate_labelled",
    "evaluate_run",
    "files_of",
    "finished_starts",
    "finished_trials",
    "how_sure",
    "load_detector",
    "load_task",
    "open_result",
    "open_run",
    "read_trajectory",
    "ready_objective",
    "register_run",
    "report_run",
    "resume_study",
    "run_study",
    "score_images",
    "search_for",
    "sync_run",
    "training_for",
    "trainings_to_come",
    "tuned_training_for",
    "tuning_for",
]
