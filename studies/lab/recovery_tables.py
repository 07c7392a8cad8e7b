"""Does a tuning find f_gen's hyperparameters? Tables over starting points, from rows of a study.

A row is a dictionary of one starting point: "variant" (how it was tuned), "texture", "true_area", "seed",
"start" (its area), "failure" (why there is nothing else, or None), "area_factor" and "aspect_factor" (see
`factor_off`), "auc", "auc_aligned" (of a detector that was trained with f_gen itself), "dsv",
"validation_loss" and "warned". The starting points of one (variant, texture, true_area, seed) compete.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from studies.lab.results import Row, markdown_table

AREA_FACTOR, ASPECT_FACTOR = 2.0, 1.5
# A detector has collapsed, whatever a warning says, where its AUC is so much below the aligned one's.
COLLAPSE = 0.2
RULES = {"validation_loss": "L_val", "dsv": "DSV"}


def factor_off(found: float, true: float) -> float:
    """By which factor a hyperparameter was missed, max(found / true, true / found); 1 is exact.

    Args:
        found, true: positive and finite, such as areas or aspects.

    Raises:
        ValueError: naming the value that is not.
    """
    for name, value in (("found", found), ("true", true)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    return max(found / true, true / found)


def found(row: Row) -> bool:
    """Whether the area was learned: within a factor of 2. A failed tuning has not learned it."""
    return row["failure"] is None and row["area_factor"] <= AREA_FACTOR


def collapsed(row: Row) -> bool:
    """Whether the detector is far worse than one that was trained with f_gen itself."""
    return row["failure"] is None and row["auc"] < row["auc_aligned"] - COLLAPSE


def by_variant(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each variant, in order of first occurrence."""
    return _grouped(rows, lambda row: row["variant"])


def starts_table(rows: Sequence[Row]) -> str:
    """A line for each variant: how all of its starting points ended."""
    lines = []
    for variant, members in by_variant(rows).items():
        ended = [row for row in members if row["failure"] is None]
        lost = [row for row in ended if collapsed(row)]
        lines.append(
            [
                variant,
                len(members),
                _share_over_seeds(members, found),
                _figure(ended, "area_factor", np.median),
                _percent([row["aspect_factor"] <= ASPECT_FACTOR for row in ended]),
                _figure(ended, "aspect_factor", np.median),
                _figure(ended, "auc", np.mean, 3),
                _figure(ended, "auc_aligned", np.mean, 3),
                _figure(ended, "dsv", np.mean),
                f"{sum(row['warned'] for row in ended)}",
                f"{len(lost)}",
                f"{sum(not row['warned'] for row in lost)}",
                f"{len(members) - len(ended)}",
            ]
        )
    titles = ["", "starts", f"area within ×{AREA_FACTOR:g} ± over seeds", "median factor, area"]
    titles += [f"aspect within ×{ASPECT_FACTOR:g}", "median factor, aspect", "AUC", "AUC, aligned", "DSV"]
    return markdown_table([*titles, "warned", "collapsed", "silently", "failed"], lines)


def where_table(rows: Sequence[Row]) -> str:
    """A line for each variant: the share of areas found by texture, true area and starting point."""
    columns = [
        *((f"true area {value:g}", "true_area", value) for value in _values(rows, "true_area")),
        *((f"from {value:g}", "start", value) for value in _values(rows, "start")),
        *((str(value), "texture", value) for value in _values(rows, "texture")),
    ]
    lines = [
        [variant, *(_percent([found(r) for r in members if r[key] == value]) for _, key, value in columns)]
        for variant, members in by_variant(rows).items()
    ]
    return markdown_table(["area within ×2", *(title for title, _, _ in columns)], lines)


def rules_table(rows: Sequence[Row]) -> str:
    """A line for each variant: which of its starting points a label-free rule keeps."""
    lines = []
    for variant, members in by_variant(rows).items():
        ended = [[row for row in run if row["failure"] is None] for run in competitors(members)]
        runs = [run for run in ended if run]
        line: list[object] = [variant, len(runs), _percent([any(map(found, run)) for run in runs])]
        for rule in RULES:
            kept = [keep(run, rule) for run in runs]
            split = [(k, run) for k, run in zip(kept, runs, strict=True) if len(set(map(found, run))) > 1]
            silent = sum(collapsed(row) and not row["warned"] for row in kept)
            right = f"{sum(found(k) for k, _ in split)} of {len(split)}"
            line += [_percent(list(map(found, kept))), right, _figure(kept, "auc", np.mean, 3), silent]
        best = [max(run, key=lambda row: row["auc"]) for run in runs]
        lines.append([*line, _figure(best, "auc", np.mean, 3)])
    titles = ["", "runs", "some start found it"]
    for rule in RULES.values():
        titles += [f"kept by {rule}: found it", "right where starts differ", "AUC", "silent collapses"]
    return markdown_table([*titles, "AUC, best start"], lines)


def competitors(rows: Sequence[Row]) -> list[list[Row]]:
    """The starting points of each run of one variant."""
    key = ("variant", "texture", "true_area", "seed")
    return list(_grouped(rows, lambda row: tuple(row[name] for name in key)).values())


def keep(run: Sequence[Row], rule: str) -> Row:
    """The starting point with the lowest value of the rule, of equal ones the first."""
    return min(run, key=lambda row: row[rule])


def tables(rows: Sequence[Row]) -> str:
    """All tables and what their words mean, as sections of a page."""
    return (
        f"## How starting points end\n\n{starts_table(rows)}\n"
        "Factor: the larger of learned / true and true / learned. AUC, aligned: of a detector trained as "
        f"long with f_gen itself. Collapsed: an AUC more than {COLLAPSE:g} below that; silently: without a "
        "warning. Warned: starts with a warning, whether collapsed or not. Failed tunings count as areas "
        "not found, and nowhere else.\n\n"
        f"## Where\n\n{where_table(rows)}\n"
        f"## Keeping one starting point without labels\n\n{rules_table(rows)}\n"
        "Right where starts differ: of the runs in which some starting points found the area and others did "
        "not, those in which the rule kept one that had.\n"
    )


def _grouped(rows: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)


def _values(rows: Sequence[Row], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def _share_over_seeds(rows: Sequence[Row], of: Callable[[Row], bool]) -> str:
    shares = [np.mean([of(r) for r in rows if r["seed"] == seed]) for seed in _values(rows, "seed")]
    return f"{_percent([of(row) for row in rows])} ± {100 * np.std(shares):.0f}"


def _percent(members: Sequence[bool]) -> str:
    return f"{np.mean(members):.0%}" if members else "–"


def _figure(rows: Sequence[Row], name: str, of: Callable[[list[float]], Any], digits: int = 2) -> str:
    return f"{of([row[name] for row in rows]):.{digits}f}" if rows else "–"
