"""How fast detectors train here: our path against a plain per-image pipeline, in one run.

    python -m studies.throughput            about 15 minutes on two cores
    python -m studies.throughput --smoke    a few seconds, one tiny cell

Both pipelines train the same encoder on the same images with the same batch, steps and optimiser. They
take turns within every cell (A B A B ...), each in a process of its own, so that ratios are taken pair by
pair and peak memory belongs to one pipeline. Writes throughput.md, .csv (one row per measured value,
tagged with its coordinates) and .png.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple
from typing import Any

import torch

from ssad_hpo.task import PRETRAINED, Training
from studies.lab.figures.throughput import throughput_figure
from studies.lab.options import parse, study_parser
from studies.lab.results import Row, cores, made_by, markdown_table, spread, write_results
from studies.throughput.cell import Cell, Run, peak_mib
from studies.throughput.measuring import PIPELINES, Peaks, Result, matrix_product, measure
from studies.throughput.ours import TRIAL_TASK, run_trial
from studies.throughput.plain import PIL_AUGMENTATIONS

SPEED = "images_per_second"


def main() -> None:
    options = arguments()
    options.imports_mib = peak_mib("cpu")
    began = time.monotonic()

    def products() -> Peaks:
        both = itertools.product(options.devices, ("float32", "bfloat16"))
        sizes = {"cpu": options.product_size, "cuda": 2 * options.product_size}
        return {(d, p): matrix_product(d, p, sizes[d]) for d, p in both}

    peaks, results = products(), []
    for where in itertools.product(options.devices, options.encoders, options.sizes, options.augmentations):
        results.append(measure(Cell(*where), options.repeats, options.seconds, options.workers))
        print(*where, f"done after {time.monotonic() - began:.0f} s", flush=True)
    trials: dict[str, list[Run]] = {}
    for device in options.devices:
        run_trial(device, steps=8)  # warm-up
        trials[device] = [run_trial(device, options.trial_steps) for _ in range(options.repeats)]
    # Once more at the end: on a shared machine the first might have been disturbed.
    peaks = {at: max(peak, peaks[at]) for at, peak in products().items()}

    rows = list(csv_rows(results, trials, peaks, options.trial_steps))
    written = [{**row, "value": f"{row['value']:.6g}"} for row in rows]
    write_results(options, "throughput", page(results, trials, peaks, options), written)
    throughput_figure([row for row in rows if row["measure"] == SPEED], options.out / "throughput.png")
    print(f"{time.monotonic() - began:.0f} s")


def arguments() -> argparse.Namespace:
    parser = study_parser("throughput", __doc__)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--devices", nargs="+", choices=devices, default=devices)
    parser.add_argument("--encoders", nargs="+", default=["small", "resnet18", PRETRAINED.encoder])
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument(
        "--augmentations", nargs="+", choices=PIL_AUGMENTATIONS, default=["cutpaste", "cutavg"]
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a run of the slower pipeline, about")
    parser.add_argument("--workers", type=int, default=min(cores(), 8), help="of the plain DataLoader")
    options = parse(parser)
    options.trial_steps, options.product_size = Training().steps, 4096
    if options.smoke:
        options.devices, options.encoders, options.sizes = options.devices[:1], ["small"], [32]
        options.augmentations, options.repeats, options.seconds = ["cutpaste"], 1, 0.1
        options.trial_steps, options.product_size = 8, 512
    options.device = options.devices[-1]  # the GPU, if there is one
    return options


def page(
    results: list[Result], trials: dict[str, list[Run]], peaks: Peaks, options: argparse.Namespace
) -> str:
    where = ["device", "encoder", "px", "f_aug"]
    speeds, shares, ours, plain = [], [], [], []
    for result in results:
        at = [str(value) for value in astuple(result.cell)]
        a, b = result.speeds("ours"), result.speeds("plain")
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        memory = [f"{max(run.peak_mib for run in result.runs[p]):.0f}" for p in PIPELINES]
        speeds.append([*at, str(result.steps), spread(a, 0), spread(b, 0), spread(ratios), *memory])
        share = [f"{result.share_of_peak(p, peaks):.0%}" for p in PIPELINES]
        shares.append([*at, result.cell.precision("ours"), f"{result.flops / 1e9:.2f}", *share])
        split, waits = median_parts([result.split]), median_parts(result.runs["plain"])
        ours.append([*at, *(f"{1000 * s / result.steps:.1f}" for s in split.values())])
        plain.append([*at, *(f"{1000 * s / result.steps:.1f}" for s in waits.values())])
    trial_rows = []
    for device, runs in trials.items():
        parts = median_parts(runs)
        parts["all but training"] = sum(parts.values()) - parts["training"]
        trial_rows += [[device, p, f"{s:.3f}", f"{s / parts['training']:.1%}"] for p, s in parts.items()]
    sizes = {result.cell.encoder: result.cell.batch for result in results}
    batches = ", ".join(f"{encoder} {batch} of each" for encoder, batch in sizes.items())
    products = ", ".join(f"{d} {p} {peak / 1e9:.0f} GFLOP/s" for (d, p), peak in peaks.items())
    alone, steps = f"{options.imports_mib:.0f}", options.trial_steps
    speed = ["steps", "ours, images/s", "plain, images/s", "ratio", "ours, MiB", "plain, MiB"]
    of_peak = ["ours computes in", "GFLOP an image", "ours", "plain (float32)"]
    return f"""# Throughput: our training path against a plain per-image pipeline

{made_by("throughput", options)} {torch.get_num_threads()} threads.

*Plain* is written the way such code is usually written: decoded PIL images in memory, torchvision's
ColorJitter and a PIL augmentation per image in {options.workers} `DataLoader` workers, float32, contiguous
layout, one copy to the device and one `loss.item()` a step. *Ours* is `ssad_hpo.detector.train` as it is,
`precision="auto"`. Both train the same encoder and head with the same optimiser on batches of as many
normal as augmented RGB images ({batches}) for the same number of steps, after one step that does not count.

## Speed and memory

Images a second (both halves of a batch count): median (minimum–maximum) of {options.repeats} runs each, in
turns; ratios run by run. Peak memory in MiB, each pipeline in its own process: resident, with Python and
its libraries (which alone take {alone}), for plain with the private pages of its workers; on a GPU the
device's memory.

{markdown_table([*where, *speed], speeds)}
![Images a second by image size](throughput.png)

## Share of peak

The arithmetic of one image in a training step (convolutions and matrix products, forward and backward, a
multiply-add counted as two), times images a second, against what a large matrix product of the same
precision reaches here: {products}.
A share above 100 % says that this yardstick is short: on AMD
processors the float32 product (MKL) stays far below what convolutions (oneDNN) can do; written as a 1 × 1
convolution the same product was twice as fast on the machine of the published results.

{markdown_table([*where, *of_peak], shares)}
## Where the time goes

Ours, milliseconds a step, from one more run with a stopwatch around the parts of the loop:

{markdown_table([*where, *split], ours)}
Plain, milliseconds a step. Its workers need the same cores as the training, so that on a CPU their work
shows in both columns:

{markdown_table([*where, *waits], plain)}
## Evaluation of one trial

`{TRIAL_TASK}`, {steps} steps, otherwise `Training()`'s defaults: three evaluations of 256 train, 256
augmented and 128 unlabeled images, one density and its scores. Medians of {options.repeats} trials.

{markdown_table(["device", "part", "seconds", "share of training"], trial_rows)}"""


def median_parts(runs: list[Run]) -> dict[str, float]:
    return {part: statistics.median(run.parts[part] for run in runs) for part in runs[0].parts}


def csv_rows(
    results: list[Result], trials: dict[str, list[Run]], peaks: Peaks, trial_steps: int
) -> Iterator[Row]:
    """One row per measured value, tagged with its coordinates."""

    def rows_of(run: Run, steps: int, **at: Any) -> Iterator[Row]:
        measured = {"seconds": run.seconds, "peak_mib": run.peak_mib}
        measured |= {f"seconds: {part}": seconds for part, seconds in run.parts.items()}
        for name, value in measured.items():
            yield {**at, "steps": steps, "measure": name, "value": value}

    for r in results:
        for pipeline, runs in r.runs.items():
            at = {**asdict(r.cell), "pipeline": pipeline, "precision": r.cell.precision(pipeline)}
            for repeat, (run, speed) in enumerate(zip(runs, r.speeds(pipeline), strict=True)):
                yield {**at, "repeat": repeat, "steps": r.steps, "measure": SPEED, "value": speed}
                yield from rows_of(run, r.steps, repeat=repeat, **at)
        at = {**asdict(r.cell), "pipeline": "ours, with stopwatch", "precision": r.cell.precision("ours")}
        yield from rows_of(r.split, r.steps, repeat=0, **at)
    for device, runs in trials.items():
        for repeat, run in enumerate(runs):
            at = {"device": device, "pipeline": f"trial on {TRIAL_TASK}"}
            yield from rows_of(run, trial_steps, repeat=repeat, **at)
    for (device, precision), peak in peaks.items():
        at = {"device": device, "precision": precision, "pipeline": "matrix product"}
        yield {**at, "measure": "flop_per_second", "value": peak}


if __name__ == "__main__":
    main()
