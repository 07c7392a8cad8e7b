"""Rows and tables of the studies that ask whether a choice beats not choosing."""

from __future__ import annotations

import multiprocessing
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Protocol, TypeVar

import numpy as np
import torch

from ssad_hpo.task import Augmentation
from studies.lab.cells import begin_worker
from studies.lab.choosing import Draw, Seen, figures, judge_of
from studies.lab.comparing import average_ranks, comparison_table
from studies.lab.detectors import DYNAMIC
from studies.lab.results import Row, markdown_table, means

SHARES: tuple[float | None, ...] = (None, 0.1, 0.02, 0.0)  # of anomalies in `unlabeled`; None leaves them
DRAWS = 3
ACROSS, WITHIN = "across kinds", "within a kind"
COMPARED = ("average", "random dynamic")
WorkT = TypeVar("WorkT")
Run = tuple[str, int]  # (set, number of the draw and of the seed of training)


class Member(Protocol):
    """A candidate, as far as tables know it."""

    @property
    def augmentation(self) -> Augmentation: ...

    @property
    def candidate(self) -> str: ...


def rows_by(function: Callable[[WorkT], list[Row]], work: Sequence[WorkT], jobs: int) -> list[Row]:
    """All rows of all pieces of work, by so many processes of one thread."""
    if jobs == 1:
        torch.set_num_threads(1)
        return [row for some in map(function, work) for row in some]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=begin_worker, initargs=(os.getpid(),)) as pool:
        return [row for some in pool.map(function, work) for row in some]


def methods(
    place: Row,
    members: Sequence[Member],
    seen: Sequence[Seen],
    frozen: Seen | None,
    labels: np.ndarray,
    places: Draw,
    whole: Sequence[Seen] = (),
) -> Iterator[Row]:
    """A row for every group of candidates (all, and those of each kind) and method, judged with labels."""
    kinds = list(dict.fromkeys(cell.augmentation.kind for cell in members))
    for kind in (None, *kinds):
        chosen = [i for i, cell in enumerate(members) if kind in (None, cell.augmentation.kind)]
        dynamic = [seen[i] for i in chosen if members[i].candidate == DYNAMIC]
        static = [seen[i] for i in chosen if members[i].candidate != DYNAMIC]
        of_whole = [whole[i] for i in chosen if whole and members[i].candidate != DYNAMIC]
        found = figures(static, dynamic, frozen, judge_of(labels, places), of_whole)
        group = {"group": ACROSS if kind is None else WITHIN, "kind": kind or "all"}
        for method, (transductive, inductive) in found.items():
            yield {**place, **group, "method": method, "transductive": transductive, "inductive": inductive}


def column(rows: Sequence[Row], figure: str = "inductive") -> dict[str, dict[Run, float]]:
    """Method -> run -> AUC, kinds averaged."""
    values: dict[str, dict[Run, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        values[row["method"]][row["set"], DRAWS * row["seed"] + row["draw"]].append(row[figure])
    return {m: {run: float(np.mean(v)) for run, v in runs.items()} for m, runs in values.items()}


PLACES = ("how", "set", "seed", "share", "group", "method")


def summary(rows: Sequence[Row], names: Sequence[str] = PLACES) -> list[Row]:
    """Means over all but what is named."""
    return means(rows, names, ("transductive", "inductive"))


def mean(runs: Mapping[Run, float]) -> float:
    """Over all runs."""
    return float(np.mean(list(runs.values())))


def share_table(rows: Sequence[Row], title: Callable[[str], str] = str) -> str:
    """A line for each method: within and across kinds, by sets, regret, rank, on the unlabelled images.

    Args:
        rows: of one share.
        title: of the column that a set's name belongs to.
    """
    within = column([row for row in rows if row["group"] == WITHIN])
    across_rows = [row for row in rows if row["group"] == ACROSS]
    across, transductive = column(across_rows), column(across_rows, "transductive")
    sets = list(dict.fromkeys(title(row["set"]) for row in rows))
    competing = [m for m in across if m not in ("oracle", "worst")]
    runs = list(across["average"])
    ranks = average_ranks({m: [across[m][run] for run in runs] for m in competing})
    lines = []
    for method, values in across.items():
        by_set = [mean({r: v for r, v in values.items() if title(r[0]) == name}) for name in sets]
        regret = mean(across["oracle"]) - mean(values)
        seen = mean(transductive[method])
        rank = f"{ranks[method]:.1f}" if method in ranks else ""
        aucs = [f"{mean(within[method]):.3f}", f"**{mean(values):.3f}**", *(f"{v:.3f}" for v in by_set)]
        lines.append([method, *aucs, f"{regret:+.3f}", rank, "–" if np.isnan(seen) else f"{seen:.3f}"])
    titles = ["method", "within a kind", "across kinds", *sets, "regret", "rank", "transductive"]
    return markdown_table(titles, lines)


def kinds_table(rows: Sequence[Row]) -> str:
    """A line for each method: within each kind of augmentation; nothing where there is one."""
    by_kind: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["group"] == WITHIN:
            by_kind[row["kind"]].append(row)
    columns = [column(some) for some in by_kind.values()]
    lines = [[m, *(f"{mean(values[m]):.3f}" for values in columns)] for m in (columns[0] if columns else ())]
    return markdown_table(["method, within", *by_kind], lines) if len(columns) > 1 else ""


def against_table(rows: Sequence[Row], hero: str, title: Callable[[str], str] = str) -> str:
    """What is gained over a method, across kinds: difference, interval over titles of sets, p."""
    across = column([row for row in rows if row["group"] == ACROSS])
    if hero not in across:
        return ""
    ordered = {m: across[m] for m in (hero, *(m for m in across if m != hero))}
    return comparison_table(
        ordered, hero, {name: title(name) for name, _ in across[hero]}, ordered, ("method", "AUC")
    )
