"""Figures of a tuning: how the hyperparameters moved, and what images they made on their way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ssad_hpo.report.findings import Course, ImageRow
from ssad_hpo.report.style import KINDS, SELECTED, WIDTH, axis_of, name_of, picture, range_axis, reject_empty
from ssad_hpo.task import Range

_PANEL = 1.2  # inches of height
_EXAMPLES = 6  # images in a row
_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


def trajectory_figure(course: Course, bounds: Mapping[str, Range], kept: int, path: Path) -> None:
    """Every tuned hyperparameter over steps, a line per start; below, the losses.

    The axes of the hyperparameters reach from bound to bound, so that one that was driven out is seen. The
    kept start is drawn thicker, with a star where it ended.

    Raises:
        ValueError: if no start is finished.
    """
    reject_empty("trajectories", course.trajectories)
    titles = {
        **{name: axis_of(name) for name in bounds},
        **({} if course.before else {"training_loss": "training loss (cross-entropy; dotted: a coin's)"}),
        "validation_loss": f"validation loss: {name_of(course.loss)} (lower is better)",
    }
    looks = list(zip([look.color for look in KINDS.values()], itertools.cycle(_LINES), strict=False))
    with picture(path, width=WIDTH, height=_PANEL * len(titles) + 0.9) as figure:
        panels = figure.subplots(len(titles), 1, sharex=True)
        for axes, (name, title) in zip(panels, titles.items(), strict=True):
            axes.set_title(title, fontsize=9.5)
            if course.warm_start:
                axes.axvspan(0, course.warm_start, color="#e8e8e8", linewidth=0, label="warm start")
            for i, trajectory in enumerate(course.trajectories):
                color, line = looks[i % len(looks)]
                is_kept = trajectory.trial == kept
                if name in bounds:
                    values = trajectory.hyperparameters[name]
                    # From the end of the warm start, until when a start stands where it begins.
                    steps = [course.warm_start, *trajectory.steps, course.steps]
                    values = np.concatenate([values[:1], values])
                    if course.before:  # each value is from before its step
                        steps, values = [0, *trajectory.steps], values[1:]
                else:
                    steps, values = list(trajectory.steps), getattr(trajectory, name)
                axes.plot(
                    steps, values, linestyle=line, color=color, linewidth=2.2 if is_kept else 1.2,
                    alpha=1.0 if is_kept else 0.8, zorder=3 if is_kept else 2,
                    marker=SELECTED.marker if is_kept else "o", markersize=11 if is_kept else 5,
                    markeredgecolor=SELECTED.color if is_kept else color, markevery=[len(steps) - 1],
                    label=f"start {trajectory.trial}" + (" (kept)" if is_kept else ""), clip_on=False,
                )  # fmt: skip
            if name in bounds:
                range_axis(axes, "y", bounds[name])
            if name == "training_loss":
                axes.axhline(math.log(2), color="#666666", linewidth=0.9, linestyle=":")
                axes.set_ylim(bottom=0)
        panels[-1].set_xlim(0, course.steps)
        panels[-1].set_xlabel("steps before the training" if course.before else "training steps")
        handles, labels = panels[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)


def examples_figure(rows: Sequence[ImageRow], path: Path) -> None:
    """Rows of images below each other, each below its title.

    Args:
        rows: all of as many images; scores and truth are not shown.

    Raises:
        ValueError: if there is no row.
    """
    reject_empty("examples", rows)
    side = WIDTH / _EXAMPLES
    with picture(path, width=WIDTH, height=len(rows) * (side + 0.3)) as figure:
        parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
        for part, row in zip(parts, rows, strict=True):
            part.suptitle(row.title, fontsize=9.5, x=0.01, ha="left")
            for axes, image in zip(part.subplots(1, _EXAMPLES), row.images[:_EXAMPLES], strict=False):
                axes.imshow(
                    image.transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest"
                )
            for axes in part.axes:
                axes.set_axis_off()
