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
from collections import defaultdict
from collections.abc import Iterator, Sequence

from studies.lab.absent import absent_part, absent_summary, detectors_by_set, rows_without
from studies.lab.choice_tables import (
    COMPARED,
    DRAWS,
    SHARES,
    against_table,
    kinds_table,
    methods,
    rows_by,
    share_table,
    summary,
)
from studies.lab.choosing import Seen, draw
from studies.lab.detectors import Cell, arrays_of, cells_of, detectors_parser, extent, run_detectors
from studies.lab.options import parse
from studies.lab.results import Row, made_by, write_results
from studies.lab.searching import truth_of

# Title, how detectors were trained, prefix of their scores.
WAYS = (
    ("fine-tuned", "fine-tuned", ""),
    ("fine-tuned, scored as a whole", "fine-tuned", "whole_"),
    ("scratch", "scratch", ""),
)


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
            rows += methods(place, members, seen, frozen, labels, places, whole)
    print(f"{title} {name}, seed {seed}: {len(members)} detectors", flush=True)
    return rows


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
                if share in (None, 0.1):
                    parts.append(kinds_table(part))
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
