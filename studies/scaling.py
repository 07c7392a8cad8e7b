"""What a study costs, as a formula: fitted on a few measured studies, checked on others, then extrapolated.

    python -m studies.scaling            about 5 minutes on two cores
    python -m studies.scaling --smoke    a few seconds

A study trains T detectors on W workers. A trial has S steps of 2 B images (B normal, B augmented) of P
pixels, and E evaluations of M images. An encoder has N parameters and needs F operations for one image in
one training step.

    seconds = ceil(T / W) * (a + S * (b + e * N) + (S * 2 B + g * E * M) * (c * F + d * P))

a: seconds of a trial beside its steps; b: of a step; e: of a parameter in a step (the optimiser's); c: of
an operation; d: of a pixel (augmentation, jitter, and what a network does beside convolutions); g: the
share of a training image's cost that an evaluated image has. A worker here is a process with one thread.
Writes scaling.md and .csv.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import time
from dataclasses import asdict, astuple, dataclass, fields, replace
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier

import numpy as np
import torch
from scipy.optimize import least_squares
from torch.utils.flop_counter import FlopCounterMode

from ssad_hpo.encoder import build_network
from ssad_hpo.task import Augmentation, Task, Training
from studies.lab.options import parse, study_parser
from studies.lab.results import Row, cores, made_by, markdown_table, write_results
from studies.lab.searching import trained

EVALUATIONS = (0.5, 0.75, 1.0)  # E = 3, as many as Training's default has
AUGMENTATION = Augmentation("cutpaste", {"patch_area": 0.05, "patch_aspect": 1.0})


@dataclass(frozen=True)
class Study:
    """The coordinates of a study; `evaluated` is M: train, augmented and unlabeled images together."""

    encoder: str
    width: int
    image_size: int
    batch: int
    steps: int
    evaluated: int = 160
    trials: int = 1
    workers: int = 1

    def training(self) -> Training:
        return Training(
            self.encoder, self.width, steps=self.steps, batch_size=self.batch, evaluate_at=EVALUATIONS
        )

    def task(self) -> Task:
        """Noise: what the pictures show does not change the times. 2/5 of `evaluated` are train images."""
        generator = torch.Generator().manual_seed(0)
        n, size = self.evaluated * 2 // 5, self.image_size
        images = torch.randint(256, (n + self.evaluated - 2 * n, 3, size, size), generator=generator)
        return Task("noise", images[:n].to(torch.uint8), images[n:].to(torch.uint8))

    def needs(self) -> Needs:
        size = (self.image_size, self.image_size)
        network = build_network(self.encoder, channels=3, image_size=size, width=self.width)
        with FlopCounterMode(display=False) as counter:
            network(torch.rand(2, 3, *size)).sum().backward()
        parameters = sum(parameter.numel() for parameter in network.parameters())
        return Needs(counter.get_total_flops() / 2, parameters)


@dataclass(frozen=True)
class Needs:
    """F, convolutions and matrix products of one image forward and backward; N, the parameters."""

    flops: float
    parameters: int


# The formula sees these ...
FITTED = [
    Study("small", 16, 64, batch=32, steps=60),
    Study("small", 16, 64, batch=4, steps=100, evaluated=40),
    Study("small", 16, 64, batch=4, steps=4, evaluated=40),
    Study("small", 16, 64, batch=8, steps=4, evaluated=1280),
    Study("small", 16, 128, batch=32, steps=16),
    Study("small", 16, 256, batch=16, steps=8, evaluated=40),
    Study("resnet18", 16, 64, batch=32, steps=10),
    Study("resnet18", 16, 64, batch=4, steps=20, evaluated=40),
    Study("resnet18", 16, 64, batch=8, steps=4, evaluated=640),
    Study("resnet18", 16, 128, batch=16, steps=8, evaluated=80),
]
# ... and is asked to predict these: other sizes, batches, steps, encoders, more than one worker.
CHECKED = [
    Study("small", 16, 64, batch=32, steps=150, evaluated=640),
    Study("small", 16, 96, batch=24, steps=30),
    Study("small", 16, 192, batch=16, steps=12, evaluated=80),
    Study("small", 32, 96, batch=32, steps=12),
    Study("resnet18", 16, 96, batch=16, steps=10),
    Study("resnet18", 16, 128, batch=32, steps=6, evaluated=320),
    Study("resnet18", 16, 256, batch=8, steps=4, evaluated=40),
    Study("resnet34", 16, 64, batch=32, steps=6),
    Study("small", 16, 64, batch=32, steps=60, trials=3, workers=2),
    Study("resnet18", 16, 128, batch=16, steps=6, evaluated=80, trials=2, workers=2),
]
SMOKE = Study("small", 4, 64, batch=4, steps=4, evaluated=40)


# ------------------------------------------------------------------------------------------ measuring


def work(
    worker: int, studies: list[Study], repeats: int, start: Barrier, results: SimpleQueue[float]
) -> None:
    """One of several workers that do the same studies side by side, each its share of the trials."""
    torch.set_num_threads(1)
    for study in studies:
        task = study.task()
        trained(task, AUGMENTATION, replace(study.training(), steps=4))  # warm-up
        for _ in range(repeats):
            start.wait()
            began = time.perf_counter()
            for _ in range(worker, study.trials, study.workers):
                trained(task, AUGMENTATION, study.training())
            results.put(time.perf_counter() - began)
            start.wait()


def measured(studies: list[Study], repeats: int) -> dict[Study, float]:
    """Seconds of each study, the median over repeats. A study ends when its last worker does."""
    context = multiprocessing.get_context("spawn")
    seconds: dict[Study, float] = {}
    for workers in sorted({study.workers for study in studies}):
        mine = [study for study in studies if study.workers == workers]
        start, results = context.Barrier(workers), context.SimpleQueue()
        arguments = [(worker, mine, repeats, start, results) for worker in range(workers)]
        processes = [context.Process(target=work, args=a, daemon=True) for a in arguments]
        for process in processes:
            process.start()
        for study in mine:
            runs = []
            for _ in range(repeats):
                runs.append(max(results.get() for _ in range(workers)))
            seconds[study] = statistics.median(runs)
            print(study, f"{seconds[study]:.2f} s", flush=True)
        for process in processes:
            process.join()
    return {study: seconds[study] for study in studies}


# -------------------------------------------------------------------------------------------- formula


@dataclass(frozen=True)
class Constants:
    """Of the formula: a and b in seconds, c, d and e in seconds per F, P and N, g a share."""

    a: float
    b: float
    c: float
    d: float
    e: float
    g: float

    def seconds(self, study: Study, needs: Needs) -> float:
        images = study.steps * 2 * study.batch + self.g * len(EVALUATIONS) * study.evaluated
        per_image = self.c * needs.flops + self.d * study.image_size**2
        per_step = self.b + self.e * needs.parameters
        return math.ceil(study.trials / study.workers) * (
            self.a + study.steps * per_step + images * per_image
        )


def fit(seconds: dict[Study, float], needs: dict[Study, Needs]) -> Constants:
    """The constants with the least squared logarithm of predicted over measured seconds, all positive."""

    def errors(logs: np.ndarray) -> list[float]:
        constants = Constants(*np.exp(logs))
        return [math.log(constants.seconds(study, needs[study]) / s) for study, s in seconds.items()]

    guess = Constants(a=0.1, b=3e-3, c=1e-11, d=3e-8, e=1e-9, g=0.3)
    return Constants(*np.exp(least_squares(errors, np.log(astuple(guess))).x).tolist())


# ----------------------------------------------------------------------------------------- the paper

# 15 objects of MVTec AD and 6 of MPDD have about 240 train and 110 test images each.
PAPER = Study("resnet18", 16, 256, batch=32, steps=10_000, evaluated=240 + 240 + 110)
PAPER_TASKS, PAPER_KINDS = 21, 4
TERAFLOPS = (25, 50, 100, 200)  # assumed, not measured: what a training sustains on one GPU
GPU_STEP = 5e-3  # seconds that the host needs to launch a step; assumed. No step is faster
GPU_TRIAL = 10.0  # seconds of a trial beside its steps: start, density, writing; assumed


def on_gpus(study: Study, flops: float, teraflops: float) -> float:
    """Seconds of a study on `study.workers` GPUs that each sustain so many TFLOP/s in a training."""
    rate = 1e12 * teraflops
    step = max(GPU_STEP, 2 * study.batch * flops / rate)
    evaluation = len(EVALUATIONS) * study.evaluated * flops / 3 / rate
    return math.ceil(study.trials / study.workers) * (GPU_TRIAL + study.steps * step + evaluation)


def duration(seconds: float) -> str:
    for unit, length in (("years", 31_557_600), ("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"


# ------------------------------------------------------------------------------------------ reporting


def page(rows: list[Row], constants: Constants, options: argparse.Namespace) -> str:
    coordinates = [field.name for field in fields(Study)]
    heading = ["", *(name.replace("_", " ") for name in coordinates), "measured", "predicted", "error"]
    shown = ["role", *coordinates, "measured", "predicted"]
    points = [[*(row[name] for name in shown), f"{float(row['error']):+.0%}"] for row in rows]
    errors = [abs(float(row["error"])) for row in rows if row["role"] == "checked"]
    middle, worst = f"{statistics.median(errors):.0%}", f"{max(errors):.0%}"
    fitted = ", ".join(f"{name} = {value:.3g}" for name, value in asdict(constants).items())

    trials = PAPER_TASKS * PAPER_KINDS * options.candidates * options.seeds
    product = (
        f"{PAPER_TASKS} tasks × {PAPER_KINDS} f_aug × {options.candidates} candidates × {options.seeds} seeds"
    )
    needs = PAPER.needs()
    flops, step = needs.flops, 2 * PAPER.batch * needs.flops
    gpus = []
    for rate in TERAFLOPS:
        studies = [PAPER, *(replace(PAPER, trials=trials, workers=w) for w in (1, 8, 64))]
        gpus.append([str(rate), *(duration(on_gpus(study, flops, rate)) for study in studies)])
    one, every = (
        duration(constants.seconds(replace(PAPER, trials=t, workers=w), needs))
        for t, w in ((1, 1), (trials, cores()))
    )
    return f"""# What a study costs

{made_by("scaling", options)}

A study trains T detectors on W workers. A trial has S steps of 2 B images (B normal, B augmented) of P
pixels, and E = {len(EVALUATIONS)} evaluations of M images (train, augmented and unlabeled). An encoder has N
parameters and needs F operations for one image in one training step (convolutions and matrix products,
forward and backward, counted).

    seconds = ceil(T / W) * (a + S * (b + e * N) + (S * 2 B + g * E * M) * (c * F + d * P))

Fitted on the studies marked so, by least squares of the logarithm:
{fitted}
(seconds; 1 / c = {1e-9 / constants.c:.0f} GFLOP/s). A worker is a process with one thread,
`precision="auto"`.

## Against measurements

Over the {len(errors)} studies that the fit has not seen: median error {middle}, largest {worst}.
Studies with two workers are predicted as if the two did not disturb each other. Seconds, medians of
{options.repeats} runs.

{markdown_table(heading, points)}
## The paper's tasks

{product} = {trials} trainings (the numbers of
candidates and seeds are assumed) of {PAPER.encoder} at {PAPER.image_size} px, {PAPER.steps} steps of
{PAPER.batch} + {PAPER.batch} images, {PAPER.evaluated} images evaluated: {step / 1e12:.2f} TFLOP a step,
{PAPER.steps * step / 1e15:.1f} PFLOP a training.

**None of this was measured on a GPU.** The rows assume what one GPU sustains over a training; an H100 is
sold with 989 TFLOP/s of dense bf16 products and an A100 with 312, so 100 is a tenth and a third of these.
Also assumed: no step is faster than {1000 * GPU_STEP:.0f} ms (the host launches its kernels one by one),
and a trial takes {GPU_TRIAL:.0f} s beside its steps. Trials are independent, so W GPUs share them without
talking.

{markdown_table(["sustained TFLOP/s", "one training", "1 GPU", "8 GPUs", "64 GPUs"], gpus)}
By the fitted formula, far outside of what it was fitted on, one worker of this machine needs {one} for
one such training, and its {cores()} cores {every} for all.
"""


def main() -> None:
    parser = study_parser("scaling", __doc__, seeds=5)
    parser.add_argument("--repeats", type=int, default=3, help="of every measured study")
    parser.add_argument(
        "--candidates", type=int, default=16, help="of each f_aug on each of the paper's tasks"
    )
    options = parse(parser)
    fitted, checked = FITTED, CHECKED
    if options.smoke:
        options.repeats = 1
        fitted = [replace(SMOKE, steps=steps, batch=batch) for steps in (4, 12) for batch in (4, 16, 32)]
        checked = [replace(SMOKE, trials=2, workers=2)]

    seconds = measured(fitted + checked, options.repeats)
    needs = {study: study.needs() for study in seconds}
    constants = fit({study: seconds[study] for study in fitted}, needs)
    rows = []
    for study, took in seconds.items():
        predicted = constants.seconds(study, needs[study])
        row = {"role": "fitted" if study in fitted else "checked", **asdict(study)}
        row |= {"gflop_per_image": f"{needs[study].flops / 1e9:.4f}", "measured": f"{took:.3f}"}
        row |= {"predicted": f"{predicted:.3f}", "error": f"{predicted / took - 1:.4f}"}
        rows.append(row)
    write_results(options, "scaling", page(rows, constants, options), rows)


if __name__ == "__main__":
    main()
