"""Does a detector work where f_aug imitates f_gen? Figures over a grid of pairs of the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssad_hpo.evaluate import rank_agreement


@dataclass(frozen=True)
class AlignmentEvaluation:
    """How much better detectors find the anomalies whose f_gen is their own f_aug.

    Attributes:
        aligned: mean AUC over the pairs where f_aug is f_gen, the diagonal.
        misaligned: mean AUC over all other pairs.
        unbeaten: for how many f_gen no other f_aug has a higher AUC than f_gen itself.
        spearman: rank correlation of -distance with AUC over all pairs, -1..1, higher is better; None
            where it is undefined: fewer than 3 pairs, or all equal in distance or AUC.
        spearman_within: the same over the f_aug of one f_gen, averaged over the f_gen where it is
            defined; None where it nowhere is.
    """

    aligned: float
    misaligned: float
    unbeaten: int
    spearman: float | None
    spearman_within: float | None


def evaluate_alignment(aucs: ArrayLike, distances: ArrayLike) -> AlignmentEvaluation:
    """Does AUC follow the alignment of f_aug with f_gen?

    So found Yoo, Zhao and Akoglu, "Data Augmentation is a Hyperparameter" (TMLR 2023).

    Args:
        aucs: (K, K), 0..1, K >= 2: rows are f_gen, columns f_aug, in the same order of kinds. NaN where a
            training failed; such pairs are left out.
        distances: (K, K) of the augmented images' embeddings from those of the anomalies, NaN alike.

    Raises:
        ValueError: naming the argument, for a wrong shape, NaN in one array only, or no pair at all on
            the diagonal or off it.
    """
    found, apart = np.asarray(aucs, dtype=float), np.asarray(distances, dtype=float)
    if found.ndim != 2 or found.shape[0] != found.shape[1]:
        raise ValueError(f"aucs: expected (K, K), got {found.shape}")
    there = np.isfinite(found)
    if apart.shape != found.shape or not np.array_equal(np.isfinite(apart), there):
        raise ValueError(f"distances: expected {found.shape} as aucs, NaN at the same pairs")
    diagonal = np.eye(len(found), dtype=bool)
    if not (there & diagonal).any() or not (there & ~diagonal).any():
        raise ValueError("aucs: expected at least one pair on the diagonal and one off it, got none")
    rows = zip(apart, found, there, strict=True)
    within = [rank_agreement(near[pairs], of_row[pairs]) for near, of_row, pairs in rows]
    defined = [value for value in within if value is not None]
    return AlignmentEvaluation(
        aligned=float(found[there & diagonal].mean()),
        misaligned=float(found[there & ~diagonal].mean()),
        unbeaten=sum(bool(there[i, i] and row[i] >= np.nanmax(row)) for i, row in enumerate(found)),
        spearman=rank_agreement(apart[there], found[there]),
        spearman_within=float(np.mean(defined)) if defined else None,
    )


def mean_grid(
    pairs: Sequence[tuple[Any, Any]], values: Sequence[float], rows: Sequence[Any], columns: Sequence[Any]
) -> NDArray[np.float64]:
    """(R, C): the mean of all values whose pair is (row, column); NaN where there is none.

    Args:
        pairs, values: N each.
        rows, columns: the R and C keys that are asked for; other pairs are left out.

    Raises:
        ValueError: if there are not as many values as pairs.
    """
    if len(values) != len(pairs):
        raise ValueError(f"values: expected one for each of {len(pairs)} pairs, got {len(values)}")
    groups: dict[tuple[Any, Any], list[float]] = {}
    for pair, value in zip(pairs, values, strict=True):
        groups.setdefault(pair, []).append(value)
    return np.array([[np.mean(groups.get((r, c), [np.nan])) for c in columns] for r in rows])
