"""A kind of defect that the unlabelled images lack: is it found as well as those that were there?

In the layout of MVTec AD a kind is the folder of test/ that an image lies in. A texture has one f_gen in each
of its tasks; these share train and normal images, and so the detectors: together they are a set of two kinds.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssad_hpo.data import unlabeled_files
from ssad_hpo.evaluate import auc
from studies.lab.choosing import Arrays, Draw, Judge, Scores, Seen, draw, figures
from studies.lab.detectors import DYNAMIC, Cell, arrays_of
from studies.lab.results import Row, markdown_table, means
from studies.lab.searching import truth_of

GOOD = "good"
LEAST = 8  # images of a kind that stands alone
_OF_TEST = ("unlabeled", "scores", "whole_scores")  # arrays with a row for each test image


@dataclass(frozen=True)
class Detectors:
    """Those of one set and seed.

    Attributes:
        name: of the set.
        seed: of the training.
        candidates: of each its cell in every task of the set.
        frozen: the encoder as it comes, in every task.
    """

    name: str
    seed: int
    candidates: tuple[tuple[Cell, ...], ...]
    frozen: tuple[Cell, ...]

    @property
    def real(self) -> bool:
        """Whether its images are files."""
        return self.frozen[0].source.loader == "folder"


def detectors_by_set(cells: Sequence[Cell], kept: Sequence[Row]) -> list[Detectors]:
    """Fine-tuned detectors of every set and seed, the tasks of a texture together."""
    trained: dict[tuple[str, str, int], dict[str, dict[str, Cell]]] = defaultdict(lambda: defaultdict(dict))
    frozen = {cell.name: cell for cell in cells if cell.how == "frozen"}
    for cell, content in zip(cells, kept, strict=True):
        if cell.how == "fine-tuned" and "failure" not in content:
            name = cell.source.arguments.get("texture", cell.name)
            trained[cell.source.loader, name, cell.training.seed][cell.name][repr(cell.augmentation)] = cell
    found = []
    for (_, name, seed), tasks in trained.items():
        first, *others = tasks.values()
        common = [key for key in first if all(key in other for other in others)]
        candidates = tuple(tuple(task[key] for task in tasks.values()) for key in common)
        found.append(Detectors(name, seed, candidates, tuple(frozen[task] for task in tasks)))
    return found


def kinds_of(cell: Cell) -> np.ndarray:
    """(N_test,) "good" or the kind of defect of each test image, in their order; only to judge by."""
    if cell.source.loader != "folder":
        kind = cell.name.removeprefix(f"{cell.source.arguments['texture']}-")
        return np.where(truth_of(cell.source) == 1, kind, GOOD)
    test = Path(cell.source.arguments["root"]) / "test"
    files = unlabeled_files(cell.source) or []
    return np.array([path.relative_to(test).parts[0] for path in files])


def absent_kinds(kinds: np.ndarray) -> list[str]:
    """The kinds of defect that are left out in turn: those of enough images, where there are others."""
    names, counts = np.unique(kinds[kinds != GOOD], return_counts=True)
    if len(names) < 2:
        return []
    return [str(name) for name, count in zip(names, counts, strict=True) if count >= LEAST]


def draw_without(kinds: np.ndarray, absent: str, seed: int) -> Draw:
    """A half of the test images without a kind as `unlabeled`; the other half, and that kind, only judge."""
    there = np.flatnonzero(kinds != absent)
    places = draw((kinds[there] != GOOD).astype(np.int8), None, seed)
    unseen = np.concatenate([there[places.unseen], np.flatnonzero(kinds == absent)])
    return Draw(there[places.unlabeled], np.sort(unseen))


def judge_by_kind(kinds: np.ndarray, places: Draw, absent: str) -> Judge:
    """AUC of the kinds that were there, and of the absent one, against the same good images, all unseen."""
    shown = kinds[places.unseen]
    there, alone = shown != absent, (shown == absent) | (shown == GOOD)

    def judged(_: Scores, unseen: Scores) -> tuple[float, float]:
        scores = np.asarray(unseen)
        first, second = (auc((shown[some] != GOOD).astype(np.int8), scores[some]) for some in (there, alone))
        return first, second

    return judged


def joined(tasks: Sequence[Arrays], kinds: Sequence[np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A detector's arrays over several tasks, and the kinds of its test images: good ones of the first task.

    Raises:
        ValueError: if it is not one detector, with the same train images.
    """
    if any(not np.array_equal(arrays["train"], tasks[0]["train"]) for arrays in tasks):
        raise ValueError("tasks: expected those of one detector, got other embeddings of train images")
    shown = [np.ones(len(kinds[0]), bool), *(some != GOOD for some in kinds[1:])]
    arrays = {
        name: np.concatenate([task[name][some] for task, some in zip(tasks, shown, strict=True)])
        if name in _OF_TEST
        else array
        for name, array in tasks[0].items()
    }
    return arrays, np.concatenate([of[some] for of, some in zip(kinds, shown, strict=True)])


def rows_without(work: tuple[argparse.Namespace, Detectors, int]) -> list[Row]:
    """A row for every absent kind, draw and method; none for a set of one kind.

    Args:
        work: options of the study, the detectors, and how many draws there are.
    """
    options, detectors, draws = work
    of_tasks = [kinds_of(cell) for cell in detectors.frozen]

    def arrays_in(cells: Sequence[Cell]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        return joined([arrays_of(cell, options.cells) for cell in cells], of_tasks)

    start, kinds = arrays_in(detectors.frozen)
    absents = absent_kinds(kinds)
    if not absents:
        return []
    static, dynamic = (
        [arrays_in(c)[0] for c in detectors.candidates if (c[0].candidate == DYNAMIC) == drawn]
        for drawn in (False, True)
    )
    rows: list[Row] = []
    for absent in absents:
        for number in range(draws):
            place = {"how": "fine-tuned", "set": detectors.name, "seed": detectors.seed, "draw": number}
            place |= {"absent": absent, "images": int((kinds == absent).sum())}
            rows += _methods(place, absent, static, dynamic, start, kinds)
    print(f"{detectors.name}, seed {detectors.seed}: {', '.join(absents)} absent in turn", flush=True)
    return rows


def _methods(
    place: Row,
    absent: str,
    static: Sequence[Arrays],
    dynamic: Sequence[Arrays],
    start: Arrays,
    kinds: np.ndarray,
) -> Iterator[Row]:
    places = draw_without(kinds, absent, place["draw"])
    seen, drawn, whole = (
        [Seen.of(arrays, places, prefix) for arrays in some]
        for some, prefix in ((static, ""), (dynamic, ""), (static, "whole_"))
    )
    frozen = Seen.of(start, places)
    found = figures(seen, drawn, frozen, judge_by_kind(kinds, places, absent), whole)
    for method, (there, alone) in found.items():
        yield {**place, "method": method, "auc_absent": alone, "auc_there": there}


def absent_summary(rows: Sequence[Row]) -> list[Row]:
    """Means over draws."""
    names = ("how", "set", "seed", "absent", "images", "method")
    return means(rows, names, ("auc_absent", "auc_there"))


def absent_table(rows: Sequence[Row]) -> str:
    """A line for each method: AUC on the absent kind and on those that were there, and their difference."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        some = [row for row in rows if row["method"] == method]
        absent, there = (float(np.mean([row[f] for row in some])) for f in ("auc_absent", "auc_there"))
        lines.append([method, f"**{absent:.3f}**", f"{there:.3f}", f"{absent - there:+.3f}"])
    return markdown_table(["method", "the absent kind", "kinds that were there", "difference"], lines)


def absent_part(title: str, rows: Sequence[Row]) -> str:
    """A part of a page: what was absent, and the table; nothing without rows."""
    if not rows:
        return ""
    images: dict[str, dict[str, int]] = defaultdict(dict)
    for row in rows:
        images[row["set"]][row["absent"]] = row["images"]
    absent = [f"{name}: {', '.join(f'{k} ({n})' for k, n in of.items())}" for name, of in images.items()]
    return f"""## {title}: one kind of defect absent

Absent from `unlabeled` in turn, with the number of test images:
{"; ".join(absent)}.
`unlabeled` is a half of the other test images; judged are images that no method has seen, both kinds against
the same good ones. Means over absent kinds, seeds and draws. Methods that learn nothing from `unlabeled`
(average, frozen) show how kinds differ in themselves. Oracle and worst are by the absent kind.

{absent_table(rows)}"""
