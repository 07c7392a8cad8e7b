"""What stopping poor trials early saves, and what TPE finds that random draws do not.

    python -m studies.search_cost --jobs 2      four hours on two cores
    python -m studies.search_cost --smoke       half a minute

Chosen before any result was seen. Tasks at 32 pixels: gravel, brick and grass with one f_gen each (CutDiff of
area 0.05, CutOut of 0.05, CutPaste of 0.1), gravel with crops of brick, digits 4 and 7 against other digits.
Searched are CutOut, CutPaste and CutDiff together over their default ranges, Rotation on digits, by DSV, 16
trials, seeds 0 to 2 (which decide images, training and sampler alike). Each of TPE and random search runs
without a pruner and with ASHA: an arm "asha/4 from 1/8" is first judged at an eighth of the steps, and a
fourth of the trials goes on from each rung. Only detectors that reached the full budget are chosen from.

The parts, in the order in which they were added:

- long: 500 steps of 64 + 64 images, asha/2 from 1/8. After that was seen, asha/4 from 1/8 was added, since 4
  is the default of Optuna and Ray.
- short: 250 steps of 32 + 32, the defaults of `Training`, with the arm that was the product's default then
  (asha/2 from 1/2), and two of which one was to replace it.
- again: as short, on seeds 3 to 5, which no choice has seen; without a pruner and the default of now alone.

Steps are those of detectors, stopped ones included. Since evaluations cost as well, seconds stand beside
them. TPE and random search are compared at equal numbers of whole trials, 4, 8 and 16, which are prefixes of
one search: a draw depends on the trials before it alone.

Every search is kept as a file, so that a killed study goes on where it was; delete the files after a change
to the library. Labels only judge, after everything is trained and chosen.

Size: 324 searches. Writes search_cost.md and .csv.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ssad_hpo.data import Source, builtin, load
from ssad_hpo.evaluate import auc
from ssad_hpo.task import Sampler, SearchSpace, Training
from studies.lab.cells import cell_path, run_missing
from studies.lab.comparing import compare
from studies.lab.options import parse, study_parser
from studies.lab.results import Row, made_by, markdown_table, write_results
from studies.lab.searching import searched, truth_of

PATCHES = ("cutout", "cutpaste", "cutdiff")
TASKS = {
    **dict.fromkeys(("gravel/cutdiff/0.05", "brick/cutout/0.05", "grass/cutpaste/0.1"), PATCHES),
    "gravel/brick": PATCHES,
    "digits/4": ("rotation",),
    "digits/7": ("rotation",),
}
SAMPLERS: tuple[Sampler, ...] = ("tpe", "random")
TRIALS, PREFIXES = 16, (4, 8, 16)
SHORT = Training(width=16, steps=250, batch_size=32, evaluate_at=(0.125, 0.5, 1.0), precision="float32")
LONG = replace(SHORT, steps=500, batch_size=64, evaluate_at=(0.125, 0.25, 0.5, 1.0))


@dataclass(frozen=True)
class Part:
    """Searches that are compared with each other.

    Attributes:
        title: on the page.
        training: of every detector, but for its seed.
        arms: name -> reduction factor of ASHA (None for no pruner) and where evaluated.
        seeds: of images, training and sampler.
    """

    title: str
    training: Training
    arms: dict[str, tuple[int | None, tuple[float, ...]]]
    seeds: range


_EIGHTH = SHORT.evaluate_at
PARTS = {
    "long": Part(
        "500 steps of 64 + 64",
        LONG,
        {
            "none": (None, LONG.evaluate_at),
            "asha/2 from 1/8": (2, LONG.evaluate_at),
            "asha/4 from 1/8": (4, LONG.evaluate_at),
        },
        range(3),
    ),
    "short": Part(
        "250 steps of 32 + 32",
        SHORT,
        {
            "none": (None, _EIGHTH),
            "asha/2 from 1/2": (2, (0.5, 0.75, 1.0)),
            "asha/4 from 1/4": (4, (0.25, 1.0)),
            "asha/4 from 1/8": (4, _EIGHTH),
        },
        range(3),
    ),
    "again": Part(
        "250 steps of 32 + 32, other seeds",
        SHORT,
        {"none": (None, _EIGHTH), "asha/4 from 1/8": (4, _EIGHTH)},
        range(3, 6),
    ),
}


@dataclass(frozen=True)
class Cell:
    """One search."""

    part: str
    task: str
    sampler: Sampler
    arm: str
    seed: int
    trials: int
    training: Training  # as of the part, or tiny
    folder: Path

    @property
    def path(self) -> Path:
        factor = PARTS[self.part].arms[self.arm][0]
        settings = (self.task, TASKS[self.task], self.sampler, factor, self.trained, self.trials)
        name = f"{self.part}_{self.task}_{self.sampler}_{self.arm}_seed{self.seed}"
        return cell_path(self.folder, name, *settings)

    @property
    def trained(self) -> Training:
        """The training with the arm's evaluations and the cell's seed."""
        return replace(self.training, evaluate_at=PARTS[self.part].arms[self.arm][1], seed=self.seed)


def run_cell(cell: Cell) -> Row:
    """Search without labels, then judge every detector that reached the full budget."""
    named = builtin(cell.task)
    source = Source(named.loader, {**named.arguments, "image_size": 32, "seed": cell.seed})
    factor = PARTS[cell.part].arms[cell.arm][0]
    space = SearchSpace(TASKS[cell.task])
    result = searched(
        load(source), space, cell.trained, cell.trials, sampler=cell.sampler, reduction_factor=factor
    )
    truth = truth_of(source)
    dsv = {candidate.number: candidate.criteria["dsv"] for candidate, _ in result.found}
    aucs = {candidate.number: auc(truth, scores) for candidate, scores in result.found}
    trials = [
        {
            "steps": max(trial.intermediate_values, default=cell.training.steps),  # a failed one: at most
            "state": trial.state.name.lower(),
            "dsv": dsv.get(trial.number),
            "auc": aucs.get(trial.number),
        }
        for trial in result.trials
    ]
    return {"searching": result.seconds, "trials": trials}


def chosen(trials: Sequence[Row]) -> Row:
    """The trial of full budget that is lowest in DSV, the first of equals."""
    return min((trial for trial in trials if trial["auc"] is not None), key=lambda trial: trial["dsv"])


def rows_of(cells: Sequence[Cell], kept: Sequence[Row]) -> list[Row]:
    """A row of each search, and of the beginnings of those without a pruner."""
    rows = []
    for cell, content in zip(cells, kept, strict=True):
        prefixes = [n for n in PREFIXES if n < cell.trials] if cell.arm == "none" else []
        for n in (*prefixes, cell.trials):
            trials = content["trials"][:n]
            done = [trial["auc"] for trial in trials if trial["auc"] is not None]
            if not done:  # all failed: the page tells how many such searches there are
                continue
            best = chosen(trials)
            rows.append(
                {
                    "part": cell.part,
                    "task": cell.task,
                    "seed": cell.seed,
                    "sampler": cell.sampler,
                    "arm": cell.arm,
                    "trials": n,
                    "steps": sum(trial["steps"] for trial in trials),
                    "share": sum(trial["steps"] for trial in trials) / (n * cell.training.steps),
                    "whole": len(done),
                    "failed": sum(trial["state"] == "fail" for trial in trials),
                    "dsv": best["dsv"],
                    "auc": best["auc"],
                    "oracle": max(done),
                    "seconds": content["searching"] if n == cell.trials else None,
                }
            )
    return rows


def column(rows: Sequence[Row], value: str, **which: object) -> dict[tuple[str, int], float]:
    """(task, seed) -> a value of the rows of which all else is given."""
    return {
        (row["task"], row["seed"]): row[value]
        for row in rows
        if all(row[name] == wanted for name, wanted in which.items())
    }


def against(rows: Sequence[Row], one: dict[str, object], other: dict[str, object]) -> list[str]:
    """Difference in selected AUC, its interval over train images, and both ways' p-values."""
    first, second = column(rows, "auc", **one), column(rows, "auc", **other)
    both = sorted(first.keys() & second.keys())
    first, second = ({run: values[run] for run in both} for values in (first, second))
    clusters = {task: task if task.startswith("digits") else task.partition("/")[0] for task, _ in both}
    found, reverse = compare(first, second, clusters), compare(second, first, clusters)
    return [f"{found.difference:+.4f}", found.interval, f"{found.p_run:.3f}", f"{reverse.p_run:.3f}"]


def pruning_table(rows: Sequence[Row], arms: Sequence[str], trials: int) -> str:
    lines = []
    for sampler, name in itertools.product(SAMPLERS, arms):
        arm: dict[str, object] = {"sampler": sampler, "arm": name, "trials": trials}
        mean = {v: np.mean([*column(rows, v, **arm).values()]) for v in ("share", "whole", "auc", "oracle")}
        seconds = np.mean([*column(rows, "seconds", **arm).values()])
        line = [sampler, name, f"{mean['share']:.0%}", f"{seconds:.0f}", f"{mean['whole']:.1f}"]
        line += [f"{mean['auc']:.3f}", f"{mean['oracle']:.3f}"]
        lines.append([*line, *(against(rows, arm, {**arm, "arm": "none"}) if name != "none" else [""] * 4)])
    titles = ["sampler", "pruner", "steps", "seconds", "whole trials", "AUC, selected", "AUC, best"]
    return markdown_table([*titles, "against none", "95 % over train images", "p, better", "p, worse"], lines)


def sampler_table(rows: Sequence[Row], prefixes: Sequence[int]) -> str:
    lines = []
    for n in prefixes:
        arms: list[dict[str, object]] = [{"sampler": s, "arm": "none", "trials": n} for s in SAMPLERS]
        means = [[np.mean([*column(rows, v, **arm).values()]) for arm in arms] for v in ("auc", "dsv")]
        lines.append([n, *(f"{value:.3f}" for pair in means for value in pair), *against(rows, *arms)])
    titles = ["trials", *(f"{v}, {s}" for v in ("AUC, selected", "DSV, lowest") for s in SAMPLERS)]
    return markdown_table(
        [*titles, "AUC, TPE − random", "95 % over train images", "p, better", "p, worse"], lines
    )


def task_table(rows: Sequence[Row], arms: Sequence[str], trials: int) -> str:
    both = list(itertools.product(SAMPLERS, arms))
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        line = [task]
        for sampler, name in both:
            arm = {"task": task, "sampler": sampler, "arm": name, "trials": trials}
            aucs, shares = (list(column(rows, v, **arm).values()) for v in ("auc", "share"))
            found = f"{np.mean(aucs):.3f} ± {np.std(aucs):.3f}, {np.mean(shares):.0%}" if aucs else ""
            line.append(found)
        lines.append(line)
    return markdown_table(["task", *(f"{sampler}, {name}" for sampler, name in both)], lines)


def part_text(name: str, rows: Sequence[Row], trials: int, prefixes: Sequence[int]) -> str:
    """What the page says of one part."""
    part, whole = PARTS[name], [row for row in rows if row["trials"] == trials]
    failed = sum(row["failed"] for row in whole)
    seeds = sorted({row["seed"] for row in rows})
    return f"""## {name.capitalize()}: {part.title}

{len({row["task"] for row in rows})} tasks, seeds {seeds[0]} to {seeds[-1]}, {trials} trials a search.
Trials that failed: {failed}.

{pruning_table(rows, list(part.arms), trials)}
TPE against random search, without stopping:

{sampler_table(rows, prefixes)}
AUC selected ± over seeds, steps:

{task_table(rows, list(part.arms), trials)}"""


def cells_of(options: argparse.Namespace) -> list[Cell]:
    tasks, trials = list(TASKS), TRIALS
    if options.smoke:
        tasks, trials = [tasks[0], tasks[-1]], 4
    cells = []
    for name, part in PARTS.items():
        training, seeds = part.training, list(part.seeds)
        if options.smoke:
            training, seeds = replace(training, steps=16, width=4, batch_size=8), seeds[:1]
        cells += [
            Cell(name, task, sampler, arm, seed, trials, training, options.cells)
            for seed, task, sampler, arm in itertools.product(seeds, tasks, SAMPLERS, part.arms)
        ]
    return cells


def main() -> None:
    options = parse(study_parser("search_cost", __doc__, cells=True))
    cells = cells_of(options)
    kept = run_missing(cells, lambda cell: cell.path, run_cell, options.jobs)
    rows, trials = rows_of(cells, kept), cells[0].trials
    prefixes = [n for n in PREFIXES if n < trials] + [trials]
    parts = [part_text(n, [row for row in rows if row["part"] == n], trials, prefixes) for n in PARTS]
    text = f"""# What a search costs

{made_by("search_cost", options)}

Images are of 32 pixels. "asha/4 from 1/8": judged first at an eighth of the steps, then at each rung four
times as far, and the best of every four go on. The head of studies/search_cost.py says what was fixed before
any result was seen and what was added when. Left out, since they found no detector, are
{len(cells) - sum(row["trials"] == trials for row in rows)} searches.

Steps: of all detectors, as a share of {trials} whole trainings. AUC, best: among the whole trials, by labels.
p: one-sided Wilcoxon over tasks × seeds, AUC with ASHA higher (better) or lower (worse) than without.

{chr(10).join(parts)}"""
    write_results(options, "search_cost", text, rows)


if __name__ == "__main__":
    main()
