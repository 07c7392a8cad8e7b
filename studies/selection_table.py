"""The talk's selection table: which label-free selector chooses the best detectors?

Every cell, a train set with one f_aug, one candidate and one seed, is trained once and kept; a detector
does not depend on the unlabelled images, so all tasks with the same train images share it. A killed run
goes on where it was. From the kept cells comes the table: mean AUC and mean rank over tasks of what each
selector chooses, its regret, and the p-value of DSV against it.

    python studies/selection_table.py --jobs 2
    python studies/selection_table.py --smoke
    python studies/selection_table.py --mvtec DIR --mpdd DIR      (the papers' setting; days on a CPU)

Chosen before any result was seen: textures gravel, brick and grass, each with f_gen CutOut, CutAvg,
CutPaste and CutDiff at areas 0.02 and 0.1 (aspect 0.5 to 2) and with crops of the two other textures as
anomalies (30 tasks); digits 1, 4 and 7 against turned and against other digits, under Rotation (6 tasks).
Candidates: areas 0.005, 0.02, 0.06 and 0.2 at aspects 0.5 and 2 (CutPaste's angle drawn for every
image), angles 30 to 180 in six steps for Rotation; and one random dynamic detector (Rand.). Added after the
first results were seen: the choice among the candidates of any kind, DSV without its clamp, and the tables of
where DSV wins and of what candidates learned.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch

from ssad_hpo import tracking
from ssad_hpo.consensus import SELECTORS
from ssad_hpo.criteria import evaluate_all
from ssad_hpo.data import Source, builtin, find_categories, load, read_labels
from ssad_hpo.detector import train
from ssad_hpo.evaluate import auc
from ssad_hpo.experiment.selector_tables import ANY_KIND, RANDOM_DYNAMIC, Row, markdown
from ssad_hpo.task import Augmentation, DetectorError, Range, Training

AREAS, ASPECTS, ANGLES = (0.005, 0.02, 0.06, 0.2), (0.5, 2.0), (30.0, 60.0, 90.0, 120.0, 150.0, 180.0)
PATCHES = ("cutout", "cutavg", "cutdiff", "cutpaste")
F_GEN_AREAS = (0.02, 0.1)
TEXTURES, DIGITS = ("gravel", "brick", "grass"), (1, 4, 7)


@dataclass(frozen=True)
class TrainSet:
    """Train images that several tasks share; `sources` are those tasks, for one data seed."""

    name: str
    sources: tuple[Source, ...]
    kinds: tuple[str, ...]
    training: Training


@dataclass(frozen=True)
class Cell:
    """One training: what is kept of it lies in FOLDER/NAME.json and FOLDER/NAME.npz."""

    train_set: TrainSet
    augmentation: Augmentation
    candidate: str
    seed: int

    @property
    def name(self) -> str:
        """Unique among cells of any settings: a kept cell is never taken for one that was set otherwise."""
        settings = (self.train_set.training, self.augmentation, [s.to_json() for s in self.train_set.sources])
        digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
        parts = (self.train_set.name, self.augmentation.kind, self.candidate, f"seed{self.seed}", digest)
        return "_".join(parts).replace(" ", "-").replace("/", "-")


def texture_sets(seed: int, training: Training) -> Iterator[TrainSet]:
    for texture in TEXTURES:
        names = [f"{texture}/{kind}/{area}" for kind in PATCHES for area in F_GEN_AREAS]
        names += [f"{texture}/{other}" for other in TEXTURES if other != texture]
        yield TrainSet(texture, tuple(_seeded(builtin(n), seed) for n in names), PATCHES, training)


def digit_sets(seed: int, training: Training) -> Iterator[TrainSet]:
    for digit in DIGITS:
        names = (f"digits/{digit}/rotated", f"digits/{digit}")
        sources = tuple(_seeded(builtin(n), seed) for n in names)
        yield TrainSet(f"digits-{digit}", sources, ("rotation",), training)


def folder_sets(root: Path, image_size: int, training: Training) -> Iterator[TrainSet]:
    """MVTec AD or MPDD: one task an object, all its anomalies together."""
    for category in find_categories(root):
        source = Source("folder", {"root": str(root), "category": category, "image_size": image_size})
        yield TrainSet(f"{root.name}-{category}", (source,), PATCHES, training)


def _seeded(source: Source, seed: int) -> Source:
    return Source(source.loader, {**source.arguments, "seed": seed})


def candidates(kind: str) -> Iterator[tuple[str, Augmentation]]:
    """Name and augmentation of every candidate of a kind, the random dynamic one last."""
    if kind == "rotation":
        for angle in ANGLES:
            yield f"{angle:g}", Augmentation(kind, {"angle": angle})
    else:
        for area, aspect in itertools.product(AREAS, ASPECTS):
            yield f"{area:g}x{aspect:g}", Augmentation(kind, {"patch_area": area, "patch_aspect": aspect})
    yield RANDOM_DYNAMIC, Augmentation(kind)


def anomaly_of(source: Source) -> str:
    """What makes a task's anomalies, for the table of where a selector wins and loses."""
    anomaly = source.arguments.get("anomaly", source.arguments.get("anomalies", "in the wild"))
    if isinstance(anomaly, dict):
        return next(iter(anomaly))  # the kind of f_gen
    return {"others": "other digits", "rotated": "turned digits"}.get(anomaly, anomaly or "in the wild")


def run_cell(cell: Cell, folder: Path) -> None:
    """Train one detector, judge it on every task of its train set without labels, and keep that."""
    torch.set_num_threads(1)
    started = time.monotonic()
    tasks = [load(source) for source in cell.train_set.sources]
    images = tasks[0].train
    row: Row = {
        "train_set": cell.train_set.name,
        "f_aug": cell.augmentation.kind,
        "candidate": cell.candidate,
        "hyperparameters": {
            n: asdict(v) if isinstance(v, Range) else v for n, v in cell.augmentation.hyperparameters.items()
        },
        "seed": cell.seed,
        "steps": cell.train_set.training.steps,
        "tasks": {},
    }
    scores: dict[str, np.ndarray] = {}
    try:
        training = replace(cell.train_set.training, seed=cell.seed)
        (checkpoint,) = train(images, cell.augmentation, training)
        detector = checkpoint.detector
        trained, augmented = detector.embed(images), detector.embed_augmented(images)
        detector.fit_density(trained)
        row["loss"] = checkpoint.loss
        for task in tasks:
            assert torch.equal(task.train, images), "tasks of one train set must share their train images"
            unlabeled = detector.embed(task.unlabeled)
            row["tasks"][task.name] = evaluate_all(trained, augmented, unlabeled)
            scores[task.name] = detector.density_score(unlabeled).numpy()
    except (DetectorError, ValueError) as error:
        row["failure"] = str(error)
    row["seconds"] = round(time.monotonic() - started, 2)
    np.savez(folder / f"{cell.name}.npz.partial.npz", **{k.replace("/", "|"): v for k, v in scores.items()})
    os.replace(folder / f"{cell.name}.npz.partial.npz", folder / f"{cell.name}.npz")
    (folder / f"{cell.name}.json.partial").write_text(json.dumps(row))
    os.replace(folder / f"{cell.name}.json.partial", folder / f"{cell.name}.json")  # last: the cell is whole


def run_cells(cells: list[Cell], folder: Path, jobs: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells if not (folder / f"{cell.name}.json").is_file()]
    print(f"{len(cells)} trainings, {len(cells) - len(missing)} kept from before", flush=True)
    started = time.monotonic()
    with ProcessPoolExecutor(jobs) as pool:
        for done, _ in enumerate(pool.map(run_cell, missing, itertools.repeat(folder)), 1):
            left = (time.monotonic() - started) / done * (len(missing) - done)
            print(f"\r{done}/{len(missing)}, {left / 60:.0f} min left", end="", flush=True)
    print()


def judge(cells: Iterable[Cell], folder: Path) -> list[tuple[Row, np.ndarray]]:
    """A row with AUC and all criteria for every kept (task, f_aug, candidate, seed), and its scores."""
    judged: list[tuple[Row, np.ndarray]] = []
    labels: dict[str, np.ndarray | None] = {}
    for cell in cells:
        kept = json.loads((folder / f"{cell.name}.json").read_text())
        if "failure" in kept:
            print(f"{cell.name} failed: {kept['failure']}", file=sys.stderr)
            continue
        with np.load(folder / f"{cell.name}.npz") as arrays:
            for source, (task, criteria) in zip(cell.train_set.sources, kept["tasks"].items(), strict=True):
                key = json.dumps(source.to_json())
                if key not in labels:
                    labels[key] = read_labels(source)
                truth, score = labels[key], arrays[task.replace("/", "|")]
                if truth is None:
                    continue
                row: Row = {
                    "task": task,
                    "train_set": cell.train_set.name,
                    "anomaly": anomaly_of(source),
                    "f_aug": cell.augmentation.kind,
                    "candidate": cell.candidate,
                    **{k: kept["hyperparameters"].get(k) for k in ("patch_area", "patch_aspect", "angle")},
                    "seed": cell.seed,
                    "steps": kept["steps"],
                    "loss": kept["loss"],
                    "seconds": kept["seconds"],
                    "auc": auc(truth, score),
                    **criteria,
                }
                judged.append((row, score))
    return judged


def with_consensus(judged: list[tuple[Row, np.ndarray]]) -> list[Row]:
    """The rows with all consensus merits, taken among the candidates of a task, f_aug and seed."""
    groups: dict[tuple[str, str, int], list[tuple[Row, np.ndarray]]] = defaultdict(list)
    for row, score in judged:
        if row["candidate"] != RANDOM_DYNAMIC and np.ptp(score) > 0:  # a constant score ranks nothing
            groups[row["task"], row["f_aug"], row["seed"]].append((row, score))
    for models in groups.values():
        if len(models) > 1:
            matrix = np.stack([score for _, score in models], axis=1)
            for name, selector in SELECTORS.items():
                for (row, _), merit in zip(models, selector(matrix), strict=True):
                    row[name] = float(merit)
    return [row for row, _ in judged]


def of_any_kind(judged: list[tuple[Row, np.ndarray]]) -> list[tuple[Row, np.ndarray]]:
    """The same candidates, those of all kinds together, where a train set has several kinds."""
    kinds = defaultdict(set)
    for row, _ in judged:
        kinds[row["train_set"]].add(row["f_aug"])
    return [({**row, "f_aug": ANY_KIND}, s) for row, s in judged if len(kinds[row["train_set"]]) > 1]


def track(rows: list[Row], out: Path, uri: str) -> None:
    """One parent run, one child a (task, f_aug, candidate, seed)."""
    outbox = out / "outbox.jsonl"
    outbox.unlink(missing_ok=True)
    with tracking.MlflowRecorder(outbox, uri, "selection_table", "selection_table") as recorder:
        recorder.study_started({"rows": len(rows)}, {})
        for row in rows:
            key = "_".join(str(row[name]) for name in ("task", "f_aug", "candidate", "seed"))
            facts = {k: v for k, v in row.items() if not isinstance(v, float)}
            recorder.trial_started(key, facts, {"task": str(row["task"]), "augmentation": str(row["f_aug"])})
            numbers = {k: v for k, v in row.items() if isinstance(v, float)}
            recorder.trial_ended(key, "complete", numbers)
        recorder.study_ended("complete")
        left = recorder.close(timeout=600)
    print(f"MLflow: {left} records undelivered" if left else f"MLflow: {len(rows)} children at {uri}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--cells", type=Path, default=Path("runs/selection_table"), help="kept trainings")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=Training.steps)
    parser.add_argument("--kinds", nargs="+", help="of f_aug; all by default")
    parser.add_argument("--mvtec", type=Path)
    parser.add_argument("--mpdd", type=Path)
    parser.add_argument("--image-size", type=int, default=256, help="of MVTec AD and MPDD")
    parser.add_argument("--encoder", default="resnet18", help="for MVTec AD and MPDD")
    parser.add_argument("--folder-steps", type=int, default=10_000, help="for MVTec AD and MPDD")
    parser.add_argument("--tracking-uri", default=None, help="MLflow's address; none by default")
    parser.add_argument("--smoke", action="store_true", help="a few tiny trainings, in seconds")
    options = parser.parse_args()

    seeds = range(1 if options.smoke else options.seeds)
    steps, width = (4, 4) if options.smoke else (options.steps, 16)
    training = Training(steps=steps, width=width, evaluate_at=(1.0,))
    paper = Training(encoder=options.encoder, steps=options.folder_steps, evaluate_at=(1.0,))
    cells: list[Cell] = []
    for seed in seeds:
        if options.mvtec or options.mpdd:
            roots = [root for root in (options.mvtec, options.mpdd) if root]
            sets = [s for root in roots for s in folder_sets(root, options.image_size, paper)]
        else:
            sets = [*texture_sets(seed, training), *digit_sets(seed, training)]
        if options.smoke:
            sets = [replace(s, sources=s.sources[:2], kinds=s.kinds[:1]) for s in (sets[0], sets[-1])]
        for train_set in sets:
            for kind in train_set.kinds:
                if options.kinds and kind not in options.kinds:
                    continue
                chosen = list(candidates(kind))
                chosen = [*chosen[:2], chosen[-1]] if options.smoke else chosen
                cells += [Cell(train_set, augmentation, name, seed) for name, augmentation in chosen]

    started = time.monotonic()
    run_cells(cells, options.cells, options.jobs)
    judged = judge(cells, options.cells)
    rows = with_consensus(judged)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "selection_table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(
            file, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    trained = sum(json.loads((options.cells / f"{c.name}.json").read_text())["seconds"] for c in cells)
    header = (
        f"{len(cells)} trainings of {cells[0].train_set.training.steps} steps, {trained / 60:.0f} minutes of "
        f"one core; {os.cpu_count()} cores ({platform.processor() or platform.machine()}), torch "
        f"{torch.__version__}, {date.today()}, commit {revision.strip() or 'none'}."
    )
    text = markdown([*rows, *with_consensus(of_any_kind(judged))], header)
    (options.out / "selection_table.md").write_text(text)
    print(text)
    if options.tracking_uri:
        track(rows, options.cells, options.tracking_uri)
    print(f"{(time.monotonic() - started) / 60:.1f} minutes; table and CSV in {options.out}")


if __name__ == "__main__":
    main()
