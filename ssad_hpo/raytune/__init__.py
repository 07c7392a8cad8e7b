"""Sweeps on a Ray cluster: objective and study as in a local search, trials wherever Ray has room.

The only room that knows Ray. Workers train and report; the driver alone talks to Optuna's storage and to
the recorder. `worker` is what runs in a trial, `ledger` is what the driver tells Optuna (and needs no Ray),
`searcher` joins the two in anybody's `tune.Tuner`, `sweeping` sets up one of its own,
and `reseeding` trains its best candidates again.
"""

from ssad_hpo.raytune.checkpoints import absolute_checkpoint_path
from ssad_hpo.raytune.reseeding import confirm
from ssad_hpo.raytune.schedulers import make_scheduler
from ssad_hpo.raytune.searcher import StudySearcher
from ssad_hpo.raytune.sweeping import check_cluster, sweep
from ssad_hpo.raytune.worker import trainable

__all__ = [
    "StudySearcher",
    "absolute_checkpoint_path",
    "check_cluster",
    "confirm",
    "make_scheduler",
    "sweep",
    "trainable",
]
