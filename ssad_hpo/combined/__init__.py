"""Several candidates that work together instead of a choice of one, without labels."""

from ssad_hpo.combined.combination import LEAST_SCORE, Combination, Part, Scale, can_be_combined, combine
from ssad_hpo.combined.detector import CombinedDetector, is_combined
from ssad_hpo.combined.heads import Head, contrast_head, copies_together, head_weight

__all__ = [
    "LEAST_SCORE",
    "Combination",
    "CombinedDetector",
    "Head",
    "Part",
    "Scale",
    "can_be_combined",
    "combine",
    "contrast_head",
    "copies_together",
    "head_weight",
    "is_combined",
]
