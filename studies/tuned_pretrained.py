"""Tuning by gradient with a pretrained encoder, on real defects: does it earn its place beside a search?

    python -m studies.tuned_pretrained --real DIR
    python -m studies.tuned_pretrained --smoke                  (an embedded texture alone)
    python -m studies.tuned_pretrained --real DIR --kept        (tables of the cells that are there)

DIR holds data sets in the layout of MVTec AD, of whose train images a quarter is held out; beside them three
embedded tasks at 64 pixels. Half of the test images, drawn by seed, are `unlabeled`, the other half judges.
Tuned are the four kinds of patches as `bilevel.PATCHES` has it, down each loss; beside it the encoder as it
comes, and the eight static candidates of `studies.choice` with the criteria that choose among them. Labels
judge alone, after everything is trained and chosen.

The losses' values along the area of f_gen's own kind, with the encoder as it comes, show their valleys; and
tunings of that kind alone, from far below and above its area, where they lead.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ssad_hpo.augment import augment
from ssad_hpo.bilevel import (
    HELD_OUT_LOSSES,
    LOSSES,
    PATCHES,
    PATCHES_TRAINING,
    CollapseWarning,
    Cost,
    Tuning,
    tune,
)
from ssad_hpo.data import Source, builtin, load
from ssad_hpo.detector import Detector, train, untrained_detector
from ssad_hpo.evaluate import auc
from ssad_hpo.judgement import Judged, judge
from ssad_hpo.task import Augmentation, DetectorError, Range, SearchSpace, Task, Training
from studies.lab.cells import cell_path, run_missing
from studies.lab.choosing import Seen, combined_scores, draw
from studies.lab.detectors import HELD_OUT, TUNED, candidates, real_sources
from studies.lab.options import parse, study_parser
from studies.lab.results import Row, made_by, markdown_table, write_results
from studies.lab.searching import truth_of

EMBEDDED = {"gravel/cutavg": "cutavg", "brick/cutpaste": "cutpaste", "grass/cutdiff": "cutdiff"}
_TUNING = replace(PATCHES, choose_by="shift")  # as for folders with held-out images
TUNINGS: dict[str, Tuning] = {
    "two-sided": _TUNING,
    "PU-AUC": replace(_TUNING, loss="pu_auc"),
    "contrast": replace(_TUNING, loss="contrast_alignment"),
    "smooth (the paper's)": replace(_TUNING, loss="smooth_alignment"),
    "MMD": replace(_TUNING, loss="mmd"),
    "density PU-AUC, second order": replace(_TUNING, loss="density_pu_auc", order=2),
}
FROZEN, SEARCH, VALLEYS, RECOVERY = "frozen", "search", "valleys", "recovery, "
CHOICES = ("dsv", "shift", "pu_auc")
AREAS = Range(0.002, 0.3, log=True)
POINTS = 9
FAR_STARTS = ({"patch_area": 0.01}, {"patch_area": 0.25})


@dataclass(frozen=True)
class Cell:
    """One way on one set: a search of eight, a tuning, the encoder as it comes, or the losses' valleys."""

    source: Source
    name: str
    method: str
    training: Training

    @property
    def tuning(self) -> Tuning | None:
        """What is tuned, if anything is."""
        if not self.method.startswith(RECOVERY):
            return TUNINGS.get(self.method)
        space = SearchSpace({self.kind: {"patch_aspect": 1.0}})
        tuned = TUNINGS[self.method.removeprefix(RECOVERY)]
        return replace(tuned, space=space, starts=FAR_STARTS, survivors=None)

    @property
    def kind(self) -> str:
        """Of f_gen, on an embedded task."""
        return EMBEDDED[self.name.replace("-", "/")]

    def path(self, folder: Path) -> Path:
        name = f"{self.name}_{self.method}_seed{self.training.seed}"
        return cell_path(folder, name, self.source, self.training, self.tuning)


def run_cell(cell: Cell, smoke: bool) -> Row:
    """Train and choose without labels, then judge; every outcome has an AUC on unseen images."""
    whole, labels = load(cell.source), truth_of(cell.source)
    places = draw(labels, None, cell.training.seed)
    task = replace(whole, unlabeled=whole.unlabeled[places.unlabeled])
    if cell.method == VALLEYS:
        return {"valleys": valleys(task, cell.kind, cell.training)}
    if cell.method.startswith(RECOVERY):
        return {"recovery": recovery(task, cell, labels[places.unlabeled])}
    unseen, truths = whole.unlabeled[places.unseen], (labels[places.unlabeled], labels[places.unseen])
    try:
        members, cost, more = detectors_of(cell, task, unseen, smoke)
    except DetectorError as error:
        return {"failure": str(error)}

    def row(how: str, scores: tuple[object, object], passes: int = 1) -> Row:
        seen, not_seen = (auc(t, np.asarray(s)) for t, s in zip(truths, scores, strict=True))
        return {"how": how, "unlabeled": seen, "unseen": not_seen, "passes": passes}

    single = [row("", (m.scores, m.unseen_scores)) for m in members]
    criteria = [m.criteria for m in members]
    if len(members) > 1:
        rows = [{**single[int(np.argmin([c[name] for c in criteria]))], "how": name} for name in CHOICES]
        mean = {name: float(np.mean([s[name] for s in single])) for name in ("unlabeled", "unseen")}
        rows.append({"how": "average", **mean, "passes": 1})
        rows.append({**max(single, key=lambda s: s["unseen"]), "how": "oracle"})
    else:
        rows = [{**single[0], "how": "alone"}]
    rows.append(row("combined", combined_scores(members, heads=True), len(members)))
    return {"outcomes": rows, "images": cost.images, "work_seconds": cost.seconds, "ends": more}


def detectors_of(
    cell: Cell, task: Task, unseen: torch.Tensor, smoke: bool
) -> tuple[list[Seen], Cost, list[str]]:
    """What a way of training ends with, its cost, and each end in words."""
    if cell.tuning is not None:
        tuning = replace(cell.tuning, survivors=2) if smoke else cell.tuning
        if smoke:
            tuning = replace(tuning, space=SearchSpace(["cutout", "cutavg"]), starts=(0.5, 0.8), look=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CollapseWarning)  # kept with the ends
            result = tune(task, tuning, cell.training)
        seen = [seen_of(start.judged, start.detector, unseen) for start in result.tuned]
        ends = [
            f"{start.start} became {start.augmentation}; {' '.join(start.warnings)}" for start in result.tuned
        ]
        return seen, result.cost, ends
    began, seen, ends = time.monotonic(), [], []
    judged_images = (
        2 * len(task.train) + len(task.unlabeled) + (0 if task.held_out is None else len(task.held_out))
    )
    cost = Cost()
    if cell.method == FROZEN:
        channels, height, width = task.train.shape[1:]
        detector = untrained_detector(
            cell.training, (channels, height, width), Augmentation("cutout"), torch.device("cpu")
        )
        seen.append(seen_of(judge(detector, task), detector, unseen))
        cost += Cost(forward=judged_images)
    else:
        stepped = 2 * cell.training.batch_size * cell.training.steps
        for name, augmentation in candidates(smoke):
            if name == "dynamic":
                continue
            (last,) = train(task.train, augmentation, cell.training)
            seen.append(seen_of(judge(last.detector, task), last.detector, unseen))
            ends.append(str(augmentation))
            cost += Cost(stepped + judged_images, stepped)
    return seen, cost + Cost(seconds=time.monotonic() - began), ends


def seen_of(judged: Judged, detector: Detector, unseen: torch.Tensor) -> Seen:
    """A judged detector, with what it makes of the unseen images."""
    assert judged.held_out is not None
    embeddings = detector.embed(unseen)
    scores = detector.density_score(embeddings).numpy()
    return Seen(judged.scores.numpy(), judged.held_out.numpy(), judged.embeddings, scores, embeddings)


def recovery(task: Task, cell: Cell, labels: np.ndarray) -> list[Row]:
    """Where each start ends, and the AUC of its detector on the unlabelled images."""
    assert cell.tuning is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)
        tuned = tune(task, cell.tuning, cell.training).tuned
    ends = [{"from": t.start.hyperparameters, "to": t.augmentation.hyperparameters} for t in tuned]
    areas = [{name: values["patch_area"] for name, values in end.items()} for end in ends]
    return [{**a, "auc": auc(labels, t.scores.numpy())} for a, t in zip(areas, tuned, strict=True)]


def valleys(task: Task, kind: str, training: Training) -> dict[str, list[float]]:
    """Every loss at areas of a kind from bound to bound, with the encoder as it comes and all images."""
    assert task.held_out is not None
    channels, height, width = task.train.shape[1:]
    shape, cpu = (channels, height, width), torch.device("cpu")
    detector = untrained_detector(training, shape, Augmentation(kind), cpu)
    train_set, unlabeled, held_out = (detector.embed(i) for i in (task.train, task.unlabeled, task.held_out))
    values: dict[str, list[float]] = {"area": []}
    for i in range(POINTS):
        area = AREAS.at(i / (POINTS - 1))
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


def sources(options: argparse.Namespace) -> Iterator[tuple[str, Source]]:
    """Name and address of every set, quick ones first."""
    for name in list(EMBEDDED)[:1] if options.smoke else EMBEDDED:
        source = builtin(name)
        yield name.replace("/", "-"), Source(source.loader, {**source.arguments, "n_held_out": HELD_OUT})
    for source in real_sources(options, options.image_size):
        yield Path(source.arguments["root"]).name, source


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """All ways on all sets."""
    cells, ways = [], (FROZEN, VALLEYS, SEARCH, *(RECOVERY + name for name in TUNINGS), *TUNINGS)
    for seed in range(1 if options.smoke else options.seeds):
        wanted = [s for s in sources(options) if not options.sets or s[0] in options.sets.split(",")]
        # What says most comes first, so that a run that is stopped early has it of all sets.
        for methods, (name, source) in itertools.product((ways[:-3], ways[-3:]), wanted):
            for method in methods:
                training = replace(TUNED if method in (FROZEN, SEARCH) else PATCHES_TRAINING, seed=seed)
                if options.smoke:
                    training = replace(training, steps=10, batch_size=4)
                known = name.replace("-", "/") in EMBEDDED
                if known or not (method == VALLEYS or method.startswith(RECOVERY)):
                    cells.append(Cell(source, name, method, training))
    return cells


def rows_of(cells: Sequence[Cell], kept: Sequence[Row]) -> list[Row]:
    """A row for every set, seed, way of training and way of choosing."""
    rows = []
    for cell, content in zip(cells, kept, strict=True):
        if "failure" in content:
            print(f"{cell.name}, {cell.method} failed: {content['failure']}")
        for outcome in content.get("outcomes", ()):
            at = {"set": cell.name, "seed": cell.training.seed, "method": cell.method}
            cost = {"images": content["images"], "seconds": content["work_seconds"]}
            rows.append({**at, **outcome, **cost, "ends": " | ".join(content["ends"])})
    return rows


def table(rows: Sequence[Row]) -> str:
    """AUC on unseen images: a line for each method and choice, a column for each set; mean over seeds."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["method"], row["how"]][row["set"]].append(row["unseen"])
    lines = []
    for (method, how), values in found.items():
        means = [float(np.mean(values[name])) if name in values else float("nan") for name in sets]
        shown = ["–" if np.isnan(mean) else f"{mean:.3f}" for mean in means]
        lines.append([method, how, *shown, "–" if np.isnan(means).any() else f"**{np.mean(means):.3f}**"])
    return markdown_table(["method", "choice", *sets, "mean"], lines)


def cost_table(rows: Sequence[Row]) -> str:
    """Thousands of images passed and seconds by set."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    found = {(row["method"], row["set"]): row for row in rows}
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        of_sets = [found.get((method, name)) for name in sets]
        shown = ["–" if r is None else f"{r['images'] / 1e3:.1f} / {r['seconds']:.0f} s" for r in of_sets]
        lines.append([method, *shown])
    return markdown_table(["method", *sets], lines)


def valley_table(cells: Sequence[Cell], kept: Sequence[Row]) -> str:
    """Where each loss is lowest, and its values from bound to bound."""
    lines = []
    for cell, content in zip(cells, kept, strict=True):
        if (found := content.get("valleys")) is not None:
            areas = found.pop("area")
            for name, values in found.items():
                best = areas[int(np.argmin(values))]
                lines.append([cell.name, name, f"{best:.3g}", ", ".join(f"{v:.3f}" for v in values)])
    shown = ", ".join(f"{AREAS.at(i / (POINTS - 1)):.2g}" for i in range(POINTS))
    return markdown_table(["set", "loss", "lowest at area", f"values at areas {shown}"], lines)


def recovery_table(cells: Sequence[Cell], kept: Sequence[Row]) -> str:
    """Area at the start and at the end, and AUC."""
    lines = []
    for cell, content in zip(cells, kept, strict=True):
        ends = [f"{e['from']:.3g} → {e['to']:.3g} ({e['auc']:.3f})" for e in content.get("recovery", ())]
        if ends:
            lines.append([cell.name, cell.method.removeprefix(RECOVERY), *ends])
    return markdown_table(["set", "loss", "from below", "from above"], lines)


def main() -> None:
    parser = study_parser("tuned_pretrained", __doc__, cells=True, seeds=1)
    parser.add_argument("--real", type=Path, help="folder of data sets in the layout of MVTec AD")
    parser.add_argument("--image-size", type=int, default=128, help="of these, the shorter side")
    parser.add_argument("--sets", default="", help="names of these alone, with commas between them")
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
    rows = rows_of(there, kept)
    page = f"""# Tuning by gradient with a pretrained encoder

{made_by("tuned_pretrained", options)}

{len(there)} of {len(cells)} cells (sets: {options.sets or "all"}; seeds: {options.seeds}); real sets at
{options.image_size} pixels, embedded ones at 64. A way that failed has no row.
AUC on the half of the test images that no method has seen, higher is better. *Combined* are all ends of a
tuning, or all candidates of the search, with their contrast heads. *Oracle* is the best one by labels.

{table(rows)}
## Cost

Thousands of images passed, a pass backward counted as one, and seconds of one thread, judging included.

{cost_table(rows)}
## Valleys of the losses

Along the area of f_gen's own kind, with the encoder as it comes; lower is better.

{valley_table(there, kept)}
## Where the losses lead

Area from start to end of a tuning of f_gen's own kind with aspect 1, and the AUC of its detector on the
unlabelled images.

{recovery_table(there, kept)}"""
    write_results(options, "tuned_pretrained", page, rows)


if __name__ == "__main__":
    main()
