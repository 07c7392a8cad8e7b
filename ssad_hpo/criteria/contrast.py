"""Validation losses that look at held-out normal images: does f_aug point where the unlabelled ones differ?

Each is a function of four sets of embeddings, (N, D) tensors of one floating type: train, augmented,
unlabeled and held-out ones, differentiable in all; it returns a scalar, lower is better. Held-out images must
be exchangeable with the normal ones among the unlabelled; where a tuning looks only at those that stand out
(`focus`), the normal ones among these are the unusual ones, and without anomalies contrasts point there.
Losses for tuning, and no keys of `CRITERIA`.

The alignment losses ask where augmented embeddings lie beside the unlabelled ones, and are low as well where
they lie on the train ones. These are of directions and ranks alone: an augmentation that nobody can tell
points nowhere, and ranks unlabelled images above held-out ones half of the time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssad_hpo.criteria.pairs import DegenerateError, check_rows, check_sets, norm

# Added to covariances of mini-batches, which have more dimensions than rows, in mean variances.
_RIDGE = 1.0
# Where the step of a rank is half done, in standard deviations of the held-out scores.
_SOFTNESS = 0.5
_EPSILON = 1e-12  # of a product of lengths


def contrast_alignment(train: Tensor, augmented: Tensor, unlabeled: Tensor, held_out: Tensor) -> Tensor:
    """Minus the cosine of mean(Z_aug) - mean(Z_trn) and mean(Z_test) - mean(Z_held); in [-1, 1].

    With a share c of anomalies the second is c times what sets anomalies apart from normal images, so c does
    not matter, and neither does how far augmented images go.

    Raises:
        DegenerateError: as `base`, and for such held-out embeddings.
    """
    _check(train, augmented, unlabeled, held_out)
    ours, theirs = augmented.mean(0) - train.mean(0), unlabeled.mean(0) - held_out.mean(0)
    return -(ours @ theirs) / (norm(ours) * norm(theirs) + _EPSILON)


def whitened_contrast(train: Tensor, augmented: Tensor, unlabeled: Tensor, held_out: Tensor) -> Tensor:
    """`contrast_alignment` with the cosine taken in the covariance C of Z_trn, as its Gaussian sees it.

    The product of two shifts a and b is a' (C + r I)^-1 b, r the mean eigenvalue of C: directions in which
    normal images differ much count less. In [-1, 1], lower is better.

    Raises:
        DegenerateError: as `contrast_alignment`, and for train embeddings that are all the same.
    """
    _check(train, augmented, unlabeled, held_out)
    centre = train.mean(0)
    ours, theirs = augmented.mean(0) - centre, unlabeled.mean(0) - held_out.mean(0)
    solved = _solve(train - centre, torch.stack([ours, theirs], 1))
    lengths = (ours @ solved[:, 0]) * (theirs @ solved[:, 1])
    return -(ours @ solved[:, 1]) / (lengths.clamp_min(0) + _EPSILON**2).sqrt()


def discriminant_pu_auc(train: Tensor, augmented: Tensor, unlabeled: Tensor, held_out: Tensor) -> Tensor:
    """Minus a smooth PU-AUC of the linear classifier that tells Z_aug from Z_trn; in (-1, 0).

    The classifier is Fisher's discriminant, w = (C + r I)^-1 (mean(Z_aug) - mean(Z_trn)), C the covariance
    within both sets and r its mean eigenvalue. The PU-AUC is the mean, over pairs of an unlabelled and a
    held-out image, of sigmoid((w.z - w.h) / (sd / 2)), sd the standard deviation of the held-out w.h: it does
    not depend on the length of w. See `criteria.pu_auc`, to which it is the differentiable form.

    Raises:
        DegenerateError: as `contrast_alignment`, and for held-out scores that are all the same.
    """
    _check(train, augmented, unlabeled, held_out)
    centres = train.mean(0), augmented.mean(0)
    within = torch.cat([train - centres[0], augmented - centres[1]])
    w = _solve(within, (centres[1] - centres[0])[:, None])[:, 0]
    w = w / (norm(w) + _EPSILON)
    return _smooth_pu_auc(unlabeled @ w, held_out @ w)


def density_pu_auc(train: Tensor, augmented: Tensor, unlabeled: Tensor, held_out: Tensor) -> Tensor:
    """Minus a smooth PU-AUC of the anomaly score itself, the distance to a Gaussian of Z_trn; in (-1, 0).

    The score is the logarithm of the squared Mahalanobis distance, the covariance that of Z_trn with its mean
    eigenvalue added; ranks are as smooth as `discriminant_pu_auc` has them. Z_aug has no part in it, so that
    the hyperparameters are known by the detector alone, which was trained with them.

    Raises:
        DegenerateError: as `discriminant_pu_auc`.
    """
    _check(train, augmented, unlabeled, held_out)
    centre = train.mean(0)
    rest = torch.cat([unlabeled, held_out]) - centre
    square = (rest * _solve(train - centre, rest.T).T).sum(1)
    scores = square.clamp_min(_EPSILON).log()
    return _smooth_pu_auc(scores[: len(unlabeled)], scores[len(unlabeled) :])


def _solve(rows: Tensor, right: Tensor) -> Tensor:
    """(C + r I)^-1 right, C the second moments of centred rows (N, D), r a mean eigenvalue of it."""
    count, length = rows.shape
    ridge = _RIDGE * rows.square().sum() / rows.numel()
    if not ridge > 0:
        raise DegenerateError("train: expected rows that differ, got identical ones")
    eye = torch.eye(min(rows.shape), dtype=rows.dtype, device=rows.device)
    if count < length:  # Woodbury's identity: the smaller system of equations
        inner = torch.linalg.solve(rows @ rows.T + count * ridge * eye, rows @ right)
        return (right - rows.T @ inner) / ridge
    return torch.linalg.solve(rows.T @ rows / count + ridge * eye, right)


def _smooth_pu_auc(unlabeled: Tensor, held_out: Tensor) -> Tensor:
    spread = held_out.std(correction=0)
    if not spread > 8 * torch.finfo(held_out.dtype).eps * held_out.abs().max():  # but for rounding
        raise DegenerateError(f"held_out: expected scores that differ, got {len(held_out)} equal ones")
    return -((unlabeled[:, None] - held_out[None]) / (_SOFTNESS * spread)).sigmoid().mean()


def _check(train: Tensor, augmented: Tensor, unlabeled: Tensor, held_out: Tensor) -> None:
    check_sets(train, augmented, unlabeled)
    check_rows("held_out", held_out, train.shape[1])
