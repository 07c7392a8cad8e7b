"""Label-free hyperparameter optimisation for self-supervised anomaly detection: the public names.

They are imported when they are first used, so that `import ssad_hpo` stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the room that has it.
_ROOMS = {
    "Augmentation": "task",
    "Cluster": "task",
    "DetectorError": "task",
    "Range": "task",
    "Recorder": "task",
    "Search": "task",
    "SearchSpace": "task",
    "Task": "task",
    "Training": "task",
    "random_static": "baselines",
    "train_autoencoder": "baselines",
    "train_deep_svdd": "baselines",
    "Calibration": "calibration",
    "CRITERIA": "criteria",
    "dsv": "criteria",
    "dsv_unclamped": "criteria",
    "evaluate_all": "criteria",
    "excess": "criteria",
    "p_anomalies": "criteria",
    "pu_auc": "criteria",
    "shift": "criteria",
    "smooth_alignment": "criteria",
    "soft_alignment": "criteria",
    "two_sided_alignment": "criteria",
    "hits": "consensus",
    "mc": "consensus",
    "sel": "consensus",
    "Source": "data",
    "DataSet": "data",
    "controlled_data": "data",
    "load_folder": "data",
    "load_folders": "data",
    "semantic_data": "data",
    "Detector": "detector",
    "CombinedDetector": "combined",
    "CollapseWarning": "bilevel",
    "Tuning": "bilevel",
    "TuningResult": "bilevel",
    "tune": "bilevel",
    "Candidate": "search",
    "Objective": "search",
    "candidates": "search",
    "select": "search",
    "Ranking": "search",
    "select_detectors": "search",
    "StudyInterrupted": "experiment",
    "StudyResult": "experiment",
    "evaluate_labelled": "experiment",
    "register_run": "experiment",
    "evaluate_run": "experiment",
    "load_detector": "experiment",
    "report_run": "experiment",
    "read_trajectory": "experiment",
    "resume_study": "experiment",
    "run_study": "experiment",
    "score_images": "experiment",
}
# Ready-made objectives on the embedded testbed -> their criterion.
_OBJECTIVES = {
    "dsv_objective": "dsv",
    "pu_auc_objective": "pu_auc",
    "smooth_alignment_objective": "smooth_alignment",
}

__all__ = sorted([*_ROOMS, *_OBJECTIVES, "__version__"])

if TYPE_CHECKING:
    from ssad_hpo.search import Objective

    dsv_objective: Objective
    pu_auc_objective: Objective
    smooth_alignment_objective: Objective


def __getattr__(name: str) -> Any:
    if name in _OBJECTIVES:
        return importlib.import_module("ssad_hpo.experiment").ready_objective(_OBJECTIVES[name])
    if name in _ROOMS:
        return getattr(importlib.import_module(f"ssad_hpo.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'ssad_hpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
