"""How well f_aug fits f_gen, and whom a detector suspects: the alignment study's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssad_hpo.report.style import HEIGHT, WIDTH, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def alignment_figure(names: Sequence[str], aucs: ArrayLike, distances: ArrayLike, path: Path) -> None:
    """Two heat maps over pairs of f_gen (rows) and f_aug (columns): AUC, and distance of the embeddings.

    Pairs of one kind, on the diagonal, are framed.

    Args:
        names: of the K kinds.
        aucs: (K, K), 0..1; white is chance (0.5). NaN is left blank, here and below.
        distances: (K, K), positive, of the augmented images from the anomalies; 1 where they are as far
            from the anomalies as from train.
        path: of the PNG file.

    Raises:
        ValueError: if an array is not (K, K) with K >= 1.
    """
    found = _grid("aucs", aucs, len(names), len(names))
    apart = _grid("distances", distances, len(names), len(names))
    with picture(path, width=2.4 * WIDTH, height=1.3 * HEIGHT) as figure:
        left, right = figure.subplots(1, 2)
        left.set_title("Are the anomalies found?")
        _heat_map(left, found, names, names, "PuOr_r", (0, 1), "test AUC (0.5 is chance, 1 is best)")
        right.set_title("Are the augmented images like the anomalies?")
        meaning = "their distance, relative to that from train (lower is closer)"
        _heat_map(right, apart, names, names, "viridis_r", None, meaning)
        for axes in (left, right):
            axes.set_xlabel("f_aug: what the detector was trained with")
            axes.set_ylabel("f_gen: what made the anomalies")
            for i in range(len(names)):
                _frame(axes, left=i, top=i, height=1)


def bias_figure(
    f_augs: Sequence[str], classes: Sequence[str], normal: str, shares: Mapping[str, ArrayLike], path: Path
) -> None:
    """A heat map for each score: the share of each class (columns) called anomalous, by f_aug (rows).

    Args:
        f_augs: names of the A rows.
        classes: names of the K columns.
        normal: which of them is normal; its column is framed.
        shares: for each title of a heat map its (A, K) shares, 0..1.
        path: of the PNG file.

    Raises:
        ValueError: if an array is not (A, K), there is none, or `normal` is none of the classes.
    """
    if not shares:
        raise ValueError("shares: expected at least one heat map, got none")
    if normal not in classes:
        raise ValueError(f"normal: expected one of {', '.join(classes)}, got {normal!r}")
    grids = {title: _grid("shares", values, len(f_augs), len(classes)) for title, values in shares.items()}
    with picture(path, width=1.2 * WIDTH * len(grids), height=1.2 * HEIGHT) as figure:
        panels = figure.subplots(1, len(grids), squeeze=False)[0]
        for axes, (title, grid) in zip(panels, grids.items(), strict=True):
            axes.set_title(title)
            _heat_map(axes, grid, f_augs, classes, "viridis", (0, 1), "share called anomalous")
            axes.set_xlabel(f"class of the images ({normal} is normal)")
            axes.set_ylabel("f_aug: what the detector was trained with")
            _frame(axes, left=classes.index(normal), top=0, height=len(f_augs))


def _grid(name: str, values: ArrayLike, rows: int, columns: int) -> NDArray[np.float64]:
    grid = np.asarray(values, dtype=float)
    if grid.shape != (rows, columns) or grid.size == 0:
        raise ValueError(f"{name}: expected ({rows}, {columns}), at least 1 each, got {grid.shape}")
    return grid


def _heat_map(
    axes: Axes,
    grid: NDArray[np.float64],
    rows: Sequence[str],
    columns: Sequence[str],
    colors: str,
    limits: tuple[float, float] | None,
    meaning: str,
) -> None:
    """Cells with their values written in, and a bar that says what the colours mean."""
    low, high = limits or (None, None)
    image = axes.imshow(np.ma.masked_invalid(grid), cmap=colors, vmin=low, vmax=high, aspect="auto")
    brightness = image.to_rgba(grid)[..., :3] @ np.array([0.299, 0.587, 0.114])
    for (i, j), value in np.ndenumerate(grid):
        if np.isfinite(value):
            ink = "white" if brightness[i, j] < 0.5 else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=9)
    if max(map(len, columns)) > 3:
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
    else:
        axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(False)
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(image, ax=axes, label=meaning)


def _frame(axes: Axes, left: int, top: int, height: int) -> None:
    """A frame around cells of one column, black beside white, so that it is seen on any colour."""
    from matplotlib.patches import Rectangle

    for color, width in (("white", 4.0), ("black", 2.0)):
        frame = Rectangle((left - 0.5, top - 0.5), 1, height, fill=False, edgecolor=color, linewidth=width)
        frame.set(clip_on=False, zorder=4 - width / 4)  # all white lines below all black ones
        axes.add_patch(frame)
