"""The ready-made objectives: label-free search on the embedded testbed, anywhere, with nothing to set up.

`optuna.create_study().optimize(ssad_hpo.dsv_objective, n_trials=16)` trains real detectors on 64-pixel
crops of a photograph of gravel, a half of whose unlabelled crops carry a grey patch.
"""

from __future__ import annotations

from functools import cache

from ssad_hpo.criteria import CRITERIA
from ssad_hpo.data import Source, builtin, load
from ssad_hpo.search import Objective
from ssad_hpo.task import Search

TASK = "gravel/cutavg"
_HELD_OUT = 128  # normal images beside the task's own, for criteria that need them


@cache
def ready_objective(criterion: str) -> Objective:
    """The objective for a criterion on the embedded testbed; it keeps the best few detectors in memory.

    >>> from ssad_hpo import dsv_objective
    >>> print(dsv_objective.criterion, dsv_objective.task.name, dsv_objective.training.steps)
    dsv gravel/cutavg 250
    """
    source = builtin(TASK)
    if "held_out" in CRITERIA[criterion].needs:
        source = Source(source.loader, {**source.arguments, "n_held_out": _HELD_OUT})
    return Objective(load(source), Search(criterion=criterion))
