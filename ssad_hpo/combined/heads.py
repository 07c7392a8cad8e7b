"""A contrast head: what in a candidate's embeddings tells suspicious unlabelled images from held-out ones.

Novelty detection from a nominal and a contaminated sample (Blanchard, Lee and Scott, JMLR 2010), made for few
images: the direction is that of linear discriminant analysis, whose covariance is that of the train
embeddings, and whose second class is the unlabelled images of the highest scores. A ridge regression of all
unlabelled against all held-out images loses to it wherever it was tried; see studies/results/choice.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssad_hpo.criteria import pu_auc
from ssad_hpo.detector import Embeddings, fit_gaussian

_FOLDS = 5  # no image is scored by a head that was fitted to it
_SUSPICIOUS = 0.2  # share of the unlabelled images that a head is fitted to
# A head's PU-AUC in standard errors above chance from which it counts, and from which it counts in full.
_COUNTS, _COUNTS_IN_FULL = 2.5, 4.5


@dataclass(frozen=True, eq=False)
class Head:
    """A linear function of unit embeddings: `embeddings @ weights + bias`, higher is more anomalous.

    Attributes:
        weights: (D,) float64.
        bias: a number.
    """

    weights: Tensor
    bias: float

    def __call__(self, embeddings: Tensor) -> Tensor:
        return embeddings.double() @ self.weights + self.bias


def contrast_head(sets: Embeddings, scores: Tensor) -> tuple[Head, Tensor, Tensor]:
    """The direction from the held-out images to the fifth of the unlabelled ones that scores highest.

    It is w = C^-1 (mean of these - mean of the held-out), C the Ledoit-Wolf covariance of the train
    embeddings, fitted in five folds of both sets.

    Args:
        sets: of a candidate, with those of held-out images.
        scores: (N_test,) by which unlabelled images are suspicious, higher is more.

    Returns:
        The mean of the folds' heads, for other images; and the scores of the unlabelled and the held-out
        images, each by the head of the fold that it was left out of, higher is more anomalous.
    """
    assert sets.held_out is not None
    unlabeled, held_out = sets.unlabeled.double(), sets.held_out.double()
    _, whitening = fit_gaussian(sets.train)
    of_unlabeled, of_held_out = (copies_together(rows, _FOLDS) for rows in (unlabeled, held_out))
    folds = int(min(of_unlabeled.max(), of_held_out.max())) + 1
    of_unlabeled, of_held_out = of_unlabeled % folds, of_held_out % folds
    values = torch.zeros(len(unlabeled)).double(), torch.zeros(len(held_out)).double()
    heads = []
    for fold in range(folds):
        kept, others = of_unlabeled != fold, of_held_out != fold
        head = _direction(unlabeled[kept], scores[kept], held_out[others], whitening)
        values[0][~kept], values[1][~others] = head(unlabeled[~kept]), head(held_out[~others])
        heads.append(head)
    mean = Head(torch.stack([h.weights for h in heads]).mean(0), sum(h.bias for h in heads) / len(heads))
    return mean, *values


def copies_together(rows: Tensor, groups: int) -> Tensor:
    """(N,) int64, a group 0..groups - 1 for each row (N, D), in turn; equal rows, of copies, have the same.

    Where almost all are copies, they are shared out like others.
    """
    first: dict[bytes, int] = {}
    places = torch.tensor([first.setdefault(row.numpy().tobytes(), len(first)) for row in rows])
    return (places if len(first) > 1 else torch.arange(len(rows))) % groups


def _direction(unlabeled: Tensor, scores: Tensor, held_out: Tensor, whitening: Tensor) -> Head:
    suspicious = unlabeled[scores.topk(max(1, round(_SUSPICIOUS * len(scores)))).indices]
    centre = held_out.mean(0)
    weights = whitening.T @ (whitening @ (suspicious.mean(0) - centre))
    return Head(weights, -float(centre @ weights))


def head_weight(unlabeled: Tensor, held_out: Tensor) -> float:
    """How much heads count beside the candidates' own scores, 0..1, by what they are worth without labels.

    Nothing while the PU-AUC of their scores is less than 2.5 standard errors above chance, all from 4.5 on.

    Args:
        unlabeled, held_out: scores of heads that these images have no part in, as `contrast_head` gives them.
    """
    n, m = len(unlabeled), len(held_out)
    error = ((n + m + 1) / (12 * n * m)) ** 0.5  # of a PU-AUC of 1/2
    height = (-float(pu_auc(unlabeled, held_out)) - 0.5) / error
    return min(max((height - _COUNTS) / (_COUNTS_IN_FULL - _COUNTS), 0.0), 1.0)
