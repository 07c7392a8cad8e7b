"""Label-free criteria of how well f_aug imitates the anomalies hidden in the unlabelled images.

Each criterion is a pure function `f(train, augmented, unlabeled)` of three sets of embeddings, (N, D)
tensors of one floating type on one device (unit rows, when they come from a detector), and returns a
scalar tensor of that type; lower is better. The formulas are those of DSV [Yoo et al., ECML PKDD 2023]
and ST-SSAD [Yoo et al., KDD 2025]; d(A, B) is the mean over all pairs of ||a - b|| / 2.

With gradients the pairwise criteria hold all pairs at once, so they are meant for mini-batches; without,
they stream over blocks of pairs in constant memory, and `evaluate_all` shares one pass among all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Rows and columns of a streamed block of pairs: 4 MiB of float32, which stays in a core's cache.
_BLOCK = 1024
# Added to the divisor of the discordance by the authors' code, and kept for equal values.
_EPSILON = 1e-8
# The clamp on the separability in DSV, as the authors have it.
_SEPARABILITY_CLAMP = 0.5
# Temperature of the soft minima of the alignment losses, in units of the normalised distances.
_SOFT_TEMPERATURE = 0.2


class DegenerateError(ValueError):
    """A set of embeddings from which no criterion can be computed: empty, collapsed, not finite."""


def base(train: Tensor, augmented: Tensor, unlabeled: Tensor) -> Tensor:
    """d(Z_trn u Z_aug, Z_test), the talk's first approach; in [0, 1] for unit rows, lower is better.

    Raises:
        DegenerateError: a set is empty, has one row, identical rows, values that are not finite, or
            another D than `train`; the message names it.
    """
    _check(train, augmented, unlabeled)
    return _pair_moments(torch.cat([train, augmented]), unlabeled)[0] / 2


def mmd(train: Tensor, augmented: Tensor, unlabeled: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of Z_trn u Z_aug and Z_test with the linear kernel; lower is better.

    Raises:
        DegenerateError: as `base`.
    """
    _check(train, augmented, unlabeled)
    return (torch.cat([train, augmented]).mean(0) - unlabeled.mean(0)).square().sum()


def mmd_normalised(train: Tensor, augmented: Tensor, unlabeled: Tensor) -> Tensor:
    """`mmd` after total distance normalisation (MMD2 of ST-SSAD's ablation); lower is better.

    A loss for tuning, and no key of `CRITERIA`: its value does not depend on the scale of the sets.

    Raises:
        DegenerateError: as `base`.
    """
    _check(train, augmented, unlabeled)
    train, augmented, unlabeled = _normalise(train, augmented, unlabeled)
    return (torch.cat([train, augmented]).mean(0) - unlabeled.mean(0)).square().sum()


def std(train: Tensor, augmented: Tensor, unlabeled: Tensor) -> Tensor:
    """Minus the population standard deviation of all ||z - z'||, z in Z_trn u Z_aug, z' in Z_test.

    Distances are not halved. Never positive; lower is better.

    Raises:
        DegenerateError: as `base`.
    """
    _check(train, augmented, unlabeled)
    return -_pair_moments(torch.cat([train, augmented]), unlabeled)[1]


def discordance(train: Tensor, augmented: Tensor, unlabeled: Tensor) -> Tensor:
    """L_dis = d(Z_trn u Z_aug, Z_test) / (d(Z_trn, Z_aug) + 1e-8) of DSV; positive, lower is better.

    Raises:
        DegenerateError: as `base`.
    """
    _check(train, augmented, unlabeled)
    across, _ = _pair_moments(torch.cat([train, augmented]), unlabeled)
    return _discordance(across, _pair_moments(train, augmented)[0])


def separability(train: Tensor, augmented: Tensor, unlabeled: Tensor) -> Tensor:
    """L_sep of DSV, without the clamp: s / d(Z_trn, Z_aug). A component: positive, *higher* is better.

    s is the standard deviation, over all pairs (z in Z_test, z' in Z_aug), of z's projection on the
    direction from mean(Z_trn) to z'.

    Raises:
        DegenerateError: as `base`.
    """
    _check(train, augmented, unlabeled)
    return _separability(train, augmented, unlabeled, _pair_moments(train, augmented)[0])


def dsv(train: Tensor, augmented: Tensor, unlabeled: Tensor) -> Tensor:
    """Discordance and separability validation, L_dis - min(L_sep, 1/2) / L_dis; lower is better.

    Negative where f_aug imitates the anomalies well, 0.6 and more where everything is mixed around.

    Raises:
        DegenerateError: as `base`.
    """
    _check(train, augmented, unlabeled)
    across, _ = _pair_moments(torch.cat([train, augmented]), unlabeled)
    within, _ = _pair_moments(train, augmented)
    return _dsv(_discordance(across, within), _separability(train, augmented, unlabeled, within))


def smooth_alignment(train: Tensor, augmented: Tensor, unlabeled: Tensor) -> Tensor:
    """L_val of ST-SSAD: half the mean, over Z_test, of the distances to mean(Z_trn) and to mean(Z_aug).

    After total distance normalisation. The talk sums over Z_test; the mean makes data sets comparable.
    Positive, lower is better.

    Raises:
        DegenerateError: as `base`.
    """
    _check(train, augmented, unlabeled)
    train, augmented, unlabeled = _normalise(train, augmented, unlabeled)
    to_train = _norm(unlabeled - train.mean(0))
    to_augmented = _norm(unlabeled - augmented.mean(0))
    return (to_train + to_augmented).mean() / 2


def soft_alignment(train: Tensor, augmented: Tensor, unlabeled: Tensor) -> Tensor:
    """Each z in Z_test pays for the nearer of mean(Z_trn) and mean(Z_aug), by a soft minimum.

    -t mean log(exp(-||z - mean Z_trn|| / t) + exp(-||z - mean Z_aug|| / t)), t = 0.2, after total
    distance normalisation. Lower is better.

    Raises:
        DegenerateError: as `base`.
    """
    _check(train, augmented, unlabeled)
    train, augmented, unlabeled = _normalise(train, augmented, unlabeled)
    distances = [_norm(unlabeled - train.mean(0)), _norm(unlabeled - augmented.mean(0))]
    return _soft_minimum(torch.stack(distances)).mean()


def two_sided_alignment(train: Tensor, augmented: Tensor, unlabeled: Tensor) -> Tensor:
    """`soft_alignment`, and mean(Z_aug) pays in turn for the distance to the z in Z_test near it.

    Added is -t log mean exp(-||z - mean Z_aug|| / t), t = 0.2. Without it augmented embeddings may leave
    everything behind: each z then pays for Z_trn alone, by distances that the normalisation shrinks.
    Lower is better. A loss for tuning, and no key of `CRITERIA`.

    Raises:
        DegenerateError: as `base`.
    """
    _check(train, augmented, unlabeled)
    train, augmented, unlabeled = _normalise(train, augmented, unlabeled)
    to_train, to_augmented = _norm(unlabeled - train.mean(0)), _norm(unlabeled - augmented.mean(0))
    from_augmented = _soft_minimum(to_augmented) + _SOFT_TEMPERATURE * math.log(len(unlabeled))
    return _soft_minimum(torch.stack([to_train, to_augmented])).mean() + from_augmented


def _soft_minimum(distances: Tensor) -> Tensor:
    """Over the first dimension; at most the minimum, which it is at temperature 0."""
    return -_SOFT_TEMPERATURE * torch.logsumexp(-distances / _SOFT_TEMPERATURE, 0)


# Name -> criterion, for those that rank detectors (lower is better).
CRITERIA: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "dsv": dsv,
    "discordance": discordance,
    "base": base,
    "mmd": mmd,
    "std": std,
    "smooth_alignment": smooth_alignment,
    "soft_alignment": soft_alignment,
}
# What detectors of one tuning can be ranked by besides: the loss that they were tuned down, whichever it is.
VALIDATION_LOSS = "validation_loss"


@torch.no_grad()
def evaluate_all(train: Tensor, augmented: Tensor, unlabeled: Tensor) -> dict[str, float]:
    """Every criterion of `CRITERIA` and the unclamped "separability", from one pass over the pairs.

    Args:
        train, augmented, unlabeled: (N, D) embeddings, as for each criterion.

    Returns:
        Name -> value; equal to the single functions.

    Raises:
        DegenerateError: as `base`.
    """
    _check(train, augmented, unlabeled)
    across, spread = _pair_moments(torch.cat([train, augmented]), unlabeled)
    within, _ = _pair_moments(train, augmented)
    dis, sep = _discordance(across, within), _separability(train, augmented, unlabeled, within)
    values = {
        "dsv": _dsv(dis, sep),
        "discordance": dis,
        "base": across / 2,
        "mmd": mmd(train, augmented, unlabeled),
        "std": -spread,
        "smooth_alignment": smooth_alignment(train, augmented, unlabeled),
        "soft_alignment": soft_alignment(train, augmented, unlabeled),
        "separability": sep,
    }
    return {name: float(value) for name, value in values.items()}


def _discordance(across: Tensor, within: Tensor) -> Tensor:
    """L_dis from the mean pair distances (not halved) of Z_trn u Z_aug to Z_test and of Z_trn to Z_aug."""
    return (across / 2) / (within / 2 + _EPSILON)


def _dsv(dis: Tensor, sep: Tensor) -> Tensor:
    return dis - sep.clamp(max=_SEPARABILITY_CLAMP) / dis


def _separability(train: Tensor, augmented: Tensor, unlabeled: Tensor, within: Tensor) -> Tensor:
    """s / d(Z_trn, Z_aug) from second moments, in O((N_test + N_aug) D^2), without a pair.

    With x = z - m and unit directions u, both split into mean and rest, the variance of x.u over all
    pairs is tr(C_x C_u) + u'C_x u + x'C_u x: three terms that cannot be negative, so nothing cancels.
    """
    centre = train.mean(0)
    direction = augmented - centre
    length = _norm(direction)[:, None]
    direction = torch.where(length > 0, direction / torch.where(length > 0, length, 1), 0)
    x_mean, x_cov = _moments(unlabeled - centre)
    u_mean, u_cov = _moments(direction)
    variance = (x_cov * u_cov).sum() + u_mean @ x_cov @ u_mean + x_mean @ u_cov @ x_mean
    return _sqrt(variance) / (within / 2)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and population covariance (D, D) of (N, D) rows."""
    mean = x.mean(0)
    rest = x - mean
    return mean, rest.T @ rest / len(x)


def _normalise(*sets: Tensor) -> list[Tensor]:
    """Total distance normalisation [ST-SSAD]: centre all rows together, divide by their root mean square."""
    rows = torch.cat(sets)
    centre = rows.mean(0)
    scale = (rows - centre).square().sum(1).mean().sqrt()
    return [(s - centre) / scale for s in sets]


def _pair_moments(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of ||a_i - b_j|| over all pairs; scalars, not halved."""
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        distances = _norm(a[:, None] - b[None])
        return distances.mean(), _sqrt(distances.var(correction=0))
    # ||a||^2 + ||b||^2 - 2 ab lets a matrix product do the work. It cancels where rows are close
    # together and far from the origin, so both sets are centred first.
    centre = (a.mean(0) + b.mean(0)) / 2
    a, b = a - centre, b - centre
    a_square, b_square = a.square().sum(1), b.square().sum(1)
    # Sums are taken of distances less their typical size, which keeps the variance accurate as well.
    typical = (a_square.mean() + b_square.mean() - 2 * a.mean(0) @ b.mean(0)).clamp_min(0).sqrt()
    total, squares = torch.zeros((2,), dtype=torch.float64, device=a.device)
    for rows, row_square in zip(a.split(_BLOCK), a_square.split(_BLOCK), strict=True):
        for columns, column_square in zip(b.split(_BLOCK), b_square.split(_BLOCK), strict=True):
            block = torch.addmm(column_square[None], rows, columns.T, alpha=-2).add_(row_square[:, None])
            block.clamp_min_(0).sqrt_().sub_(typical)
            total += block.sum()
            squares += block.square_().sum()
    mean, square = total / (len(a) * len(b)), squares / (len(a) * len(b))
    return typical + mean.to(a.dtype), (square - mean.square()).clamp_min(0).sqrt().to(a.dtype)


def _norm(x: Tensor) -> Tensor:
    """Euclidean norms along the last dimension, with gradient 0 (not NaN) at 0, to any order."""
    return _sqrt(x.square().sum(-1))


def _sqrt(square: Tensor) -> Tensor:
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)


def _check(train: Tensor, augmented: Tensor, unlabeled: Tensor) -> None:
    for name, rows in (("train", train), ("augmented", augmented), ("unlabeled", unlabeled)):
        if not isinstance(rows, Tensor) or not rows.is_floating_point():
            came = getattr(rows, "dtype", type(rows).__name__)
            raise DegenerateError(f"{name}: expected a floating-point tensor, got {came}")
        if rows.ndim != 2 or rows.shape[0] < 2 or rows.shape[1] < 1:
            raise DegenerateError(f"{name}: expected (N, D) with N >= 2, got {tuple(rows.shape)}")
        if rows.shape[1] != train.shape[1]:
            raise DegenerateError(
                f"{name}: expected rows of train's length {train.shape[1]}, got {rows.shape[1]}"
            )
        if not rows.isfinite().all():
            bad = int((~rows.isfinite().all(1)).sum())
            raise DegenerateError(f"{name}: expected finite values, got NaN or infinity in {bad} rows")
        # Identical up to rounding: a collapsed network's rows may differ in their last bits.
        tolerance = 8 * torch.finfo(rows.dtype).eps * rows[0].abs().max()
        if ((rows - rows[0]).abs() <= tolerance).all():
            raise DegenerateError(f"{name}: expected rows that differ, got {len(rows)} identical ones")
