"""Figures of single detectors: the scores they give, the embeddings they make, the images they see."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ssad_hpo.report.findings import EmbeddingSets, ImageRow
from ssad_hpo.report.style import SETS, WIDTH, legend_below, panel, picture, plain_log_ticks, reject_empty

if TYPE_CHECKING:
    from matplotlib.patches import Rectangle

_BINS = 8, 30  # least and most, of small and of large sets
_SHOWN = 500  # points of a set in a map: more hide one another
_COLUMNS = 4


def scores_figure(
    scores: Mapping[str, NDArray[np.floating]], title: str, path: Path, threshold: float | None = None
) -> None:
    """Histograms of anomaly scores, one outline per set.

    Args:
        scores: (N,) for each set, by its name in `style.SETS`.
        threshold: the score above which images raise an alarm, for a dashed line; None for none.

    Raises:
        ValueError: if there is no set, or an empty one.
    """
    reject_empty("scores", tuple(scores))
    for name, values in scores.items():
        reject_empty(f"scores of {name}", values)
    pooled = np.concatenate(list(scores.values()))
    log = bool(pooled.min() > 0 and np.quantile(pooled, 0.98) > 8 * np.quantile(pooled, 0.25))
    transformed = np.log(pooled) if log else pooled
    bins = np.clip(2 * int(min(map(len, scores.values())) ** 0.5), *_BINS)
    edges = np.histogram_bin_edges(transformed, bins)
    edges = np.exp(edges) if log else edges
    edges[0], edges[-1] = pooled.min(), pooled.max()  # what exp and log make of the ends may leave some out
    with panel(path, title) as axes:
        for name, values in scores.items():
            look = SETS[name]
            heights, _ = np.histogram(values, edges)
            heights = 100 * heights / len(values)
            axes.stairs(heights, edges, fill=True, color=look.color, alpha=0.13)
            axes.stairs(
                heights, edges, color=look.color, linestyle=look.line, linewidth=1.7,
                label=f"{name} ({len(values)})",
            )  # fmt: skip
        if log:
            axes.set_xscale("log")
            plain_log_ticks(axes.xaxis, edges[0], edges[-1])
        if threshold is not None:
            axes.axvline(threshold, color="black", linestyle="--", linewidth=1.1, label="alarm threshold")
        axes.set_xlabel("anomaly score (higher is more anomalous)")
        axes.set_ylabel("share of the set (%)")
        legend_below(axes, min(3, len(scores) + (threshold is not None)))


def embedding_figure(
    sets: EmbeddingSets, title: str, path: Path, anomalous: NDArray[np.bool_] | None = None
) -> None:
    """A map of one trial's embeddings: their first two principal components, fitted to all sets together.

    Args:
        anomalous: (N_test,) whether each unlabelled image is an anomaly, where that is known.

    Raises:
        ValueError: if `anomalous` is of another length.
    """
    groups = {"train": sets.train, "augmented": sets.augmented, "unlabeled": sets.unlabeled}
    if anomalous is not None:
        if len(anomalous) != len(sets.unlabeled):
            raise ValueError(f"anomalous: expected {len(sets.unlabeled)} values, got {len(anomalous)}")
        del groups["unlabeled"]
        groups["unlabeled, normal"] = sets.unlabeled[~anomalous]
        groups["unlabeled, anomalous"] = sets.unlabeled[anomalous]
    axes_of_map, mean, explained = _principal_axes(np.concatenate(list(groups.values())))
    with panel(path, title, height=4.3) as axes:
        for name, rows in groups.items():
            look = SETS[name]
            x, y = ((rows[:: -(-len(rows) // _SHOWN) or 1] - mean) @ axes_of_map).T
            axes.scatter(
                x, y, s=22, c=look.color, marker=look.marker, alpha=0.65, label=name,
                linewidths=1.0 if look.marker in "x+" else 0,
            )  # fmt: skip
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_xlabel(f"first component ({explained[0]:.0%} of the variance)")
        axes.set_ylabel(f"second component ({explained[1]:.0%})")
        legend_below(axes, 2)


def _principal_axes(
    rows: NDArray[np.floating],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """(D, 2) directions, the (D,) mean and the two shares of the variance."""
    rows = rows.astype(np.float64)
    mean = rows.mean(axis=0)
    variances, directions = np.linalg.eigh(np.cov(rows, rowvar=False, ddof=0).reshape(2 * rows.shape[1:]))
    main = directions[:, [-1, -2]]
    main *= np.where(main[np.abs(main).argmax(axis=0), [0, 1]] < 0, -1, 1)  # a sign that does not vary
    return main, mean, variances[[-1, -2]] / (variances.sum() or 1.0)


def images_figure(row: ImageRow, path: Path) -> None:
    """Images to look at, four beside each other; with their scores, and a frame where the truth is known.

    Raises:
        ValueError: if there is no image.
    """
    reject_empty("images", row.images)
    lines = -(-len(row.images) // _COLUMNS)
    captions = row.scores is not None or row.anomalous is not None
    side = WIDTH / _COLUMNS
    with picture(path, width=WIDTH, height=lines * (side + 0.22 * captions) + 0.35) as figure:
        figure.suptitle(row.title, fontsize=11, x=0.01, ha="left")
        places = figure.subplots(lines, _COLUMNS, squeeze=False).flat
        for i, axes in enumerate(places):
            axes.set_axis_off()
            if i >= len(row.images):
                continue
            image = row.images[i].transpose(1, 2, 0)
            axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            words = [] if row.scores is None else [f"{row.scores[i]:.3g}"]
            if row.anomalous is not None:
                truth = "anomaly" if row.anomalous[i] else "normal"
                look = SETS["unlabeled, anomalous" if row.anomalous[i] else "unlabeled, normal"]
                words.append(truth)
                axes.add_patch(_frame(image.shape[:2], look.color, "-" if row.anomalous[i] else ":"))
            axes.set_title(" · ".join(words), fontsize=8.5, loc="center", pad=3)


def _frame(shape: tuple[int, ...], color: str, line: str) -> Rectangle:
    from matplotlib.patches import Rectangle

    height, width = shape
    return Rectangle(
        (-0.5, -0.5), width, height, fill=False, edgecolor=color, linestyle=line, linewidth=3, clip_on=False
    )
