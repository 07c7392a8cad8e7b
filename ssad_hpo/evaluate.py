"""Judging a choice after it was made: the only room where labels meet scores.

AUC stands for the area under the ROC curve, 0..1, higher is better, 0.5 is chance. Criteria are lower
is better, as in `ssad_hpo.criteria`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import torch

    Values = NDArray[Any] | torch.Tensor | Sequence[float]

_TaskT = TypeVar("_TaskT", bound=Hashable)


def auc(labels: Values, scores: Values) -> float:
    """The area under the ROC curve: the chance that an anomaly scores above a normal sample.

    Args:
        labels: (N,), 1 (or True) for an anomaly, 0 (or False) for normal; both must occur.
        scores: (N,), finite, higher is more anomalous; equal scores count half.

    Raises:
        ValueError: naming the argument, for a wrong shape or length, labels other than 0 and 1 or of
            one class only, scores that are not finite.
    """
    from sklearn.metrics import roc_auc_score  # here and below: slow, and needed when a search has ended

    truth, predicted = _vector("labels", labels), _vector("scores", scores)
    if len(truth) != len(predicted):
        raise ValueError(f"scores: expected one for each of {len(truth)} labels, got {len(predicted)}")
    values = np.unique(truth).tolist()
    if values != [0, 1]:
        raise ValueError(f"labels: expected both 0 (normal) and 1 (anomaly), got {values[:5]}")
    return float(roc_auc_score(truth, predicted))


@dataclass(frozen=True)
class StudyEvaluation:
    """How good a study's choice was among its candidates.

    Attributes:
        auc_selected: AUC of the candidate that was chosen without labels.
        auc_oracle: the best AUC among the candidates.
        auc_random: their mean AUC, which a random choice has in expectation.
        auc_worst: the worst AUC among them.
        regret: auc_oracle - auc_selected, 0 is best.
        spearman: rank correlation of -criterion with AUC, -1..1, higher is better; None where it is
            undefined: fewer than 3 candidates, or all equal in criterion or AUC.
        n_candidates: how many there were.
    """

    auc_selected: float
    auc_oracle: float
    auc_random: float
    auc_worst: float
    regret: float
    spearman: float | None
    n_candidates: int

    def metrics(self) -> dict[str, float]:
        """The figures by name, for tracking; without those that are undefined."""
        return {name: float(value) for name, value in asdict(self).items() if value is not None}


def evaluate_candidates(
    aucs: Mapping[int, float], criterion_values: Mapping[int, float], selected: int
) -> StudyEvaluation:
    """Compare the selected candidate with the oracle, the worst and a random choice.

    Args:
        aucs: the AUC of each candidate that could have been chosen, by trial number.
        criterion_values: the criterion's value for the same trials, lower is better.
        selected: the trial that was chosen; it need not be the criterion's minimum.

    Raises:
        ValueError: naming the argument, when there is no candidate, the two mappings hold different
            trials, a value is not finite, an AUC is outside 0..1, or `selected` is none of them.
    """
    if not aucs:
        raise ValueError("aucs: expected at least one candidate, got none")
    if set(aucs) != set(criterion_values):
        apart = sorted(set(aucs) ^ set(criterion_values))
        raise ValueError(f"criterion_values: expected the trials of aucs, got a difference in {apart}")
    if selected not in aucs:
        raise ValueError(f"selected: expected one of the trials {sorted(aucs)}, got {selected}")
    for trial, value in aucs.items():
        if not 0 <= value <= 1:
            raise ValueError(f"aucs: expected 0..1, got {value} for trial {trial}")
    for trial, value in criterion_values.items():
        if not math.isfinite(value):
            raise ValueError(f"criterion_values: expected finite values, got {value} for trial {trial}")

    trials = sorted(aucs)  # so that sums do not depend on the order in which trials ended
    values = np.array([aucs[trial] for trial in trials])
    goodness = np.array([-criterion_values[trial] for trial in trials])
    return StudyEvaluation(
        auc_selected=float(aucs[selected]),
        auc_oracle=float(values.max()),
        auc_random=float(values.mean()),
        auc_worst=float(values.min()),
        regret=float(values.max() - aucs[selected]),
        spearman=_spearman(goodness, values),
        n_candidates=len(trials),
    )


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
    """Does AUC follow the alignment of f_aug with f_gen [1]?

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
    rows = zip(-apart, found, there, strict=True)
    within = [_spearman(near[pairs], of_row[pairs]) for near, of_row, pairs in rows]
    defined = [value for value in within if value is not None]
    return AlignmentEvaluation(
        aligned=float(found[there & diagonal].mean()),
        misaligned=float(found[there & ~diagonal].mean()),
        unbeaten=sum(bool(there[i, i] and row[i] >= np.nanmax(row)) for i, row in enumerate(found)),
        spearman=_spearman(-apart[there], found[there]),
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


def average_ranks(table: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Each method's rank averaged over tasks; rank 1 is the best AUC of a task, ties averaged.

    Args:
        table: for each method its AUC (or any figure where higher is better) on every task, all in
            the same order of tasks.

    Raises:
        ValueError: when there is no method or no task, lengths differ, or a value is not finite.
    """
    from scipy.stats import rankdata

    if not table:
        raise ValueError("table: expected at least one method, got none")
    rows = {method: _vector(f"table[{method!r}]", aucs) for method, aucs in table.items()}
    lengths = {method: len(row) for method, row in rows.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(f"table: expected every method on the same tasks, one or more, got {lengths}")
    ranks = rankdata(-np.stack(list(rows.values())), method="average", axis=0)
    return dict(zip(rows, ranks.mean(axis=1).tolist(), strict=True))


def wilcoxon_greater(a: Values, b: Values) -> float:
    """The p-value of the one-sided paired Wilcoxon signed-rank test that `a` is greater than `b`.

    Pairs without a difference are left out (Wilcoxon's own way); if none is left, nothing speaks for
    `a` and the p-value is 1. Of the pairs that remain, up to 50 without ties and up to 13 with ties are
    tested exactly, more by the normal approximation with a correction for ties (SciPy's choice).

    Args:
        a, b: (N,) paired values, for instance the AUCs of two methods on the same tasks; N >= 1.

    Raises:
        ValueError: naming the argument, for a wrong shape, different lengths, values not finite.
    """
    from scipy.stats import wilcoxon

    first, second = _vector("a", a), _vector("b", b)
    if len(first) != len(second) or len(first) == 0:
        raise ValueError(f"b: expected as many values as a, at least 1, got {len(first)} and {len(second)}")
    # Rounded, since 0.9 - 0.8 and 0.8 - 0.7 differ in their last bits and must count as tied.
    differences = np.round(first - second, 12)
    differences = differences[differences != 0]
    if len(differences) == 0:
        return 1.0
    return float(wilcoxon(differences, alternative="greater").pvalue)


@dataclass(frozen=True)
class Comparison:
    """One method against another on the same tasks and seeds.

    Attributes:
        difference: mean over tasks of (first - second), each task's values averaged over its seeds.
        low, high: the 95 % bootstrap interval of `difference`, resampling whole clusters of tasks.
        p_task: one-sided Wilcoxon p-value that the first is greater, the unit being the task after
            averaging its seeds. Tasks that share trainings are not independent, which makes this (and
            the next) optimistic; the interval is not.
        p_run: the same, the unit being task and seed.
    """

    difference: float
    low: float
    high: float
    p_task: float
    p_run: float


def compare(
    first: Mapping[tuple[_TaskT, int], float],
    second: Mapping[tuple[_TaskT, int], float],
    clusters: Mapping[_TaskT, Hashable],
    *,
    draws: int = 2000,
) -> Comparison:
    """Compare two methods over the same runs.

    Args:
        first, second: by (task, seed) the AUC, or any figure where higher is better.
        clusters: by task the cluster in which it moves with others, e.g. its train images.
        draws: of the bootstrap, which draws from a seed of its own.

    Raises:
        ValueError: when there is no run, or the two methods have different ones.
    """
    if not first or set(first) != set(second):
        apart = len(set(first) ^ set(second))
        raise ValueError(f"second: expected the runs of first, at least 1, got {apart} that only one has")
    runs = sorted(first, key=repr)
    tasks = list(dict.fromkeys(task for task, _ in runs))
    means = [
        [float(np.mean([method[run] for run in runs if run[0] == task])) for task in tasks]
        for method in (first, second)
    ]
    by_cluster: dict[Hashable, list[float]] = defaultdict(list)
    for task, a, b in zip(tasks, *means, strict=True):
        by_cluster[clusters[task]].append(a - b)
    grouped = list(by_cluster.values())
    generator = np.random.default_rng(0)
    resampled = [
        np.mean(np.concatenate([grouped[i] for i in generator.integers(len(grouped), size=len(grouped))]))
        for _ in range(draws)
    ]
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Comparison(
        difference=float(np.mean(means[0]) - np.mean(means[1])),
        low=float(low),
        high=float(high),
        p_task=wilcoxon_greater(*means),
        p_run=wilcoxon_greater([first[r] for r in runs], [second[r] for r in runs]),
    )


def rank_agreement(criterion: Values, aucs: Values) -> float | None:
    """Spearman's rank correlation of -criterion with AUC, -1..1, higher is better.

    Args:
        criterion: (K,) values of K candidates, lower is better.
        aucs: (K,) their AUCs.

    Returns:
        None where it is undefined: fewer than 3 candidates, or all equal in one of the two.
    """
    return _spearman(-_vector("criterion", criterion), _vector("aucs", aucs))


def factor_off(found: float, true: float) -> float:
    """By which factor a hyperparameter was missed, max(found / true, true / found); 1 is exact.

    Args:
        found, true: positive and finite, such as areas or aspects.

    Raises:
        ValueError: naming the value that is not.
    """
    for name, value in (("found", found), ("true", true)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    return max(found / true, true / found)


def _vector(name: str, values: Values) -> NDArray[np.float64]:
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1:
        raise ValueError(f"{name}: expected (N,), got {vector.shape}")
    if not np.isfinite(vector).all():
        raise ValueError(f"{name}: expected finite values, got {vector[~np.isfinite(vector)][0]}")
    return vector


def _spearman(goodness: NDArray[np.float64], aucs: NDArray[np.float64]) -> float | None:
    from scipy.stats import spearmanr

    if len(aucs) < 3 or np.ptp(goodness) == 0 or np.ptp(aucs) == 0:
        return None
    return float(spearmanr(goodness, aucs).statistic)
