"""Do heat maps find the place of a defect, and by which design?

    python -m studies.heatmaps
    python -m studies.heatmaps --smoke                          (one texture, the frozen encoder alone)

Defects of a known f_gen are put into crops of scikit-image's textures, so that their pixels are known. Heat
maps of detectors, frozen, fine-tuned, from scratch and combined, are judged by pixel AUROC: of all pixels of
the defective images together, how often one that was changed is above one that was not. Of every detector
several designs are compared; `shipped` is what `Detector.heatmaps` does.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssad_hpo.augment import NONE, augment
from ssad_hpo.data import controlled_data
from ssad_hpo.detector import Detector, maps_of, train, untrained_detector
from ssad_hpo.evaluate import auc
from ssad_hpo.task import PRETRAINED, Augmentation, Task, Training
from studies.lab.cells import cell_path, run_missing
from studies.lab.figures.heatmaps import sheet
from studies.lab.heatmaps import DESIGNS, all_maps, occlusion_maps
from studies.lab.options import parse, study_parser
from studies.lab.results import Row, made_by, markdown_table, write_results

TEXTURES = ("gravel", "brick", "grass")
KINDS, AREAS = ("cutavg", "cutpaste", "cutdiff"), (0.01, 0.05)
WAYS = ("frozen", "fine-tuned", "scratch")
SHIPPED, OCCLUSION = "shipped", "occlusion"
TRAINED_WITH = ("cutpaste", "cutavg")
_IMAGE_SIZE, _TRAIN, _TEST, _OCCLUDED = 128, 96, 16, 4


@dataclass(frozen=True)
class Cell:
    """Detectors of one texture, trained in one way."""

    texture: str
    way: str
    smoke: bool

    def path(self, folder: Path) -> Path:
        """Where the cell is kept."""
        return cell_path(folder, f"{self.texture}_{self.way}", self, KINDS, AREAS, sorted(DESIGNS))


def defects(task: Task, kind: str, area: float) -> tuple[Tensor, np.ndarray]:
    """Images with a defect each, and which of their pixels it changed, (N, H, W)."""
    normal = task.unlabeled
    f_gen = Augmentation(kind, {"patch_area": area, "patch_aspect": 1.0})
    changed = augment(normal.float() / 255, f_gen, torch.Generator().manual_seed(0))
    images = (changed * 255).round().to(torch.uint8)
    return images, (images != normal).any(1).numpy()


def detectors_of(cell: Cell, task: Task) -> list[Detector]:
    """The detectors of a cell: of the fine-tuned ones two, with an f_aug each."""
    channels, height, width = task.train.shape[1:]
    if cell.way == "frozen":
        shape, cpu = (channels, height, width), torch.device("cpu")
        return [untrained_detector(PRETRAINED, shape, Augmentation(NONE), cpu)]
    training = replace(Training() if cell.way == "scratch" else PRETRAINED, evaluate_at=(1.0,))
    found = []
    for kind in TRAINED_WITH[: 1 if cell.way == "scratch" else 2]:
        (last,) = train(task.train, Augmentation(kind), training)
        found.append(last.detector)
    return found


def run_cell(cell: Cell) -> Row:
    """Pixel AUROC of what detectors ship, and of every design by the first of them, on all defects."""
    task = task_of(cell.texture)
    detectors = detectors_of(cell, task)
    for detector in detectors:
        detector.fit_patches(task.train)
    of_train = all_maps(detectors[0], task.train)
    designs = {} if cell.way == "fine-tuned" else {n: make(of_train) for n, make in DESIGNS.items()}
    rows = []
    for kind, area in itertools.product(KINDS, AREAS):
        images, mask = defects(task, kind, area)
        shipped = [detector.heatmaps(images) for detector in detectors]
        found = {SHIPPED: shipped[0]}
        if len(shipped) > 1:
            found["both combined"] = torch.stack(shipped).mean(0)
        maps = all_maps(detectors[0], images) if designs else {}
        for name, distances in designs.items():
            found[name] = maps_of(distances(maps), (_IMAGE_SIZE, _IMAGE_SIZE))
        if cell.way == "frozen" and area == AREAS[-1]:
            detectors[0].fit_density(detectors[0].embed(task.train))
            found[OCCLUSION] = occlusion_maps(detectors[0], images[:_OCCLUDED])
            found[f"{SHIPPED}, on these"] = shipped[0][:_OCCLUDED]
        for name, values in found.items():
            where = mask[: len(values)].reshape(-1).astype(np.int8)
            value = auc(where, values.numpy().reshape(-1))
            rows.append({"design": name, "f_gen": kind, "area": area, "pixel_auroc": value})
    return {"rows": rows}


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """All cells, or of a smoke run one."""
    if options.smoke:
        return [Cell("gravel", "frozen", True)]
    return [Cell(texture, way, False) for way, texture in itertools.product(options.ways, TEXTURES)]


def table(rows: Sequence[Row]) -> str:
    """A line for each way and design: means over textures by f_gen, and over all."""
    groups: dict[tuple[str, str], dict[tuple[str, float], list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        found = groups.setdefault((row["way"], row["design"]), defaultdict(list))
        found[row["f_gen"], row["area"]].append(row["pixel_auroc"])
    kinds = list(itertools.product(KINDS, AREAS))
    lines = []
    for (way, design), found in groups.items():
        shown = [f"{np.mean(found[kind]):.3f}" if kind in found else "–" for kind in kinds]
        lines.append([way, design, f"**{np.mean([np.mean(v) for v in found.values()]):.3f}**", *shown])
    return markdown_table(
        ["detector", "design", "mean", *(f"{kind} {area:g}" for kind, area in kinds)], lines
    )


def draw(options: argparse.Namespace) -> None:
    """One image with each kind of large defect and a normal one, of every texture, by the frozen encoder."""
    rows = []
    for texture in TEXTURES[: 1 if options.smoke else None]:
        task = task_of(texture)
        (detector,) = detectors_of(Cell(texture, "frozen", options.smoke), task)
        detector.fit_patches(task.train)
        shown = [defects(task, kind, AREAS[-1])[0][i] for i, kind in enumerate(KINDS)]
        rows.append((detector, torch.stack([*shown, task.unlabeled[len(KINDS)]])))
    options.out.mkdir(parents=True, exist_ok=True)
    sheet(rows, options.out / "heatmaps.png")


def task_of(texture: str) -> Task:
    """Train images of a texture, and normal ones to put defects into."""
    return controlled_data(
        texture, image_size=_IMAGE_SIZE, n_train=_TRAIN, n_unlabeled=_TEST, contamination=0.0
    ).task


def main() -> None:
    parser = study_parser("heatmaps", __doc__, cells=True)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="of training, by default all")
    options = parse(parser)
    cells = cells_of(options)
    kept = run_missing(cells, lambda cell: cell.path(options.cells), run_cell, options.jobs)
    rows = [
        {"texture": cell.texture, "way": cell.way, **row}
        for cell, content in zip(cells, kept, strict=True)
        for row in content["rows"]
    ]
    page = f"""# Heat maps

{made_by("heatmaps", options)}

Pixel AUROC, higher is better, 0.5 is chance: {_TEST} images of {_IMAGE_SIZE} pixels with a defect each for
every texture, kind and area, pixels of all of them together; mean over textures ({", ".join(TEXTURES)}).
Encoders are EfficientNet-Lite0 (frozen; fine-tuned for {PRETRAINED.steps} steps) and the small one from
scratch ({Training().steps} steps), trained with {TRAINED_WITH[0]}; *both combined* are that fine-tuned one
and one trained with {TRAINED_WITH[1]}. Designs: Gaussians of unit feature vectors at strides of 8 and 16
pixels, averaged over 3x3 cells, one for each map or of both joined, for all places or one for each;
distances as they are, or less what is usual at the place. The shipped design was chosen by the frozen
encoder's figures on these very textures. Occlusion is judged on {_OCCLUDED} images a texture and kind, beside
*shipped, on these*. A piece of gravel or grass that is pasted on gravel or grass can be seen by its edge
alone. Seconds of one thread, on a machine with other work: {sum(content["seconds"] for content in kept):.0f}.

{table(rows)}
![By the frozen encoder: {", ".join(KINDS)} of area {AREAS[-1]:g} and a normal image, each beside its heat \
map, in a row for each texture](heatmaps.png)
"""
    write_results(options, "heatmaps", page, rows)
    draw(options)


if __name__ == "__main__":
    main()
