"""Methods against each other on the same tasks and seeds: ranks, paired tests, intervals, and their table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from scipy.stats import rankdata, wilcoxon

from ssad_hpo.evaluate import finite_vector
from studies.lab.results import markdown_table

if TYPE_CHECKING:
    from ssad_hpo.evaluate import Values

TaskT = TypeVar("TaskT", bound=Hashable)
_DRAWS = 2000  # of the bootstrap, which draws from a seed of its own
Column = Mapping[tuple[TaskT, int], float]  # (task, seed) -> AUC, or another figure


def average_ranks(table: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Each method's rank averaged over tasks; rank 1 is the best AUC of a task, ties averaged.

    Args:
        table: for each method its AUC (or any figure where higher is better) on every task, all in
            the same order of tasks.

    Raises:
        ValueError: when there is no method or no task, lengths differ, or a value is not finite.
    """
    if not table:
        raise ValueError("table: expected at least one method, got none")
    rows = {method: finite_vector(f"table[{method!r}]", aucs) for method, aucs in table.items()}
    lengths = {method: len(row) for method, row in rows.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(f"table: expected every method on the same tasks, one or more, got {lengths}")
    ranks = rankdata(-np.stack(list(rows.values())), method="average", axis=0)
    return dict(zip(rows, ranks.mean(axis=1).tolist(), strict=True))


def wilcoxon_greater(a: Values, b: Values) -> float:
    """The p-value of the one-sided paired Wilcoxon signed-rank test that `a` is greater than `b`.

    Pairs without a difference are left out (Wilcoxon's own way); if none is left, nothing speaks for
    `a` and the p-value is 1. Of the pairs that remain, up to 50 without ties and up to 13 with ties are
    tested exactly, more by the normal approximation with a correction for ties (SciPy's choice).

    Args:
        a, b: (N,) paired values, for instance the AUCs of two methods on the same tasks; N >= 1.

    Raises:
        ValueError: naming the argument, for a wrong shape, different lengths, values not finite.
    """
    first, second = finite_vector("a", a), finite_vector("b", b)
    if len(first) != len(second) or len(first) == 0:
        raise ValueError(f"b: expected as many values as a, at least 1, got {len(first)} and {len(second)}")
    # Rounded, since 0.9 - 0.8 and 0.8 - 0.7 differ in their last bits and must count as tied.
    differences = np.round(first - second, 12)
    differences = differences[differences != 0]
    if len(differences) == 0:
        return 1.0
    return float(wilcoxon(differences, alternative="greater").pvalue)


@dataclass(frozen=True)
class Comparison:
    """One method against another on the same tasks and seeds.

    Attributes:
        difference: mean over tasks of (first - second), each task's values averaged over its seeds.
        low, high: the 95 % bootstrap interval of `difference`, resampling whole clusters of tasks.
        p_task: one-sided Wilcoxon p-value that the first is greater, the unit being the task after
            averaging its seeds. Tasks that share trainings are not independent, which makes this (and
            the next) optimistic; the interval is not.
        p_run: the same, the unit being task and seed.
    """

    difference: float
    low: float
    high: float
    p_task: float
    p_run: float

    @property
    def interval(self) -> str:
        """As it stands in a table."""
        return f"{self.low:+.3f} … {self.high:+.3f}"


def compare(first: Column[TaskT], second: Column[TaskT], clusters: Mapping[TaskT, Hashable]) -> Comparison:
    """Compare two methods over the same runs.

    Args:
        first, second: by (task, seed) the AUC, or any figure where higher is better.
        clusters: by task the cluster in which it moves with others, e.g. its train images.

    Raises:
        ValueError: when there is no run, or the two methods have different ones.
    """
    if not first or set(first) != set(second):
        apart = len(set(first) ^ set(second))
        raise ValueError(f"second: expected the runs of first, at least 1, got {apart} that only one has")
    runs = sorted(first, key=repr)
    tasks = list(dict.fromkeys(task for task, _ in runs))
    means = [
        [float(np.mean([method[run] for run in runs if run[0] == task])) for task in tasks]
        for method in (first, second)
    ]
    by_cluster: dict[Hashable, list[float]] = defaultdict(list)
    for task, a, b in zip(tasks, *means, strict=True):
        by_cluster[clusters[task]].append(a - b)
    grouped = list(by_cluster.values())
    generator = np.random.default_rng(0)
    resampled = [
        np.mean(np.concatenate([grouped[i] for i in generator.integers(len(grouped), size=len(grouped))]))
        for _ in range(_DRAWS)
    ]
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Comparison(
        difference=float(np.mean(means[0]) - np.mean(means[1])),
        low=float(low),
        high=float(high),
        p_task=wilcoxon_greater(*means),
        p_run=wilcoxon_greater([first[r] for r in runs], [second[r] for r in runs]),
    )


def comparison_table(
    aucs: Mapping[str, Column[TaskT]],
    hero: str,
    clusters: Mapping[TaskT, Hashable],
    figures: Mapping[str, Column[TaskT]],
    titles: tuple[str, str],
    title: Callable[[str], str] = str,
) -> str:
    """A line for each method: a figure of its own with its spread over seeds, and `hero` against it.

    Args:
        aucs: for each method its runs, the same of all.
        hero: the method that the others are compared with.
        clusters: see `compare`.
        figures: for each method what is shown of it, by run.
        titles: of the methods and of that figure.
        title: writes a method's name.
    """
    lines: list[list[object]] = []
    for method, column in aucs.items():
        seeds = sorted({seed for _, seed in column})
        by_seed = [np.mean([v for (_, s), v in figures[method].items() if s == seed]) for seed in seeds]
        against = ["", "", "", ""]
        if method != hero:
            found = compare(aucs[hero], column, clusters)
            against = [
                f"{found.difference:+.3f}",
                found.interval,
                f"{found.p_task:.4f}",
                f"{found.p_run:.4f}",
            ]
        lines.append([title(method), f"{np.mean(by_seed):.3f} ± {np.std(by_seed):.3f}", *against])
    beside = [f"{title(hero)} − {titles[0]}", "95 % over train sets", "p, unit task", "p, unit task × seed"]
    return markdown_table([titles[0], f"{titles[1]} ± over seeds", *beside], lines)
