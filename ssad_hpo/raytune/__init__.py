"""Sweeps on a Ray cluster: objective and study as in a local search, trials wherever Ray has room.

The only room that knows Ray. Workers train and report; the driver alone talks to Optuna's storage and to
the recorder. `worker` is what runs in a trial, `book` is what the driver tells Optuna (and needs no Ray),
`searcher` joins the two in anybody's `tune.Tuner`, `sweeping` sets up one of its own.
"""

from ssad_hpo.raytune.schedulers import SCHEDULERS, make_scheduler
from ssad_hpo.raytune.searcher import StudySearcher
from ssad_hpo.raytune.storage import absolute_storage
from ssad_hpo.raytune.sweeping import check_resources, sweep
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
