"""Pretrained encoders on real defects: does fine-tuning pay beside the encoder as it comes, and from scratch?

    python -m studies.pretrained --real DIR --jobs 2
    python -m studies.pretrained --smoke                        (an embedded texture alone)

DIR holds data sets in the layout of MVTec AD. Of every set a quarter of the train images is held out, by
content. Candidates, chosen before any result was seen: CutOut, CutAvg, CutDiff and CutPaste at areas 0.005
and 0.05 with aspect 1, and of each kind a dynamic one, whose size and aspect are drawn anew for every image.
The embedded tasks are textures with anomalies of a known f_gen, or with crops of another texture.

Every detector's embeddings and scores are kept in the folder of cells, for `studies.held_out`.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ssad_hpo.augment import NONE
from ssad_hpo.data import Source, builtin, load, read_labels
from ssad_hpo.detector import train, untrained_detector
from ssad_hpo.evaluate import auc
from ssad_hpo.judgement import Judged, judge
from ssad_hpo.task import Augmentation, DetectorError, Training
from studies.lab.cells import cell_path, run_missing
from studies.lab.options import parse, study_parser
from studies.lab.results import Row, made_by, markdown_table, write_results

KINDS, AREAS, DYNAMIC = ("cutout", "cutavg", "cutdiff", "cutpaste"), (0.005, 0.05), "dynamic"
EMBEDDED = (
    "gravel/cutavg", "gravel/brick", "brick/cutpaste", "brick/grass", "grass/cutdiff", "grass/gravel",
)  # fmt: skip
IMAGE_SIZE = 128
HELD_OUT_SHARE, HELD_OUT = 0.25, 64
SCRATCH = Training(evaluate_at=(1.0,))
TUNED = Training(encoder="tf_efficientnet_lite0", weights="pretrained", evaluate_at=(1.0,))


@dataclass(frozen=True)
class Cell:
    """One detector: an augmentation, a training, a data set."""

    source: Source
    how: str
    training: Training
    candidate: str
    augmentation: Augmentation

    @property
    def name(self) -> str:
        """For people."""
        arguments = self.source.arguments
        where = arguments.get("root") or f"{arguments['texture']}-{_anomaly(arguments['anomaly'])}"
        return Path(where).name

    def path(self, folder: Path) -> Path:
        """Where the cell is kept; its arrays lie beside it."""
        kind = self.augmentation.kind
        name = f"{self.name}_{self.how}_{kind}_{self.candidate}_seed{self.training.seed}"
        return cell_path(folder, name, self.source, self.training, self.augmentation)


def _anomaly(anomaly: str | dict[str, object]) -> str:
    return anomaly if isinstance(anomaly, str) else next(iter(anomaly))


def sources(options: argparse.Namespace, image_size: int) -> Iterator[Source]:
    """The data sets: real ones at this size, embedded ones at 64 pixels, with their held-out images."""
    if options.real is not None:
        for folder in sorted(path for path in options.real.iterdir() if (path / "train").is_dir()):
            arguments = {"image_size": image_size, "held_out_share": HELD_OUT_SHARE}
            yield Source("folder", {"root": str(folder), **arguments})
    for name in EMBEDDED[:1] if options.smoke else EMBEDDED:
        source = builtin(name)
        yield Source(source.loader, {**source.arguments, "n_held_out": HELD_OUT})


def candidates(smoke: bool) -> Iterator[tuple[str, Augmentation]]:
    """Name and augmentation of every candidate."""
    for kind, area in itertools.product(KINDS[:1] if smoke else KINDS, AREAS):
        yield f"{area:g}", Augmentation(kind, {"patch_area": area, "patch_aspect": 1.0})
    for kind in () if smoke else KINDS:
        yield DYNAMIC, Augmentation(kind)


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """All detectors of the study; that of the encoder as it comes first, once a set."""
    cells = []
    for how, training, size in (
        ("fine-tuned", TUNED, options.image_size),
        ("scratch", SCRATCH, 64),
    ):
        if options.smoke:
            training = replace(training, steps=2, batch_size=4)
        for source in sources(options, size):
            if how == "fine-tuned":
                cells.append(Cell(source, "frozen", training, NONE, Augmentation(NONE)))
            for (name, augmentation), seed in itertools.product(
                candidates(options.smoke), range(options.seeds)
            ):
                if how == "scratch" and name == DYNAMIC:
                    continue
                cells.append(Cell(source, how, replace(training, seed=seed), name, augmentation))
    return cells


def run_cell(cell: Cell, folder: Path) -> Row:
    """Train a detector, judge it without labels, and keep its embeddings and scores beside the cell."""
    task = load(cell.source)
    try:
        if cell.how == "frozen":
            channels, height, width = task.train.shape[1:]
            first = Augmentation(KINDS[0])  # of the criteria's augmented images
            detector = untrained_detector(
                cell.training, (channels, height, width), first, torch.device("cpu")
            )
            loss = None
        else:
            (last,) = train(task.train, cell.augmentation, cell.training)
            detector, loss = last.detector, last.loss
        judged = judge(detector, task)
    except DetectorError as error:
        return {"failure": str(error)}
    _keep_arrays(judged, cell.path(folder).with_suffix(".npz"))
    return {"loss": loss, "precision": detector.training.precision, **judged.criteria}


def _keep_arrays(judged: Judged, path: Path) -> None:
    sets = judged.embeddings
    assert sets.held_out is not None and judged.held_out is not None
    np.savez(
        path,
        train=sets.train.numpy(),
        augmented=sets.augmented.numpy(),
        unlabeled=sets.unlabeled.numpy(),
        held_out=sets.held_out.numpy(),
        scores=judged.scores.numpy(),
        held_out_scores=judged.held_out.numpy(),
    )


def rows_of(cells: Sequence[Cell], kept: Sequence[Row], folder: Path) -> list[Row]:
    """A row with AUC and criteria for every detector that was trained."""
    rows: list[Row] = []
    truths: dict[str, np.ndarray | None] = {}
    for cell, content in zip(cells, kept, strict=True):
        if "failure" in content:
            print(f"{cell.name}, {cell.augmentation} failed: {content['failure']}")
            continue
        key = repr(cell.source)
        if key not in truths:
            truths[key] = read_labels(cell.source)
        truth = truths[key]
        assert truth is not None, f"{cell.name}: a set of this study has ground truth"
        with np.load(cell.path(folder).with_suffix(".npz")) as arrays:
            value = auc(truth, arrays["scores"])
        named = {"set": cell.name, "how": cell.how, "f_aug": cell.augmentation.kind}
        named |= {"candidate": cell.candidate, "seed": cell.training.seed, "steps": cell.training.steps}
        rows.append({**named, "auc": value, **content})
    return rows


def table(rows: Sequence[Row]) -> str:
    """A line for each set and for their mean: frozen, and average and best candidate of every training."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["set"], row["how"]].append(row)
    lines: list[list[float]] = []
    sets = list(dict.fromkeys(row["set"] for row in rows))
    for name in sets:
        (frozen,) = groups[name, "frozen"]
        line = [frozen["auc"]]
        for how in ("scratch", "fine-tuned"):
            seeds = defaultdict(list)
            for row in groups[name, how]:
                seeds[row["seed"]].append(row["auc"])
            seconds = [row["seconds"] for row in groups[name, how]]
            line += [float(np.mean([np.mean(aucs) for aucs in seeds.values()]))]
            line += [float(np.mean([max(aucs) for aucs in seeds.values()])), float(np.median(seconds))]
        lines.append(line)
    titles = (
        "set",
        "frozen",
        "scratch, average",
        "best",
        "seconds",
        "fine-tuned, average",
        "best",
        "seconds",
    )
    named = [*zip(sets, lines, strict=True), ("mean", np.mean(lines, axis=0).tolist())]
    return markdown_table(
        titles,
        [
            [name, *(f"{value:.0f}" if i in (3, 6) else f"{value:.3f}" for i, value in enumerate(line))]
            for name, line in named
        ],
    )


def main() -> None:
    parser = study_parser("pretrained", __doc__, cells=True, seeds=2)
    parser.add_argument("--real", type=Path, help="folder of data sets in the layout of MVTec AD")
    parser.add_argument("--image-size", type=int, default=IMAGE_SIZE, help="of these, the shorter side")
    options = parse(parser)
    if options.smoke:
        options.seeds = 1
    cells = cells_of(options)
    work = partial(run_cell, folder=options.cells)
    kept = run_missing(cells, lambda cell: cell.path(options.cells), work, options.jobs)
    rows = rows_of(cells, kept, options.cells)
    page = f"""# Pretrained encoders

{made_by("pretrained", options)}

AUC, higher is better. *Frozen* is EfficientNet-Lite0 as it comes; *average* and *best* are over candidates,
the best by ground truth, which no selector reaches; means over {options.seeds} seeds. Seconds are a
candidate's, in one thread, judging included. Steps: {SCRATCH.steps} from scratch at 64 pixels,
{TUNED.steps} fine-tuned at {options.image_size}; embedded tasks have 64 pixels in both.

{table(rows)}"""
    write_results(options, "pretrained", page, rows)


if __name__ == "__main__":
    main()
