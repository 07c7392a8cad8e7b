"""Tuning by gradient with a pretrained encoder, on real defects: does it earn its place beside a search?

    python -m studies.tuned_pretrained --real DIR
    python -m studies.tuned_pretrained --smoke                  (an embedded texture alone)
    python -m studies.tuned_pretrained --real DIR --kept        (tables of the cells that are there)

DIR holds data sets in the layout of MVTec AD, of whose train images a quarter is held out; beside them three
embedded tasks at 64 pixels. Half of the test images, drawn by seed, are `unlabeled`, the other half judges.
Tuned are the four kinds of patches as `bilevel.PATCHES` has it, before the training, down each loss; and in
turn with it, as folders were tuned before that. Beside it the encoder as it comes, and a search's sixteen
candidates, a grid of the four kinds by areas (halved where they do not fit). All end as a study of folders
does: by `shift`, and up to eight of the lowest, the encoder as it comes among them, combined. Labels judge
alone, after everything is trained and chosen.

"Which kind" asks twelve embedded tasks, three textures by four kinds of spots of area 0.05, with a half and a
tenth of anomalies: do the losses of the encoder as it comes find f_gen's kind and its area? The losses'
values along the area of f_gen's own kind show their valleys.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ssad_hpo.augment import augment, fits
from ssad_hpo.bilevel import (
    HELD_OUT_LOSSES,
    LOSSES,
    PATCHES_HELD_OUT,
    PATCHES_IN_TURN_HELD_OUT,
    PATCHES_IN_TURN_TRAINING,
    CollapseWarning,
    Cost,
    prepare,
    tune,
)
from ssad_hpo.bilevel.before import Staged
from ssad_hpo.bilevel.ways import way_of
from ssad_hpo.data import Source, builtin, load
from ssad_hpo.detector import Detector, train, untrained_detector
from ssad_hpo.judgement import Judged, frozen_evaluation, judge
from ssad_hpo.task import (
    COMBINED,
    PRETRAINED,
    Augmentation,
    DetectorError,
    Range,
    SearchSpace,
    Task,
    Training,
)
from studies.lab.cells import cell_path, run_missing
from studies.lab.choosing import Draw, Seen, combined_scores, draw, judge_of
from studies.lab.detectors import HELD_OUT, real_sources
from studies.lab.options import parse, study_parser
from studies.lab.results import Row, made_by, write_results
from studies.lab.searching import truth_of
from studies.lab.tuned_tables import auc_table, cost_table, kinds_table, valley_table

EMBEDDED = {"gravel/cutavg": "cutavg", "brick/cutpaste": "cutpaste", "grass/cutdiff": "cutdiff"}
KINDS, AREAS = ("cutout", "cutavg", "cutdiff", "cutpaste"), (0.005, 0.02, 0.06, 0.2)
CANDIDATES = tuple(itertools.product(KINDS, AREAS))
BEFORE = {
    "two-sided": replace(PATCHES_HELD_OUT, loss="two_sided_alignment"),
    "whitened contrast": PATCHES_HELD_OUT,
    "whitened contrast, all looked at": replace(PATCHES_HELD_OUT, focus=False),
    "contrast": replace(PATCHES_HELD_OUT, loss="contrast_alignment"),
    "PU-AUC": replace(PATCHES_HELD_OUT, loss="pu_auc"),
    "smooth (the paper's)": replace(PATCHES_HELD_OUT, loss="smooth_alignment"),
    "MMD": replace(PATCHES_HELD_OUT, loss="mmd"),
}
IN_TURN = PATCHES_IN_TURN_HELD_OUT
TUNINGS = {**BEFORE, "two-sided, in turn": IN_TURN}
FROZEN, SEARCH, VALLEYS, WHICH = "frozen", "search of 16", "valleys", "which kind"
SHARES, F_GEN_AREA = (0.5, 0.1), 0.05
VALLEY, POINTS = Range(0.002, 0.3, log=True), 9


@dataclass(frozen=True)
class Cell:
    """One way on one set: a search, a tuning, the encoder as it comes, the losses' valleys or kinds."""

    source: Source
    name: str
    method: str
    training: Training

    def path(self, folder: Path) -> Path:
        name = f"{self.name}_{self.method}_seed{self.training.seed}"
        of = {SEARCH: CANDIDATES, WHICH: BEFORE, VALLEYS: (VALLEY, POINTS, *LOSSES, *HELD_OUT_LOSSES)}
        own = TUNINGS.get(self.method, of.get(self.method)), COMBINED
        return cell_path(folder, name, self.source, self.training, own)


def run_cell(cell: Cell, smoke: bool) -> Row:
    """Train and choose without labels, then judge; every outcome has an AUC on unseen images."""
    whole, labels = load(cell.source), truth_of(cell.source)
    if cell.method == WHICH:
        return {"found": which_kind(whole, cell.training, smoke)}
    places = draw(labels, None, cell.training.seed)
    task = replace(whole, unlabeled=whole.unlabeled[places.unlabeled])
    if cell.method == VALLEYS:
        return {"valleys": valleys(task, EMBEDDED[cell.name.replace("-", "/")], cell.training)}
    unseen = whole.unlabeled[places.unseen]
    try:
        members, cost, ends = detectors_of(cell, task, unseen, smoke)
    except DetectorError as error:
        return {"failure": str(error)}
    rows = outcomes(members, labels, places)
    return {"outcomes": rows, "images": cost.images, "work_seconds": cost.seconds, "ends": ends}


def outcomes(members: Sequence[tuple[Seen, Seen]], labels: np.ndarray, places: Draw) -> list[Row]:
    """What a study ends with, by both scores; the last member is the encoder as it comes."""
    judged, rows = judge_of(labels, places), []
    for prefix, chosen in (("", [m[0] for m in members]), ("as a whole, ", [m[1] for m in members])):
        single = [judged(m.scores, m.unseen_scores) for m in chosen]
        ranked = sorted(range(len(chosen)), key=lambda i: (chosen[i].criteria[COMBINED.criterion], i))
        together = [chosen[i] for i in ranked[: COMBINED.combine]]
        trained = single[:-1] or single
        found = {
            "by shift": single[ranked[0]],
            "average": tuple(map(float, np.mean(trained, axis=0))),
            "oracle": max(trained, key=lambda pair: pair[1]),
            "combined": judged(*combined_scores(together, heads=True)),
        }
        rows += [{"how": prefix + how, "unlabeled": a, "unseen": b} for how, (a, b) in found.items()]
    return rows


def detectors_of(
    cell: Cell, task: Task, unseen: torch.Tensor, smoke: bool
) -> tuple[list[tuple[Seen, Seen]], Cost, list[str]]:
    """What a way of training ends with, with the encoder as it comes; its cost, and each end in words."""
    began, cost, found, ends = time.monotonic(), Cost(), [], []
    if (tuning := TUNINGS.get(cell.method)) is not None:
        if smoke:
            quick = {"steps_before": 2} if tuning.steps_before else {"look": 0.5}
            tuning = replace(tuning, space=SearchSpace(["cutout", "cutavg"]), survivors=2, **quick)
        height, width = task.train.shape[2:]
        tuning = replace(tuning, space=tuning.space.within(height=height, width=width))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CollapseWarning)  # kept with the ends
            result = tune(task, tuning, cell.training)
        found = [(start.judged, start.detector) for start in result.tuned]
        ends = [f"{t.start} became {t.augmentation}; {' '.join(t.warnings)}" for t in result.tuned]
        cost += result.cost
    elif cell.method == SEARCH:
        stepped = 2 * cell.training.batch_size * cell.training.steps
        for kind, area in CANDIDATES[:2] if smoke else CANDIDATES:
            augmentation = fitting(kind, area, task)
            (last,) = train(task.train, augmentation, cell.training)
            found.append((judge(last.detector, task), last.detector))
            ends.append(str(augmentation))
            cost += Cost(stepped + judged_images(task), stepped)
    if tuning is None or not tuning.steps_before:  # one that has them has judged it already
        cost += Cost(forward=judged_images(task))
    evaluation = frozen_evaluation(
        task, SearchSpace("cutout"), replace(PRETRAINED, seed=cell.training.seed), "cpu"
    )
    found.append((evaluation.judged, evaluation.detector))
    members = [seen_of(judged, detector, unseen) for judged, detector in found]
    return members, replace(cost, seconds=time.monotonic() - began), ends


def fitting(kind: str, area: float, task: Task) -> Augmentation:
    """A spot of this area and aspect 1; one that is too large for a tall image is halved until it fits."""
    height, width = task.train.shape[2:]
    augmentation = Augmentation(kind, {"patch_area": area, "patch_aspect": 1.0})
    return augmentation if fits(augmentation, height=height, width=width) else fitting(kind, area / 2, task)


def judged_images(task: Task) -> int:
    """Images passed to judge a detector."""
    return sum(map(len, task.sets().values())) + len(task.train)


def seen_of(judged: Judged, detector: Detector, unseen: torch.Tensor) -> tuple[Seen, Seen]:
    """A judged detector with what it makes of the unseen images, by its own score and by density."""
    assert judged.held_out is not None and judged.embeddings.held_out is not None
    embeddings, scores = detector.embed_and_score(unseen)
    own = Seen(judged.scores.numpy(), judged.held_out.numpy(), judged.embeddings, scores.numpy(), embeddings)
    sets = judged.embeddings.unlabeled, judged.embeddings.held_out, embeddings
    density = [detector.density_score(rows).numpy() for rows in sets]
    return own, Seen(density[0], density[1], judged.embeddings, density[2], embeddings)


def which_kind(task: Task, training: Training, smoke: bool) -> dict[str, list[Row]]:
    """Where every loss leads from every start, before any training: the lowest first."""
    found = {}
    for name, tuning in list(BEFORE.items())[: 2 if smoke else None]:
        tuning = replace(tuning, steps_before=2) if smoke else tuning
        ends = []
        for start in prepare(task, tuning, training):
            way = way_of(start)
            assert isinstance(way, Staged)
            try:
                list(way.train(until=tuning.steps_before))
                value = way.look()
            except DetectorError:
                continue
            ends.append((value, {"kind": way.augmentation.kind, **way.augmentation.hyperparameters}))
        found[name] = [{**end, "value": value} for value, end in sorted(ends, key=lambda pair: pair[0])]
    return found


def valleys(task: Task, kind: str, training: Training) -> dict[str, list[float]]:
    """Every loss at areas of a kind from bound to bound, with the encoder as it comes and all images."""
    assert task.held_out is not None
    channels, height, width = task.train.shape[1:]
    shape, cpu = (channels, height, width), torch.device("cpu")
    detector = untrained_detector(training, shape, Augmentation(kind), cpu)
    train_set, unlabeled, held_out = (detector.embed(i) for i in (task.train, task.unlabeled, task.held_out))
    values: dict[str, list[float]] = {"area": []}
    for i in range(POINTS):
        area = VALLEY.at(i / (POINTS - 1))
        generator = torch.Generator().manual_seed(0)
        there = Augmentation(kind, {"patch_area": area, "patch_aspect": 1.0})
        changed = augment(task.train / 255, there, generator).mul(255).round().to(torch.uint8)
        augmented = detector.embed(changed)
        values["area"].append(area)
        for name, loss in LOSSES.items():
            values.setdefault(name, []).append(float(loss(train_set, augmented, unlabeled)))
        for name, contrast in HELD_OUT_LOSSES.items():
            values.setdefault(name, []).append(float(contrast(train_set, augmented, unlabeled, held_out)))
    return values


def embedded(name: str, **others: object) -> Source:
    """An embedded task with held-out images."""
    source = builtin(name)
    return Source(source.loader, {**source.arguments, "n_held_out": HELD_OUT, **others})


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """All ways on all sets, those that say most first."""
    cells, textures = [], ("gravel", "brick", "grass")
    known = [(name.replace("/", "-"), embedded(name)) for name in list(EMBEDDED)[: 1 if options.smoke else 3]]
    real = [(Path(s.arguments["root"]).name, s) for s in real_sources(options, options.image_size)]
    for seed in range(1 if options.smoke else options.seeds):
        training = replace(PRETRAINED, seed=seed)
        in_turn = replace(PATCHES_IN_TURN_TRAINING, seed=seed)
        if options.smoke:
            training, in_turn = (
                replace(training, steps=2, batch_size=4),
                replace(in_turn, steps=10, batch_size=4),
            )
        for method, (name, source) in itertools.product((FROZEN, SEARCH, *TUNINGS), known + real):
            cells.append(Cell(source, name, method, in_turn if TUNINGS.get(method) == IN_TURN else training))
        spots = [f"{texture}/{kind}/{F_GEN_AREA}" for texture in textures for kind in KINDS]
        for name, share in itertools.product(spots[: 1 if options.smoke else None], SHARES):
            source = embedded(name, seed=seed, contamination=share)
            cells.append(Cell(source, f"{name.rpartition('/')[0]} {share:g}", WHICH, training))
        cells += [Cell(source, name, VALLEYS, training) for name, source in known if seed == 0]
    return [cell for cell in cells if not options.methods or cell.method in options.methods.split(";")]


def rows_of(cells: Sequence[Cell], kept: Sequence[Row]) -> Iterator[Row]:
    """A row for every set, seed, way of training and end."""
    for cell, content in zip(cells, kept, strict=True):
        if "failure" in content:
            print(f"{cell.name}, {cell.method} failed: {content['failure']}")
        for outcome in content.get("outcomes", ()):
            at = {"set": cell.name, "seed": cell.training.seed, "method": cell.method}
            cost = {"images": content["images"], "seconds": content["work_seconds"]}
            yield {**at, **outcome, **cost, "ends": " | ".join(content["ends"])}


def main() -> None:
    parser = study_parser("tuned_pretrained", __doc__, cells=True, seeds=1)
    parser.add_argument("--real", type=Path, help="folder of data sets in the layout of MVTec AD")
    parser.add_argument("--image-size", type=int, default=128, help="of these, the shorter side")
    parser.add_argument("--methods", default="", help="these alone, with semicolons between them")
    parser.add_argument("--kept", action="store_true", help="compute nothing, show the cells that are there")
    options = parse(parser)
    cells = cells_of(options)
    if options.kept:
        there = [cell for cell in cells if cell.path(options.cells).exists()]
        kept = [json.loads(cell.path(options.cells).read_text()) for cell in there]
    else:
        there = cells
        work = partial(run_cell, smoke=options.smoke)
        kept = run_missing(cells, lambda cell: cell.path(options.cells), work, options.jobs)
    rows = list(rows_of(there, kept))
    asked = [
        (cell.name, content["found"]) for cell, content in zip(there, kept, strict=True) if "found" in content
    ]
    shown = [
        (cell.name, content["valleys"])
        for cell, content in zip(there, kept, strict=True)
        if "valleys" in content
    ]
    page = f"""# Tuning by gradient with a pretrained encoder

{made_by("tuned_pretrained", options)}

{len(there)} of {len(cells)} cells, seeds: {options.seeds}; real sets at {options.image_size} pixels, embedded
ones at 64. A way that failed has no row.
AUC on the half of the test images that no method has seen, higher is better. *By shift* is the candidate that
a study chooses, the encoder as it comes among them; *combined* up to eight of the lowest with their contrast
heads, as studies of folders end where anomalies are seen. *Average* and *oracle* (by labels) are of the
trained ones. *As a whole* is the density of whole images' embeddings in place of the default's patches.

{auc_table(rows)}
## Cost

Thousands of images passed, a pass backward counted as one; that as a share of the search's; and seconds of
one thread, judging included.

{cost_table(rows, SEARCH)}
## Which kind of spot, and how large

Down the loss of the encoder as it comes, {PATCHES_HELD_OUT.steps_before} steps from each of eight starts:
tasks whose lowest end is of f_gen's kind, and among these the areas within a factor of 1.5 of f_gen's (no
start is) and their median ratio to it. {len(asked)} tasks.

{kinds_table(asked, F_GEN_AREA)}
## Valleys of the losses

Along the area of f_gen's own kind, with the encoder as it comes; lower is better.

{valley_table(shown, [VALLEY.at(i / (POINTS - 1)) for i in range(POINTS)])}"""
    write_results(options, "tuned_pretrained", page, rows)


if __name__ == "__main__":
    main()
