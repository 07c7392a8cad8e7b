"""The talk's qualitative figure: hyperparameters on their way to those of f_gen, and what they look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from ssad_hpo.report.style import KINDS, WIDTH, axis_of, picture, plain_log_ticks, reject_empty

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOOKS = tuple(KINDS.values())
_LINES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Trajectory:
    """One starting point's way.

    Attributes:
        group: in the legend, told by the colour.
        start: in the legend, told by the line.
        steps: (T,) training steps, rising.
        values: for each hyperparameter its (T,) values, positive.
    """

    group: str
    start: str
    steps: Sequence[int]
    values: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class TrajectoryPanel:
    """A column of the figure: all trajectories with one truth.

    Attributes:
        title: above the column.
        truth: f_gen's value of each hyperparameter; a row of panels each.
        trajectories: what is drawn.
    """

    title: str
    truth: Mapping[str, float]
    trajectories: Sequence[Trajectory]


def trajectories_figure(
    panels: Sequence[TrajectoryPanel],
    images: Sequence[tuple[str, ArrayLike]],
    images_title: str,
    path: Path,
    *,
    factor: float = 2.0,
) -> None:
    """Hyperparameters over training steps beside f_gen's, and below them images along one of the ways.

    Args:
        panels: columns; all have the same hyperparameters.
        images: (caption, (H, W) in 0..255), from left to right; none for no strip.
        images_title: which way they lie on.
        path: of the PNG file.
        factor: the band about the truth that counts as found.

    Raises:
        ValueError: if there is no panel, or panels differ in their hyperparameters.
    """
    reject_empty("panels", panels)
    names = list(panels[0].truth)
    if any(list(panel.truth) != names for panel in panels):
        raise ValueError(f"panels: expected {', '.join(names)} in each")
    drawn = [t for panel in panels for t in panel.trajectories]
    groups, starts = (list(dict.fromkeys(getattr(t, of) for t in drawn)) for of in ("group", "start"))
    heights = [2.6 * len(names), *([1.7] if images else [])]
    with picture(path, width=1.1 * WIDTH * len(panels), height=sum(heights) + 0.5) as figure:
        parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        grid = parts[0].subplots(len(names), len(panels), squeeze=False, sharex=True, sharey="row")
        for column, panel in enumerate(panels):
            grid[0, column].set_title(panel.title)
            grid[-1, column].set_xlabel("training step")
            for row, name in enumerate(names):
                _ways(grid[row, column], panel, name, groups, starts, factor)
        for row, name in enumerate(names):
            grid[row, 0].set_ylabel(axis_of(name))
        if images:
            parts[1].suptitle(images_title, fontsize=10, x=0.01, ha="left")
            for axes, (caption, pixels) in zip(
                parts[1].subplots(1, len(images), squeeze=False)[0], images, strict=True
            ):
                axes.imshow(np.asarray(pixels), cmap="gray", vmin=0, vmax=255)
                axes.set_title(caption, fontsize=9, loc="center")
                axes.set_axis_off()
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)


def _ways(
    axes: Axes,
    panel: TrajectoryPanel,
    name: str,
    groups: Sequence[str],
    starts: Sequence[str],
    factor: float,
) -> None:
    true = panel.truth[name]
    axes.axhspan(true / factor, true * factor, color="#eeeeee", zorder=0)
    axes.axhline(true, color="black", linewidth=1.2, label="f_gen (band: factor " + f"{factor:g})")
    for group, look in zip(groups, _LOOKS, strict=False):
        axes.plot([], [], color=look.color, label=group)
    for start, line in zip(starts, _LINES, strict=False):
        axes.plot([], [], color="#666666", linestyle=line, label=start)
    seen = [true / factor, true * factor]
    for way in panel.trajectories:
        look, line = _LOOKS[groups.index(way.group)], _LINES[starts.index(way.start)]
        axes.plot(way.steps, way.values[name], color=look.color, linestyle=line, linewidth=1.4)
        seen += [min(way.values[name]), max(way.values[name])]
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    plain_log_ticks(axes.yaxis, min(low, *seen), max(high, *seen))
