"""How the report's pictures look: sizes, colours, markers, words.

Every picture is one panel, a phone's width at its natural size: the page lays them side by side where
there is room. Colours are Okabe and Ito's, and viridis for values; a marker, a line style or a word
always says the same as the colour.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ssad_hpo.task import Range

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.7, 3.9  # inches
_DPI = 200
_lock = threading.RLock()
_STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "figure.constrained_layout.w_pad": 0.07,  # inches
    "figure.constrained_layout.h_pad": 0.07,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handletextpad": 0.4,
    "legend.labelspacing": 0.7,
    "legend.columnspacing": 1.2,
}


class Look(NamedTuple):
    """How a group of points or lines is told from the others."""

    color: str
    marker: str
    line: str = "-"


KINDS = {
    "cutout": Look("#0072B2", "o"),
    "cutavg": Look("#D55E00", "s"),
    "cutpaste": Look("#009E73", "^"),
    "cutdiff": Look("#CC79A7", "D"),
    "rotation": Look("#E69F00", "P"),
}
_OTHER_KIND = Look("#666666", "X")
STATUSES = {
    "complete": Look("#0072B2", "o"),
    "pruned": Look("#D55E00", "x", "--"),
    "failed": Look("#CC79A7", "v", ":"),
    "interrupted": Look("#666666", "d", "-."),
}
SETS = {
    "train": Look("#0072B2", "o"),
    "augmented": Look("#E69F00", "^", "--"),
    "held-out": Look("#56B4E9", "P", "-."),
    "unlabeled": Look("#111111", "x", ":"),
    "unlabeled, normal": Look("#009E73", "+"),
    "unlabeled, anomalous": Look("#D55E00", "x", "--"),
}
SELECTED, ORACLE = Look("#000000", "*"), Look("#000000", "s")

_NAMES = {
    "cutout": "CutOut",
    "cutavg": "CutAvg",
    "cutpaste": "CutPaste",
    "cutdiff": "CutDiff",
    "rotation": "Rotation",
    "dsv": "DSV",
    "base": "Base",
    "mmd": "MMD",
    "std": "STD",
    "pu_auc": "PU-AUC",
    "dsv_unclamped": "DSV unclamped",
    "none": "the encoder as it comes",
}
_AXES = {
    "patch_area": "patch area (fraction of the image)",
    "patch_aspect": "patch aspect (width / height)",
    "angle": "angle (degrees)",
}


def name_of(key: str) -> str:
    """A criterion, a kind of f_aug or a hyperparameter, as it is written in a sentence."""
    return _NAMES.get(key, key.replace("_", " "))


def axis_of(hyperparameter: str) -> str:
    """A hyperparameter with its unit, as it stands at an axis."""
    return _AXES.get(hyperparameter, name_of(hyperparameter))


def look_of(kind: str) -> Look:
    """The look of a kind of f_aug; those without one of their own share a grey cross."""
    return KINDS.get(kind, _OTHER_KIND)


@contextmanager
def panel(path: Path, title: str, *, height: float = HEIGHT) -> Iterator[Axes]:
    """One set of axes to draw on; becomes a PNG file at the end."""
    with picture(path, width=WIDTH, height=height) as figure:
        axes = figure.subplots()
        axes.set_title(title)
        yield axes


@contextmanager
def picture(path: Path, *, width: float, height: float) -> Iterator[Figure]:
    """A figure in the report's style, whatever the user's matplotlibrc says; saved at the end."""
    import matplotlib.style
    from matplotlib.figure import Figure

    # The style belongs to the whole process: threads that draw at once would leave it changed.
    with _lock, matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(path, dpi=_DPI, format="png", metadata={"Software": None})


def legend_below(axes: Axes, columns: int) -> None:
    """The legend of the axes' labelled things, below them."""
    handles, labels = axes.get_legend_handles_labels()
    figure = axes.get_figure()
    assert figure is not None
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def ceiling(values: ArrayLike) -> float:
    """The highest value to show: the maximum, or less where a few outliers would flatten all the rest.

    Criteria are lower is better, so the interesting end is always shown whole.
    """
    values = np.asarray(values, dtype=float)
    low, high = np.quantile(values, [0.25, 0.75])
    if high == low:
        return float(values.max())
    return float(values[values <= high + 5 * (high - low)].max())


def plain_log_ticks(axis: Any, low: float, high: float) -> None:
    """Ticks of a log axis as plain numbers: 1 and 3 times powers of ten, or more if the range is narrow."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    narrow = high / low < 8
    axis.set_major_locator(MaxNLocator(5) if narrow else LogLocator(subs=(1.0, 3.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def range_axis(axes: Axes, which: str, searched: Range) -> None:
    """Scale, limits and ticks of the axis ("x" or "y") of one hyperparameter: its range, a little beyond."""
    low, high = searched.low, searched.high
    if searched.log:
        beyond = (high / low) ** 0.05
        getattr(axes, f"set_{which}scale")("log")
        getattr(axes, f"set_{which}lim")(low / beyond, high * beyond)
        plain_log_ticks(getattr(axes, f"{which}axis"), low, high)
    else:
        beyond = (high - low) * 0.05
        getattr(axes, f"set_{which}lim")(low - beyond, high + beyond)


def reject_empty(name: str, rows: Sequence[Any] | np.ndarray) -> None:
    """Raises ValueError if there is nothing to draw."""
    if len(rows) == 0:
        raise ValueError(f"{name}: expected at least one, got none")
