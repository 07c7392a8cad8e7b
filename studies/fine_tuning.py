"""Which settings of fine-tuning matter? One at a time is moved away from its default.

    python -m studies.fine_tuning --real DIR --jobs 2
    python -m studies.fine_tuning --real DIR --image-size 128 --factors steps frozen_stages
    python -m studies.fine_tuning --smoke                        (an embedded texture alone)

DIR holds data sets in the layout of MVTec AD. Two candidates of `studies/lab/detectors.py`, a small patch
that is pasted and a large one of differences, are trained with each setting on every set and with every seed;
the values were chosen before any result was seen. At the default the detectors are those of
`studies.pretrained`: in its folder of cells, and at its size of images, they are not trained again.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ssad_hpo.augment import NONE
from ssad_hpo.detector.training import encoder_rate
from ssad_hpo.task import Augmentation, Training
from studies.lab.detector_rows import rows_of
from studies.lab.detectors import (
    TUNED,
    Cell,
    candidates,
    detectors_parser,
    extent,
    run_detectors,
    sources,
)
from studies.lab.options import parse
from studies.lab.results import Row, made_by, markdown_table, write_results

ALL = "all"  # stages frozen: the encoder as it comes, which no training moves
RATE = encoder_rate(TUNED)
FACTORS: dict[str, tuple[Any, ...]] = {
    "frozen_stages": (0, ALL),
    "encoder_learning_rate": (0.0003, 0.03),
    "learning_rate": (0.003, 0.3),
    "steps": (5, 80),
    "batch_size": (4, 32),
    "encoder_batch_norm": ("train",),
    "jitter": (0.0, 0.3),
    "momentum": (0.0,),
    "weight_decay": (0.1,),
    "score": ("classifier",),
    "precision": ("float32", "bfloat16"),  # one of them is what "auto" stands for
}
CANDIDATES = (("0.005", "cutpaste"), ("0.05", "cutdiff"))
DEFAULT, FROZEN = "fine-tuned", "frozen"  # as kept detectors of other studies are called
FIGURES = ("auc_patches", "auc_whole")
Run = tuple[str, int]  # (set, seed)


@dataclass(frozen=True)
class Variant:
    """A training with one setting changed; `how` is what its cells are called."""

    how: str
    training: Training


def variants(factors: Sequence[str], training: Training) -> list[Variant]:
    """The default, and each value of the factors that are chosen."""
    found = [Variant(DEFAULT, training)]
    for factor in factors:
        for value in FACTORS[factor]:
            if value == ALL:
                found.append(Variant(FROZEN, training))
                continue
            changed = {factor: value}
            if factor == "learning_rate":  # of the head alone: that of the encoder follows it otherwise
                changed["encoder_learning_rate"] = RATE
            found.append(Variant(f"{factor} {shown(value)}", replace(training, **changed)))
    return found


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """All detectors, variant by variant, the default first."""
    training = replace(TUNED, steps=2, batch_size=4) if options.smoke else TUNED
    pair = [(n, a) for n, a in candidates(smoke=False) if (n, a.kind) in CANDIDATES]
    cells = []
    for variant in variants(options.factors, training):
        for source in sources(options, options.image_size):
            if variant.how == FROZEN:
                cells.append(Cell(source, FROZEN, variant.training, NONE, Augmentation(NONE)))
                continue
            for seed in range(options.seeds):
                seeded = replace(variant.training, seed=seed)
                cells += [
                    Cell(source, variant.how, seeded, name, f_aug)
                    for name, f_aug in pair[: 1 if options.smoke else None]
                ]
    return cells


def by_detector(rows: Sequence[Row], how: str, figure: str) -> dict[tuple[Run, str], float]:
    """A figure of a variant by run and candidate; the frozen encoder stands for each of the default's."""
    if how == FROZEN:
        of_set = {row["set"]: row[figure] for row in rows if row["how"] == how}
        trained = by_detector(rows, DEFAULT, figure)
        return {(run, kind): of_set[run[0]] for run, kind in trained if run[0] in of_set}
    return {((row["set"], row["seed"]), row["f_aug"]): row[figure] for row in rows if row["how"] == how}


def by_run(detectors: Mapping[tuple[Run, str], float]) -> dict[Run, float]:
    """Candidates averaged."""
    values: dict[Run, list[float]] = defaultdict(list)
    for (run, _), value in detectors.items():
        values[run].append(value)
    return {run: float(np.mean(some)) for run, some in values.items()}


def differences(rows: Sequence[Row], how: str, figure: str) -> dict[Run, float]:
    """Of a variant to the default, by run; of the candidates that both could be trained with."""
    own, default = (by_detector(rows, name, figure) for name in (how, DEFAULT))
    return by_run({place: own[place] - default[place] for place in own if place in default})


def table(rows: Sequence[Row]) -> str:
    """A line for each variant: AUC of both scores, the difference to the default, runs and seconds."""
    lines = []
    for how in dict.fromkeys(row["how"] for row in rows):
        aucs = [by_run(by_detector(rows, how, figure)) for figure in FIGURES]
        if how == DEFAULT:
            moved = [seed_spread(runs) for runs in aucs]
        else:
            moved = [spread_of(list(differences(rows, how, figure).values())) for figure in FIGURES]
        shown_aucs = [f"{np.mean(list(runs.values())):.3f}" if runs else "–" for runs in aucs]
        seconds = np.median([row["seconds"] for row in rows if row["how"] == how])
        lines.append([title(how), *shown_aucs, *moved, len(aucs[0]), f"{seconds:.3g}"])
    titles = ["", "its score", "whole", "its score − default", "whole − default", "runs", "seconds"]
    return markdown_table(titles, lines)


def seed_spread(runs: Mapping[Run, float]) -> str:
    """Standard deviation over seeds, a mean over sets; nothing of one seed."""
    if len({seed for _, seed in runs}) < 2:
        return ""
    values = [[value for (name, _), value in runs.items() if name == each] for each in {n for n, _ in runs}]
    return f"± {np.mean([np.std(some) for some in values]):.3f}"


def spread_of(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    return f"{np.mean(values):+.3f} ± {np.std(values):.3f}" if values else "–"


def set_table(rows: Sequence[Row]) -> str:
    """What a variant adds to the AUC of its score, set by set, means over seeds."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    lines = []
    for how in dict.fromkeys(row["how"] for row in rows):
        if how != DEFAULT:
            moved = differences(rows, how, FIGURES[0])
            of_sets = [[value for (name, _), value in moved.items() if name == each] for each in sets]
            lines.append([title(how), *(f"{np.mean(some):+.3f}" if some else "–" for some in of_sets)])
    return markdown_table(["", *sets], lines)


def title(how: str) -> str:
    """Of a variant, for people."""
    return {DEFAULT: "default", FROZEN: f"frozen_stages {ALL}"}.get(how, how)


def default_list(factors: Sequence[str]) -> str:
    """A line for each factor with its default, and the values that it is moved to."""
    default = {factor: getattr(TUNED, factor) for factor in factors}
    if "encoder_learning_rate" in default:
        default["encoder_learning_rate"] = RATE  # a share of the other rate, unless it is set
    return "".join(
        f"- `{factor}` {shown(value)}; also {', '.join(map(shown, FACTORS[factor]))}\n"
        for factor, value in default.items()
    )


def shown(value: object) -> str:
    """A setting, for people and the names of cells."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = detectors_parser("fine_tuning", __doc__)
    parser.add_argument(
        "--factors", nargs="+", choices=list(FACTORS), metavar="NAME", help=f"of {', '.join(FACTORS)}; all"
    )
    options = parse(parser)
    options.seeds = 1 if options.smoke else options.seeds
    few = ["frozen_stages", "score"] if options.smoke else list(FACTORS)
    options.factors = list(dict.fromkeys(options.factors or few))
    cells = cells_of(options)
    there, kept = run_detectors(cells, options)
    rows = rows_of(there, kept, options.cells)
    embedded = {cell.name for cell in cells if cell.source.loader != "folder"}
    parts = []
    for name, real in (("Real sets", True), ("Embedded tasks", False)):
        if chosen := [row for row in rows if (row["set"] not in embedded) == real]:
            size = options.image_size if real else 64
            parts.append(f"## {name}, {size} pixels\n\n{table(chosen)}\nBy set, the score's AUC − default:\n")
            parts.append(set_table(chosen))
    pair = ", ".join(f"{kind} at {area}" for area, kind in CANDIDATES)
    count = sum("failure" in content for content in kept)
    failed = f" {count} detectors could not be trained." if count else ""
    page = f"""# Settings of fine-tuning, one at a time

{made_by("fine_tuning", options)}

{extent(cells, there)}
AUC on all test images, higher is better; means over sets, seeds ({options.seeds}) and candidates
({pair}). *Its score* is by patches, and of `score classifier`
the classifier's; *whole* is by the distance of an image's embedding. Differences are of the same set and
seed, ± their standard deviation over runs, which are sets × seeds; beside the default stands its own over
seeds, as a mean over sets. Seconds are the median detector's in one thread, judging included, on a machine
that had other work as well. With all stages frozen a detector is the encoder as it comes, once a set.{failed}

{default_list(options.factors)}
{chr(10).join(parts)}"""
    write_results(options, "fine_tuning", page, rows)


if __name__ == "__main__":
    main()
