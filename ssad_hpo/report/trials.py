"""Figures of a study's trials: where the search went, how each training went, whether the choice was good."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

from ssad_hpo.report.findings import Trial
from ssad_hpo.report.style import (
    KINDS,
    ORACLE,
    SELECTED,
    STATUSES,
    Look,
    axis_of,
    ceiling,
    legend_below,
    look_of,
    name_of,
    panel,
    range_axis,
    reject_empty,
)
from ssad_hpo.task import Range, SearchSpace

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def auc_figure(trials: Sequence[Trial], selected: int, criterion: str, path: Path) -> None:
    """Criterion against AUC, a point per candidate; the selected one and the best one are marked.

    Args:
        trials: those that are complete and have an AUC are drawn.

    Raises:
        ValueError: if no trial has an AUC.
    """
    judged = {t.number: (t.value, t.auc, t) for t in trials if t.value is not None and t.auc is not None}
    reject_empty("trials: with an AUC", tuple(judged))
    top = ceiling([value for value, _, _ in judged.values()])
    oracle = min(judged, key=lambda number: (-judged[number][1], number))
    with panel(path, f"Does {name_of(criterion)} know the good detectors?") as axes:
        axes.axhline(0.5, color="#666666", linewidth=0.8, linestyle="--", label="chance")
        kinds = {t.augmentation.kind: None for _, _, t in judged.values() if t.augmentation}
        for kind in sorted(kinds, key=[*KINDS, *kinds].index):
            look = look_of(kind)
            of_kind = [p for p in judged.values() if p[2].augmentation and p[2].augmentation.kind == kind]
            if of_kind:
                axes.scatter(
                    [min(value, top) for value, _, _ in of_kind],
                    [auc for _, auc, _ in of_kind],
                    s=34,
                    c=look.color,
                    marker=look.marker,
                    alpha=0.8 if len(judged) < 60 else 0.5,
                    linewidths=0,
                    label=name_of(kind),
                )
        for number, look, word in ((oracle, ORACLE, "best AUC"), (selected, SELECTED, "selected")):
            if number in judged:
                value, auc, _ = judged[number]
                _mark(axes, min(value, top), auc, look, f"{word} ({auc:.3f})")
        axes.set_ylim(min(0.45, min(auc for _, auc, _ in judged.values()) - 0.05), 1.03)
        axes.set_xlabel(f"{name_of(criterion)} (lower is better; no labels)")
        axes.set_ylabel("AUC (higher is better; labels)")
        _say_what_is_beyond(axes, sum(value > top for value, _, _ in judged.values()), "at the right edge")
        legend_below(axes, 3)


def searched(space: SearchSpace, kind: str) -> list[tuple[str, str | None]]:
    """What the panels of a kind show: pairs of its hyperparameters that are searched.

    (name, None) stands for a single one, to be drawn against the criterion; the list is empty where the
    kind has nothing to search.
    """
    names = [n for n, v in space.kinds[kind].items() if isinstance(v, Range)]
    if len(names) < 2:
        return [(name, None) for name in names]
    return [(names[0], other) for other in names[1:]]


def hyperparameters_figure(
    trials: Sequence[Trial],
    space: SearchSpace,
    kind: str,
    names: tuple[str, str | None],
    selected: int,
    criterion: str,
    path: Path,
) -> None:
    """The hyperparameters searched of one kind of f_aug, coloured by the criterion.

    Trials without a value of their whole budget (pruned, failed, interrupted) have markers of their own;
    on the criterion's axis they stand at their last value, or at the top if they have none.

    Args:
        trials: of all kinds, so that colours mean the same in the panels of all kinds.
        names: two hyperparameters; or one and None, then the criterion stands on the second axis.

    Raises:
        ValueError: if no trial is complete.
    """
    from matplotlib.colors import Normalize

    values = [t.value for t in trials if t.value is not None]
    reject_empty("trials: complete ones", values)
    across, up = names
    shown = [t for t in trials if t.augmentation is not None and t.augmentation.kind == kind]
    brightest = ceiling(values)
    colors = Normalize(min(values), brightest)
    known = [value for t in trials if (value := _last_value(t)) is not None]
    bottom, top = min(known), ceiling(known)
    with panel(path, _title(space, kind, names)) as axes:
        for status, look in STATUSES.items():
            group = [t for t in shown if t.status == status]
            if not group:
                continue
            xs = [_hyperparameter(t, across) for t in group]
            ys = [min(_last_value(t, top), top) if up is None else _hyperparameter(t, up) for t in group]
            label = f"{status} ({len(group)})"
            if status == "complete":
                points = axes.scatter(
                    xs, ys, c=[t.value or 0.0 for t in group], s=46, cmap="viridis", norm=colors,
                    edgecolors="#444444", linewidths=0.6, zorder=3, label=label,
                )  # fmt: skip
                axes.figure.colorbar(
                    points,
                    label=f"{name_of(criterion)} (lower is better)",
                    extend="max" if max(values) > brightest else "neither",
                )
            else:
                if up is None and any(_last_value(t) is None for t in group):
                    label += ", at the top: no value"
                axes.scatter(
                    xs, ys, c=look.color, marker=look.marker, s=30, linewidths=1.2, zorder=2, label=label
                )
            for t, x, y in zip(group, xs, ys, strict=True):
                if t.number == selected:
                    _mark(axes, x, y, SELECTED, "selected")
        _range_axis(axes, "x", across, space.kinds[kind][across])
        if up is None:
            room = (top - bottom) * 0.06 or 0.1
            axes.set_ylim(bottom - room, top + room)
            axes.set_ylabel(f"{name_of(criterion)} (lower is better)")
        else:
            _range_axis(axes, "y", up, space.kinds[kind][up])
        if shown:
            legend_below(axes, 3)
        else:
            axes.text(0.5, 0.5, "never tried", ha="center", va="center", transform=axes.transAxes)


def learning_curves_figure(trials: Sequence[Trial], selected: int, criterion: str, path: Path) -> None:
    """The criterion over training steps, a line per trial.

    Args:
        trials: those with an evaluation are drawn.

    Raises:
        ValueError: if no trial was ever evaluated.
    """
    curves = [t for t in trials if t.curve]
    reject_empty("trials: with an evaluation", curves)
    everything = [value for t in curves for value in t.curve.values()]
    top = ceiling(everything)
    many = len(curves) > 40
    with panel(path, f"{name_of(criterion)} while the detectors were trained") as axes:
        for status, look in STATUSES.items():
            group = [t for t in curves if t.status == status and t.number != selected]
            for i, t in enumerate(group):
                steps, heights = list(t.curve), list(t.curve.values())
                axes.plot(
                    steps, heights, look.line, color=look.color, alpha=0.3 if many else 0.75, linewidth=1.2,
                    label=f"{status} ({len(group)})" if i == 0 else None,
                    marker=look.marker, markersize=3 if many else 5, markevery=[len(steps) - 1],
                )  # fmt: skip
        for t in curves:
            if t.number == selected:
                axes.plot(
                    list(t.curve), list(t.curve.values()), "-", color=SELECTED.color, linewidth=2.2,
                    marker=SELECTED.marker, markersize=10, label=f"selected (trial {t.number})",
                )  # fmt: skip
        steps = sorted({step for t in curves for step in t.curve})
        if len(steps) <= 6:
            axes.set_xticks(steps)
        around = 0.06 * (steps[-1] - steps[0]) or 1.0
        axes.set_xlim(steps[0] - around, steps[-1] + around)
        room = (top - min(everything)) * 0.06 or 0.1
        axes.set_ylim(min(everything) - room, top + room)
        axes.set_xlabel("training steps")
        axes.set_ylabel(f"{name_of(criterion)} (lower is better)")
        _say_what_is_beyond(axes, sum(max(t.curve.values()) > top for t in curves), "above")
        legend_below(axes, 3)


def _title(space: SearchSpace, kind: str, names: tuple[str, str | None]) -> str:
    """Kind and hyperparameters of a panel, with those of the kind that are fixed."""

    def short(name: str) -> str:
        return name.removeprefix("patch_")

    fixed = [f"{short(n)} {v:g}" for n, v in space.kinds[kind].items() if not isinstance(v, Range)]
    title = f"{name_of(kind)}: {' and '.join(short(n) for n in names if n)}"
    return title + (f" ({', '.join(fixed)})" if fixed else "")


@overload
def _last_value(trial: Trial) -> float | None: ...
@overload
def _last_value(trial: Trial, otherwise: float) -> float: ...
def _last_value(trial: Trial, otherwise: float | None = None) -> float | None:
    """The criterion of a complete trial, the last one known of another."""
    if trial.value is not None:
        return trial.value
    return list(trial.curve.values())[-1] if trial.curve else otherwise


def _hyperparameter(trial: Trial, name: str) -> float:
    assert trial.augmentation is not None
    value = trial.augmentation.hyperparameters[name]
    assert not isinstance(value, Range)
    return value


def _range_axis(axes: Axes, which: str, name: str, searched: float | Range) -> None:
    assert isinstance(searched, Range)
    getattr(axes, f"set_{which}label")(axis_of(name))
    range_axis(axes, which, searched)


def _mark(axes: Axes, x: float, y: float, look: Look, label: str) -> None:
    """A large open marker around a point."""
    axes.scatter(
        [x], [y], s=230 if look.marker == "*" else 210, facecolors="none", edgecolors=look.color,
        marker=look.marker, linewidths=1.6, zorder=5, label=label,
    )  # fmt: skip


def _say_what_is_beyond(axes: Axes, count: int, where: str) -> None:
    if count:
        trials = "1 trial lies" if count == 1 else f"{count} trials lie"
        axes.text(
            0.98, 0.98, f"{trials} far {where}", ha="right", va="top", fontsize=9, transform=axes.transAxes
        )
