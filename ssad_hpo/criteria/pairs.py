"""What several criteria need of three sets of embeddings: distances of their pairs, and whether they can be.

Without gradients all that goes over pairs streams over blocks of them in constant memory.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

# Rows and columns of a streamed block of pairs: 4 MiB of float32, which stays in a core's cache.
_BLOCK = 1024
# Added to the divisor of the discordance by the authors' code, and kept for equal values.
_EPSILON = 1e-8
# The clamp on the separability in DSV, as the authors have it.
_SEPARABILITY_CLAMP = 0.5


class DegenerateError(ValueError):
    """A set of embeddings from which no criterion can be computed: empty, collapsed, not finite."""


class Pairs:
    """Three sets and what several criteria need of their pairs, each found once, when it is first needed."""

    def __init__(self, train: Tensor, augmented: Tensor, unlabeled: Tensor) -> None:
        check_sets(train, augmented, unlabeled)
        self.train, self.augmented, self.unlabeled = train, augmented, unlabeled

    @cached_property
    def across(self) -> tuple[Tensor, Tensor]:
        """Moments, as `_pair_moments` gives them, of Z_trn u Z_aug to Z_test."""
        return _pair_moments(torch.cat([self.train, self.augmented]), self.unlabeled)

    @cached_property
    def within(self) -> Tensor:
        """Mean distance, not halved, of Z_trn to Z_aug."""
        return _pair_moments(self.train, self.augmented)[0]

    @property
    def base(self) -> Tensor:
        """See `criteria.base`, as for all that follow."""
        return self.across[0] / 2

    @property
    def std(self) -> Tensor:
        return -self.across[1]

    @cached_property
    def discordance(self) -> Tensor:
        return (self.across[0] / 2) / (self.within / 2 + _EPSILON)

    @property
    def dsv(self) -> Tensor:
        return self.discordance - self.separability.clamp(max=_SEPARABILITY_CLAMP) / self.discordance

    @property
    def dsv_unclamped(self) -> Tensor:
        return self.discordance - self.separability / self.discordance

    @cached_property
    def separability(self) -> Tensor:
        """From second moments, in O((N_test + N_aug) D^2), without a pair.

        With x = z - m and unit directions u, both split into mean and rest, the variance of x.u over all
        pairs is tr(C_x C_u) + u'C_x u + x'C_u x: three terms that cannot be negative, so nothing cancels.
        """
        centre = self.train.mean(0)
        direction = self.augmented - centre
        length = norm(direction)[:, None]
        direction = torch.where(length > 0, direction / torch.where(length > 0, length, 1), 0)
        x_mean, x_cov = _moments(self.unlabeled - centre)
        u_mean, u_cov = _moments(direction)
        variance = (x_cov * u_cov).sum() + u_mean @ x_cov @ u_mean + x_mean @ u_cov @ x_mean
        return _sqrt(variance) / (self.within / 2)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and population covariance (D, D) of (N, D) rows."""
    mean = x.mean(0)
    rest = x - mean
    return mean, rest.T @ rest / len(x)


def _pair_moments(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of ||a_i - b_j|| over all pairs; scalars, not halved."""
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        distances = norm(a[:, None] - b[None])
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


def norm(x: Tensor) -> Tensor:
    """Euclidean norms along the last dimension, with gradient 0 (not NaN) at 0, to any order."""
    return _sqrt(x.square().sum(-1))


def _sqrt(square: Tensor) -> Tensor:
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)


def check_sets(train: Tensor, augmented: Tensor, unlabeled: Tensor) -> None:
    """Raise DegenerateError, naming it, for a set from which no criterion can be computed; see `base`."""
    for name, rows in (("train", train), ("augmented", augmented), ("unlabeled", unlabeled)):
        check_rows(name, rows, train.shape[1] if getattr(train, "ndim", 0) == 2 else None)
        # Identical up to rounding: a collapsed network's rows may differ in their last bits.
        tolerance = 8 * torch.finfo(rows.dtype).eps * rows[0].abs().max()
        if ((rows - rows[0]).abs() <= tolerance).all():
            raise DegenerateError(f"{name}: expected rows that differ, got {len(rows)} identical ones")


def check_rows(name: str, rows: Tensor, length: int | None) -> None:
    """Raise DegenerateError, naming it, for what is no set of finite embeddings (of a length, if given)."""
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        came = getattr(rows, "dtype", type(rows).__name__)
        raise DegenerateError(f"{name}: expected a floating-point tensor, got {came}")
    if rows.ndim != 2 or rows.shape[0] < 2 or rows.shape[1] < 1:
        raise DegenerateError(f"{name}: expected (N, D) with N >= 2, got {tuple(rows.shape)}")
    if length is not None and rows.shape[1] != length:
        raise DegenerateError(f"{name}: expected rows of train's length {length}, got {rows.shape[1]}")
    if not rows.isfinite().all():
        bad = int((~rows.isfinite().all(1)).sum())
        raise DegenerateError(f"{name}: expected finite values, got NaN or infinity in {bad} rows")
