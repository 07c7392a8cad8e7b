"""What stopping poor trials early saves, and what TPE finds that random draws do not.

    python studies/search_cost.py --jobs 2      two hours and a quarter on two cores
    python studies/search_cost.py --smoke       half a minute

Chosen before any result was seen. Tasks at 32 pixels: gravel, brick and grass with one f_gen each (CutDiff of
area 0.05, CutOut of 0.05, CutPaste of 0.1), gravel with crops of brick, digits 4 and 7 against other digits.
Searched are CutOut, CutPaste and CutDiff together over their default ranges, Rotation on digits, by DSV, 16
trials of 500 steps, seeds 0 to 2 (which decide images, training and sampler alike). Evaluated, and stopped by
ASHA, is at an eighth, a quarter, a half and all of the steps, with reduction factor 2. Each of TPE and random
search runs with and without ASHA; only detectors that reached the full budget are chosen from.

Steps are those of detectors, stopped ones included. Since evaluations cost as well, seconds stand beside
them. TPE and random search are compared at equal numbers of whole trials, 4, 8 and 16, which are prefixes of
one search: a draw depends on the trials before it alone.

Added after that much was seen: the arms "asha/4" with reduction factor 4, the default of Optuna and Ray.

Every search is kept as a file, so that a killed study goes on where it was; delete the files after a change
to the library. Labels only judge, after everything is trained and chosen.

Size: 108 searches, 36 of them whole. Writes search_cost.md and .csv.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from ssad_hpo.data import Source, builtin, load, read_labels
from ssad_hpo.evaluate import auc, compare
from ssad_hpo.experiment.cells import cell_path, provenance, run_missing, write_csv
from ssad_hpo.experiment.selector_tables import markdown_table
from ssad_hpo.search import Objective, candidates, open_study, run_search
from ssad_hpo.search.sampling import CountedOncePruner
from ssad_hpo.task import SearchSpace, Training

PATCHES = ("cutout", "cutpaste", "cutdiff")
TASKS = {
    **dict.fromkeys(("gravel/cutdiff/0.05", "brick/cutout/0.05", "grass/cutpaste/0.1"), PATCHES),
    "gravel/brick": PATCHES,
    "digits/4": ("rotation",),
    "digits/7": ("rotation",),
}
SAMPLERS, PRUNERS = ("tpe", "random"), ("none", "asha", "asha/4")
TRIALS, PREFIXES = 16, (4, 8, 16)
TRAINING = Training(
    steps=500, batch_size=64, width=16, evaluate_at=(0.125, 0.25, 0.5, 1.0), precision="float32"
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One search."""

    task: str
    sampler: str
    pruner: str
    training: Training
    trials: int
    folder: Path

    @property
    def path(self) -> Path:
        name = f"{self.task}_{self.sampler}_{self.pruner}_seed{self.training.seed}"
        settings = (self.task, TASKS[self.task], self.sampler, self.pruner, self.training, self.trials)
        return cell_path(self.folder, name, *settings)


def run_cell(cell: Cell) -> Row:
    """Search without labels, then judge every detector that reached the full budget."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    named = builtin(cell.task)
    source = Source(named.loader, {**named.arguments, "image_size": 32, "seed": cell.training.seed})
    task = load(source)
    with tempfile.TemporaryDirectory() as artifacts:
        objective = Objective(task, "dsv", SearchSpace(TASKS[cell.task]), cell.training, artifacts=artifacts)
        storage = optuna.storages.InMemoryStorage()
        pruner, _, factor = cell.pruner.partition("/")
        how = {"sampler": cell.sampler, "pruner": pruner, "seed": cell.training.seed}
        study = open_study(storage, "search_cost", objective, **how)
        if factor:
            first = cell.training.evaluation_steps[0]
            study.pruner = CountedOncePruner(min_resource=first, reduction_factor=int(factor))
        started = time.monotonic()
        run_search(study, objective, cell.trials)
        searching = time.monotonic() - started
        found = {candidate.number: candidate for candidate in candidates(study)}
        labels = read_labels(source)
        aucs = {number: auc(labels, candidate.scores()) for number, candidate in found.items()}
    trials = [
        {
            "steps": max(trial.intermediate_values, default=cell.training.steps),  # a failed one: at most
            "state": trial.state.name.lower(),
            "dsv": found[trial.number].criteria["dsv"] if trial.number in found else None,
            "auc": aucs.get(trial.number),
        }
        for trial in study.get_trials(deepcopy=False)
    ]
    return {"searching": searching, "trials": trials}


def chosen(trials: Sequence[Row]) -> Row:
    """The trial of full budget that is lowest in DSV, the first of equals."""
    return min((trial for trial in trials if trial["auc"] is not None), key=lambda trial: trial["dsv"])


def rows_of(cells: Sequence[Cell], kept: Sequence[Row]) -> list[Row]:
    """A row of each search, and of the beginnings of those without a pruner."""
    rows = []
    for cell, content in zip(cells, kept, strict=True):
        prefixes = [n for n in PREFIXES if n < cell.trials] if cell.pruner == "none" else []
        for n in (*prefixes, cell.trials):
            trials = content["trials"][:n]
            done = [trial["auc"] for trial in trials if trial["auc"] is not None]
            if not done:  # all failed: the page tells how many such searches there are
                continue
            best = chosen(trials)
            rows.append(
                {
                    "task": cell.task,
                    "seed": cell.training.seed,
                    "sampler": cell.sampler,
                    "pruner": cell.pruner,
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
    interval = f"{found.low:+.3f} … {found.high:+.3f}"
    return [f"{found.difference:+.4f}", interval, f"{found.p_run:.3f}", f"{reverse.p_run:.3f}"]


def pruning_table(rows: Sequence[Row], trials: int) -> str:
    lines = []
    for sampler, pruner in itertools.product(SAMPLERS, PRUNERS):
        arm: dict[str, object] = {"sampler": sampler, "pruner": pruner, "trials": trials}
        mean = {v: np.mean([*column(rows, v, **arm).values()]) for v in ("share", "whole", "auc", "oracle")}
        seconds = np.mean([*column(rows, "seconds", **arm).values()])
        line = [sampler, pruner, f"{mean['share']:.0%}", f"{seconds:.0f}", f"{mean['whole']:.1f}"]
        line += [f"{mean['auc']:.3f}", f"{mean['oracle']:.3f}"]
        lines.append(
            [*line, *(against(rows, arm, {**arm, "pruner": "none"}) if pruner != "none" else [""] * 4)]
        )
    titles = ["sampler", "pruner", "steps", "seconds", "whole trials", "AUC, selected", "AUC, best"]
    return markdown_table([*titles, "against none", "95 % over train images", "p, better", "p, worse"], lines)


def sampler_table(rows: Sequence[Row], prefixes: Sequence[int]) -> str:
    lines = []
    for n in prefixes:
        arms: list[dict[str, object]] = [{"sampler": s, "pruner": "none", "trials": n} for s in SAMPLERS]
        means = [[np.mean([*column(rows, v, **arm).values()]) for arm in arms] for v in ("auc", "dsv")]
        lines.append([n, *(f"{value:.3f}" for pair in means for value in pair), *against(rows, *arms)])
    titles = ["trials", *(f"{v}, {s}" for v in ("AUC, selected", "DSV, lowest") for s in SAMPLERS)]
    return markdown_table(
        [*titles, "AUC, TPE − random", "95 % over train images", "p, better", "p, worse"], lines
    )


def task_table(rows: Sequence[Row], trials: int) -> str:
    values: dict[str, dict[tuple[str, str], list[str]]] = defaultdict(dict)
    for task, sampler, pruner in itertools.product(TASKS, SAMPLERS, PRUNERS):
        arm = {"task": task, "sampler": sampler, "pruner": pruner, "trials": trials}
        aucs, shares = (list(column(rows, v, **arm).values()) for v in ("auc", "share"))
        if aucs:
            values[task][sampler, pruner] = [
                f"{np.mean(aucs):.3f} ± {np.std(aucs):.3f}, {np.mean(shares):.0%}"
            ]
    titles = [f"{sampler}, {pruner}" for sampler, pruner in itertools.product(SAMPLERS, PRUNERS)]
    lines = [
        [task, *(arms.get(a, [""])[0] for a in itertools.product(SAMPLERS, PRUNERS))]
        for task, arms in values.items()
    ]
    return markdown_table(["task", *titles], lines)


def cells_of(options: argparse.Namespace) -> list[Cell]:
    training, tasks, seeds, trials = TRAINING, list(TASKS), range(options.seeds), TRIALS
    if options.smoke:
        training = replace(training, steps=16, width=4, batch_size=8)
        tasks, seeds, trials = [tasks[0], tasks[-1]], range(2), 6
    return [
        Cell(task, sampler, pruner, replace(training, seed=seed), trials, options.cells)
        for seed, task, sampler, pruner in itertools.product(seeds, tasks, SAMPLERS, PRUNERS)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="side by side, one thread each")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--cells", type=Path, default=Path("runs/search_cost"), help="what is kept")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--smoke", action="store_true", help="tiny trainings, only to see that it works")
    options = parser.parse_args()
    cells = cells_of(options)
    kept = run_missing(cells, lambda cell: cell.path, run_cell, options.jobs)
    rows, trials, training = rows_of(cells, kept), cells[0].trials, cells[0].training
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(rows, options.out / "search_cost.csv")
    said = "**A smoke run: these numbers mean nothing.** " if options.smoke else ""
    whole = [row for row in rows if row["trials"] == trials]
    failed = sum(row["failed"] for row in whole)
    text = f"""# What a search costs

{said}Made by `python studies/search_cost.py`. {provenance()}

{len({cell.task for cell in cells})} tasks, seeds 0 to {cells[-1].training.seed}, {trials} trials of
{training.steps} steps of {training.batch_size} + {training.batch_size} images at 32 pixels, evaluated at
{", ".join(map(str, training.evaluation_steps))}. Failed trials: {failed}; searches
without a detector, left out below: {len(cells) - len(whole)}. Tasks, seeds and sizes were
fixed before any result was seen; the arms with reduction factor 4 (asha/4) were added after those with 2.

## Stopping early

{pruning_table(rows, trials)}
Steps: of all detectors, as a share of {trials} whole trainings. AUC, best: among the whole trials, by labels.
p: one-sided Wilcoxon over tasks × seeds, AUC with ASHA higher (better) or lower (worse) than without.

## TPE against random search, without stopping

{sampler_table(rows, [n for n in PREFIXES if n < trials] + [trials])}
## Tasks

{task_table(rows, trials)}
AUC selected ± over seeds, steps.
"""
    (options.out / "search_cost.md").write_text(text)
    print(f"wrote {options.out / 'search_cost.md'}")


if __name__ == "__main__":
    main()
