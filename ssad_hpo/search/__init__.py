"""Search without labels: the objective, running and resuming a study, selecting a detector."""

from ssad_hpo.search.kept import Kept, open_kept
from ssad_hpo.search.objective import FAILURE, Evaluation, Objective, evaluations, final_scores
from ssad_hpo.search.offline import Ranking, select_detectors
from ssad_hpo.search.running import (
    open_journal,
    open_study,
    reconcile,
    remaining_trials,
    run_search,
    was_interrupted,
)
from ssad_hpo.search.sampling import (
    PRUNERS,
    REDUCTION_FACTOR,
    SAMPLERS,
    first_rung,
    is_exhausted,
    is_final,
    make_pruner,
    make_sampler,
    position,
)
from ssad_hpo.search.selection import Candidate, candidates, select

__all__ = [
    "FAILURE",
    "PRUNERS",
    "REDUCTION_FACTOR",
    "SAMPLERS",
    "Candidate",
    "Evaluation",
    "Kept",
    "Objective",
    "Ranking",
    "candidates",
    "evaluations",
    "final_scores",
    "first_rung",
    "is_exhausted",
    "is_final",
    "make_pruner",
    "make_sampler",
    "open_journal",
    "open_kept",
    "open_study",
    "position",
    "reconcile",
    "remaining_trials",
    "run_search",
    "select",
    "select_detectors",
    "was_interrupted",
]
