"""Searches whose candidates score together: tiny, and of images whose anomalies nobody can miss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssad_hpo.augment import Augmentation
from ssad_hpo.data import Source
from ssad_hpo.experiment import StudyResult, run_study
from ssad_hpo.task import Search, Training

# Black patches of a third of the image, in half of the unlabelled images.
CLEAR = Source(
    "controlled",
    {
        "anomaly": Augmentation("cutout", {"patch_area": 0.3, "patch_aspect": 1.0}),
        "image_size": 16,
        "n_train": 24,
        "n_unlabeled": 60,
        "n_held_out": 60,
    },
)
TRAINING = Training(steps=10, batch_size=8, width=8, evaluate_at=(1.0,), precision="float32")


def clear_run(folder: Path, **settings: Any) -> StudyResult:
    """Five candidates, by PU-AUC, of which only the best is kept unless some are to be combined."""
    search = {"n_trials": 5, "sampler": "random", "criterion": "pu_auc", "keep": 1, **settings}
    return run_study(CLEAR, Search("cutout", **search), TRAINING, run=folder, tracking_uri=None)
