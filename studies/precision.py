"""Does bf16 choose as well as float32? The same candidates trained in both precisions, over tasks and seeds.

    python -m studies.precision --jobs 2    about 12 minutes on two cores with bf16
    python -m studies.precision --smoke     a few seconds

Every cell (task, seed, patch area, precision) is trained once and kept as a file, so that a killed run
goes on where it was; delete the files after a change to the library. A seed is that of the training; the
images of a task stay the same, so that two seeds of float32 show how much a selection moves by chance
alone, beside which two precisions of one seed are to be seen. Chosen before any result was seen: the tasks
(f_aug is of the kind that made the anomalies, its area is searched), areas, aspect 1, 150 steps. Writes
precision.md and .csv.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from ssad_hpo.criteria import CRITERIA
from ssad_hpo.data import Source, builtin, load
from ssad_hpo.evaluate import auc
from ssad_hpo.task import Augmentation, DetectorError, Precision, Training
from studies.lab.cells import cell_path, run_missing
from studies.lab.options import parse, study_parser
from studies.lab.results import Row, made_by, markdown_table, write_results
from studies.lab.searching import trained, truth_of

TASKS = ("gravel/cutavg", "brick/cutpaste", "grass/cutdiff", "brick/cutavg", "grass/cutout")
SEEDS = (0, 1, 2)
AREAS = (0.005, 0.02, 0.08, 0.25)
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
TRAINING = Training(steps=150, evaluate_at=(1.0,))


@dataclass(frozen=True)
class Cell:
    """One training: a candidate (a patch area) on a task, in a precision."""

    task: str
    seed: int
    area: float
    precision: Precision
    smoke: bool = False

    @property
    def training(self) -> Training:
        settings = replace(TRAINING, width=4, steps=6, batch_size=8) if self.smoke else TRAINING
        return replace(settings, seed=self.seed, precision=self.precision)

    @property
    def source(self) -> Source:
        source = builtin(self.task)
        fewer = {"n_train": 32, "n_unlabeled": 16} if self.smoke else {}
        return Source(source.loader, {**source.arguments, **fewer})

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(self.task.split("/")[1], {"patch_area": self.area, "patch_aspect": 1.0})

    def path(self, folder: Path) -> Path:
        """Where the cell is kept."""
        name = f"{self.task}_{self.precision}_seed{self.seed}_area{self.area:g}"
        return cell_path(folder, name, self.training, self.source, self.augmentation)


def run_cell(cell: Cell) -> Row:
    """Train, judge without and with ground truth."""
    row: Row = asdict(cell)
    del row["smoke"]
    try:
        evaluation, scores = trained(load(cell.source), cell.augmentation, cell.training)
    except DetectorError as error:
        return {**row, "failure": str(error)}
    found = auc(truth_of(cell.source), scores)
    return {**row, **evaluation.judged.criteria, "auc": found, "loss": evaluation.loss}


# ------------------------------------------------------------------------------------------- analysis

Table = dict[tuple[str, int, str], list[Row]]  # (task, seed, precision) -> candidates, by area
Pair = tuple[list[Row], list[Row]]


def by_study(rows: list[Row]) -> Table:
    """The candidates of every task, seed and precision; an area that failed anywhere is left out."""
    failed = {(row["task"], row["area"]) for row in rows if "failure" in row}
    table: Table = {}
    for row in sorted(rows, key=lambda row: row["area"]):
        if (row["task"], row["area"]) not in failed:
            table.setdefault((row["task"], row["seed"], row["precision"]), []).append(row)
    return table


def selected(candidates: list[Row], criterion: str) -> Row:
    return min(candidates, key=lambda row: row[criterion])


def pairs(table: Table) -> tuple[list[Pair], list[Pair]]:
    """(bf16, float32) candidates of every task and seed; and of float32 those of any two seeds of a task."""
    tasks, seeds = sorted({task for task, _, _ in table}), sorted({seed for _, seed, _ in table})
    precisions = [(table[t, s, "bfloat16"], table[t, s, "float32"]) for t in tasks for s in seeds]
    two_seeds = [
        (table[t, a, "float32"], table[t, b, "float32"])
        for t in tasks
        for a, b in itertools.combinations(seeds, 2)
    ]
    return precisions, two_seeds


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's; not a number where one side does not vary."""
    return float(stats.spearmanr(a, b).statistic) if np.ptp(a) > 0 and np.ptp(b) > 0 else float("nan")


def interval(differences: Sequence[float]) -> str:
    """Mean and its 95 % confidence interval by Student's t."""
    mean, n = statistics.mean(differences), len(differences)
    half = statistics.stdev(differences) / n**0.5 * stats.t.ppf(0.975, n - 1)
    return f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})"


def signs(differences: Sequence[float]) -> str:
    """How many are positive, negative, zero, and the two-sided sign test's p-value."""
    up, down = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    p = stats.binomtest(up, up + down).pvalue if up + down else 1.0
    return f"{up} / {down} / {len(differences) - up - down}, p = {p:.2f}"


def selection_row(table: Table, criterion: str) -> list[str]:
    precisions, two_seeds = pairs(table)
    chosen = [(selected(a, criterion), selected(b, criterion)) for a, b in precisions]
    differences = [bf16["auc"] - float32["auc"] for bf16, float32 in chosen]
    chance = [selected(a, criterion)["auc"] - selected(b, criterion)["auc"] for a, b in two_seeds]
    same = sum(bf16["area"] == float32["area"] for bf16, float32 in chosen) / len(chosen)
    return [
        criterion,
        f"{statistics.mean(float32['auc'] for _, float32 in chosen):.4f}",
        f"{statistics.mean(bf16['auc'] for bf16, _ in chosen):.4f}",
        interval(differences),
        f"{min(differences):+.3f} to {max(differences):+.3f}",
        signs(differences),
        f"{np.mean(np.abs(differences)):.4f}",
        f"{np.mean(np.abs(chance)):.4f}",
        f"{same:.0%}",
    ]


def correlation_row(table: Table, name: str) -> list[str]:
    cells = [name]
    for these in pairs(table):
        values = [correlation([r[name] for r in a], [r[name] for r in b]) for a, b in these]
        defined = [value for value in values if value == value]
        cells += [f"{statistics.mean(defined):.3f}", f"{min(defined):.2f}"] if defined else ["–", "–"]
    moved = [abs(x[name] - y[name]) for a, b in pairs(table)[0] for x, y in zip(a, b, strict=True)]
    return [*cells, f"{statistics.median(moved):.4f}"]


def by_seed(table: Table, task: str, precision: str) -> list[float]:
    """AUC of DSV's choice for each seed."""
    studies = (table[key] for key in sorted(table) if key[0] == task and key[2] == precision)
    return [selected(candidates, "dsv")["auc"] for candidates in studies]


def page(rows: list[Row], training: Training, options: argparse.Namespace) -> str:
    table = by_study(rows)
    tasks, seeds, areas = (sorted({row[name] for row in rows}) for name in ("task", "seed", "area"))
    took = {p: statistics.median(r["seconds"] for r in rows if r["precision"] == p) for p in PRECISIONS}
    failures = [f"{row['task']}, {row['precision']}: {row['failure']}" for row in rows if "failure" in row]
    every = [x["auc"] - y["auc"] for a, b in pairs(table)[0] for x, y in zip(a, b, strict=True)]
    by_task, of_tasks = [], []
    for task in tasks:
        aucs = [by_seed(table, task, precision) for precision in PRECISIONS]
        float32, bf16 = (statistics.mean(values) for values in aucs)
        of_tasks.append(bf16 - float32)
        each = [", ".join(f"{value:.3f}" for value in values) for values in aucs]
        by_task.append(
            [task, f"{float32:.3f} ({each[0]})", f"{bf16:.3f} ({each[1]})", f"{bf16 - float32:+.4f}"]
        )
    shown = ("difference (95 % interval)", "least to most", "+ / − / 0, sign test", "mean size")
    selection = ["criterion", "float32", "bf16", *shown, "between two seeds", "same candidate"]
    compared = ["of", "precisions, mean", "least", "two seeds of float32, mean", "least", "median difference"]
    # Those of held-out images are in no row, as there are none.
    criteria = [name for name in CRITERIA if all(name in row for row in rows if "failure" not in row)]
    ranking = markdown_table(compared, [correlation_row(table, name) for name in (*criteria, "auc")])
    return f"""# bf16 against float32

{made_by("precision", options)}

{len(tasks)} tasks × {len(seeds)} training seeds × {len(areas)} candidates (f_aug of the task's own kind,
patch areas {", ".join(f"{area:g}" for area in areas)}, aspect 1), each trained in float32 and under bf16
autocast by `Training(width={training.width}, steps={training.steps}, batch_size={training.batch_size})` at
64 px. Tasks, candidates and steps were fixed before any result was seen. A training took
{took["float32"]:.1f} s in float32 and {took["bfloat16"]:.1f} s in bf16 (medians, one thread).
Failed trainings: {"; ".join(failures) or "none"}.

## AUC of the selected candidate

Means over {len(tasks) * len(seeds)} pairs of task and seed. Differences are bf16 − float32 of the same task
and seed: positive ones are in favour of bf16. The *mean size* of these differences is to be seen beside that
*between two seeds* of float32 on the same task, which is what chance alone does to a selection.

{markdown_table(selection, [selection_row(table, criterion) for criterion in criteria])}
With tasks as the unit (means over seeds), DSV's difference is {interval(of_tasks)}. Of all
{len(every)} pairs of detectors, selected or not, AUC differs by {interval(every)}; {signs(every)}.
Those of one task are not independent, so that these last two figures claim too much.

## Selected by DSV, task by task

Mean AUC (of each seed).

{markdown_table(["task", "float32", "bf16", "difference"], by_task)}
## Do the precisions rank candidates alike?

Spearman's correlation over the {len(areas)} candidates of a task and seed: mean and least between precisions,
the same between two seeds of float32; and the median absolute difference between precisions.

{ranking}"""


def main() -> None:
    options = parse(study_parser("precision", __doc__, cells=True))
    tasks, seeds, areas = (TASKS[:2], SEEDS[:2], AREAS[1:]) if options.smoke else (TASKS, SEEDS, AREAS)
    cells = [
        Cell(task, seed, area, precision, options.smoke)
        for task, seed, area, precision in itertools.product(tasks, seeds, areas, PRECISIONS)
    ]
    rows = run_missing(cells, lambda cell: cell.path(options.cells), run_cell, options.jobs)
    write_results(options, "precision", page(rows, cells[0].training, options), rows)


if __name__ == "__main__":
    main()
