"""Consensus selectors: merits of trained models from their anomaly scores on `unlabeled`, no labels.

Each selector takes one (n_samples, n_models) matrix of scores, higher is more anomalous, and gives
(n_models,) merits, higher is better. A model counts as good when it agrees with the others, which holds
as far as most models are good.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.stats import kendalltau, rankdata

if TYPE_CHECKING:
    import torch

Merits = NDArray[np.float64]


def mc(scores: NDArray[Any] | torch.Tensor) -> Merits:
    """Model centrality: the mean Kendall tau-b of a model's scores to every other model's.

    Args:
        scores: (n_samples, n_models), higher is more anomalous, both at least 2.

    Returns:
        (n_models,) in -1..1, higher is better.

    Raises:
        ValueError: for a wrong shape, values that are not finite, or a model that gives all samples
            the same score (its tau to anything is undefined).

    One of the selectors that DSV (Yoo et al., ECML PKDD 2023) is compared with, as are `hits` and `sel`.
    """
    ranks = _dense_ranks(_checked(scores))
    n_models = len(ranks)
    taus = np.zeros((n_models, n_models))

    def fill_row(model: int) -> None:
        taus[model, model + 1 :] = _taus(ranks[model], ranks[model + 1 :])

    # Threads, not processes: half of a tau's time is spent in sorts and counts that release the GIL.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill_row, range(n_models - 1)))
    return (taus + taus.T).sum(axis=1) / (n_models - 1)


def hits(scores: NDArray[Any] | torch.Tensor) -> Merits:
    """HITS: the hub values of the models, where models vote for samples by inverse rank.

    With I = 1 / rank (rank 1 is the most anomalous, ties averaged), the power iteration
    authority ~ I hub, hub ~ I^T authority converges to the leading eigenvector of I^T I, which is
    positive and unique as I is positive (Perron). We solve for it directly: no tolerance, no number of
    iterations.

    Args:
        scores: (n_samples, n_models), higher is more anomalous, both at least 2.

    Returns:
        (n_models,) in 0..1 with unit Euclidean length, higher is better.

    Raises:
        ValueError: as `mc`; a constant model has a hub value, but no opinion to be judged by.
    """
    inverse_ranks = _inverse_ranks(_checked(scores))
    n_models = inverse_ranks.shape[1]
    _, vectors = eigh(inverse_ranks.T @ inverse_ranks, subset_by_index=[n_models - 1, n_models - 1])
    return np.abs(vectors[:, 0])  # its sign is arbitrary; all entries have the same


def sel(scores: NDArray[Any] | torch.Tensor) -> Merits:
    """SELECT: the Kendall tau-b of a model to the consensus of the models that SELECT trusts.

    The first that it trusts agrees most with the mean inverse rank over all models. Then the model that
    agrees most with the mean inverse rank over the trusted ones joins, while its tau is at least the mean of
    the taus at which models joined so far, the first one's included. Equal taus: the lower number.

    Args:
        scores: (n_samples, n_models), higher is more anomalous, both at least 2.

    Returns:
        (n_models,) in -1..1, higher is better.

    Raises:
        ValueError: as `mc`, and when a consensus gives all samples the same rank (models that
            contradict each other perfectly).
    """
    return _select(_checked(scores))[1]


SELECTORS: dict[str, Callable[[NDArray[Any] | torch.Tensor], Merits]] = {
    "mc": mc,
    "sel": sel,
    "hits": hits,
}


def _checked(scores: NDArray[Any] | torch.Tensor) -> NDArray[np.float64]:
    if not isinstance(scores, np.ndarray) and hasattr(scores, "detach"):
        scores = scores.detach().cpu().double().numpy()
    matrix = np.asarray(scores, dtype=np.float64)
    if matrix.ndim != 2 or min(matrix.shape) < 2:
        raise ValueError(
            f"scores: expected (n_samples, n_models) with at least 2 of each, got {matrix.shape}"
        )
    not_finite = ~np.all(np.isfinite(matrix), axis=0)
    _reject_models("finite scores", not_finite, "values that are not finite")
    constant = np.all(matrix == matrix[0], axis=0)
    _reject_models("models that tell samples apart", constant, "constant scores")
    return matrix


def _reject_models(expected: str, bad: NDArray[np.bool_], came: str) -> None:
    if bad.any():
        columns = np.flatnonzero(bad).tolist()
        shown = f"{columns[:5]}" if len(columns) <= 5 else f"{columns[:5]} and {len(columns) - 5} more"
        raise ValueError(f"scores: expected {expected}, got {came} in columns {shown}")


def _dense_ranks(matrix: NDArray[np.float64]) -> NDArray[np.unsignedinteger[Any]]:
    """(n_models, n_samples) ranks from 1, equal scores share one, in the smallest integer type.

    SciPy sorts in every tau; integers of 16 bits (up to 65,535 samples) go through a radix sort, ten
    times as fast as floats.
    """
    ranks = rankdata(matrix.T, method="dense", axis=1)
    return ranks.astype(np.min_scalar_type(matrix.shape[0]))


def _inverse_ranks(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n_samples, n_models) 1 / rank, rank 1 is the highest score, ties averaged."""
    return 1 / rankdata(-matrix, method="average", axis=0)


def _taus(target: NDArray[Any], ranks: NDArray[Any]) -> Merits:
    """Kendall tau-b of every row of `ranks` (n, n_samples) to `target` (n_samples,)."""
    # Sorting samples by the target once leaves SciPy one real sort in each tau instead of two.
    order = np.argsort(target, kind="stable")
    target = target[order]
    return np.array([kendalltau(row, target).statistic for row in ranks[:, order]])


def _select(matrix: NDArray[np.float64]) -> tuple[list[int], Merits]:
    """The models (column numbers) that SELECT trusts, in the order in which it came to, and all merits."""
    ranks, inverse_ranks = _dense_ranks(matrix), _inverse_ranks(matrix)
    taus = _taus_to_consensus(inverse_ranks, ranks)
    trusted = [int(np.argmax(taus))]
    joined_at = [taus[trusted[0]]]
    while True:
        taus = _taus_to_consensus(inverse_ranks[:, trusted], ranks)
        candidates = taus.copy()
        candidates[trusted] = -np.inf
        best = int(np.argmax(candidates))
        if len(trusted) == len(ranks) or candidates[best] < np.mean(joined_at):
            return trusted, taus
        trusted.append(best)
        joined_at.append(candidates[best])


def _taus_to_consensus(inverse_ranks: NDArray[np.float64], ranks: NDArray[Any]) -> Merits:
    # Sorted before the sum, so that samples with the same ranks from different models stay tied, and
    # the order of the models does not matter, in spite of rounding.
    consensus = np.sort(inverse_ranks, axis=1).mean(axis=1)
    if (consensus == consensus[0]).all():
        raise ValueError(
            "scores: expected models with some consensus, got inverse ranks that cancel out everywhere"
        )
    return _taus(_dense_ranks(consensus[:, None])[0], ranks)
