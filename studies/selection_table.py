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
image), angles 30 to 180 in six steps for Rotation; and one random dynamic detector (Rand.).
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
from ssad_hpo.criteria import CRITERIA, evaluate_all
from ssad_hpo.data import Source, builtin, find_categories, load, read_labels
from ssad_hpo.detector import train
from ssad_hpo.evaluate import auc, average_ranks, wilcoxon_greater
from ssad_hpo.task import Augmentation, DetectorError, Range, Training

AREAS, ASPECTS, ANGLES = (0.005, 0.02, 0.06, 0.2), (0.5, 2.0), (30.0, 60.0, 90.0, 120.0, 150.0, 180.0)
PATCHES = ("cutout", "cutavg", "cutdiff", "cutpaste")
F_GEN_AREAS = (0.02, 0.1)
TEXTURES, DIGITS = ("gravel", "brick", "grass"), (1, 4, 7)
COLUMNS = ("Avg.", "Rand.", "base", "mmd", "std", "mc", "sel", "hits", "dsv")
BEYOND = ("discordance", "smooth_alignment", "soft_alignment", "oracle", "worst")
NAMES = {"base": "Base", "mmd": "MMD", "std": "STD", "mc": "MC", "sel": "SEL", "hits": "HITS", "dsv": "DSV"}
RANDOM = "random dynamic"


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
    yield RANDOM, Augmentation(kind)


def run_cell(cell: Cell, folder: Path) -> None:
    """Train one detector, judge it on every task of its train set without labels, and keep that."""
    torch.set_num_threads(1)
    started = time.monotonic()
    tasks = [load(source) for source in cell.train_set.sources]
    images = tasks[0].train
    row: dict[str, object] = {
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
        training = replace(cell.train_set.training, seed=cell.seed, evaluate_at=(1.0,))
        (checkpoint,) = train(images, cell.augmentation, training)
        detector = checkpoint.detector
        trained, augmented = detector.embed(images), detector.embed_augmented(images)
        detector.fit_density(trained)
        row["loss"] = checkpoint.loss
        for task in tasks:
            assert torch.equal(task.train, images), "tasks of one train set must share their train images"
            unlabeled = detector.embed(task.unlabeled)
            row["tasks"][task.name] = evaluate_all(trained, augmented, unlabeled)  # type: ignore[index]
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


def judge(cells: Iterable[Cell], folder: Path) -> list[dict[str, object]]:
    """A row for every kept (task, f_aug, candidate, seed): AUC, all criteria, all consensus merits."""
    rows: list[dict[str, object]] = []
    scores: dict[tuple[str, str, int], list[tuple[int, np.ndarray]]] = defaultdict(list)
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
                if cell.candidate != RANDOM:
                    scores[task, cell.augmentation.kind, cell.seed].append((len(rows), score))
                rows.append(
                    {
                        "task": task,
                        "train_set": cell.train_set.name,
                        "f_aug": cell.augmentation.kind,
                        "candidate": cell.candidate,
                        **{
                            k: kept["hyperparameters"].get(k) for k in ("patch_area", "patch_aspect", "angle")
                        },
                        "seed": cell.seed,
                        "steps": kept["steps"],
                        "loss": kept["loss"],
                        "seconds": kept["seconds"],
                        "auc": auc(truth, score),
                        **criteria,
                    }
                )
    for models in scores.values():
        usable = [(i, s) for i, s in models if np.ptp(s) > 0]  # a constant score ranks nothing
        if len(usable) > 1:
            matrix = np.stack([s for _, s in usable], axis=1)
            for name, selector in SELECTORS.items():
                for (i, _), merit in zip(usable, selector(matrix), strict=True):
                    rows[i][name] = float(merit)
    return rows


def choices(rows: list[dict[str, object]]) -> dict[str, dict[tuple[str, str, int], float]]:
    """Column -> (f_aug, task, seed) -> the AUC that it gives."""
    groups: dict[tuple[str, str, int], list[dict[str, object]]] = defaultdict(list)
    table: dict[str, dict[tuple[str, str, int], float]] = defaultdict(dict)
    for row in rows:
        key = (str(row["f_aug"]), str(row["task"]), int(row["seed"]))  # type: ignore[call-overload]
        if row["candidate"] == RANDOM:
            table["Rand."][key] = float(row["auc"])  # type: ignore[arg-type]
        else:
            groups[key].append(row)
    for key, group in groups.items():
        aucs = np.array([row["auc"] for row in group], float)
        table["Avg."][key], table["oracle"][key], table["worst"][key] = aucs.mean(), aucs.max(), aucs.min()
        for name in CRITERIA:
            table[name][key] = aucs[np.argmin([row[name] for row in group])]
        for name in SELECTORS:
            table[name][key] = aucs[np.argmax([row.get(name, -np.inf) for row in group])]
    return dict(table)


def by_task(column: dict[tuple[str, str, int], float], f_aug: str | None) -> dict[tuple[str, str], float]:
    """AUC of a column for each (f_aug, task), averaged over seeds."""
    values = defaultdict(list)
    for (kind, task, _), value in column.items():
        if f_aug in (None, kind):
            values[kind, task].append(value)
    return {key: float(np.mean(value)) for key, value in values.items()}


def bootstrap(rows: list[dict[str, object]], difference: dict[tuple[str, str], float]) -> tuple[float, float]:
    """A 95 % interval of the mean difference, resampling train sets: tasks that share one move together."""
    sets = {str(row["task"]): str(row["train_set"]) for row in rows}
    grouped = defaultdict(list)
    for (_, task), value in difference.items():
        grouped[sets[task]].append(value)
    groups = list(grouped.values())
    rng = np.random.default_rng(0)
    means = [
        np.mean(np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))]))
        for _ in range(2000)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def markdown(rows: list[dict[str, object]], header: str) -> str:
    table = choices(rows)
    columns = (*COLUMNS, *BEYOND)
    titles = [NAMES.get(c, c.replace("_", " ")) for c in columns]
    kinds = list(dict.fromkeys(str(row["f_aug"]) for row in rows))
    tasks = len({row["task"] for row in rows})
    seeds = sorted({int(row["seed"]) for row in rows})  # type: ignore[call-overload]
    line = "| " + " | ".join(["f_aug", "tasks", *titles]) + " |\n" + "|---" * (len(titles) + 2) + "|\n"
    auc_lines, rank_lines = line, line
    for kind in (*kinds, None):
        per_task = {c: by_task(table[c], kind) for c in columns}
        keys = sorted(per_task["dsv"])
        name = kind or "all"
        means = [f"{np.mean([per_task[c][k] for k in keys]):.3f}" for c in columns]
        auc_lines += f"| {name} | {len(keys)} | " + " | ".join(means) + " |\n"
        competing = [c for c in columns if c not in ("oracle", "worst")]
        ranks = average_ranks({c: [per_task[c][k] for k in keys] for c in competing})
        shown = [f"{ranks[c]:.2f}" if c in ranks else "" for c in columns]
        rank_lines += f"| {name} | {len(keys)} | " + " | ".join(shown) + " |\n"

    tests = "| column | DSV − column | 95 % over train sets | p, unit task | p, unit task × seed | regret |\n"
    tests += "|---|---|---|---|---|---|\n"
    dsv = by_task(table["dsv"], None)
    for column, title in zip(columns, titles, strict=True):
        if column in ("dsv", "oracle", "worst"):
            continue
        other = by_task(table[column], None)
        keys, fine = sorted(dsv), sorted(table["dsv"])
        difference = {k: dsv[k] - other[k] for k in keys}
        low, high = bootstrap(rows, difference)
        p = wilcoxon_greater([dsv[k] for k in keys], [other[k] for k in keys])
        p_fine = wilcoxon_greater([table["dsv"][k] for k in fine], [table[column][k] for k in fine])
        regret = np.mean([table["oracle"][k] - table[column][k] for k in fine])
        tests += (
            f"| {title} | {np.mean(list(difference.values())):+.3f} | {low:+.3f} … {high:+.3f} "
            f"| {p:.4f} | {p_fine:.4f} | {regret:.3f} |\n"
        )
    regret = np.mean([table["oracle"][k] - table["dsv"][k] for k in table["dsv"]])
    spread = np.std([[table["dsv"][k] for k in table["dsv"] if k[2] == s] for s in seeds], axis=0).mean()
    return (
        f"# Selection table\n\n{header}\n\n{tasks} tasks, seeds {', '.join(map(str, seeds))}.\n\n"
        f"## AUC of the chosen detector, mean over tasks\n\n{auc_lines}\n"
        f"## Rank among the columns, mean over tasks (1 is best)\n\n{rank_lines}\n"
        f"## DSV against each column (one-sided paired Wilcoxon, DSV greater)\n\n{tests}\n"
        f"Regret of DSV: {regret:.3f}; its standard deviation over seeds, mean over tasks: {spread:.3f}. "
        "Tasks that share trainings are not independent, which makes the p-values optimistic; the interval "
        "resamples train sets instead.\n"
    )


def track(rows: list[dict[str, object]], out: Path, uri: str) -> None:
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
    parser.add_argument("--mvtec", type=Path)
    parser.add_argument("--mpdd", type=Path)
    parser.add_argument("--image-size", type=int, default=256, help="of MVTec AD and MPDD")
    parser.add_argument("--encoder", default="resnet18", help="for MVTec AD and MPDD")
    parser.add_argument("--folder-steps", type=int, default=10_000, help="for MVTec AD and MPDD")
    parser.add_argument("--tracking-uri", default=None, help="MLflow's address; none by default")
    parser.add_argument("--smoke", action="store_true", help="a few tiny trainings, in seconds")
    options = parser.parse_args()

    seeds = range(1 if options.smoke else options.seeds)
    training = Training(steps=4 if options.smoke else options.steps, width=4 if options.smoke else 16)
    paper = Training(encoder=options.encoder, steps=options.folder_steps)
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
                chosen = list(candidates(kind))
                chosen = [*chosen[:2], chosen[-1]] if options.smoke else chosen
                cells += [Cell(train_set, augmentation, name, seed) for name, augmentation in chosen]

    started = time.monotonic()
    run_cells(cells, options.cells, options.jobs)
    rows = judge(cells, options.cells)
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
    text = markdown(rows, header)
    (options.out / "selection_table.md").write_text(text)
    print(text)
    if options.tracking_uri:
        track(rows, options.cells, options.tracking_uri)
    print(f"{(time.monotonic() - started) / 60:.1f} minutes; table and CSV in {options.out}")


if __name__ == "__main__":
    main()
