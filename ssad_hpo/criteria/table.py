"""The table of criteria that rank detectors: a criterion is a function and a row here.

CONTRIBUTING.md has the recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ssad_hpo.criteria import functions
from ssad_hpo.criteria.pairs import Pairs

_SETS = ("train", "augmented", "unlabeled")
_NEEDS = (*_SETS, "scores")


@dataclass(frozen=True)
class Criterion:
    """A row of `CRITERIA`.

    Attributes:
        function: gives a scalar tensor, lower is better, of what it needs.
        needs: what its arguments are, in order: embeddings (N, D) "train", "augmented", "unlabeled", and
            "scores", the anomaly scores (N_test,) of the unlabelled images, higher is more anomalous.
        shared: whether `Pairs` has the same value under the criterion's name, from what others need as well.

    Raises:
        ValueError: for a need that nobody can meet.
    """

    function: Callable[..., Tensor]
    needs: tuple[str, ...] = _SETS
    shared: bool = False

    def __post_init__(self) -> None:
        if unknown := set(self.needs) - set(_NEEDS):
            raise ValueError(f"needs: expected some of {', '.join(_NEEDS)}, got {', '.join(sorted(unknown))}")


# Name -> criterion, for those that rank detectors (lower is better).
CRITERIA: dict[str, Criterion] = {
    "dsv": Criterion(functions.dsv, shared=True),
    "discordance": Criterion(functions.discordance, shared=True),
    "base": Criterion(functions.base, shared=True),
    "mmd": Criterion(functions.mmd),
    "std": Criterion(functions.std, shared=True),
    "smooth_alignment": Criterion(functions.smooth_alignment),
    "soft_alignment": Criterion(functions.soft_alignment),
}
# What detectors of one tuning can be ranked by besides: the loss that they were tuned down, whichever it is.
VALIDATION_LOSS = "validation_loss"


def measured() -> tuple[str, ...]:
    """What `evaluate_all` names: every criterion, and one component."""
    return (*CRITERIA, "separability")


@torch.no_grad()
def evaluate_all(
    train: Tensor, augmented: Tensor, unlabeled: Tensor, scores: Tensor | None = None
) -> dict[str, float]:
    """Every criterion of `CRITERIA` and the unclamped "separability", from one pass over the pairs.

    Args:
        train, augmented, unlabeled: (N, D) embeddings, as for each criterion.
        scores: (N_test,) anomaly scores of the unlabelled images; criteria that need them are left out
            where there are none.

    Returns:
        Name -> value; equal to the single functions.

    Raises:
        DegenerateError: as `base`.
    """
    pairs = Pairs(train, augmented, unlabeled)
    given = dict(zip(_NEEDS, (train, augmented, unlabeled, scores), strict=True))
    values: dict[str, Tensor] = {}
    for name, criterion in CRITERIA.items():
        if criterion.shared:
            values[name] = getattr(pairs, name)
        elif scores is not None or "scores" not in criterion.needs:
            values[name] = criterion.function(*(given[need] for need in criterion.needs))
    values["separability"] = pairs.separability
    return {name: float(value) for name, value in values.items()}
