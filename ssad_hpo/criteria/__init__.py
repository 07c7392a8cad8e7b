"""Label-free criteria of how well f_aug imitates the anomalies hidden in the unlabelled images."""

from ssad_hpo.criteria.contrast import (
    contrast_alignment,
    density_pu_auc,
    discriminant_pu_auc,
    whitened_contrast,
)
from ssad_hpo.criteria.evidence import NO_EVIDENCE, p_anomalies, shifted_as_a_whole
from ssad_hpo.criteria.functions import (
    base,
    discordance,
    dsv,
    dsv_unclamped,
    mmd,
    mmd_normalised,
    separability,
    smooth_alignment,
    soft_alignment,
    std,
    two_sided_alignment,
)
from ssad_hpo.criteria.held_out import differ, excess, pu_auc, shift
from ssad_hpo.criteria.pairs import DegenerateError, check_rows, check_sets
from ssad_hpo.criteria.table import (
    CRITERIA,
    VALIDATION_LOSS,
    Criterion,
    error_of,
    evaluate_all,
    measured,
)

__all__ = [
    "CRITERIA",
    "NO_EVIDENCE",
    "VALIDATION_LOSS",
    "Criterion",
    "DegenerateError",
    "base",
    "check_rows",
    "check_sets",
    "contrast_alignment",
    "density_pu_auc",
    "differ",
    "discordance",
    "discriminant_pu_auc",
    "dsv",
    "dsv_unclamped",
    "error_of",
    "evaluate_all",
    "excess",
    "measured",
    "mmd",
    "mmd_normalised",
    "p_anomalies",
    "pu_auc",
    "separability",
    "shift",
    "shifted_as_a_whole",
    "smooth_alignment",
    "soft_alignment",
    "std",
    "two_sided_alignment",
    "whitened_contrast",
]
