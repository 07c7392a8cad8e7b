"""Offline selection: choose among detectors that somebody has trained already.

A detector is one npz file, written by any tool: embeddings `train`, `augmented` and `unlabeled`, (N, D)
each, and, where there are any, anomaly `scores` of the unlabelled samples, (N_test,), and `held_out_scores`,
(N_held,), of normal samples that the detector has not seen. Neither a model nor a search is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from ssad_hpo.bounds import MOST_ARRAY_BYTES, MOST_SEED, whole
from ssad_hpo.consensus import SELECTORS
from ssad_hpo.criteria import CRITERIA, DegenerateError, evaluate_all
from ssad_hpo.files import FileError
from ssad_hpo.search.store import HELD_OUT_SCORES, SCORES, SETS, read_arrays

_REMEDY = (
    "write it anew with finite train, augmented and unlabeled embeddings, (N, D) each, leave it out or, if "
    "it is merely large, raise max_bytes (--max-bytes)"
)


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


def select_detectors(
    files: Sequence[str | Path], selector: str = "dsv", *, max_bytes: int = MOST_ARRAY_BYTES
) -> Ranking:
    """Rank trained detectors without labels, and choose one.

    Args:
        files: an npz file for each detector, see above; all of the same unlabelled samples, in one order.
        selector: what chooses: a key of `ssad_hpo.CRITERIA`, or "mc", "hits" or "sel".
        max_bytes: of the arrays in a file; a larger one is refused.

    Raises:
        ValueError: naming the file that cannot be read, lacks a set, holds a degenerate one or another
            number of unlabelled samples; or for a consensus selector where scores are missing.
    """
    if selector not in CRITERIA and selector not in SELECTORS:
        raise ValueError(f"selector: expected one of {', '.join((*CRITERIA, *SELECTORS))}, got {selector!r}")
    whole("max_bytes", max_bytes, 1, MOST_SEED)
    if not files:
        raise ValueError("files: expected at least one detector, got none")
    paths = tuple(Path(file) for file in files)
    rows: list[dict[str, float]] = []
    scores: list[NDArray[np.float64]] = []
    samples = None
    for path in paths:
        if not path.exists():
            raise FileError(f"{path}: cannot be read as an npz file of arrays (there is no such file)")
        read = read_arrays(path, _REMEDY, SETS, optional=(SCORES, HELD_OUT_SCORES), max_bytes=max_bytes)
        arrays = {name: array.astype(np.float64) for name, array in read.items()}
        samples = samples or len(arrays["unlabeled"])
        if len(arrays["unlabeled"]) != samples:
            raise ValueError(
                f"{path}: expected {samples} unlabelled samples as in {paths[0]}, "
                f"got {len(arrays['unlabeled'])}"
            )
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        scored = [tensors.get(name) for name in (SCORES, HELD_OUT_SCORES)]
        rows.append(_criteria(path, [tensors[name] for name in SETS], scored, selector))
        if not np.isfinite(list(rows[-1].values())).all():
            raise FileError(f"{path}: its embeddings are too large for any criterion; normalise their rows")
        if SCORES in arrays:
            scores.append(arrays[SCORES])
    values = {
        name: np.array([row[name] for row in rows]) for name in CRITERIA if all(name in r for r in rows)
    }
    ranks = {name: rankdata(value) for name, value in values.items()}
    if selector not in values and selector in CRITERIA:
        needed = " and ".join({"held_out": HELD_OUT_SCORES}.get(n, n) for n in CRITERIA[selector].needs)
        raise ValueError(f"selector: {selector!r} needs {needed} in every file, and some have none")
    if len(scores) < len(paths) and selector in SELECTORS:
        raise ValueError(f"selector: {selector!r} needs scores in every file, and some have none")
    if len(scores) == len(paths) > 1:
        matrix = np.stack(scores, axis=1)
        for name, merit in SELECTORS.items():
            try:
                values[name] = merit(matrix)
            except ValueError:  # a detector whose scores are all the same
                if name == selector:
                    raise
            else:
                ranks[name] = rankdata(-values[name])
    return Ranking(paths, values, ranks, selector, int(np.argmin(ranks[selector])))


def _criteria(
    path: Path, sets: Sequence[torch.Tensor], scored: Sequence[torch.Tensor | None], selector: str
) -> dict[str, float]:
    """All criteria of a detector; where those of its scores cannot be, and are not asked for, without."""
    try:
        return evaluate_all(*sets, *scored)
    except DegenerateError as error:
        if selector in SELECTORS or "scores" not in CRITERIA[selector].needs:
            with suppress(DegenerateError):
                return evaluate_all(*sets)
        raise FileError(f"{path}: {error}") from error
