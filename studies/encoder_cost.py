"""What the default encoder costs: seconds of a training step and of a judging, and memory.

    python -m studies.encoder_cost             five minutes
    python -m studies.encoder_cost --smoke     half a minute
    python -m studies.encoder_cost --device cuda

By image size and precision, on 300 train, 150 unlabelled and 75 held-out images of noise, in one thread, each
cell in a process of its own; medians of single steps. Writes encoder_cost.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from dataclasses import dataclass, replace

import torch

from ssad_hpo.augment import Augmentation
from ssad_hpo.detector import resolve_precision, train, untrained_network
from ssad_hpo.judgement import judge
from ssad_hpo.numerics import threads
from ssad_hpo.task import PRETRAINED, Precision, Task
from studies.lab.options import parse, study_parser
from studies.lab.results import made_by, markdown_table, write_results

SIZES = (64, 128, 224, 256)
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")


@dataclass(frozen=True)
class Cost:
    """Seconds of a step, of a task's first judging and of a later one; peak memory in GiB, a GPU's on one."""

    step: float
    first: float
    judging: float
    memory: float

    @property
    def candidate(self) -> float:
        """Seconds."""
        return PRETRAINED.steps * self.step + len(PRETRAINED.evaluation_steps) * self.judging


def measure(size: int, precision: Precision, steps: int, device: str) -> Cost:
    """In a process of its own."""
    images = torch.randint(256, (525, 1, size, size), generator=torch.Generator().manual_seed(0))
    task = Task("noise", *images.to(torch.uint8).split((300, 150, 75)))
    every = tuple((i + 1) / steps for i in range(steps))
    training = replace(PRETRAINED, steps=steps, evaluate_at=every, precision=precision)
    seconds = []
    with threads(1):
        began = time.perf_counter()
        for checkpoint in train(task.train, Augmentation("cutpaste"), training, device):
            seconds.append(time.perf_counter() - began)
            detector, began = checkpoint.detector, time.perf_counter()
        judge(detector, task)
        first, began = time.perf_counter() - began, time.perf_counter()
        judge(detector, task)
        judging = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return Cost(statistics.median(seconds[1:]), first, judging, peak / 2**30)  # the first loads the weights


def main() -> None:
    parser = study_parser("encoder_cost", __doc__)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where to train and to judge"
    )
    options: argparse.Namespace = parse(parser)
    lines = []
    for size in SIZES[:1] if options.smoke else SIZES:
        depthwise = untrained_network(PRETRAINED, (1, size, size)).depthwise
        auto = resolve_precision(PRETRAINED, torch.device(options.device), size * size, depthwise=depthwise)
        for precision in PRECISIONS:
            # A process anew: its peak of memory is its own.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                cost = pool.apply(measure, (size, precision, 3 if options.smoke else 9, options.device))
            name = f"**{precision}**" if precision == auto else precision
            seconds = f"{cost.step:.3g}", f"{cost.first:.1f}", f"{cost.judging:.1f}", f"{cost.candidate:.1f}"
            lines.append([size, name, *seconds, f"{cost.memory:.1f}"])
            print(*lines[-1], flush=True)
    judging = "first judging, s", "judging, s"
    titles = ["pixels", "precision", "step, s", *judging, "candidate, s", "peak memory, GiB"]
    page = f"""# Cost of the default encoder

{made_by("encoder_cost", options)}

EfficientNet-Lite0 as searches of folders train it: steps of {PRETRAINED.batch_size} normal and as many
augmented images, the first {PRETRAINED.frozen_stages} of five stages frozen, one thread. Judging embeds 300
train images, as many augmented, 150 unlabelled and 75 held-out ones; the first one of a search passes all of
them through the frozen stages, later ones the augmented alone. A candidate is {PRETRAINED.steps} steps and
{len(PRETRAINED.evaluation_steps)} later judging. Bold is what the precision "auto" takes on this machine.

{markdown_table(titles, lines)}"""
    write_results(options, "encoder_cost", page)


if __name__ == "__main__":
    main()
