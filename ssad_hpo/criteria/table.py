"""The table of criteria that rank detectors: a criterion is a function and a row here.

CONTRIBUTING.md has the recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ssad_hpo.criteria import functions, held_out
from ssad_hpo.criteria.pairs import Pairs

_SETS = ("train", "augmented", "unlabeled")
_NEEDS = (*_SETS, "scores", "held_out")
_SCORES = ("scores", "held_out")


@dataclass(frozen=True)
class Criterion:
    """A row of `CRITERIA`.

    Attributes:
        function: gives a scalar tensor, lower is better, of what it needs.
        needs: what its arguments are, in order: embeddings (N, D) "train", "augmented", "unlabeled";
            "scores", the anomaly scores (N_test,) of the unlabelled images, higher is more anomalous;
            "held_out", those (N_held,) of held-out normal images.
        shared: whether `Pairs` has the same value under the criterion's name, from what others need as well.
        error: gives the standard error of its value of the same arguments; None where there is no formula.

    Raises:
        ValueError: for a need that nobody can meet.
    """

    function: Callable[..., Tensor]
    needs: tuple[str, ...] = _SETS
    shared: bool = False
    error: Callable[..., Tensor] | None = None

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
    "dsv_unclamped": Criterion(functions.dsv_unclamped, shared=True),
    "pu_auc": Criterion(held_out.pu_auc, _SCORES, error=held_out.pu_auc_error),
    "excess": Criterion(held_out.excess, _SCORES, error=held_out.excess_error),
    "shift": Criterion(held_out.shift, _SCORES, error=held_out.shift_error),
}
# What detectors of one tuning can be ranked by besides: the loss that they were tuned down, whichever it is.
VALIDATION_LOSS = "validation_loss"


def measured() -> tuple[str, ...]:
    """What `evaluate_all` names: every criterion, standard errors, and one component."""
    errors = [error_of(name) for name, criterion in CRITERIA.items() if criterion.error is not None]
    return (*CRITERIA, *errors, "separability")


def error_of(criterion: str) -> str:
    """The name of a criterion's standard error among what is measured."""
    return f"{criterion}_error"


@torch.no_grad()
def evaluate_all(
    train: Tensor,
    augmented: Tensor,
    unlabeled: Tensor,
    scores: Tensor | None = None,
    held_out: Tensor | None = None,
) -> dict[str, float]:
    """Every criterion of `CRITERIA`, standard errors, "separability", from one pass over pairs.

    Args:
        train, augmented, unlabeled: (N, D) embeddings, as for each criterion.
        scores: (N_test,) anomaly scores of the unlabelled images.
        held_out: (N_held,) those of held-out normal images; what needs images that are not there is left out.

    Returns:
        Name -> value; equal to the single functions.

    Raises:
        DegenerateError: as `base` and `shift`.
    """
    pairs = Pairs(train, augmented, unlabeled)
    given = dict(zip(_NEEDS, (train, augmented, unlabeled, scores, held_out), strict=True))
    values: dict[str, Tensor] = {}
    for name, criterion in CRITERIA.items():
        arguments = [given[need] for need in criterion.needs]
        if criterion.shared:
            values[name] = getattr(pairs, name)
        elif all(argument is not None for argument in arguments):
            values[name] = criterion.function(*arguments)
            if criterion.error is not None:
                values[error_of(name)] = criterion.error(*arguments)
    values["separability"] = pairs.separability
    return {name: float(value) for name, value in values.items()}
