"""Does a choice beat not choosing on the talk's 36 embedded tasks, where detectors are trained from scratch?

    python -m studies.choice_embedded --jobs 2
    python -m studies.choice_embedded --smoke

Tasks and candidates are those of `studies/lab/embedded.py`, with held-out normal images beside them; a
detector is trained once for all tasks that share its train images. Choices, averages and combinations are
those of `studies.choice`, on a half of the test images, with all of their anomalies, or so many that these
are a tenth or a fiftieth of the images, or none; the other half judges (inductive). Textures are looked at
once more, with all of their anomalies and with a tenth, with held-out images *shifted* against the unlabelled
normal ones: from the part of the photograph that train images are from. The draw of the halves has the number
of the seed. The encoder as it comes stands beside them.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ssad_hpo.augment import NONE
from ssad_hpo.data import Source, load
from ssad_hpo.detector import Detector, train, untrained_detector
from ssad_hpo.judgement import judge
from ssad_hpo.task import PRETRAINED, Augmentation, DetectorError, Training
from studies.lab.cells import cell_path, run_missing
from studies.lab.choice_tables import (
    COMPARED,
    SHARES,
    against_table,
    kinds_table,
    methods,
    rows_by,
    share_table,
    summary,
)
from studies.lab.choosing import Arrays, Seen, as_it_comes, draw, judge_of
from studies.lab.detectors import DYNAMIC, kept_arrays, write_arrays
from studies.lab.embedded import TrainSet, candidates, digit_sets, texture_sets, with_held_out
from studies.lab.options import parse, study_parser
from studies.lab.results import Row, made_by, write_results
from studies.lab.searching import truth_of
from studies.lab.selector_tables import RANDOM_DYNAMIC

ALIKE, SHIFTED = "held-out as the unlabelled normal ones", "held-out shifted"
_OF_TASK = ("unlabeled", "scores", "held_out", "held_out_scores")


@dataclass(frozen=True)
class Cell:
    """One detector of a train set, judged on all of its tasks; of kind "none" the encoder as it comes."""

    train_set: TrainSet
    name: str
    augmentation: Augmentation
    seed: int

    @property
    def candidate(self) -> str:
        """As `studies.choice` calls it."""
        return DYNAMIC if self.name == RANDOM_DYNAMIC else self.name

    def path(self, folder: Path) -> Path:
        """Where the cell is kept; its arrays lie beside it."""
        name = f"{self.train_set.name}_{self.augmentation.kind}_{self.name}_seed{self.seed}"
        return cell_path(folder, name, self.train_set.training, self.augmentation, self.train_set.sources)


@dataclass(frozen=True)
class Group:
    """All detectors of a train set and seed: those from scratch, and the encoder as it comes."""

    members: tuple[Cell, ...]
    frozen: Cell


def shifted(source: Source) -> Source | None:
    """The task with held-out images from the columns of the train images; none of digits."""
    if source.loader != "controlled":
        return None
    return Source(source.loader, {**source.arguments, "held_out_columns": "train"})


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """Every candidate of every train set, and for each of these the encoder as it comes."""
    training = Training(evaluate_at=(1.0,))
    if options.smoke:
        training = replace(training, steps=4, width=4)
    cells = []
    for seed in range(1 if options.smoke else options.seeds):
        sets = [*texture_sets(seed, training), *digit_sets(seed, training)]
        if options.smoke:
            sets = [replace(s, sources=s.sources[:2], kinds=s.kinds[:1]) for s in (sets[0], sets[-1])]
        for train_set in sets:
            held = replace(train_set, sources=tuple(map(with_held_out, train_set.sources)))
            for kind in held.kinds:
                chosen = list(candidates(kind))
                chosen = [*chosen[:2], chosen[-1]] if options.smoke else chosen
                cells += [Cell(held, name, augmentation, seed) for name, augmentation in chosen]
            cells.append(Cell(replace(held, training=PRETRAINED), NONE, Augmentation(NONE), seed))
    return cells


def run_cell(cell: Cell, folder: Path) -> Row:
    """Train a detector, and keep what it makes of every task's images, as `of_task` finds it."""
    sources = cell.train_set.sources
    tasks = [load(source) for source in sources]
    first = tasks[0]
    assert all(torch.equal(task.train, first.train) for task in tasks), (
        "tasks of one train set share its images"
    )
    arrays: dict[str, np.ndarray] = {}
    try:
        detector = trained(cell, first.train)
        for place, (source, task) in enumerate(zip(sources, tasks, strict=True)):
            found = kept_arrays(judge(detector, task))
            arrays |= {name: found[name] for name in ("train", "augmented")}
            arrays |= {f"{place}_{name}": found[name] for name in _OF_TASK}
            if place == 0 and (other := shifted(source)) is not None:  # the same for all tasks
                found = kept_arrays(judge(detector, load(other)))
                arrays |= {f"shifted_{name}": found[name] for name in _OF_TASK[2:]}
    except (DetectorError, ValueError) as error:
        return {"failure": str(error)}
    write_arrays(cell.path(folder).with_suffix(".npz"), arrays)
    return {}


def trained(cell: Cell, images: torch.Tensor) -> Detector:
    """The detector of a cell, for `judge`."""
    training = replace(cell.train_set.training, seed=cell.seed)
    if cell.augmentation.kind != NONE:
        (last,) = train(images, cell.augmentation, training)
        return last.detector
    channels, height, width = images.shape[1:]
    kind = Augmentation(cell.train_set.kinds[0])  # of the criteria's augmented images
    return untrained_detector(training, (channels, height, width), kind, torch.device("cpu"))


def of_task(arrays: Arrays, place: int, held_out: str) -> dict[str, np.ndarray] | None:
    """What `Seen.of` takes of a kept detector on one of its tasks; None without such held-out images."""
    prefix = f"{place}_" if held_out == ALIKE else "shifted_"
    if f"{prefix}held_out" not in arrays:
        return None
    own = {name: arrays[f"{place}_{name}"] for name in _OF_TASK[:2]}
    normal = {name: arrays[f"{prefix}{name}"] for name in _OF_TASK[2:]}
    return {"train": arrays["train"], "augmented": arrays["augmented"], **own, **normal}


def groups(cells: Sequence[Cell], kept: Sequence[Row]) -> Iterator[Group]:
    """The detectors that were trained, by train set and seed."""
    found: dict[tuple[str, int], list[Cell]] = defaultdict(list)
    for cell, content in zip(cells, kept, strict=True):
        if "failure" not in content:
            found[cell.train_set.name, cell.seed].append(cell)
    for members in found.values():
        *scratch, last = members
        yield Group(tuple(scratch), last)


def rows_of_task(work: tuple[argparse.Namespace, Group, int]) -> list[Row]:
    """A row for every kind of held-out images, share, group of candidates and method."""
    options, group, place = work
    source, seed = group.frozen.train_set.sources[place], group.frozen.seed
    labels = truth_of(source)
    kept = []
    for cell in (*group.members, group.frozen):
        with np.load(cell.path(options.cells).with_suffix(".npz")) as arrays:
            kept.append(dict(arrays))
    rows: list[Row] = []
    for how in (ALIKE, SHIFTED):
        there = [own for one in kept if (own := of_task(one, place, how)) is not None]
        for share in SHARES[: len(SHARES) if how == ALIKE else 2] if there else ():
            places = draw(labels, share, seed)
            *seen, frozen = [Seen.of(one, places) for one in there]
            where = {"how": how, "set": load(source).name, "seed": seed, "share": share, "draw": 0}
            found = list(methods(where, group.members, seen, None, labels, places))
            as_is = as_it_comes(frozen, judge_of(labels, places))
            for row in [row for row in found if row["method"] == "average"]:
                for method, (of_seen, of_unseen) in as_is.items():
                    found.append({**row, "method": method, "transductive": of_seen, "inductive": of_unseen})
            rows += found
    print(f"{rows[0]['set']}, seed {seed}: {len(group.members)} detectors", flush=True)
    return rows


def column_title(task: str) -> str:
    """The column of a task: its texture, or digits."""
    return task.partition("/")[0]


def part_of(rows: Sequence[Row], how: str, share: float | None, tasks: str) -> str:
    """Table of a share, and what is gained over not choosing."""
    title = "anomalies as they are" if share is None else f"anomalies {share:g} of unlabeled"
    tables = [share_table(rows, column_title)]
    if share in (None, 0.1) and how == ALIKE:
        tables.append(kinds_table(rows))
        tables += [against_table(rows, hero, column_title) for hero in COMPARED]
    return "\n".join([f"## {tasks}, {how}: {title}\n", *tables])


def main() -> None:
    parser = study_parser("choice_embedded", __doc__, cells=True, seeds=1)
    options = parse(parser)
    cells = cells_of(options)
    work = partial(run_cell, folder=options.cells)
    kept = run_missing(cells, lambda cell: cell.path(options.cells), work, options.jobs)
    found = [
        (options, group, i)
        for group in groups(cells, kept)
        for i in range(len(group.frozen.train_set.sources))
    ]
    rows = rows_by(rows_of_task, found, options.jobs)
    parts = []
    for tasks, several in (("Textures, four kinds", True), ("Digits, one kind", False)):
        of = [row for row in rows if (column_title(row["set"]) != "digits") == several]
        for how in (ALIKE, SHIFTED):
            for share in SHARES:
                part = [row for row in of if row["how"] == how and row["share"] == share]
                parts += [part_of(part, how, share, tasks)] if part else []
    failures = [
        f"{c.train_set.name} {c.augmentation}: {k['failure']}"
        for c, k in zip(cells, kept, strict=True)
        if "failure" in k
    ]
    page = f"""# The talk's embedded tasks: a choice, a combination, or none

{made_by("choice_embedded", options)}

{len(cells)} detectors, together {sum(content["seconds"] for content in kept) / 60:.0f} minutes of one core;
{len(failures)} failed. Mean AUC on images that no method has seen, over tasks and seeds; higher is better.
Candidates are static and from scratch; *dynamic* detectors need no choice; *frozen* is EfficientNet-Lite0 as
it comes, by patches. Regret is the distance across kinds to the oracle, the candidate that is best on
those images. *Transductive* is across kinds on the unlabelled images themselves.

{chr(10).join(parts)}"""
    of_textures = [{**row, "set": column_title(row["set"])} for row in rows]
    names = ("how", "set", "share", "group", "kind", "method")
    write_results(options, "choice_embedded", page, summary(of_textures, names))


if __name__ == "__main__":
    main()
