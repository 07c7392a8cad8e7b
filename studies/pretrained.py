"""Pretrained encoders on real defects: does fine-tuning pay beside the encoder as it comes, and from scratch?

    python -m studies.pretrained --real DIR --jobs 2
    python -m studies.pretrained --smoke                        (an embedded texture alone)

DIR holds data sets in the layout of MVTec AD. `studies/lab/detectors.py` says what is trained on what.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssad_hpo.data import read_labels
from ssad_hpo.evaluate import auc
from studies.lab.detectors import (
    SCRATCH,
    TUNED,
    Cell,
    arrays_of,
    cells_of,
    detectors_parser,
    run_detectors,
)
from studies.lab.options import parse
from studies.lab.results import Row, made_by, markdown_table, write_results


def rows_of(cells: Sequence[Cell], kept: Sequence[Row], folder: Path) -> list[Row]:
    """A row with AUC and criteria for every detector that was trained."""
    rows: list[Row] = []
    truths: dict[str, np.ndarray | None] = {}
    for cell, content in zip(cells, kept, strict=True):
        if "failure" in content:
            print(f"{cell.name}, {cell.augmentation} failed: {content['failure']}")
            continue
        key = repr(cell.source)
        if key not in truths:
            truths[key] = read_labels(cell.source)
        truth = truths[key]
        assert truth is not None, f"{cell.name}: a set of this study has ground truth"
        value = auc(truth, arrays_of(cell, folder)["scores"])
        named: Row = {"set": cell.name, "how": cell.how, "f_aug": cell.augmentation.kind}
        named |= {"candidate": cell.candidate, "seed": cell.training.seed, "steps": cell.training.steps}
        rows.append({**named, "auc": value, **content})
    return rows


def table(rows: Sequence[Row]) -> str:
    """A line for each set and for their mean: frozen, and average and best candidate of every training."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["set"], row["how"]].append(row)
    lines: list[list[float]] = []
    sets = list(dict.fromkeys(row["set"] for row in rows))
    for name in sets:
        (frozen,) = groups[name, "frozen"]
        line = [frozen["auc"]]
        for how in ("scratch", "fine-tuned"):
            seeds = defaultdict(list)
            for row in groups[name, how]:
                seeds[row["seed"]].append(row["auc"])
            seconds = [row["seconds"] for row in groups[name, how]]
            line += [float(np.mean([np.mean(aucs) for aucs in seeds.values()]))]
            line += [float(np.mean([max(aucs) for aucs in seeds.values()])), float(np.median(seconds))]
        lines.append(line)
    titles = (
        "set",
        "frozen",
        "scratch, average",
        "best",
        "seconds",
        "fine-tuned, average",
        "best",
        "seconds",
    )
    named = [*zip(sets, lines, strict=True), ("mean", np.mean(lines, axis=0).tolist())]
    return markdown_table(
        titles,
        [
            [name, *(f"{value:.0f}" if i in (3, 6) else f"{value:.3f}" for i, value in enumerate(line))]
            for name, line in named
        ],
    )


def main() -> None:
    options = parse(detectors_parser("pretrained", __doc__))
    cells = cells_of(options)
    kept = run_detectors(cells, options)
    rows = rows_of(cells, kept, options.cells)
    page = f"""# Pretrained encoders

{made_by("pretrained", options)}

AUC, higher is better. *Frozen* is EfficientNet-Lite0 as it comes; *average* and *best* are over candidates,
the best by ground truth, which no selector reaches; means over {options.seeds} seeds. Seconds are a
candidate's, in one thread, judging included. Steps: {SCRATCH.steps} from scratch at 64 pixels,
{TUNED.steps} fine-tuned at {options.image_size}; embedded tasks have 64 pixels in both.

{table(rows)}"""
    write_results(options, "pretrained", page, rows)


if __name__ == "__main__":
    main()
