"""Offline selection: choose among detectors that somebody has trained already.

A detector is one npz file, written by any tool: embeddings `train`, `augmented` and `unlabeled`, (N, D)
each, and, where there are any, anomaly `scores` of the unlabelled samples, (N_test,). Neither a model
nor a search is needed.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from ssad_hpo.consensus import SELECTORS
from ssad_hpo.criteria import CRITERIA, DegenerateError, evaluate_all

_SETS = ("train", "augmented", "unlabeled")


@dataclass(frozen=True)
class Ranking:
    """Who ranks which detector where.

    Attributes:
        paths: the detectors' files, in the order given.
        values: for each selector one value a detector: criteria (lower is better), and the consensus
            selectors (higher is better) if every detector has scores.
        ranks: for each selector one rank a detector, 1 is best, equal ones averaged.
        selector: the one that chose.
        selected: index of the chosen detector; of equal ones the first.
    """

    paths: tuple[Path, ...]
    values: dict[str, NDArray[np.float64]]
    ranks: dict[str, NDArray[np.float64]]
    selector: str
    selected: int


def select_detectors(files: Sequence[str | Path], selector: str = "dsv") -> Ranking:
    """Rank trained detectors without labels, and choose one.

    Args:
        files: an npz file for each detector, see above; all of the same unlabelled samples, in one order.
        selector: what chooses: a key of `ssad_hpo.CRITERIA`, or "mc", "hits" or "sel".

    Raises:
        ValueError: naming the file that cannot be read, lacks a set, holds a degenerate one or another
            number of unlabelled samples; or for a consensus selector where scores are missing.
    """
    if selector not in CRITERIA and selector not in SELECTORS:
        raise ValueError(f"selector: expected one of {', '.join((*CRITERIA, *SELECTORS))}, got {selector!r}")
    if not files:
        raise ValueError("files: expected at least one detector, got none")
    paths = tuple(Path(file) for file in files)
    rows: list[dict[str, float]] = []
    scores: list[NDArray[np.float64]] = []
    samples = None
    for path in paths:
        arrays = _read(path)
        samples = samples or len(arrays["unlabeled"])
        if len(arrays["unlabeled"]) != samples:
            raise ValueError(
                f"{path}: expected {samples} unlabelled samples as in {paths[0]}, "
                f"got {len(arrays['unlabeled'])}"
            )
        try:
            given = (torch.from_numpy(arrays[name]) for name in (*_SETS, "scores") if name in arrays)
            rows.append(evaluate_all(*given))
        except DegenerateError as error:
            raise ValueError(f"{path}: {error}") from error
        if "scores" in arrays:
            scores.append(arrays["scores"])
    values = {
        name: np.array([row[name] for row in rows]) for name in CRITERIA if all(name in r for r in rows)
    }
    ranks = {name: rankdata(value) for name, value in values.items()}
    if len(scores) < len(paths) and (selector in SELECTORS or "scores" in CRITERIA[selector].needs):
        raise ValueError(f"selector: {selector!r} needs scores in every file, and some have none")
    if len(scores) == len(paths) > 1:
        matrix = np.stack(scores, axis=1)
        for name, merit in SELECTORS.items():
            values[name] = merit(matrix)
            ranks[name] = rankdata(-values[name])
    return Ranking(paths, values, ranks, selector, int(np.argmin(ranks[selector])))


def _read(path: Path) -> dict[str, NDArray[np.float64]]:
    """The arrays of one detector, as float64; never unpickles."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in (*_SETS, "scores") if name in file}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read as an npz file of arrays ({error})") from error
    missing = [name for name in _SETS if name not in arrays]
    if missing:
        raise ValueError(f"{path}: expected arrays train, augmented and unlabeled, without {missing[0]}")
    for name, array in arrays.items():
        if not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
            raise ValueError(f"{path}: {name}: expected real numbers, got {array.dtype}")
    scores = arrays.get("scores")
    if scores is not None and scores.shape != (len(arrays["unlabeled"]),):
        raise ValueError(
            f"{path}: scores: expected one for each of {len(arrays['unlabeled'])} unlabelled samples, "
            f"got {scores.shape}"
        )
    return {name: array.astype(np.float64) for name, array in arrays.items()}
