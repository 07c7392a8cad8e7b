"""Detectors from scratch, fine-tuned and frozen, kept with their embeddings and scores for several studies.

Of every real set a quarter of the train images is held out, by content. Candidates, chosen before any result
was seen: CutOut, CutAvg, CutDiff and CutPaste at areas 0.005 and 0.05 with aspect 1, and of each kind a
dynamic one, whose size and aspect are drawn anew for every image. The embedded tasks are textures with
anomalies of a known f_gen, or with crops of another texture.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ssad_hpo.augment import NONE
from ssad_hpo.data import Source, builtin, load
from ssad_hpo.data.folder import IMAGE_SIZE
from ssad_hpo.detector import Detector, train, untrained_detector
from ssad_hpo.judgement import Judged, judge
from ssad_hpo.task import PRETRAINED, Augmentation, DetectorError, Task, Training
from studies.lab.cells import cell_path, run_missing
from studies.lab.options import study_parser
from studies.lab.results import Row

KINDS, AREAS, DYNAMIC = ("cutout", "cutavg", "cutdiff", "cutpaste"), (0.005, 0.05), "dynamic"
EMBEDDED = (
    "gravel/cutavg", "gravel/brick", "brick/cutpaste", "brick/grass", "grass/cutdiff", "grass/gravel",
)  # fmt: skip
OTHER_SIZES = (64, 128, 192, 384)  # of real sets, by the encoder as it comes alone
HELD_OUT_SHARE, HELD_OUT = 0.25, 64
SCRATCH = Training(evaluate_at=(1.0,))
TUNED = PRETRAINED


@dataclass(frozen=True)
class Cell:
    """One detector: an augmentation, a training, a data set."""

    source: Source
    how: str
    training: Training
    candidate: str
    augmentation: Augmentation
    device: str = "cpu"

    @property
    def name(self) -> str:
        """For people."""
        arguments = self.source.arguments
        where = arguments.get("root") or f"{arguments['texture']}-{_anomaly(arguments['anomaly'])}"
        return Path(where).name

    def path(self, folder: Path) -> Path:
        """Where the cell is kept; its arrays lie beside it."""
        kind = self.augmentation.kind
        name = f"{self.name}_{self.how.replace(' ', '_')}_{kind}_{self.candidate}_seed{self.training.seed}"
        elsewhere = () if self.device == "cpu" else (self.device,)
        return cell_path(folder, name, self.source, self.training, self.augmentation, *elsewhere)


def _anomaly(anomaly: str | dict[str, object]) -> str:
    return anomaly if isinstance(anomaly, str) else next(iter(anomaly))


def sources(options: argparse.Namespace, image_size: int) -> Iterator[Source]:
    """The data sets: real ones at this size, embedded ones at 64 pixels, with their held-out images."""
    yield from real_sources(options, image_size)
    for name in EMBEDDED[:1] if options.smoke else EMBEDDED:
        source = builtin(name)
        yield Source(source.loader, {**source.arguments, "n_held_out": HELD_OUT})


def real_sources(options: argparse.Namespace, image_size: int) -> Iterator[Source]:
    """The real data sets at a size, with a quarter of their train images held out; none without --real."""
    if options.real is not None:
        for folder in sorted(path for path in options.real.iterdir() if (path / "train").is_dir()):
            arguments = {"image_size": image_size, "held_out_share": HELD_OUT_SHARE}
            yield Source("folder", {"root": str(folder), **arguments})


def candidates(smoke: bool) -> Iterator[tuple[str, Augmentation]]:
    """Name and augmentation of every candidate."""
    for kind, area in itertools.product(KINDS[:1] if smoke else KINDS, AREAS):
        yield f"{area:g}", Augmentation(kind, {"patch_area": area, "patch_aspect": 1.0})
    for kind in () if smoke else KINDS:
        yield DYNAMIC, Augmentation(kind)


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """All detectors; that of the encoder as it comes first, once a set."""
    seeds = range(1 if options.smoke else options.seeds)
    cells = _trained_cells(options, "fine-tuned", TUNED, options.image_size, seeds)
    for size in () if options.smoke else OTHER_SIZES:
        for source in sources(options, size):
            if source.loader == "folder":
                cells.append(Cell(source, f"frozen at {size}", TUNED, NONE, Augmentation(NONE)))
    return cells + _trained_cells(options, "scratch", SCRATCH, 64, seeds)


def _trained_cells(
    options: argparse.Namespace, how: str, training: Training, size: int, seeds: range
) -> list[Cell]:
    """Those of one way of training, with the encoder as it comes beside fine-tuned ones."""
    cells = []
    if options.smoke:
        training = replace(training, steps=2, batch_size=4)
    for source in sources(options, size):
        if how == "fine-tuned":
            cells.append(Cell(source, "frozen", training, NONE, Augmentation(NONE)))
        if how == "scratch" and source.loader != "folder" and not options.smoke:
            continue  # those are the table of `studies.selection_table`
        for (name, augmentation), seed in itertools.product(candidates(options.smoke), seeds):
            if how == "scratch" and name == DYNAMIC:
                continue
            cells.append(Cell(source, how, replace(training, seed=seed), name, augmentation))
    return cells


def run_cell(cell: Cell, folder: Path) -> Row:
    """Train a detector, judge it without labels, and keep its embeddings and scores beside the cell."""
    task = load(cell.source)
    try:
        detector, loss = trained(cell, task)
        judged = judge(detector, task)
    except (DetectorError, ValueError) as error:  # a patch that does not fit tall images
        return {"failure": str(error)}
    arrays = kept_arrays(judged)
    if detector.training.score != "density":
        arrays["whole_scores"] = detector.density_score(judged.embeddings.unlabeled).numpy()
        arrays["whole_held_out_scores"] = detector.density_score(torch.from_numpy(arrays["held_out"])).numpy()
    write_arrays(cell.path(folder).with_suffix(".npz"), arrays)
    return {"loss": loss, "precision": detector.training.precision, **judged.criteria}


def trained(cell: Cell, task: Task) -> tuple[Detector, float | None]:
    """The detector of a cell, or the encoder as it comes, and its training's loss; for `judge`."""
    if cell.augmentation.kind != NONE:
        (last,) = train(task.train, cell.augmentation, cell.training, cell.device)
        return last.detector, last.loss
    channels, height, width = task.train.shape[1:]
    first = Augmentation(KINDS[0])  # of the criteria's augmented images
    device = torch.device(cell.device)
    return untrained_detector(cell.training, (channels, height, width), first, device), None


def kept_arrays(judged: Judged) -> dict[str, np.ndarray]:
    """What studies need of a judged detector, by name."""
    sets = judged.embeddings
    assert sets.held_out is not None and judged.held_out is not None
    return {
        "train": sets.train.numpy(),
        "augmented": sets.augmented.numpy(),
        "unlabeled": sets.unlabeled.numpy(),
        "held_out": sets.held_out.numpy(),
        "scores": judged.scores.numpy(),
        "held_out_scores": judged.held_out.numpy(),
    }


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Keep arrays by name; `arrays_of` reads them."""
    np.savez(path, **arrays)  # type: ignore[arg-type]  # of its stubs


def detectors_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of a study of these detectors."""
    parser = study_parser(name, description, cells=True, seeds=2)
    parser.set_defaults(cells=Path("runs/detectors"))
    parser.add_argument("--real", type=Path, help="folder of data sets in the layout of MVTec AD")
    parser.add_argument("--kept", action="store_true", help="compute nothing, show the cells that are there")
    parser.add_argument("--image-size", type=int, default=IMAGE_SIZE, help="of these, the shorter side")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    return parser


def run_detectors(cells: Sequence[Cell], options: argparse.Namespace) -> tuple[list[Cell], list[Row]]:
    """Train those that are not kept yet; cells, and what is kept of each, its arrays apart.

    With --kept nothing is trained, and of a set a way of training counts once all of its static candidates
    are there.
    """
    cells = [replace(cell, device=options.device) for cell in cells]
    if options.kept:
        there = [cell for cell in cells if cell.path(options.cells).exists()]
        lacking = {(cell.name, cell.how) for cell in cells if cell.candidate != DYNAMIC and cell not in there}
        there = [cell for cell in there if (cell.name, cell.how) not in lacking]
        return there, [json.loads(cell.path(options.cells).read_text()) for cell in there]
    work = partial(run_cell, folder=options.cells)
    return cells, run_missing(cells, lambda cell: cell.path(options.cells), work, options.jobs)


def extent(cells: Sequence[Cell], there: Sequence[Cell]) -> str:
    """A sentence on what a page lacks; nothing where it lacks nothing."""
    if len(there) == len(cells):
        return ""
    return f"Stopped before its end: {len(there)} of {len(cells)} detectors are in it.\n"


def arrays_of(cell: Cell, folder: Path) -> dict[str, np.ndarray]:
    """Embeddings `train`, `augmented`, `unlabeled`, `held_out`, and `scores` and `held_out_scores`.

    Detectors that score by patches have `whole_scores` and `whole_held_out_scores` as well, by density.
    """
    with np.load(cell.path(folder).with_suffix(".npz")) as arrays:
        return dict(arrays)
