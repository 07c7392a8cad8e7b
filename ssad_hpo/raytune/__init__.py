"""Sweeps on a Ray cluster: objective and study as in a local search, trials wherever Ray has room.

The only room that knows Ray. Workers train and report; the driver alone talks to Optuna's storage and to
the recorder. `worker` is what runs in a trial, `book` is what the driver tells Optuna (and needs no Ray),
`tuning` joins the two in a `tune.Tuner`.
"""

from ssad_hpo.raytune.tuning import (
    SCHEDULERS,
    StudySearcher,
    absolute_storage,
    check_resources,
    make_scheduler,
    sweep,
)
from ssad_hpo.raytune.worker import trainable

__all__ = [
    "SCHEDULERS",
    "StudySearcher",
    "absolute_storage",
    "check_resources",
    "make_scheduler",
    "sweep",
    "trainable",
]
