"""Kept detectors by their AUC, as rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssad_hpo.evaluate import auc
from studies.lab.detectors import Cell, arrays_of
from studies.lab.results import Row
from studies.lab.searching import truth_of


def rows_of(cells: Sequence[Cell], kept: Sequence[Row], folder: Path) -> list[Row]:
    """A row with AUC, by patches and as a whole, and criteria for every detector that was trained."""
    rows: list[Row] = []
    truths: dict[str, np.ndarray] = {}
    for cell, content in zip(cells, kept, strict=True):
        if "failure" in content:
            print(f"{cell.name}, {cell.augmentation} failed: {content['failure']}")
            continue
        key = repr(cell.source)
        if key not in truths:
            truths[key] = truth_of(cell.source)
        truth, arrays = truths[key], arrays_of(cell, folder)
        whole = arrays.get("whole_scores", arrays["scores"])
        named: Row = {"set": cell.name, "how": cell.how, "f_aug": cell.augmentation.kind}
        named |= {"candidate": cell.candidate, "seed": cell.training.seed, "steps": cell.training.steps}
        named |= {"auc_patches": auc(truth, arrays["scores"]) if "whole_scores" in arrays else None}
        rows.append({**named, "auc_whole": auc(truth, whole), **content})
    return rows
