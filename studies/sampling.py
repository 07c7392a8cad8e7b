"""Do TPE, a grid or ranges find better candidates than random draws, and how many should score together?

    python -m studies.sampling --jobs 2                     (an hour on two cores)
    python -m studies.sampling --smoke

Four textures' tasks at 32 pixels, four kinds of patches over their default ranges, 64 held-out images, 16
candidates of 250 steps of 32 + 32 images, float32. Random draws, a grid (each kind at four areas, square) and
random *ranges* (a dynamic augmentation: centre and width of its area are drawn, all else is drawn anew for
every image) do not look at a criterion, so that one training of their candidates serves all; TPE, which draws
its first ten at random, follows PU-AUC or shift over points, shift over ranges. A half of the unlabelled
images is looked at, with all of their anomalies or so many that they are a tenth; the other half judges, as
in `studies.choice_embedded`.

Chosen before any result was seen: all of it. Labels share out the halves, and judge in the end.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import optuna

from ssad_hpo.data import Source, builtin, load
from ssad_hpo.detector import train
from ssad_hpo.judgement import judge
from ssad_hpo.search import make_sampler
from ssad_hpo.task import Augmentation, DetectorError, Range, Search, SearchSpace, Task, Training
from studies.lab.cells import cell_path, run_missing
from studies.lab.choosing import Seen, combined_scores, draw, judge_of, sees_anomalies
from studies.lab.comparing import compare
from studies.lab.detectors import kept_arrays
from studies.lab.embedded import AREAS, PATCHES, with_held_out
from studies.lab.options import parse, study_parser
from studies.lab.results import Row, made_by, markdown_table, means, write_results
from studies.lab.searching import truth_of

TASKS = ("gravel/cutdiff/0.05", "brick/cutpaste/0.05", "grass/cutout/0.05", "gravel/brick")
TRAINING = Training(width=16, steps=250, batch_size=32, evaluate_at=(1.0,), precision="float32")
TRIALS, WIDTHS = 16, (1.2, 10.0)  # of an area's range, its high end as a multiple of its low end
SHARES: tuple[float | None, ...] = (None, 0.1)  # of anomalies among what is looked at; None leaves them
POINTS, GRID, RANGES = "random points", "grid of points", "random ranges"
BY = ("dsv", "pu_auc", "shift")
TOGETHER = (3, 4, 8, TRIALS)


@dataclass(frozen=True)
class Cell:
    """The candidates of one way of sampling on one task; without a criterion they serve all shares."""

    task: str
    seed: int
    arm: str
    training: Training
    trials: int
    ranges: bool = False
    criterion: str | None = None
    share: float | None = None

    @property
    def source(self) -> Source:
        named = with_held_out(builtin(self.task))
        return Source(named.loader, {**named.arguments, "image_size": 32, "seed": self.seed})

    def path(self, folder: Path) -> Path:
        """Where the cell is kept."""
        share = "all" if self.share is None else f"{self.share:g}"
        name = f"{self.task}_{self.arm}_{share}_seed{self.seed}"
        return cell_path(folder, name, self.training, self.trials, self.source, PATCHES, WIDTHS)


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """Every arm on every task and seed."""
    tasks: Sequence[str] = options.tasks
    training, trials = TRAINING, TRIALS
    if options.smoke:
        tasks, trials = TASKS[:1], 4
        training = replace(training, steps=4, width=4, batch_size=8)
    cells = []
    for seed, task in itertools.product(range(1 if options.smoke else options.seeds), tasks):
        one = partial(Cell, task, seed, training=replace(training, seed=seed), trials=trials)
        cells += [one(POINTS), one(GRID), one(RANGES, ranges=True), one("TPE by PU-AUC", criterion="pu_auc")]
        for share, ranges in ((None, False), (0.1, False), (None, True)):
            arm = "TPE by shift, ranges" if ranges else "TPE by shift"
            cells.append(one(arm, criterion="shift", share=share, ranges=ranges))
    return cells


def range_of(trial: optuna.trial.BaseTrial) -> Augmentation:
    """A dynamic augmentation whose area is drawn from a range with a centre and a width of its own."""
    kind = trial.suggest_categorical("augmentation", list(PATCHES))
    area = Augmentation(kind).hyperparameters["patch_area"]
    assert isinstance(area, Range)  # the default, as large as fits
    centre = trial.suggest_float(f"{kind}.centre", area.low, area.high, log=True)
    width = trial.suggest_float(f"{kind}.width", *WIDTHS, log=True) ** 0.5
    ends = max(area.low, centre / width), min(area.high, centre * width)
    return Augmentation(kind, {"patch_area": Range(*ends, log=True)})


def proposed(cell: Cell, look: Callable[[Augmentation], float | None]) -> None:
    """Look at as many candidates as a cell has, each proposed by what was found before."""
    if cell.arm == GRID:
        for kind, area in list(itertools.product(PATCHES, AREAS))[: cell.trials]:
            look(Augmentation(kind, {"patch_area": area, "patch_aspect": 1.0}))
        return
    space = SearchSpace(PATCHES)
    sampler = make_sampler(Search(space, sampler="tpe" if cell.criterion else "random", seed=cell.seed))
    study = optuna.create_study(sampler=sampler)

    def objective(trial: optuna.Trial) -> float:
        value = look(range_of(trial) if cell.ranges else space.suggest(trial))
        if value is None:
            raise optuna.TrialPruned
        return value

    study.optimize(objective, n_trials=cell.trials)


def run_cell(cell: Cell) -> Row:
    """Train the candidates by what is seen without labels; then judge every choice with them."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    task, labels = load(cell.source), truth_of(cell.source)
    shares = (cell.share,) if cell.criterion else SHARES
    draws = {share: draw(labels, share, cell.seed) for share in shares}
    found: dict[float | None, list[Seen]] = {share: [] for share in shares}
    names: list[str] = []

    def look(augmentation: Augmentation) -> float | None:
        try:
            arrays = judged(task, augmentation, cell.training)
        except DetectorError:
            return None
        names.append(str(augmentation))
        for share, places in draws.items():
            found[share].append(Seen.of(arrays, places))
        return found[shares[0]][-1].criteria[cell.criterion or BY[0]]

    proposed(cell, look)
    figures = [
        {"share": share, **figures_of(found[share], judge_of(labels, places))}
        for share, places in draws.items()
    ]
    return {"figures": figures, "candidates": names}


def judged(task: Task, augmentation: Augmentation, training: Training) -> dict[str, np.ndarray]:
    """What is kept of one trained candidate."""
    (last,) = train(task.train, augmentation, training)
    return kept_arrays(judge(last.detector, task))


def figures_of(seen: Sequence[Seen], judge_by: Callable[..., tuple[float, float]]) -> dict[str, float]:
    """AUC on unseen images of every choice and of the best by shift together."""
    aucs = [judge_by(c.scores, c.unseen_scores)[1] for c in seen]
    table = {"average": float(np.mean(aucs))}
    for name in BY:
        table[name] = aucs[int(np.argmin([c.criteria[name] for c in seen]))]
    evidence = sees_anomalies(seen)
    first = sorted(seen, key=lambda c: c.criteria["shift"])
    for count in TOGETHER:
        members = first[:count] if evidence else seen
        table[together(count)] = judge_by(*combined_scores(members, heads=evidence))[1]
    return {**table, "oracle": max(aucs)}


def together(count: int) -> str:
    """The line of so many candidates, or of all where nothing is seen."""
    return f"best {count} by shift, with heads"


def rows_of(cells: Sequence[Cell], kept: Sequence[Row]) -> Iterator[Row]:
    """A row for every arm, share and choice."""
    for cell, content in zip(cells, kept, strict=True):
        for figures in content["figures"]:
            share = figures["share"]
            for choice, value in figures.items():
                if choice != "share":
                    place = {"task": cell.task, "seed": cell.seed, "arm": cell.arm, "share": share}
                    yield {**place, "choice": choice, "auc": value}


def column(rows: Sequence[Row], arm: str, choice: str) -> dict[tuple[str, int], float]:
    """(task, seed) -> AUC."""
    return {(r["task"], r["seed"]): r["auc"] for r in rows if (r["arm"], r["choice"]) == (arm, choice)}


def table_of(rows: Sequence[Row]) -> str:
    """A line for each choice, a column for each arm; below, each arm against random points."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    lines: list[list[str]] = []
    for choice in dict.fromkeys(row["choice"] for row in rows):
        values = (np.mean(list(column(rows, arm, choice).values())) for arm in arms)
        lines.append([choice, *(f"{value:.3f}" for value in values)])
    against = []
    for arm, choice in itertools.product(arms[1:], ("average", "shift", together(8), "oracle")):
        first, second = column(rows, arm, choice), column(rows, POINTS, choice)
        result = compare(first, second, {task: task.partition("/")[0] for task, _ in first})
        figures = [f"{result.difference:+.3f}", result.interval, f"{result.p_run:.3f}"]
        against.append([arm, choice, *figures])
    titles = ["arm", "choice", "AUC, arm − random points", "95 % over textures", "p, better"]
    return markdown_table(["AUC", *arms], lines) + "\n" + markdown_table(titles, against)


def main() -> None:
    parser = study_parser("sampling", __doc__, cells=True, seeds=2)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="of those that there are")
    options = parse(parser)
    cells = cells_of(options)
    kept = run_missing(cells, lambda cell: cell.path(options.cells), run_cell, options.jobs)
    rows = list(rows_of(cells, kept))
    parts = []
    for share in SHARES:
        of = [row for row in rows if row["share"] == share]
        title = "half of the unlabelled images anomalous" if share is None else f"{share:.0%} anomalous"
        parts.append(f"## {title.capitalize()}\n\n{table_of(of)}")
    failed = sum(cell.trials - len(content["candidates"]) for cell, content in zip(cells, kept, strict=True))
    page = f"""# How to propose candidates: TPE, random draws, a grid, ranges

{made_by("sampling", options)}

{len(cells)} searches of {cells[0].trials} candidates, {sum(content["seconds"] for content in kept) / 60:.0f}
minutes of one core; {failed} candidates failed. Mean AUC on images that no method has seen; tasks:
{len({cell.task for cell in cells})}, seeds: {len({cell.seed for cell in cells})}. Lines: which candidate is
chosen, or how many score together (all without heads, where no candidate sees anomalies). Columns: how the
candidates were proposed.

{chr(10).join(parts)}"""
    write_results(
        options, "sampling", page, means(rows, ("task", "seed", "arm", "share", "choice"), ("auc",))
    )


if __name__ == "__main__":
    main()
