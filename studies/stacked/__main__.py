"""Does it pay to train several detectors in one process, their parameters stacked?

    python -m studies.stacked            about 5 minutes on two cores
    python -m studies.stacked --smoke    a few seconds

A step is what a training does between two checkpoints: jitter and f_aug of a ready batch, each detector
with its own seed and patch area, forward, backward, SGD. The ways to take the steps of K detectors:

ordinary  one detector after the other; also with two threads, and in two processes with a detector each
vmap      torch.func.vmap over torch.func.stack_module_state, running statistics stacked as well
grouped   the same written out: grouped convolutions, one batch norm over the channels of all detectors

All ways take turns within a repeat, in an order that is reversed every other time, so that ratios are
taken repeat by repeat. Writes stacked.md and .csv (one row for each run).
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict

from studies.lab.options import parse, study_parser
from studies.lab.results import made_by, markdown_table, spread, write_results
from studies.stacked.measuring import Groups, Speeds, cells, measured
from studies.stacked.ways import Cell


def against(cell: Cell, other: Cell, speeds: Speeds) -> str:
    return spread([a / b for a, b in zip(speeds[cell], speeds[other], strict=True)])


def page(groups: Groups, speeds: Speeds, options: argparse.Namespace) -> str:
    rows: list[list[object]] = []
    best: list[list[object]] = []
    for group in groups:
        ordinary, pair = group[0], next(cell for cell in group if cell.processes == 2)
        for cell in group:
            size, precision, way, *counts = list(asdict(cell).values())[:6]
            ratios = [against(cell, ordinary, speeds), against(cell, pair, speeds)]
            rows.append([size, precision, way, *counts, spread(speeds[cell], 1), *ratios])
        for threads in sorted({cell.threads for cell in group}):
            stacked = [cell for cell in group if cell.way != "ordinary" and cell.threads == threads]
            fastest = max(stacked, key=lambda cell: statistics.median(speeds[cell]))
            name = f"{fastest.way}, {fastest.detectors} detectors, {threads} threads"
            other = ordinary if threads == 1 else pair
            best.append([size, precision, name, other.processes, against(fastest, other, speeds)])
    ways = ["px", "precision", "way", "detectors", "threads", "processes", "steps/s", "to one", "to two"]
    return f"""# Several detectors in one process

{made_by("stacked", options)}

The small encoder of width 16 on grey images, {options.batch} + {options.batch} a step: jitter, CutPaste with
a patch area of its own for each detector, forward, backward, SGD. *Ordinary* is one detector after the
other; *vmap* is `torch.func.vmap` over stacked parameters and running statistics; *grouped* is the same
written out with grouped convolutions and fused batch norms. Under bf16 autocast vmap's batch norm raises
an error, so that only the grouped form is there.

## Does it pay?

The fastest stacked form (by its median: its ratio is somewhat flattered) against ordinary training in as
many processes of one thread as it has threads. Above 1 stacking pays.

{markdown_table(["px", "precision", "fastest stacked", "processes", "ratio"], best)}
## All ways

Detectors of a process; detector-steps a second over all processes. Medians (minimum–maximum) of
{options.repeats} runs of {options.seconds} s, in turns; ratios repeat by repeat, to one ordinary process
with one thread and to two of them.

{markdown_table(ways, rows)}"""


def main() -> None:
    parser = study_parser("stacked", __doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.8, help="of a run; whole steps are taken")
    options = parse(parser)
    options.sizes, options.detectors, options.batch = (32, 64), (1, 2, 4, 8), 32
    options.threads = (1,) if options.device == "cuda" else (1, 2)
    if options.smoke:
        options.sizes, options.detectors, options.batch = (32,), (2,), 4
        # Two threads would wait for each other wherever something else needs a core.
        options.threads, options.repeats, options.seconds = (1,), 2, 0.02

    groups = cells(options)
    speeds = measured(groups, options.repeats, options.seconds)
    rows = [
        {**asdict(cell), "repeat": repeat, "detector_steps_per_second": f"{speed:.4g}"}
        for cell, runs in speeds.items()
        for repeat, speed in enumerate(runs)
    ]
    write_results(options, "stacked", page(groups, speeds, options), rows)


if __name__ == "__main__":
    main()
