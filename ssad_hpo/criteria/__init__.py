"""Label-free criteria of how well f_aug imitates the anomalies hidden in the unlabelled images."""

from ssad_hpo.criteria.functions import (
    base,
    discordance,
    dsv,
    mmd,
    mmd_normalised,
    separability,
    smooth_alignment,
    soft_alignment,
    std,
    two_sided_alignment,
)
from ssad_hpo.criteria.pairs import DegenerateError, check_sets
from ssad_hpo.criteria.table import CRITERIA, VALIDATION_LOSS, Criterion, evaluate_all, measured

__all__ = [
    "CRITERIA",
    "VALIDATION_LOSS",
    "Criterion",
    "DegenerateError",
    "base",
    "check_sets",
    "discordance",
    "dsv",
    "evaluate_all",
    "measured",
    "mmd",
    "mmd_normalised",
    "separability",
    "smooth_alignment",
    "soft_alignment",
    "std",
    "two_sided_alignment",
]
