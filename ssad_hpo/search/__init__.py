"""Search without labels: the objective, running and resuming a study, selecting a detector."""

from ssad_hpo.search.objective import (
    Objective,
    add_frozen,
    check_minimises,
    reconcile,
    remaining_trials,
    run_search,
    was_interrupted,
)
from ssad_hpo.search.offline import Ranking, select_detectors
from ssad_hpo.search.record import TrialRecord, is_final, records
from ssad_hpo.search.reseeding import confirm, further_seeds, read_reseeded, to_confirm
from ssad_hpo.search.sampling import first_rung, is_exhausted, make_pruner, make_sampler, open_study, position
from ssad_hpo.search.selection import Candidate, candidates, ranked, select
from ssad_hpo.search.store import (
    FolderStore,
    Kept,
    detector_folder,
    keep_patches,
    keeps_detector,
    open_kept,
)

__all__ = [
    "Candidate",
    "FolderStore",
    "Kept",
    "Objective",
    "Ranking",
    "TrialRecord",
    "add_frozen",
    "candidates",
    "check_minimises",
    "confirm",
    "detector_folder",
    "first_rung",
    "further_seeds",
    "is_exhausted",
    "is_final",
    "keep_patches",
    "keeps_detector",
    "make_pruner",
    "make_sampler",
    "open_kept",
    "open_study",
    "position",
    "ranked",
    "read_reseeded",
    "reconcile",
    "records",
    "remaining_trials",
    "run_search",
    "select",
    "select_detectors",
    "to_confirm",
    "was_interrupted",
]
