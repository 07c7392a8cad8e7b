"""The talk's selection table, from rows of candidates: which label-free selector chooses the best?

A row is a dictionary of a (task, f_aug, candidate, seed): these four, "train_set" (tasks of one share
trainings), "anomaly" (what f_gen is), "auc", every criterion and component of `ssad_hpo.criteria` and
every merit of `ssad_hpo.consensus` by name. The candidate `RANDOM_DYNAMIC` is the column Rand., and no
selector may choose it. Rows whose f_aug is `ANY_KIND` stand beside the others and are never averaged with
them.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from ssad_hpo.consensus import SELECTORS
from ssad_hpo.criteria import CRITERIA
from ssad_hpo.evaluate import rank_agreement
from studies.lab.comparing import average_ranks, comparison_table
from studies.lab.results import Row, markdown_table

RANDOM_DYNAMIC = "random dynamic"
ANY_KIND = "any kind"  # as f_aug: chosen among the candidates of all kinds together
COLUMNS = ("Avg.", "Rand.", "base", "mmd", "std", "mc", "sel", "hits", "dsv")
BEYOND = ("dsv_unclamped", "discordance", "smooth_alignment", "soft_alignment", "oracle", "worst")
_NAMES = {name: name.upper() for name in ("mmd", "std", "mc", "sel", "hits", "dsv")}
_NAMES |= {"base": "Base", "dsv_unclamped": "DSV unclamped"}

Run = tuple[tuple[str, str], int]  # ((f_aug, task), seed)


def runs_of(rows: list[Row]) -> dict[Run, list[Row]]:
    """The candidates of each run, without the random dynamic detector."""
    runs: dict[Run, list[Row]] = defaultdict(list)
    for row in rows:
        if row["candidate"] != RANDOM_DYNAMIC:
            runs[(row["f_aug"], row["task"]), row["seed"]].append(row)
    return dict(runs)


def choices(rows: list[Row]) -> dict[str, dict[Run, float]]:
    """Column -> run -> the AUC that it gives."""
    table: dict[str, dict[Run, float]] = {column: {} for column in (*COLUMNS, *BEYOND)}
    dynamic: dict[Run, list[float]] = defaultdict(list)  # one, or of any kind the mean of all kinds'
    for row in rows:
        if row["candidate"] == RANDOM_DYNAMIC:
            dynamic[(row["f_aug"], row["task"]), row["seed"]].append(row["auc"])
    table["Rand."] = {run: float(np.mean(aucs)) for run, aucs in dynamic.items()}
    for run, group in runs_of(rows).items():
        aucs = np.array([row["auc"] for row in group])
        table["Avg."][run], table["oracle"][run], table["worst"][run] = aucs.mean(), aucs.max(), aucs.min()
        for name in CRITERIA.keys() & table.keys() - {"dsv_unclamped"}:  # that one older rows do not have
            table[name][run] = aucs[np.argmin([row[name] for row in group])]
        table["dsv_unclamped"][run] = aucs[np.argmin([unclamped(row) for row in group])]
        for name in SELECTORS:
            table[name][run] = aucs[np.argmax([row.get(name, -np.inf) for row in group])]
    return table


def unclamped(row: Row) -> float:
    """DSV as it would be without its clamp of the separability: L_dis - L_sep / L_dis."""
    return float(row["discordance"] - row["separability"] / row["discordance"])


def task_means(column: dict[Run, float], f_aug: str | None = None) -> dict[tuple[str, str], float]:
    """AUC of a column for each (f_aug, task), averaged over seeds; of one f_aug, or of each single kind."""
    values = defaultdict(list)
    for (task, _), value in sorted(column.items()):
        if task[0] == f_aug or (f_aug is None and task[0] != ANY_KIND):
            values[task].append(value)
    return {task: float(np.mean(value)) for task, value in values.items()}


def auc_and_rank_tables(table: dict[str, dict[Run, float]]) -> tuple[str, str]:
    columns = (*COLUMNS, *BEYOND)
    competing = [c for c in columns if c not in ("oracle", "worst")]
    kinds: list[str | None] = list(dict.fromkeys(f_aug for (f_aug, _), _ in table["dsv"]))
    kinds.insert(kinds.index(ANY_KIND) if ANY_KIND in kinds else len(kinds), None)
    aucs, ranks = [], []
    for kind in kinds:
        means = {c: list(task_means(table[c], kind).values()) for c in columns}
        head = [kind or "all", len(means["dsv"])]
        aucs.append([*head, *(f"{np.mean(means[c]):.3f}" for c in columns)])
        by_column = average_ranks({c: means[c] for c in competing})
        ranks.append([*head, *(f"{by_column[c]:.2f}" for c in competing)])
    titles = ["f_aug", "tasks"]
    return (
        markdown_table([*titles, *map(title, columns)], aucs),
        markdown_table([*titles, *map(title, competing)], ranks),
    )


def regret_table(rows: list[Row], *, any_kind: bool = False) -> str:
    """Regret of every column, and DSV against it: within each kind, or among the candidates of any kind."""
    rows = [row for row in rows if (row["f_aug"] == ANY_KIND) == any_kind]
    table = choices(rows)
    oracle, aucs = table["oracle"], {column: table[column] for column in (*COLUMNS, *BEYOND[:-2])}
    regrets = {name: {run: oracle[run] - auc for run, auc in column.items()} for name, column in aucs.items()}
    train_sets = {(row["f_aug"], row["task"]): row["train_set"] for row in rows}
    return comparison_table(aucs, "dsv", train_sets, regrets, ("column", "regret"), title)


def alignment_table(rows: list[Row]) -> str:
    """Where DSV wins and where it loses: a line for each f_aug and kind of anomaly."""
    groups: dict[tuple[str, str], list[list[Row]]] = defaultdict(list)
    for ((f_aug, _), _), group in runs_of(rows).items():
        groups[f_aug, group[0]["anomaly"]].append(group)
    lines = []
    for key, members in sorted(groups.items()):
        figures: dict[str, list[float | None]] = defaultdict(list)
        for group in members:
            aucs = np.array([row["auc"] for row in group])
            values = {name: np.array([row[name] for row in group]) for name in ("dsv", "discordance")}
            values["free"] = np.array([unclamped(row) for row in group])
            figures["average"].append(aucs.mean())
            figures["chosen"].append(aucs[values["dsv"].argmin()])
            figures["free chosen"].append(aucs[values["free"].argmin()])
            figures["oracle"].append(aucs.max())
            figures["clamped"].append(np.mean([row["separability"] > 0.5 for row in group]))
            for name, value in values.items():
                figures[name].append(rank_agreement(value, aucs))
        shown = ("average", "chosen", "oracle", "dsv", "discordance", "clamped", "free", "free chosen")
        lines.append([*key, *(_mean(figures[name]) for name in shown)])
    titles = ["f_aug", "anomalies", "Avg.", "DSV", "oracle", "ρ DSV", "ρ discordance", "clamped"]
    return markdown_table([*titles, "ρ without clamp", "AUC without clamp"], lines)


def learning_table(rows: list[Row]) -> str:
    """What candidates of each size learned, and how often DSV chose them: is the training long enough?"""
    rows = [row for row in rows if row["f_aug"] != ANY_KIND]
    chosen = [min(group, key=lambda row: row["dsv"]) for group in runs_of(rows).values()]
    groups: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for row in rows:
        if row["candidate"] != RANDOM_DYNAMIC:
            groups[_size(row)].append(row)
    lines = []
    for key, members in groups.items():
        figures = (np.mean([row[name] for row in members]) for name in ("loss", "auc", "dsv"))
        picked = sum(_size(row) == key for row in chosen)
        lines.append([key[0], f"{key[1]:g}", *(f"{figure:.2f}" for figure in figures), picked])
    return markdown_table(["f_aug", "patch area or angle", "training loss", "AUC", "DSV", "chosen"], lines)


def _size(row: Row) -> tuple[str, float]:
    """f_aug and the patch's area; the angle where there is no patch."""
    area = row["patch_area"]
    return row["f_aug"], float(row["angle"] if area is None else area)


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.2f}" if known else "–"


def title(column: str) -> str:
    return _NAMES.get(column, column.replace("_", " "))


def markdown(rows: list[Row], header: str) -> str:
    table = choices(rows)
    aucs, ranks = auc_and_rank_tables(table)
    of_any_kind = ""
    if any(row["f_aug"] == ANY_KIND for row in rows):
        among = regret_table(rows, any_kind=True)
        of_any_kind = f"## The same among the candidates of any kind\n\n{among}\n"
    chosen = len(choices([row for row in rows if row["f_aug"] != ANY_KIND])["dsv"])
    tasks, seeds = len({row["task"] for row in rows}), sorted({row["seed"] for row in rows})
    return (
        f"# Selection table\n\n{header}\n\n{tasks} tasks, seeds {', '.join(map(str, seeds))}.\n\n"
        f"## AUC of the chosen detector, mean over tasks\n\n{aucs}\n"
        f"## Rank among the columns, mean over tasks (1 is best)\n\n{ranks}\n"
        f"## Regret, and DSV against each column\n\n{regret_table(rows)}\n"
        "Regret is oracle − chosen. p: one-sided paired Wilcoxon, DSV greater. Tasks that share trainings "
        "are not independent, which makes the p-values optimistic; the interval resamples train sets.\n\n"
        f"{of_any_kind}"
        f"## Where DSV wins and where it loses\n\n{alignment_table(rows)}\n"
        "AUC: the mean of the candidates, the one that DSV chose, the best. ρ: Spearman's correlation of "
        "−criterion with AUC over a run's candidates, mean over runs. Clamped: the share of candidates whose "
        "separability is above 1/2, where DSV sees the discordance alone; without clamp, "
        "L_dis − L_sep / L_dis.\n\n"
        f"## What the candidates learned\n\n{learning_table(rows)}\n"
        "Means over tasks, seeds and aspects. Training loss: cross-entropy over the whole training, a coin "
        f"has 0.69. Chosen: by DSV, of {chosen} runs.\n"
    )
