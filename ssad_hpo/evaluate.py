"""Judging a choice after it was made: the only room where labels meet scores.

AUC stands for the area under the ROC curve, 0..1, higher is better, 0.5 is chance. Criteria are lower
is better, as in `ssad_hpo.criteria`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    Values = NDArray[Any] | torch.Tensor | Sequence[float]


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

    truth, predicted = finite_vector("labels", labels), finite_vector("scores", scores)
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
        auc_combined: AUC of several that score together, which is no choice of one; None where none do.
    """

    auc_selected: float
    auc_oracle: float
    auc_random: float
    auc_worst: float
    regret: float
    spearman: float | None
    n_candidates: int
    auc_combined: float | None = None

    def metrics(self) -> dict[str, float]:
        """The figures by name, for tracking; without those that are undefined."""
        return {name: float(value) for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Alarms:
    """How decisions fit the truth.

    Attributes:
        alarm_rate: the share of good images that was to raise an alarm, 0..1.
        n_good, n_anomalous: how many images of each there were.
        false_alarms: good ones that raised an alarm.
        misses: anomalous ones that raised none.
    """

    alarm_rate: float
    n_good: int
    n_anomalous: int
    false_alarms: int
    misses: int

    def sentence(self) -> str:
        """What is to be told, with the ranges that so few images allow."""
        told = [f"at a false alarm rate of {self.alarm_rate:.3g}"]
        if self.n_good:
            rate, low, high = share_range(self.false_alarms, self.n_good)
            told.append(
                f"{self.false_alarms} of {self.n_good} good images raise an alarm "
                f"({rate:.3f}, 95 % range {low:.3f} to {high:.3f})"
            )
        if self.n_anomalous:
            rate, low, high = share_range(self.misses, self.n_anomalous)
            told.append(
                f"{self.misses} of {self.n_anomalous} anomalous ones are missed "
                f"({rate:.3f}, {low:.3f} to {high:.3f})"
            )
        return ", ".join(told)


def count_alarms(labels: Values, alarms: Values, alarm_rate: float) -> Alarms:
    """Compare decisions with the truth.

    Args:
        labels: (N,), 1 for an anomaly, 0 for normal.
        alarms: (N,), True where an image raises an alarm.
        alarm_rate: the share of good images that was to raise one.

    Raises:
        ValueError: for other values, or numbers of them that differ.
    """
    truth, raised = finite_vector("labels", labels), finite_vector("alarms", alarms)
    if len(truth) != len(raised) or not set(np.unique(np.concatenate([truth, raised])).tolist()) <= {0, 1}:
        raise ValueError(f"labels, alarms: expected as many of 0 and 1, got {len(truth)} and {len(raised)}")
    good, anomalous = truth == 0, truth == 1
    return Alarms(
        alarm_rate,
        int(good.sum()),
        int(anomalous.sum()),
        int((raised[good] == 1).sum()),
        int((raised[anomalous] == 0).sum()),
    )


def share_range(count: int, total: int) -> tuple[float, float, float]:
    """A share, and the 95 % range of its true value (Clopper and Pearson, 1934), 0..1 each."""
    from scipy.stats import beta

    low = 0.0 if count == 0 else float(beta.ppf(0.025, count, total - count + 1))
    high = 1.0 if count == total else float(beta.ppf(0.975, count + 1, total - count))
    return count / total, low, high


def evaluate_candidates(
    aucs: Mapping[int, float],
    criterion_values: Mapping[int, float],
    selected: int,
    combined: float | None = None,
) -> StudyEvaluation:
    """Compare the selected candidate with the oracle, the worst and a random choice.

    Args:
        aucs: the AUC of each candidate that could have been chosen, by trial number.
        criterion_values: the criterion's value for the same trials, lower is better.
        selected: the trial that was chosen; it need not be the criterion's minimum.
        combined: the AUC of several of them together.

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
    criteria = np.array([criterion_values[trial] for trial in trials])
    return StudyEvaluation(
        auc_selected=float(aucs[selected]),
        auc_oracle=float(values.max()),
        auc_random=float(values.mean()),
        auc_worst=float(values.min()),
        regret=float(values.max() - aucs[selected]),
        spearman=rank_agreement(criteria, values),
        n_candidates=len(trials),
        auc_combined=combined,
    )


def rank_agreement(criterion: Values, aucs: Values) -> float | None:
    """Spearman's rank correlation of -criterion with AUC, -1..1, higher is better.

    Args:
        criterion: (K,) values of K candidates, lower is better.
        aucs: (K,) their AUCs.

    Returns:
        None where it is undefined: fewer than 3 candidates, or all equal in one of the two.
    """
    from scipy.stats import spearmanr

    goodness, found = -finite_vector("criterion", criterion), finite_vector("aucs", aucs)
    if len(found) < 3 or np.ptp(goodness) == 0 or np.ptp(found) == 0:
        return None
    return float(spearmanr(goodness, found).statistic)


def finite_vector(name: str, values: Values) -> NDArray[np.float64]:
    """(N,) values as an array.

    Raises:
        ValueError: naming them, for another shape or a value that is not finite.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1:
        raise ValueError(f"{name}: expected (N,), got {vector.shape}")
    if not np.isfinite(vector).all():
        raise ValueError(f"{name}: expected finite values, got {vector[~np.isfinite(vector)][0]}")
    return vector
