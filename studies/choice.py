"""Does a choice beat not choosing? Every selector, held-out criterion and combination on the same detectors.

    python -m studies.choice --real DIR --jobs 2
    python -m studies.choice --smoke                            (an embedded texture alone)

DIR holds data sets in the layout of MVTec AD; `studies/lab/detectors.py` says what is trained on what, and
the detectors are those of `studies.pretrained`. Half of a set's test images, drawn by seed, are `unlabeled`:
all of their anomalies, or so many that these are a tenth or a fiftieth of the images, or none. The other half
judges what was chosen or combined (inductive), beside the unlabelled images themselves (transductive). Where
a set has several kinds of defect, each is absent from `unlabeled` in turn (`studies/lab/absent.py`). k = 3
of "top 3", and one weight for scores and heads, were chosen before any result was seen.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

from studies.lab.absent import absent_part, absent_summary, detectors_by_set, rows_without
from studies.lab.choosing import Draw, Seen, draw, figures, judge_of
from studies.lab.comparing import average_ranks, comparison_table
from studies.lab.detectors import (
    DYNAMIC,
    Cell,
    arrays_of,
    cells_of,
    detectors_parser,
    extent,
    run_detectors,
)
from studies.lab.options import parse
from studies.lab.results import Row, made_by, markdown_table, write_results
from studies.lab.searching import truth_of

SHARES: tuple[float | None, ...] = (None, 0.1, 0.02, 0.0)
DRAWS = 3
ACROSS, WITHIN = "across kinds", "within a kind"
COMPARED = ("average", "random dynamic")
# Title, how detectors were trained, prefix of their scores.
WAYS = (
    ("fine-tuned", "fine-tuned", ""),
    ("fine-tuned, scored as a whole", "fine-tuned", "whole_"),
    ("scratch", "scratch", ""),
)
WorkT = TypeVar("WorkT")
Run = tuple[str, int]  # (set, number of the draw and of the seed of training)


def groups(cells: Sequence[Cell], kept: Sequence[Row], how: str) -> Iterator[tuple[str, int, list[Cell]]]:
    """(set, seed, detectors that were trained) of one way of training."""
    found: dict[tuple[str, int], list[Cell]] = defaultdict(list)
    for cell, content in zip(cells, kept, strict=True):
        if cell.how == how and "failure" not in content:
            found[cell.name, cell.training.seed].append(cell)
    for (name, seed), members in found.items():
        yield name, seed, members


def rows_of(options: argparse.Namespace, cells: Sequence[Cell], kept: Sequence[Row]) -> list[Row]:
    """A row for every way of training, set, seed, share, draw, group of candidates and method."""
    frozen = {cell.name: cell for cell in cells if cell.how == "frozen"}
    work = [
        (options, title, prefix, frozen[name] if how == "fine-tuned" else None, seed, members)
        for title, how, prefix in WAYS
        for name, seed, members in groups(cells, kept, how)
    ]
    return rows_by(_rows_of_set, work, options.jobs)


def rows_by(function: Callable[[WorkT], list[Row]], work: Sequence[WorkT], jobs: int) -> list[Row]:
    """All rows of all pieces of work, by so many processes of one thread."""
    if jobs == 1:
        torch.set_num_threads(1)
        return [row for some in map(function, work) for row in some]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return [row for some in pool.map(function, work) for row in some]


def _rows_of_set(
    work: tuple[argparse.Namespace, str, str, Cell | None, int, list[Cell]],
) -> list[Row]:
    options, title, prefix, start, seed, members = work
    name = members[0].name
    labels = truth_of(members[0].source)
    arrays = [arrays_of(cell, options.cells) for cell in members]
    of_start = None if start is None else arrays_of(start, options.cells)
    by_patches = not prefix and "whole_scores" in arrays[0]
    rows: list[Row] = []
    for share in SHARES[:1] if options.smoke else SHARES:
        for number in range(1 if options.smoke else DRAWS):
            places = draw(labels, share, number)
            seen = [Seen.of(one, places, prefix) for one in arrays]
            frozen = None if of_start is None else Seen.of(of_start, places, prefix)
            whole = [Seen.of(one, places, "whole_") for one in arrays] if by_patches else []
            place = {"how": title, "set": name, "seed": seed, "share": share, "draw": number}
            rows += _methods(place, members, seen, frozen, labels, places, whole)
    print(f"{title} {name}, seed {seed}: {len(members)} detectors", flush=True)
    return rows


def _methods(
    place: Row,
    members: Sequence[Cell],
    seen: Sequence[Seen],
    frozen: Seen | None,
    labels: np.ndarray,
    places: Draw,
    whole: Sequence[Seen],
) -> Iterator[Row]:
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


def summary(rows: Sequence[Row]) -> list[Row]:
    """Means over draws and kinds."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    names = ("how", "set", "seed", "share", "group", "method")
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return [
        dict(zip(names, place, strict=True))
        | {f: round(float(np.mean([row[f] for row in some])), 4) for f in ("transductive", "inductive")}
        for place, some in groups.items()
    ]


def mean(runs: Mapping[Run, float]) -> float:
    """Over all runs."""
    return float(np.mean(list(runs.values())))


def share_table(rows: Sequence[Row]) -> str:
    """A line for each method: within and across kinds, by sets, regret, rank, on the unlabelled images."""
    within = column([row for row in rows if row["group"] == WITHIN])
    across_rows = [row for row in rows if row["group"] == ACROSS]
    across, transductive = column(across_rows), column(across_rows, "transductive")
    sets = list(dict.fromkeys(row["set"] for row in rows))
    competing = [m for m in across if m not in ("oracle", "worst")]
    runs = list(across["average"])
    ranks = average_ranks({m: [across[m][run] for run in runs] for m in competing})
    lines = []
    for method, values in across.items():
        by_set = [mean({r: v for r, v in values.items() if r[0] == name}) for name in sets]
        regret = mean(across["oracle"]) - mean(values)
        seen = mean(transductive[method])
        rank = f"{ranks[method]:.1f}" if method in ranks else ""
        aucs = [f"{mean(within[method]):.3f}", f"**{mean(values):.3f}**", *(f"{v:.3f}" for v in by_set)]
        lines.append([method, *aucs, f"{regret:+.3f}", rank, "–" if np.isnan(seen) else f"{seen:.3f}"])
    titles = ["method", "within a kind", "across kinds", *sets, "regret", "rank", "transductive"]
    return markdown_table(titles, lines)


def against_table(rows: Sequence[Row], hero: str) -> str:
    """What is gained over a method, across kinds: difference, interval over sets, p."""
    across = column([row for row in rows if row["group"] == ACROSS])
    if hero not in across:
        return ""
    ordered = {m: across[m] for m in (hero, *(m for m in across if m != hero))}
    return comparison_table(
        ordered, hero, {name: name for name, _ in across[hero]}, ordered, ("method", "AUC")
    )


def main() -> None:
    options = parse(detectors_parser("choice", __doc__))
    cells = cells_of(options)
    there, kept = run_detectors(cells, options)
    rows = rows_of(options, there, kept)
    embedded = {cell.name for cell in cells if cell.source.loader != "folder"}
    parts = []
    for how, real in itertools.product([title for title, *_ in WAYS], (True, False)):
        chosen = [row for row in rows if row["how"] == how and (row["set"] not in embedded) == real]
        for share in SHARES if chosen else ():
            part = [row for row in chosen if row["share"] == share]
            if part:
                where = f"{'Real sets' if real else 'Embedded tasks'}, {how}"
                title = "anomalies as they are" if share is None else f"anomalies {share:g} of unlabeled"
                parts.append(f"## {where}: {title}\n\n{share_table(part)}")
                parts += [against_table(part, hero) for hero in COMPARED if share is None]
    detectors, draws = detectors_by_set(there, kept), 1 if options.smoke else DRAWS
    absent: list[Row] = []
    for title, real in (("Real sets", True), ("Embedded textures", False)):
        of = rows_by(rows_without, [(options, d, draws) for d in detectors if d.real == real], options.jobs)
        parts.append(absent_part(f"{title}, fine-tuned", of))
        absent += of
    page = f"""# A choice, a combination, or none

{made_by("choice", options)}

{extent(cells, there)}
Mean AUC on images that no method has seen, over sets, seeds and draws; higher is better. Regret is the
distance across kinds to the oracle, the candidate that is best on those images. *Transductive* is across
kinds on the unlabelled images themselves. Candidates are static; *dynamic* detectors need no choice.
Fine-tuned detectors score by patches, as is their default, or, where that is said, as a whole.

{chr(10).join(parts)}"""
    write_results(options, "choice", page, [*summary(rows), *absent_summary(absent)])


if __name__ == "__main__":
    main()
