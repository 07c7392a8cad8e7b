"""ST-SSAD's table: methods against each other on the same tasks, with what each of them costs.

A row is a dictionary of a (task, method, draw, seed): these four, "train_set" (tasks of one share
trainings), "auc", "forward", "backward" and "second" (images passed, see `bilevel.Cost`), "seconds" and
"failure" (why there is no AUC, or None). Draws of one method, task and seed are averaged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from ssad_hpo.bilevel import Cost
from studies.lab.comparing import average_ranks, compare, comparison_table
from studies.lab.results import Row, markdown_table

# The talk's columns, the search beside them, and our losses; then what stands beside the comparison.
METHODS = (
    *("AE", "D-SVDD", "RS-CO", "RD-CO", "RS-CP", "RD-CP", "RS-CD", "RD-CD", "DSV search"),
    *("ST-SSAD", "MMD1", "MMD2", "FO", "soft alignment", "two-sided alignment"),
    *("two-sided, second order", "contrast alignment", "PU-AUC"),
)
SHORT_SEARCH, BY_PU_AUC, BEST_TRIAL = "DSV search, 4 trials", "DSV search, by PU-AUC", "best trial"
RS_TUNED, RD_TUNED = "RS, tuned kind", "RD, tuned kind"
BEYOND = (SHORT_SEARCH, BY_PU_AUC, RS_TUNED, RD_TUNED, "frozen", BEST_TRIAL)
# What a method that failed on a task is worth there: a coin.
FAILED = 0.5

Run = tuple[str, int]  # (task, seed)


def columns(rows: Sequence[Row]) -> dict[str, dict[Run, float]]:
    """Method -> run -> AUC, those of `METHODS` and `BEYOND` that occur, in this order."""
    groups: dict[str, dict[Run, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        value = FAILED if row["failure"] is not None else row["auc"]
        groups[row["method"]][row["task"], row["seed"]].append(value)
    known = [method for method in (*METHODS, *BEYOND) if method in groups]
    return {m: {run: float(np.mean(values)) for run, values in groups[m].items()} for m in known}


def task_table(rows: Sequence[Row], hero: str) -> str:
    """The talk's table: AUC of each task (a line, mean over seeds), and p-values of `hero` greater."""
    table = columns(rows)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    means = {method: _task_means(column, tasks) for method, column in table.items()}
    lines = [[task, *(f"{means[m][i]:.3f}" for m in table)] for i, task in enumerate(tasks)]
    lines.append(["**mean**", *(f"{np.mean(means[m]):.3f}" for m in table)])
    ranks = average_ranks({m: means[m] for m in table if m not in BEYOND})
    lines.append(["**mean rank**", *(f"{ranks[m]:.2f}" if m in ranks else "" for m in table)])
    if hero in table:
        clusters = _clusters(rows)
        against = {m: compare(table[hero], table[m], clusters) for m in table if m != hero}
        for name, unit in (("p_task", "task"), ("p_run", "task × seed")):
            values = [f"{getattr(against[m], name):.4f}" if m in against else hero for m in table]
            lines.append([f"**p**, unit {unit}", *values])
    return markdown_table(["task", *table], lines)


def hero_table(rows: Sequence[Row], hero: str) -> str:
    """One method against every other: difference, bootstrap interval over train sets, p-values."""
    table = columns(rows)
    return comparison_table(table, hero, _clusters(rows), table, ("method", "AUC"))


def cost_table(rows: Sequence[Row], reference: str) -> str:
    """What a method costs on one task, mean over tasks, seeds and draws, and as a share of another's."""
    costs = {method: _mean_cost(rows, method) for method in columns(rows) if method != BEST_TRIAL}
    lines: list[list[object]] = []
    for method, cost in costs.items():
        counts = [f"{count / 1e3:.1f}" for count in (cost.forward, cost.backward, cost.second, cost.images)]
        shares = ["", ""]
        if reference in costs:
            whole = costs[reference]
            shares = [f"{cost.images / whole.images:.1%}", f"{cost.seconds / whole.seconds:.1%}"]
        lines.append([method, *counts, shares[0], f"{cost.seconds:.1f}", shares[1]])
    titles = ["method", "forward", "backward", "second", "all", f"of {reference}", "seconds"]
    return markdown_table([*titles, f"of {reference}"], lines)


def markdown(rows: Sequence[Row], header: str, heroes: Sequence[str], reference: str) -> str:
    """The whole page.

    Args:
        rows: of all methods, the same runs of each.
        header: below the title.
        heroes: methods that are compared with every other; the first has its p-values in the main table.
        reference: the method whose cost is 100 %.
    """
    failures = [row for row in rows if row["failure"] is not None]
    said = "; ".join(f"{r['method']} on {r['task']}, seed {r['seed']}: {r['failure']}" for r in failures)
    against = "\n".join(f"## {hero} against each method\n\n{hero_table(rows, hero)}" for hero in heroes)
    return (
        f"# ST-SSAD against search and baselines\n\n{header}\n\n"
        f"Failed, and counted as an AUC of {FAILED:g}: {said or 'none'}.\n\n"
        f"## AUC\n\n{task_table(rows, heroes[0])}\n"
        f"p: one-sided paired Wilcoxon, {heroes[0]} greater. Tasks that share trainings are not independent, "
        "which makes p-values optimistic; the intervals below resample train sets.\n\n"
        f"{against}\n"
        f"## Cost on one task\n\n{cost_table(rows, reference)}\n"
        "Thousands of images passed forward and backward, to train and to judge. Second: those whose "
        "backward pass was differentiated again, each counted as two more passes in all. Of a random static "
        "augmentation one run. Seconds of one core, loading not included.\n"
    )


def _task_means(column: dict[Run, float], tasks: Sequence[str]) -> list[float]:
    return [float(np.mean([auc for run, auc in column.items() if run[0] == task])) for task in tasks]


def _clusters(rows: Sequence[Row]) -> dict[str, str]:
    return {row["task"]: row["train_set"] for row in rows}


def _mean_cost(rows: Sequence[Row], method: str) -> Cost:
    those = [row for row in rows if row["method"] == method and row["failure"] is None]
    if not those:
        return Cost()
    forward, backward, second = (
        round(np.mean([row[name] for row in those])) for name in ("forward", "backward", "second")
    )
    return Cost(forward, backward, second, float(np.mean([row["seconds"] for row in those])))
