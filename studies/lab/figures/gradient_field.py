"""Where a validation loss leads: its value and negative gradient over two alignment parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ssad_hpo.report.style import picture, reject_empty

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIDE = 3.0  # of a panel, inches
_ARROWS = 17  # along each side, at most


@dataclass(frozen=True, eq=False)
class Field:
    """A loss over a grid of the parameters u1 and u2.

    Attributes:
        title: of its panel.
        u1, u2: (C,) and (R,), rising.
        loss: (R, C), lower is better.
        slope: (R, C, 2), the gradient of the loss in u1 and u2.

    Raises:
        ValueError: if a shape does not fit.
    """

    title: str
    u1: NDArray[np.float64]
    u2: NDArray[np.float64]
    loss: NDArray[np.float64]
    slope: NDArray[np.float64]

    def __post_init__(self) -> None:
        shape = (len(self.u2), len(self.u1))
        if self.loss.shape != shape or self.slope.shape != (*shape, 2):
            expected = f"{shape} and {(*shape, 2)}"
            raise ValueError(
                f"loss, slope: expected {expected}, got {self.loss.shape} and {self.slope.shape}"
            )


def gradient_field_figure(
    rows: Mapping[str, Sequence[Field]],
    aligned: tuple[float, float],
    collapsed: tuple[float, float],
    path: Path,
) -> None:
    """A panel for each field: the loss in colour, the direction of its negative gradient as arrows.

    Arrows have one length, so that flat places are read as well: the colour says how steep it is.

    Args:
        rows: the fields of each row of panels, by the row's title.
        aligned, collapsed: (u1, u2) of perfect alignment and of no augmentation at all; marked.
        path: of the PNG file.

    Raises:
        ValueError: if there is no row, or one without a field.
    """
    reject_empty("rows", tuple(rows))
    for title, fields in rows.items():
        reject_empty(f"rows[{title!r}]", fields)
    columns = max(map(len, rows.values()))
    with picture(path, width=_SIDE * columns + 0.6, height=_SIDE * len(rows) + 0.4) as figure:
        parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
        for part, (title, fields) in zip(parts, rows.items(), strict=True):
            part.suptitle(title, fontsize=11, x=0.01, ha="left")
            panels = part.subplots(1, columns, squeeze=False)[0]
            for axes, field in zip(panels, fields, strict=False):
                _panel(axes, field, aligned, collapsed)
            for axes in panels[len(fields) :]:
                axes.set_axis_off()
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)


def _panel(axes: Axes, field: Field, aligned: tuple[float, float], collapsed: tuple[float, float]) -> None:
    axes.set_title(field.title, fontsize=10)
    image = axes.contourf(field.u1, field.u2, field.loss, levels=24, cmap="viridis")
    axes.contour(field.u1, field.u2, field.loss, levels=12, colors="black", linewidths=0.3, alpha=0.5)
    every = max(1, -(-max(field.loss.shape) // _ARROWS))
    part = (slice(every // 2, None, every),) * 2
    downhill = -field.slope[part]
    length = np.linalg.norm(downhill, axis=-1, keepdims=True)
    direction = np.divide(downhill, length, out=np.zeros_like(downhill), where=length > 0)
    axes.quiver(
        field.u1[part[1]], field.u2[part[0]], direction[..., 0], direction[..., 1],
        color="white", edgecolor="black", linewidth=0.3, pivot="mid", scale=1.2 * _ARROWS, width=0.008,
    )  # fmt: skip
    marks = ((aligned, "*", "aligned", 190), (collapsed, "X", "collapsed: augmented = normal", 90))
    for (x, y), marker, label, size in marks:
        axes.scatter(x, y, size, color="#D55E00", marker=marker, edgecolors="white", label=label, zorder=3)
    axes.set(xlabel="u1", ylabel="u2", aspect="equal")
    axes.grid(False)
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(image, ax=axes, shrink=0.8, format="%.3g")
