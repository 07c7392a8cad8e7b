"""Reads npz files of embeddings and scores: what a trial leaves, and what `select` is given."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ssad_hpo.criteria import check_rows, check_sets
from ssad_hpo.files import check_archive, reading

SETS = ("train", "augmented", "unlabeled")
SCORES = "scores"
HELD_OUT, HELD_OUT_SCORES = (
    "held_out",
    "held_out_scores",
)  # embeddings and scores, where there are such images
_MOST_BYTES = 16 * 2**30


def read_arrays(
    path: Path,
    remedy: str,
    names: Collection[str] = (*SETS, SCORES),
    optional: Collection[str] = (HELD_OUT, HELD_OUT_SCORES),
) -> dict[str, NDArray[np.floating]]:
    """Arrays by name, as floating-point numbers; never unpickles.

    Args:
        path: of the npz file.
        remedy: for the message, if it cannot be used.
        names: of what must be there: the three sets, (N, D) each, or scores, one for each unlabelled sample.
        optional: what is read if it is there; of held-out samples embeddings (N, D) and scores (N,).

    Raises:
        FileError: if it is no such file, lacks an array, or holds one of another type or shape, one whose
            numbers are not finite or whose rows are all the same. OSError: if it cannot be opened.
    """
    with reading(path, "cannot be read as an npz file of arrays", remedy):
        check_archive(path, _MOST_BYTES)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in (*names, *optional) if name in file}
    with reading(path, "cannot be read as embeddings and scores", remedy):
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ValueError(f"expected arrays train, augmented and unlabeled, without {missing[0]}")
        for name, array in arrays.items():
            if not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
                raise ValueError(f"{name}: expected real numbers, got {array.dtype}")
            if array.dtype not in (np.float32, np.float64):
                arrays[name] = array.astype(np.float64)
        if all(name in arrays for name in SETS):
            check_sets(*(torch.from_numpy(arrays[name]) for name in SETS))
        _check_scores(arrays, SCORES, "unlabeled", "unlabelled")
        _check_scores(arrays, HELD_OUT_SCORES, HELD_OUT, "held-out")
        if HELD_OUT in arrays and "train" in arrays:
            check_rows(HELD_OUT, torch.from_numpy(arrays[HELD_OUT]), arrays["train"].shape[-1])
    return arrays


def _check_scores(arrays: dict[str, NDArray[np.floating]], name: str, rows: str, kind: str) -> None:
    """Raise ValueError for scores that are not finite, or not one for each of the embeddings `rows`."""
    if (scores := arrays.get(name)) is None:
        return
    samples = len(arrays[rows]) if rows in arrays else scores.size
    if scores.shape != (samples,):
        raise ValueError(f"{name}: expected one for each of {samples} {kind} samples, got {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
