"""Pretrained encoders on real defects: does fine-tuning pay beside the encoder as it comes, and from scratch?

    python -m studies.pretrained --real DIR --jobs 2
    python -m studies.pretrained --smoke                        (an embedded texture alone)

DIR holds data sets in the layout of MVTec AD. `studies/lab/detectors.py` says what is trained on what.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from studies.lab.detector_rows import rows_of
from studies.lab.detectors import SCRATCH, TUNED, cells_of, detectors_parser, extent, run_detectors
from studies.lab.options import parse
from studies.lab.results import Row, made_by, markdown_table, write_results


def table(rows: Sequence[Row]) -> str:
    """A line for each set: frozen, and average and best candidate of every training; means at the end."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["set"], row["how"]].append(row)
    sets = list(dict.fromkeys(row["set"] for row in rows))
    lines = []
    for name in sets:
        (frozen,) = groups[name, "frozen"]
        scratch, tuned = groups[name, "scratch"], groups[name, "fine-tuned"]
        of_ways = [
            *_figures(scratch, "auc_whole"),
            *_figures(tuned, "auc_whole"),
            *_figures(tuned, "auc_patches"),
        ]
        seconds = [_seconds(scratch), _seconds(tuned)]
        lines.append([frozen["auc_whole"], frozen["auc_patches"], *of_ways, *seconds])
    count = len(lines)
    for title, place in (("from scratch", 2), ("fine-tuned", 4)):
        if some := [line for line in lines[:count] if not np.isnan(line[place])]:
            sets.append(f"mean of those {title} as well")
            lines.append(np.mean(some, axis=0).tolist())
    sets.append("mean of all")
    lines.append(np.mean(lines[:count], axis=0).tolist())
    titles = [
        "set", "frozen, whole", "frozen, patches", "scratch, average", "best",
        "fine-tuned, whole, average", "best", "fine-tuned, patches, average", "best",
        "scratch, s", "fine-tuned, s",
    ]  # fmt: skip
    return markdown_table(
        titles, [[n, *map(_shown, line, range(10))] for n, line in zip(sets, lines, strict=True)]
    )


def size_table(rows: Sequence[Row], size: int) -> str:
    """The encoder as it comes, by the size of the images: a line for each real set, and their mean."""
    values: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row["how"].startswith("frozen at "):
            values[row["set"]][int(row["how"].split()[-1])] = row
    for row in rows:
        if row["how"] == "frozen" and row["set"] in values:
            values[row["set"]][size] = row
    if not values:
        return ""
    sizes = sorted({pixels for of in values.values() for pixels in of})
    values = {name: of for name, of in values.items() if len(of) == len(sizes)}  # means of the same sets
    ways = [(figure, pixels) for figure in ("auc_whole", "auc_patches") for pixels in sizes]
    lines = [[name, *(of[pixels][figure] for figure, pixels in ways)] for name, of in values.items()]
    lines.append(["mean", *np.mean([line[1:] for line in lines], axis=0).tolist()])
    titles = ["set", *(f"{figure.removeprefix('auc_')}, {pixels}" for figure, pixels in ways)]
    shown = [[name, *(f"{value:.3f}" for value in line)] for name, *line in lines]
    return f"""
## The encoder as it comes, by the shorter side of the images in pixels

{markdown_table(titles, shown)}"""


def _figures(rows: Sequence[Row], figure: str) -> tuple[float, float]:
    """Mean over seeds of the average and the best AUC; NaN where nothing was trained."""
    if not rows:
        return np.nan, np.nan
    seeds = defaultdict(list)
    for row in rows:
        seeds[row["seed"]].append(row[figure])
    average, best = (float(np.mean([f(aucs) for aucs in seeds.values()])) for f in (np.mean, np.max))
    return average, best


def _seconds(rows: Sequence[Row]) -> float:
    return float(np.median([row["seconds"] for row in rows])) if rows else np.nan


def _shown(value: float, place: int) -> str:
    if np.isnan(value):
        return "–"
    return f"{value:.0f}" if place >= 8 else f"{value:.3f}"


def main() -> None:
    options = parse(detectors_parser("pretrained", __doc__))
    cells = cells_of(options)
    there, kept = run_detectors(cells, options)
    rows = rows_of(there, kept, options.cells)
    page = f"""# Pretrained encoders

{made_by("pretrained", options)}

{extent(cells, there)}
AUC, higher is better. *Frozen* is EfficientNet-Lite0 as it comes; *whole* scores an image by the distance of
its embedding, *patches* by its most anomalous patches. *Average* and *best* are over candidates, the best by
ground truth, which no selector reaches; means over seeds: {options.seeds}. Seconds are the median
candidate's in one thread, judging included, on a machine that had other work as well. Steps:
{SCRATCH.steps} from scratch at 64 pixels, {TUNED.steps} fine-tuned at {options.image_size}, and at 64 of the
embedded tasks, whose detectors from scratch are those of `selection_table`.

{table(rows)}
{size_table(rows, options.image_size)}"""
    write_results(options, "pretrained", page, rows)


if __name__ == "__main__":
    main()
