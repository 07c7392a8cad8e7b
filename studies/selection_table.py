"""The talk's selection table: which label-free selector chooses the best detectors?

Every cell, a train set with one f_aug, one candidate and one seed, is trained once and kept; a detector
does not depend on the unlabelled images, so all tasks with the same train images share it. A killed run
goes on where it was. From the kept cells comes the table: mean AUC and mean rank over tasks of what each
selector chooses, its regret, and the p-value of DSV against it.

    python -m studies.selection_table --jobs 2
    python -m studies.selection_table --smoke
    python -m studies.selection_table --mvtec DIR --mpdd DIR      (the papers' setting; days on a CPU)

Tasks and candidates are those of `studies/lab/embedded.py`, chosen before any result was seen. Added after
the first results were seen: the choice among the candidates of any kind, DSV without its clamp, and the
tables of where DSV wins and of what candidates learned.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ssad_hpo import tracking
from ssad_hpo.consensus import SELECTORS
from ssad_hpo.criteria import evaluate_all
from ssad_hpo.data import Source, find_categories, load, read_labels
from ssad_hpo.detector import train
from ssad_hpo.evaluate import auc
from ssad_hpo.task import Augmentation, DetectorError, Range, Training
from studies.lab.cells import cell_path, run_missing
from studies.lab.embedded import PATCHES, TrainSet, candidates, digit_sets, texture_sets
from studies.lab.options import parse, study_parser
from studies.lab.results import Row, made_by, write_results
from studies.lab.searching import Scores
from studies.lab.selector_tables import ANY_KIND, RANDOM_DYNAMIC, markdown


@dataclass(frozen=True)
class Cell:
    """One training of a candidate, judged on all tasks of its train set."""

    train_set: TrainSet
    augmentation: Augmentation
    candidate: str
    seed: int

    def path(self, folder: Path) -> Path:
        """Where the cell is kept."""
        name = f"{self.train_set.name}_{self.augmentation.kind}_{self.candidate}_seed{self.seed}"
        return cell_path(folder, name, self.train_set.training, self.augmentation, self.train_set.sources)


def folder_sets(root: Path, image_size: int, training: Training) -> Iterator[TrainSet]:
    """MVTec AD or MPDD: one task an object, all its anomalies together."""
    for category in find_categories(root):
        source = Source("folder", {"root": str(root), "category": category, "image_size": image_size})
        yield TrainSet(f"{root.name}-{category}", (source,), PATCHES, training)


def anomaly_of(source: Source) -> str:
    """What makes a task's anomalies, for the table of where a selector wins and loses."""
    anomaly = source.arguments.get("anomaly", source.arguments.get("anomalies", "in the wild"))
    if isinstance(anomaly, dict):
        return next(iter(anomaly))  # the kind of f_gen
    return {"others": "other digits", "rotated": "turned digits"}.get(anomaly, anomaly or "in the wild")


def run_cell(cell: Cell) -> Row:
    """Train one detector, and judge it on every task of its train set without labels."""
    tasks = [load(source) for source in cell.train_set.sources]
    images = tasks[0].train
    assert all(torch.equal(task.train, images) for task in tasks), "tasks of one train set share its images"
    of_tasks: Row = {}
    try:
        training = replace(cell.train_set.training, seed=cell.seed)
        (checkpoint,) = train(images, cell.augmentation, training)
        detector = checkpoint.detector
        embedded, augmented = detector.embed(images), detector.embed_augmented(images)
        detector.fit_density(embedded)
        for task in tasks:
            unlabeled = detector.embed(task.unlabeled)
            criteria = evaluate_all(embedded, augmented, unlabeled)
            of_tasks[task.name] = {"criteria": criteria, "scores": detector.density_score(unlabeled).tolist()}
    except (DetectorError, ValueError) as error:
        return {"failure": str(error)}
    return {"loss": checkpoint.loss, "tasks": of_tasks}


def judge(cells: Sequence[Cell], kept: Sequence[Row]) -> list[tuple[Row, Scores]]:
    """A row with AUC and all criteria for every kept (task, f_aug, candidate, seed), and its scores."""
    judged: list[tuple[Row, Scores]] = []
    truths: dict[str, np.ndarray | None] = {}
    for cell, content in zip(cells, kept, strict=True):
        train_set, augmentation = cell.train_set, cell.augmentation
        if "failure" in content:
            at = f"{train_set.name}, {augmentation}, seed {cell.seed}"
            print(f"{at} failed: {content['failure']}", file=sys.stderr)
            continue
        values = {
            n: asdict(v) if isinstance(v, Range) else v for n, v in augmentation.hyperparameters.items()
        }
        for source, (task, found) in zip(train_set.sources, content["tasks"].items(), strict=True):
            key = json.dumps(source.to_json())
            if key not in truths:
                truths[key] = read_labels(source)
            truth, scores = truths[key], np.array(found["scores"])
            if truth is None:
                continue
            row: Row = {
                "task": task,
                "train_set": train_set.name,
                "anomaly": anomaly_of(source),
                "f_aug": augmentation.kind,
                "candidate": cell.candidate,
                **{name: values.get(name) for name in ("patch_area", "patch_aspect", "angle")},
                "seed": cell.seed,
                "steps": train_set.training.steps,
                "loss": content["loss"],
                "seconds": content["seconds"],
                "auc": auc(truth, scores),
                **found["criteria"],
            }
            judged.append((row, scores))
    return judged


def with_consensus(judged: list[tuple[Row, Scores]]) -> list[Row]:
    """The rows with all consensus merits, taken among the candidates of a task, f_aug and seed."""
    groups: dict[tuple[str, str, int], list[tuple[Row, Scores]]] = defaultdict(list)
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


def of_any_kind(judged: list[tuple[Row, Scores]]) -> list[tuple[Row, Scores]]:
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


def sets_of(options: argparse.Namespace, seed: int) -> list[TrainSet]:
    """The train sets of one seed: embedded ones, or the folders that were asked for."""
    if options.mvtec or options.mpdd:
        paper = Training(encoder=options.encoder, steps=options.folder_steps, evaluate_at=(1.0,))
        roots = [root for root in (options.mvtec, options.mpdd) if root]
        sets = [s for root in roots for s in folder_sets(root, options.image_size, paper)]
    else:
        steps, width = (4, 4) if options.smoke else (options.steps, 16)
        training = Training(steps=steps, width=width, evaluate_at=(1.0,))
        sets = [*texture_sets(seed, training), *digit_sets(seed, training)]
    if options.smoke:
        sets = [replace(s, sources=s.sources[:2], kinds=s.kinds[:1]) for s in (sets[0], sets[-1])]
    return sets


def cells_of(options: argparse.Namespace) -> list[Cell]:
    cells = []
    for seed in range(1 if options.smoke else options.seeds):
        for train_set in sets_of(options, seed):
            for kind in train_set.kinds:
                if options.kinds and kind not in options.kinds:
                    continue
                chosen = list(candidates(kind))
                chosen = [*chosen[:2], chosen[-1]] if options.smoke else chosen
                cells += [Cell(train_set, augmentation, name, seed) for name, augmentation in chosen]
    return cells


def main() -> None:
    parser = study_parser("selection_table", __doc__, cells=True, seeds=3)
    parser.add_argument("--steps", type=int, default=Training.steps)
    parser.add_argument("--kinds", nargs="+", help="of f_aug; all by default")
    parser.add_argument("--mvtec", type=Path)
    parser.add_argument("--mpdd", type=Path)
    parser.add_argument("--image-size", type=int, default=256, help="of MVTec AD and MPDD")
    parser.add_argument("--encoder", default="resnet18", help="for MVTec AD and MPDD")
    parser.add_argument("--folder-steps", type=int, default=10_000, help="for MVTec AD and MPDD")
    parser.add_argument("--tracking-uri", help="MLflow's address; none by default")
    options = parse(parser)

    cells = cells_of(options)
    kept = run_missing(cells, lambda cell: cell.path(options.cells), run_cell, options.jobs)
    judged = judge(cells, kept)
    rows = with_consensus(judged)
    header = (
        f"{made_by('selection_table', options)}\n\n{len(cells)} trainings of "
        f"{cells[0].train_set.training.steps} steps, together "
        f"{sum(content['seconds'] for content in kept) / 60:.0f} minutes of one core."
    )
    page = markdown([*rows, *with_consensus(of_any_kind(judged))], header)
    write_results(options, "selection_table", page, rows)
    if options.tracking_uri:
        track(rows, options.cells, options.tracking_uri)


if __name__ == "__main__":
    main()
