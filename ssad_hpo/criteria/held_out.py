"""Criteria of scores: do the unlabelled images score above normal ones that no detector has seen?

Each is a pure function of two sets of anomaly scores, those of the unlabelled images, (N_test,), and those of
held-out normal ones, (N_held,), both floating and higher for more anomalous; it returns a float64 scalar,
lower is better. Held-out images must be exchangeable with the normal ones among the unlabelled: scores of
images that a detector was trained on, or its density fitted to, are lower whatever it has learned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssad_hpo.criteria.pairs import DegenerateError

# Tails of the held-out scores in which anomalies may stand out (ARGOS, arXiv 2511.14832).
_TAILS = (0.05, 0.1, 0.2, 0.3)
_ROUNDING = 8  # units in the last place by which equal scores may differ from their mean


def pu_auc(scores: Tensor, held_out: Tensor) -> Tensor:
    """Minus the share of pairs in which the unlabelled image scores above the held-out one, ties half.

    In [-1, 0]. With a share c of anomalies it is -(1/2 + c (AUC - 1/2)) but for sampling, so detectors are
    ranked as by their AUC, without a label and without c (Menon et al., ICML 2015; Sakai et al., 2018).

    >>> import torch
    >>> from ssad_hpo import pu_auc
    >>> held_out = torch.arange(4.0)
    >>> float(pu_auc(held_out + 0.5, held_out)), float(pu_auc(held_out, held_out))
    (-0.625, -0.5)

    Raises:
        DegenerateError: a set is empty or not of one dimension, or has values that are not finite.
    """
    scores, held_out = _checked(scores, held_out)
    return -_placements(scores, held_out).mean()


def pu_auc_error(scores: Tensor, held_out: Tensor) -> Tensor:
    """Standard error of `pu_auc` (DeLong et al., 1988); that of the AUC it implies is 1 / c of it.

    Raises:
        DegenerateError: as `pu_auc`.
    """
    scores, held_out = _checked(scores, held_out)
    above, below = _placements(scores, held_out), 1 - _placements(held_out, scores)
    parts = [p.var(correction=1) / len(p) for p in (above, below) if len(p) > 1]
    return torch.stack(parts).sum().sqrt() if parts else scores.new_tensor(0.5)


def excess(scores: Tensor, held_out: Tensor) -> Tensor:
    """Minus the largest excess of the unlabelled scores in a tail of the held-out ones.

    That of a tail of share a in 0.05, 0.1, 0.2 and 0.3 is (share of unlabelled scores above the held-out
    (1 - a)-quantile - a) / sqrt(a); see ARGOS (Hein et al., arXiv 2511.14832). In [-4.25, 0.23]. Stronger
    than `pu_auc` where anomalies are few and clear.

    Raises:
        DegenerateError: as `pu_auc`.
    """
    return -_tails(*_checked(scores, held_out))[0].max()


def excess_error(scores: Tensor, held_out: Tensor) -> Tensor:
    """Standard error of `excess` in the tail that it found: binomial, of both shares.

    Raises:
        DegenerateError: as `pu_auc`.
    """
    scores, held_out = _checked(scores, held_out)
    found, share, tail = _tails(scores, held_out)
    best = int(found.argmax())
    q, a = share[best], tail[best]
    # A tail that is empty, or holds all, is still uncertain: Agresti and Coull's two of each.
    q = (q * len(scores) + 2) / (len(scores) + 4)
    return ((q * (1 - q) / len(scores) + a * (1 - a) / len(held_out)) / a).sqrt()


def shift(scores: Tensor, held_out: Tensor) -> Tensor:
    """Minus (mean of the unlabelled scores - mean of the held-out ones) / standard deviation of the latter.

    Raises:
        DegenerateError: as `pu_auc`, and for held-out scores that are all the same.
    """
    scores, held_out = _checked(scores, held_out)
    return -(scores.mean() - held_out.mean()) / _spread(held_out)


def shift_error(scores: Tensor, held_out: Tensor) -> Tensor:
    """Standard error of `shift`, its divisor's uncertainty included (delta method).

    Raises:
        DegenerateError: as `shift`.
    """
    scores, held_out = _checked(scores, held_out)
    spread = _spread(held_out)
    z, distance = (held_out - held_out.mean()) / spread, (scores.mean() - held_out.mean()) / spread
    # What a held-out image does to both the mean and the standard deviation, whatever the scores' shape.
    influence = z + distance / 2 * (z.square() - 1)
    of_scores = scores.var(correction=0) / spread.square() / len(scores)
    return (of_scores + influence.var(correction=0) / len(held_out)).sqrt()


def _placements(scores: Tensor, others: Tensor) -> Tensor:
    """For each score the share of others below it, equal ones half; in O(n log n)."""
    ordered = others.sort().values
    below = torch.searchsorted(ordered, scores, right=False)
    upto = torch.searchsorted(ordered, scores, right=True)
    return (below + upto).double() / (2 * len(others))


def _tails(scores: Tensor, held_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(excess, share of unlabelled scores, share of held-out ones) of every tail."""
    tails = scores.new_tensor(_TAILS)
    thresholds = torch.quantile(held_out, 1 - tails)
    share = (scores[None] > thresholds[:, None]).double().mean(1)
    return (share - tails) / tails.sqrt(), share, tails


def differ(scores: Tensor) -> bool:
    """Whether scores do by more than rounding: equal ones seldom have a standard deviation of 0."""
    rounding = _ROUNDING * torch.finfo(scores.dtype).eps * float(scores.abs().max())
    return float(scores.std(correction=0)) > rounding


def _spread(held_out: Tensor) -> Tensor:
    if not differ(held_out):
        raise DegenerateError(f"held_out: expected scores that differ, got {len(held_out)} equal ones")
    return held_out.std(correction=0)


def _checked(scores: Tensor, held_out: Tensor) -> tuple[Tensor, Tensor]:
    for name, values in (("scores", scores), ("held_out", held_out)):
        if not isinstance(values, Tensor) or not values.is_floating_point():
            came = getattr(values, "dtype", type(values).__name__)
            raise DegenerateError(f"{name}: expected a floating-point tensor, got {came}")
        if values.ndim != 1 or not len(values):
            raise DegenerateError(f"{name}: expected (N,) with N >= 1, got {tuple(values.shape)}")
        if not values.isfinite().all():
            raise DegenerateError(f"{name}: expected finite values, got NaN or infinity")
    return scores.double(), held_out.double()
