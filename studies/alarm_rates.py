"""Is the rate of false alarms that was asked for kept, by single, frozen and combined detectors?

    python -m studies.alarm_rates --real DIR --jobs 2
    python -m studies.alarm_rates --smoke                       (an embedded texture alone)

DIR holds data sets in the layout of MVTec AD. Of each set the encoder as it comes and three detectors,
fine-tuned with three kinds of patches, are kept with what they make of all images; `studies/lab/deciding.py`
then shares out the normal images that no training saw, again and again: 99 of them calibrate (fewer where
there are fewer), half of the rest is seen by the search with half of the anomalies, and the others are new.
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
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from ssad_hpo.augment import NONE
from ssad_hpo.calibration import DRIFT_LEVEL, Calibration
from ssad_hpo.data import Source, builtin, load
from ssad_hpo.data.folder import IMAGE_SIZE
from ssad_hpo.judgement import judge
from ssad_hpo.task import Augmentation, DetectorError
from studies.lab.cells import run_missing
from studies.lab.deciding import ANOMALOUS, FRESH, SEEN, SHIFTED, Decider, Member, deciders, split
from studies.lab.detectors import (
    TUNED,
    Cell,
    arrays_of,
    kept_arrays,
    real_sources,
    trained,
    write_arrays,
)
from studies.lab.options import parse, study_parser
from studies.lab.results import Row, made_by, markdown_table, means, write_results
from studies.lab.searching import truth_of

RATES = (0.01, 0.05, 0.1)
CALIBRATE = 99  # the fewest that keep a rate of 0.01
FINE_TUNED = (("cutout", 0.05), ("cutdiff", 0.005), ("cutpaste", 0.05))
EMBEDDED = ("gravel/cutavg", "brick/cutpaste", "grass/cutdiff")
BATCH, CHANGED_BATCH, BATCHES, ANOMALIES = 40, 100, 10, (0.0, 0.3, 0.5, 0.7, 0.9)  # of monitoring
DRAWN, OWN = "drawn", "as they come"


def sources(options: argparse.Namespace) -> Iterator[Source]:
    """The real sets, and textures with as many images."""
    yield from real_sources(options, IMAGE_SIZE)
    for name in EMBEDDED[:1] if options.smoke else EMBEDDED:
        source = builtin(name)
        yield Source(source.loader, {**source.arguments, "n_unlabeled": 200, "n_held_out": 128})


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """The encoder as it comes and the fine-tuned detectors of every set."""
    training = replace(TUNED, steps=2, batch_size=4) if options.smoke else TUNED
    cells = []
    for source in sources(options):
        cells.append(Cell(source, "frozen", training, NONE, Augmentation(NONE)))
        for kind, area in FINE_TUNED:
            augmentation = Augmentation(kind, {"patch_area": area, "patch_aspect": 1.0})
            cells.append(Cell(source, "fine-tuned", training, f"{area:g}", augmentation))
    return cells


def run_cell(cell: Cell, folder: Path) -> Row:
    """Train a detector and keep its scores and embeddings, also of test images that were changed."""
    task = load(cell.source)
    try:
        detector, _ = trained(cell, task)
        judged = judge(detector, task)
    except (DetectorError, ValueError) as error:
        return {"failure": str(error)}
    arrays = {**kept_arrays(judged), "train_scores": detector.score(task.train).numpy()}
    for name in SHIFTED:
        rows, scores = detector.embed_and_score(_changed(task.unlabeled, name))
        arrays |= {name: rows.numpy(), f"{name}_scores": scores.numpy()}
    write_arrays(cell.path(folder).with_suffix(".npz"), arrays)
    return {"loss": None}


def _changed(images: Tensor, how: str) -> Tensor:
    """Images under four fifths of the light, or out of focus by one pixel."""
    if how == "darker":
        return (images * 0.8).round().to(torch.uint8)
    return gaussian_blur(images, [7, 7], [1.0, 1.0])


@dataclass(frozen=True)
class Study:
    """Rows of decisions and of monitored batches."""

    decisions: list[Row]
    batches: list[Row]


def study_of(options: argparse.Namespace, cells: Sequence[Cell], kept: Sequence[Row]) -> Study:
    """All splits of all sets."""
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell, content in zip(cells, kept, strict=True):
        if "failure" in content:
            print(f"{cell.name}, {cell.augmentation} failed: {content['failure']}")
        else:
            groups[cell.name].append(cell)
    found = Study([], [])
    for name, members in groups.items():
        labels = truth_of(members[0].source)
        arrays = [arrays_of(cell, options.cells) for cell in members]
        own = len(arrays[0]["held_out"])
        wanted = min(CALIBRATE, 5 * (own + int((labels == 0).sum())) // 8)
        print(f"{name}: {len(members)} detectors, {own} held-out images", flush=True)
        for mode, n in ((DRAWN, wanted), (OWN, None)):
            for number in range(2 if options.smoke else options.splits):
                places = split(labels, own, n, number)
                ways = deciders([Member.of(one, places) for one in arrays])
                place = {"set": name, "split": mode, "draw": number}
                for way, some in ways.items():
                    for decider in some:
                        found.decisions.extend(_decisions({**place, "way": way}, decider))
                        if mode == DRAWN and way in ("encoder as it comes", "combined"):
                            found.batches.extend(_batches({**place, "way": way}, decider, number))
    return found


def _decisions(place: Row, decider: Decider) -> Iterator[Row]:
    n = len(decider.calibration.held_out)
    for rate in RATES:
        if rate < decider.calibration.least_rate:
            continue
        shares = {
            name: float(decider.calibration.alarms(scores, rate).double().mean())
            for name, scores in decider.scored.items()
        }
        expected = decider.calibration.realised_rates(rate)[0]
        yield {**place, "n": n, "rate": rate, "expected": expected, "weight": decider.head_weight, **shares}


def _batches(place: Row, decider: Decider, seed: int) -> Iterator[Row]:
    """Batches with more and more anomalies, and of images that are all changed: which are said to drift."""
    generator = np.random.default_rng(seed)
    fresh, anomalous = (decider.scored[name].numpy() for name in (FRESH, ANOMALOUS))
    for share in ANOMALIES:
        n = round(share * BATCH)
        if n > len(anomalous) or BATCH - n > len(fresh):
            continue
        for _ in range(BATCHES):
            drawn = [generator.choice(s, k, replace=False) for s, k in ((fresh, BATCH - n), (anomalous, n))]
            yield {**place, "batch": _named(share), "drift": _drifts(decider.calibration, *drawn)}
    for name in SHIFTED:
        scores = decider.scored[name].numpy()
        for _ in range(BATCHES):
            batch = generator.choice(scores, min(CHANGED_BATCH, len(scores)), replace=False)
            yield {**place, "batch": name, "drift": _drifts(decider.calibration, batch)}


def _named(share: float) -> str:
    return f"{share:g} anomalous"


def _drifts(calibration: Calibration, *scores: np.ndarray) -> bool:
    return calibration.drift(torch.from_numpy(np.concatenate(scores))) < DRIFT_LEVEL


def rates_table(rows: Sequence[Row]) -> str:
    """A line for every way to decide and rate: kept on the mean of sets, by set, in the worst split."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    groups: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["way"], row["rate"]].append(row)
    lines = []
    for (way, rate), some in groups.items():
        of_sets = {name: [row for row in some if row["set"] == name] for name in sets}
        kept = [_mean(own, FRESH) for own in of_sets.values() if own]
        draws = [row[FRESH] for row in some]
        lines.append(
            [
                way,
                f"{rate:g}",
                f"{np.mean([_mean(own, 'expected') for own in of_sets.values() if own]):.3f}",
                f"**{np.mean(kept):.3f}**",
                *(f"{_mean(own, FRESH):.3f}" if own else "–" for own in of_sets.values()),
                f"{np.quantile(draws, 0.05):.3f} to {np.quantile(draws, 0.95):.3f}",
                f"{np.mean([_mean(own, SEEN) for own in of_sets.values() if own]):.3f}",
                f"{1 - np.mean([_mean(own, ANOMALOUS) for own in of_sets.values() if own]):.3f}",
            ]
        )
    titles = ["decided by", "asked", "expected", "kept", *sets, "5 to 95 % of splits", "seen ones", "missed"]
    return markdown_table(titles, lines)


def batches_table(rows: Sequence[Row], decisions: Sequence[Row]) -> str:
    """The share of batches that are said to drift, and how many changed images raise an alarm."""
    names = [*(_named(share) for share in ANOMALIES), *SHIFTED]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    lines = []
    for way in ways:
        for name in dict.fromkeys(row["set"] for row in rows):
            own = [row for row in rows if row["way"] == way and row["set"] == name]
            of_batches = [[row for row in own if row["batch"] == batch] for batch in names]
            told = [f"{_mean(some, 'drift'):.3f}" if some else "–" for some in of_batches]
            here = [r for r in decisions if r["way"] == way and r["set"] == name and r["rate"] == 0.05]
            lines.append([way, name, *told, *(f"{_mean(here, changed):.3f}" for changed in SHIFTED)])
    alarms = [f"alarms at 0.05, {changed}" for changed in SHIFTED]
    return markdown_table(["scored by", "set", *names, *alarms], lines)


def _mean(rows: Sequence[Row], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def summary(rows: Sequence[Row]) -> list[Row]:
    """Means over splits and detectors."""
    names = ("set", "split", "way", "n", "rate")
    return means(rows, names, ("expected", "weight", FRESH, SEEN, ANOMALOUS, *SHIFTED))


def main() -> None:
    parser = study_parser("alarm_rates", __doc__, cells=True)
    parser.add_argument("--real", type=Path, help="folder of data sets in the layout of MVTec AD")
    parser.add_argument("--splits", type=int, default=20, help="of every set")
    options = parse(parser)
    cells = cells_of(options)
    kept = run_missing(
        cells, lambda c: c.path(options.cells), partial(run_cell, folder=options.cells), options.jobs
    )
    found = study_of(options, cells, kept)
    of_mode = {mode: [row for row in found.decisions if row["split"] == mode] for mode in (DRAWN, OWN)}
    page = f"""# Alarm rates: asked for and kept

{made_by("alarm_rates", options)}

Shares of new normal images that raise an alarm, means over random splits. *Expected* is k / (n + 1), which a
conformal p-value has with n held-out images. *Seen ones* are normal images that the search had among the
unlabelled ones, scored as if they were new; *missed* is the share of new anomalies without an alarm.

## Held-out images drawn from all normal ones: they and new ones differ by chance alone

{rates_table(of_mode[DRAWN])}
## Held-out images as they come: a quarter of the train folder, against good test images

{rates_table(of_mode[OWN])}
## Monitoring: the share of batches that are said to have drifted

Batches of {BATCH} new images with more and more anomalies, and of {CHANGED_BATCH} good ones, all of them
changed: four fifths of the light, or a blur of one pixel.

{batches_table(found.batches, of_mode[DRAWN])}"""
    write_results(options, "alarm_rates", page, summary(found.decisions))


if __name__ == "__main__":
    main()
