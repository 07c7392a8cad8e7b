"""Reads npz files of embeddings and scores: what a trial leaves, and what `select` is given."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ssad_hpo.bounds import MOST_ARRAY_BYTES
from ssad_hpo.criteria import check_rows, check_sets
from ssad_hpo.files import check_archive, reading

SETS = ("train", "augmented", "unlabeled")
SCORES = "scores"
# Embeddings and scores of held-out images, where there are such.
HELD_OUT, HELD_OUT_SCORES = "held_out", "held_out_scores"


def read_arrays(
    path: Path,
    remedy: str,
    names: Collection[str] = (*SETS, SCORES),
    optional: Collection[str] = (HELD_OUT, HELD_OUT_SCORES),
    max_bytes: int = MOST_ARRAY_BYTES,
) -> dict[str, NDArray[np.floating]]:
    """Arrays by name, as floating-point numbers; never unpickles.

    Args:
        remedy: for the message, if it cannot be used.
        names: of what must be there: the three sets, (N, D) each, or scores, one for each unlabelled sample.
        optional: what is read if it is there; of held-out samples embeddings (N, D) and scores (N,).
        max_bytes: of all arrays in the file.

    Raises:
        FileError: if it is no such file, lacks an array, or holds one of another type or shape, one whose
            numbers are not finite or whose rows are all the same. OSError: if it cannot be opened.
    """
    with reading(path, "cannot be read as an npz file of arrays", remedy):
        check_archive(path, max_bytes)
        _check_sizes(path)
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


def _check_sizes(path: Path) -> None:
    """Raise ValueError for an array that declares another size than it has, before room is made for it."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                shape, _, dtype = headers[np.lib.format.read_magic(file)](file)
                declared, there = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
            if declared != there and not dtype.hasobject:  # objects are refused by numpy
                raise ValueError(f"{member.filename} declares {declared} bytes and has {there}")
