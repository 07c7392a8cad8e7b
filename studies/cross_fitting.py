"""Few good images: hold some out, or train on all of them in turn (cross-fitting)?

    python -m studies.cross_fitting --jobs 2                (20 minutes on two cores)
    python -m studies.cross_fitting --smoke
    python -m studies.cross_fitting --real DIR              (what users of folders get)

A pool of good images that are as the unlabelled normal ones, 40 or 120 of them, eight candidates of four
kinds of patches, 160 steps of 16 + 16 images of 32 pixels, float32. *Held out*: a quarter of the pool
measures, three quarters train. *Cross-fitted*: four quarters take turns, a candidate is four detectors, its
criterion the mean of four, its score the mean of theirs, each on the scale of the quarter that it has not
seen. That costs four times as much, so a third way costs as much: held out, each candidate trained with four
seeds, its criterion and score the means of theirs. A half of 128 unlabelled images is looked at, with all of
its anomalies or so many that they are a tenth; the other half judges.

With --real the same on the data sets of DIR, in the layout of MVTec AD, with the pretrained default at 128
pixels, the eight static candidates of `studies.pretrained` and the encoder as it comes, whose density learns
from what trains. A pool are train images drawn by seed. *Combined* is then with contrast heads, as a search
ends; of several detectors of a candidate, the mean of combinations of the first, the second and so on. A last
way, *none held out*, trains on the whole pool and can choose by DSV alone: also among CutAvg's candidates and
the encoder as it comes, as searches of few images did before.

Chosen before any result was seen: all of it. Labels share out the halves, and judge in the end.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ssad_hpo.augment import NONE
from ssad_hpo.data import Source, builtin, load
from ssad_hpo.detector import Detector, train, untrained_detector
from ssad_hpo.judgement import judge
from ssad_hpo.task import Augmentation, Task, Training
from studies.lab.cells import cell_path, run_missing
from studies.lab.choosing import Draw, Seen, combined_scores, draw, judge_of
from studies.lab.comparing import compare
from studies.lab.detectors import DYNAMIC, TUNED, kept_arrays
from studies.lab.detectors import candidates as real_candidates
from studies.lab.embedded import F_GEN_AREAS, PATCHES
from studies.lab.options import parse, study_parser
from studies.lab.results import Row, made_by, markdown_table, means, write_results
from studies.lab.searching import truth_of

TASKS = ("gravel/cutdiff/0.05", "brick/cutpaste/0.05", "grass/cutout/0.05", "gravel/brick")
TRAINING = Training(width=16, steps=160, batch_size=16, evaluate_at=(1.0,), precision="float32")
POOLS, FOLDS = (40, 120), 4
SHARES: tuple[float | None, ...] = (None, 0.1)  # of anomalies among what is looked at; None leaves them
HELD, HELD_4, CROSS = "held out", "held out, four seeds", "cross-fitted"
WHOLE = "none held out"
CHOICES = ("pu_auc", "shift")
AS_IT_COMES = Augmentation(NONE)


@dataclass(frozen=True)
class Cell:
    """All candidates of a task by all three ways, or with none of the pool held out."""

    task: str
    pool: int
    seed: int
    training: Training
    candidates: tuple[Augmentation, ...]
    root: Path | None = None
    image_size: int = 32
    whole: bool = False

    @property
    def source(self) -> Source:
        if self.root is not None:
            return Source("folder", {"root": str(self.root), "image_size": self.image_size})
        named = builtin(self.task)
        sizes = {"image_size": self.image_size, "n_train": 2, "n_held_out": self.pool, "seed": self.seed}
        return Source(named.loader, {**named.arguments, **sizes})

    def load(self) -> Task:
        """The task, with the whole pool as its held-out images."""
        task = load(self.source)
        if self.root is None:
            return task
        drawn = np.random.default_rng(self.seed).permutation(len(task.train))[: self.pool]
        return replace(task, held_out=task.train[drawn])

    def path(self, folder: Path) -> Path:
        """Where the cell is kept."""
        name = f"{self.task}_{self.pool}_seed{self.seed}"
        way = (WHOLE,) if self.whole else ()
        return cell_path(folder, name, self.training, self.source, self.candidates, *way)


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """Every task, pool and seed."""
    sizes = itertools.product(PATCHES, F_GEN_AREAS)
    chosen = tuple(Augmentation(k, {"patch_area": area, "patch_aspect": 1.0}) for k, area in sizes)
    tasks: Sequence[str] = TASKS
    pools: Sequence[int] = options.pools
    training = TRAINING
    if options.smoke:
        tasks, pools, chosen = TASKS[:1], POOLS[:1], chosen[:2]
        training = replace(training, steps=4, width=4, batch_size=8)
    seeds = range(1 if options.smoke else options.seeds)
    if options.real is not None:
        static = (a for name, a in real_candidates(options.smoke) if name != DYNAMIC)
        chosen = (*static, AS_IT_COMES)
        roots = sorted(path for path in options.real.iterdir() if (path / "train").is_dir())
        return [
            Cell(root.name, pool, seed, replace(TUNED, seed=seed), chosen, root, options.image_size, whole)
            for whole, seed, pool, root in itertools.product((False, True), seeds, pools, roots)
        ]
    return [
        Cell(task, pool, seed, replace(training, seed=seed), chosen)
        for seed, pool, task in itertools.product(seeds, pools, tasks)
    ]


def fold_of(task: Task, fold: int) -> Task:
    """The task whose pool's quarter of this number is held out, while the others train."""
    pool = task.held_out
    assert pool is not None
    inside = np.arange(len(pool)) % FOLDS == fold
    return replace(task, train=pool[~inside], held_out=pool[inside])


def run_cell(cell: Cell) -> Row:
    """Train every candidate by all ways, and judge every choice with labels."""
    task, labels = cell.load(), truth_of(cell.source)
    draws = {share: draw(labels, share, cell.seed) for share in SHARES}
    if cell.whole:
        return {"figures": without_holding_out(cell, task, labels, draws)}
    # way -> share -> candidate -> its detectors
    found: dict[str, dict[float | None, list[list[Seen]]]] = {
        way: {share: [] for share in SHARES} for way in (HELD, HELD_4, CROSS)
    }
    for augmentation in cell.candidates:
        arrays = {
            (fold, turn): judged(fold_of(task, fold), augmentation, cell.training, turn)
            for fold, turn in [(0, turn) for turn in range(FOLDS)] + [(fold, 0) for fold in range(1, FOLDS)]
        }
        for share, places in draws.items():
            seen = {key: Seen.of(some, places) for key, some in arrays.items()}
            found[HELD][share].append([seen[0, 0]])
            found[HELD_4][share].append([seen[0, turn] for turn in range(FOLDS)])
            found[CROSS][share].append([seen[fold, 0] for fold in range(FOLDS)])
    figures = []
    for way, share in itertools.product(found, SHARES):
        judge_by = judge_of(labels, draws[share])
        members = found[way][share]
        aucs = [judge_by(*combined_scores(m, heads=False))[1] for m in members]
        row: Row = {"way": way, "share": share, "average": float(np.mean(aucs)), "oracle": max(aucs)}
        for name in CHOICES:
            values = [np.mean([one.criteria[name] for one in m]) for m in members]
            row[name] = aucs[int(np.argmin(values))]
        whole = [one for m in members for one in m]
        row["all together"] = judge_by(*combined_scores(whole, heads=False))[1]
        if AS_IT_COMES in cell.candidates:
            row["encoder as it comes"] = aucs[cell.candidates.index(AS_IT_COMES)]
            together = [combined_scores(some, heads=True) for some in zip(*members, strict=True)]
            means_of = (torch.stack(scores).mean(0) for scores in zip(*together, strict=True))
            row["combined"] = judge_by(*means_of)[1]
        figures.append(row)
    return {"figures": figures}


def without_holding_out(
    cell: Cell, task: Task, labels: np.ndarray, draws: dict[float | None, Draw]
) -> list[Row]:
    """What the whole pool trains, and what DSV chooses of it."""
    assert task.held_out is not None
    trained_on_all = replace(task, train=task.held_out)  # nothing reads what it makes of these
    arrays = [judged(trained_on_all, a, cell.training, 0) for a in cell.candidates]
    frozen = cell.candidates.index(AS_IT_COMES)
    few = [i for i, a in enumerate(cell.candidates) if a.kind in ("cutavg", NONE)]
    rows = []
    for share, places in draws.items():
        judge_by = judge_of(labels, places)
        members = [Seen.of(some, places) for some in arrays]
        aucs = [judge_by(m.scores, m.unseen_scores)[1] for m in members]
        dsv = [m.criteria["dsv"] for m in members]
        row: Row = {"way": WHOLE, "share": share, "average": float(np.mean(aucs)), "oracle": max(aucs)}
        row["dsv"] = aucs[int(np.argmin(dsv))]
        row["dsv, of CutAvg"] = aucs[min(few, key=lambda i: dsv[i])]
        rows.append({**row, "encoder as it comes": aucs[frozen]})
    return rows


def judged(task: Task, augmentation: Augmentation, training: Training, turn: int) -> dict[str, np.ndarray]:
    """What is kept of a candidate that was trained with one of its seeds."""
    training = replace(training, seed=training.seed + 1000 * turn)
    return kept_arrays(judge(trained(task, augmentation, training), task))


def trained(task: Task, augmentation: Augmentation, training: Training) -> Detector:
    """A candidate's detector."""
    if augmentation == AS_IT_COMES:
        channels, height, width = task.train.shape[1:]
        first = Augmentation(PATCHES[0])  # of the criteria's augmented images
        return untrained_detector(training, (channels, height, width), first, torch.device("cpu"))
    (last,) = train(task.train, augmentation, training)
    return last.detector


def rows_of(cells: Sequence[Cell], kept: Sequence[Row]) -> Iterator[Row]:
    """A row for every way, share and choice."""
    for cell, content in zip(cells, kept, strict=True):
        for figures in content["figures"]:
            for choice in (name for name in figures if name not in ("way", "share")):
                place = {"task": cell.task, "pool": cell.pool, "seed": cell.seed}
                place |= {name: figures[name] for name in ("way", "share")}
                yield {**place, "choice": choice, "auc": figures[choice]}


def table_of(rows: Sequence[Row]) -> str:
    """A line for each choice: every way, and cross-fitting against holding out with as many trainings."""
    lines, ways = [], list(dict.fromkeys(row["way"] for row in rows))
    for choice in dict.fromkeys(row["choice"] for row in rows):
        columns = {
            way: {(r["task"], r["seed"]): r["auc"] for r in rows if (r["way"], r["choice"]) == (way, choice)}
            for way in ways
        }
        textures = {task: task.partition("/")[0] for task, _ in columns[CROSS]}
        figures = [f"{np.mean(list(column.values())):.3f}" if column else "–" for column in columns.values()]
        compared = ["–", "–", "–"]
        if columns[CROSS]:
            result = compare(columns[CROSS], columns[HELD_4], textures)
            compared = [f"{result.difference:+.3f}", result.interval, f"{result.p_run:.3f}"]
        lines.append([choice, *figures, *compared])
    titles = ["", *ways, f"{CROSS} − {HELD_4}", "95 % over textures or sets", "p, better"]
    return markdown_table(titles, lines)


def main() -> None:
    parser = study_parser("cross_fitting", __doc__, cells=True, seeds=2)
    parser.add_argument(
        "--pools", type=int, nargs="+", choices=POOLS, default=POOLS, help="sizes of the pool"
    )
    parser.add_argument("--real", type=Path, help="folder of data sets in the layout of MVTec AD")
    parser.add_argument("--image-size", type=int, default=128, help="of these, the shorter side")
    options = parse(parser)
    cells = cells_of(options)
    kept = run_missing(cells, lambda cell: cell.path(options.cells), run_cell, options.jobs)
    rows = list(rows_of(cells, kept))
    parts = []
    for pool, share in itertools.product(dict.fromkeys(cell.pool for cell in cells), SHARES):
        of = [row for row in rows if (row["pool"], row["share"]) == (pool, share)]
        title = "half of the unlabelled images anomalous" if share is None else f"{share:.0%} anomalous"
        if options.real is not None and share is None:
            title = "anomalies as they are"
        parts.append(f"## {pool} good images, {title}\n\n{table_of(of)}")
    page = f"""# Few good images: hold some out, or cross-fit?

{made_by("cross_fitting" + ("" if options.real is None else " --real DIR"), options)}

{sum(not cell.whole for cell in cells)} cells of {len(cells[0].candidates)} candidates, seven trainings each,
{sum(content["seconds"] for content in kept) / 60:.0f} minutes of one core. Mean AUC on images that no
method has seen; tasks: {len({cell.task for cell in cells})}, seeds: {len({cell.seed for cell in cells})}.

{chr(10).join(parts)}"""
    places = ("task", "pool", "seed", "way", "share", "choice")
    name = "cross_fitting" if options.real is None else "cross_fitting_real"
    write_results(options, name, page, means(rows, places, ("auc",)))


if __name__ == "__main__":
    main()
