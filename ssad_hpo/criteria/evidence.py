"""Is there anything to choose by: do any detector's scores tell the unlabelled images from held-out ones?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from ssad_hpo.calibration import DRIFT_LEVEL, Calibration
from ssad_hpo.criteria.pairs import DegenerateError

NO_EVIDENCE = 0.05  # from here on the unlabelled images show no anomaly that any detector sees


def p_anomalies(
    scores: Sequence[Tensor], held_out: Sequence[Tensor], *, permutations: int = 999, seed: int = 0
) -> float:
    """The chance that unlabelled images without anomalies would look as anomalous as these, to any detector.

    A permutation test of the largest PU-AUC among detectors: which of all scores are those of unlabelled
    images is drawn anew each time, for all detectors alike. Below 0.05 some detector sees anomalies.

    >>> import torch
    >>> from ssad_hpo.criteria import p_anomalies
    >>> held_out = torch.arange(30.0)
    >>> p_anomalies([held_out + 9], [held_out]) < 0.01, p_anomalies([held_out], [held_out]) > 0.3
    (True, True)

    Args:
        scores: of each detector (N_test,) anomaly scores of the unlabelled images, in one order.
        held_out: of each detector (N_held,) those of held-out normal images, in one order.
        permutations: how many.
        seed: of the permutations.

    Returns:
        (1 + those that reach what was seen) / (1 + permutations).

    Raises:
        DegenerateError: for no detector, or numbers of scores that differ between detectors.
    """
    if not scores or len(scores) != len(held_out):
        raise DegenerateError(
            f"held_out: expected scores of {len(scores)} detectors, at least one, got {len(held_out)}"
        )
    if len({(len(u), len(h)) for u, h in zip(scores, held_out, strict=True)}) > 1:
        raise DegenerateError("scores: expected as many of each detector, got different numbers")
    ranks = np.stack([rankdata(torch.cat([u, h]).numpy()) for u, h in zip(scores, held_out, strict=True)])
    count, total = len(scores[0]), ranks.shape[1]
    # PU-AUC rises with the sum of the unlabelled images' ranks, and all detectors have as many of both.
    seen = ranks[:, :count].sum(1).max()
    generator = np.random.default_rng(seed)
    drawn = generator.permuted(np.tile(np.arange(total) < count, (permutations, 1)), axis=1)
    reached = (drawn @ ranks.T).max(1) >= seen - 1e-9 * total
    return float(1 + reached.sum()) / (1 + permutations)


def shifted_as_a_whole(scores: Tensor, held_out: Tensor) -> bool:
    """Whether the unlabelled scores lie above the held-out ones as a whole, not in their tail alone.

    Where anomalies are the difference, the normal ones among the unlabelled images still have low scores. If
    almost none has, held-out images are not as the normal ones among the unlabelled, and no criterion of
    scores can tell that from anomalies. It is what `Calibration.drift` asks of any batch.

    Args:
        scores: (N_test,) of the unlabelled images.
        held_out: (N_held,) of held-out normal images.
    """
    return Calibration(held_out).drift(scores) < DRIFT_LEVEL
