"""The Gaussian of normal embeddings."""

from __future__ import annotations

import torch
from torch import Tensor


def fit_gaussian(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and whitening (D, D) of (N, D) rows, float64, with the covariance of Ledoit and Wolf.

    ||whitening (z - mean)|| is the Mahalanobis distance.

    Raises:
        ValueError: for rows without any spread.
    """
    from sklearn.covariance import ledoit_wolf  # imported here: slow, and `import ssad_hpo` is not

    rows = rows.double()
    mean = rows.mean(0)
    covariance, _ = ledoit_wolf((rows - mean).numpy(), assume_centered=True)
    lower, failed = torch.linalg.cholesky_ex(torch.from_numpy(covariance))
    if failed:
        raise ValueError("have no spread")
    eye = torch.eye(len(lower), dtype=lower.dtype)
    return mean, torch.linalg.solve_triangular(lower, eye, upper=False).contiguous()
