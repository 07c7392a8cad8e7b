"""Does it pay to train the best candidates again with other seeds, and which value should then choose?

    python -m studies.reseeding --real DIR
    python -m studies.reseeding --smoke                    (an embedded texture alone)

Static candidates of `studies/lab/detectors.py`, fine-tuned with each seed. Each seed in turn is the search's
own: of the best four by `shift` with it, one is chosen by that value alone, by the mean over all seeds, or by
the mean over the other seeds, and judged by the AUC of its detector of the search's own seed, which is what a
run ends with.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ssad_hpo.evaluate import auc
from studies.lab.detectors import (
    DYNAMIC,
    TUNED,
    Cell,
    arrays_of,
    candidates,
    detectors_parser,
    run_detectors,
    sources,
)
from studies.lab.options import parse
from studies.lab.results import Row, made_by, markdown_table, write_results
from studies.lab.searching import truth_of

CRITERION, TOP = "shift", 4
WAYS = ("the search's value alone", "mean over all seeds", "mean over the other seeds", "oracle", "average")
FIGURES = ("spread", "between", "together")


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """Every candidate with every seed, set by set."""
    training = replace(TUNED, steps=2, batch_size=4) if options.smoke else TUNED
    static = [candidate for candidate in candidates(options.smoke) if candidate[0] != DYNAMIC]
    return [
        Cell(source, "fine-tuned", replace(training, seed=seed), name, augmentation)
        for source in sources(options, options.image_size)
        for name, augmentation in static
        for seed in range(options.seeds)
    ]


def rows_of(options: argparse.Namespace, cells: Sequence[Cell], kept: Sequence[Row]) -> list[Row]:
    """What each way chooses of every set with every seed as the search's own, and how values spread."""
    sets: dict[str, dict[str, dict[int, tuple[float, float]]]] = defaultdict(lambda: defaultdict(dict))
    for cell, content in zip(cells, kept, strict=True):
        if "failure" in content:
            print(f"{cell.name}, {cell.augmentation} failed: {content['failure']}")
            continue
        value = auc(truth_of(cell.source), arrays_of(cell, options.cells)["scores"])
        sets[cell.name][str(cell.augmentation)][cell.training.seed] = (content[CRITERION], value)
    rows: list[Row] = []
    for name, found in sets.items():
        whole = [list(of.values()) for of in found.values() if len(of) == options.seeds]
        values, aucs = np.moveaxis(np.array(whole), 2, 0)
        for seed in range(options.seeds):
            chosen = chosen_by(values, aucs, seed)
            rows.append({"set": name, "seed": seed, **{w: round(a, 4) for w, a in chosen.items()}})
        rows.append(
            {"set": name, "seed": "all", **{n: round(f, 4) for n, f in spreads(values, aucs).items()}}
        )
    return rows


def chosen_by(values: NDArray[np.float64], aucs: NDArray[np.float64], own: int) -> Mapping[str, float]:
    """AUC of what each way chooses, with one seed as the search's own.

    Args:
        values: (candidates, seeds) of the criterion, lower is better. aucs: of the same detectors.
        own: place of that seed.
    """
    best = np.argsort(values[:, own], kind="stable")[:TOP]
    others = np.delete(values, own, axis=1)
    by = {WAYS[0]: values[:, own], WAYS[1]: values.mean(1), WAYS[2]: others.mean(1) if others.size else None}
    found = {w: float(aucs[best[np.argmin(v[best])], own]) for w, v in by.items() if v is not None}
    return {**found, WAYS[3]: float(aucs[:, own].max()), WAYS[4]: float(aucs[:, own].mean())}


def spreads(values: NDArray[np.float64], aucs: NDArray[np.float64]) -> Mapping[str, float]:
    """How much of a value is the seed's, and whether a detector with a better value is itself better."""
    own, of_aucs = values - values.mean(1, keepdims=True), aucs - aucs.mean(1, keepdims=True)
    moves = own.std() > 0 and of_aucs.std() > 0
    return {
        "spread": float(np.sqrt((own**2).sum() / max(1, own.size - len(own)))),
        "between": float(values.mean(1).std(ddof=1)) if len(values) > 1 else 0.0,
        "together": float(np.corrcoef(-own.ravel(), of_aucs.ravel())[0, 1]) if moves else 0.0,
    }


def ways_table(rows: Sequence[Row]) -> str:
    """AUC of what each way chooses, by set, means over seeds."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    lines = []
    for way in WAYS:
        means = [float(np.mean([row[way] for row in rows if row["set"] == s and way in row])) for s in sets]
        lines.append([way, *(f"{mean:.3f}" for mean in means), f"**{np.mean(means):.3f}**"])
    return markdown_table(["chosen by", *sets, "mean"], lines)


def spreads_table(rows: Sequence[Row]) -> str:
    """Spread of the criterion, by set."""
    some = [row for row in rows if row["seed"] == "all"]
    lines = [[row["set"], *(f"{row[name]:.3f}" for name in FIGURES)] for row in some]
    return markdown_table(["set", "spread over seeds", "spread over candidates", "correlation"], lines)


def main() -> None:
    parser = detectors_parser("reseeding", __doc__)
    parser.set_defaults(seeds=3)
    options = parse(parser)
    options.seeds = 2 if options.smoke else options.seeds
    cells = cells_of(options)
    there, kept = run_detectors(cells, options)
    rows = rows_of(options, there, kept)
    page = f"""# The best candidates with other seeds

{made_by("reseeding", options)}

Mean AUC of the detector that a run ends with: one of the best {TOP} of {
        len(cells) // options.seeds // len({cell.name for cell in cells})
    } by `{CRITERION}` with the search's own seed, which each of {options.seeds}
seeds is in turn.

{ways_table([row for row in rows if row["seed"] != "all"])}
Standard deviations of `{
        CRITERION
    }` over the seeds of a candidate and over candidates' means; and how the value
and the AUC of a candidate's detectors go together over its seeds (1: the lucky seed is a better detector).

{spreads_table(rows)}"""
    write_results(options, "reseeding", page, rows)


if __name__ == "__main__":
    main()
