"""Which unlabelled images a tuning looks at: those that stand out against held-out normal ones.

Where few unlabelled images are anomalous, a validation loss is mostly about normal ones, and its lowest point
moves away from where the augmentation imitates the anomalies. Held-out images tell how many more unlabelled
ones score high than there would be without anomalies; twice as many of the highest are about half anomalous.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 16  # images that are looked at, if there are so many
EVERY = 5  # steps of the hyperparameters after which the images are chosen anew


def standing_out(scores: Tensor, held_out: Tensor) -> Tensor:
    """Places of the unlabelled images that stand out, in rising order.

    Args:
        scores: (N_test,) anomaly scores of the unlabelled images, higher is more anomalous.
        held_out: (N_held,) those of held-out normal images.

    Returns:
        (M,) int64: of the highest scores twice as many as the largest excess of the unlabelled images above
        any threshold (the share of them there less that of held-out ones), at least 16, at most all.
    """
    order = scores.argsort(descending=True, stable=True)
    ranked, normal = scores[order].contiguous(), held_out.sort().values
    # At each score as the threshold: images that are not below it.
    among = 1 - torch.searchsorted(scores.sort().values, ranked).double() / len(scores)
    expected = 1 - torch.searchsorted(normal, ranked).double() / len(held_out)
    excess = float((among - expected).max().clamp_min(0)) * len(scores)
    return order[: max(LEAST, round(2 * excess))].sort().values
