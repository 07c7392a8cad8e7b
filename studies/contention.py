"""What other load on a machine does to a training, by its threads and by how these wait for each other.

    python -m studies.contention             ten minutes
    python -m studies.contention --smoke     half a minute

A training is timed alone, as two at once, and beside a busy loop on each core; with one thread and with one
on each core; where threads that wait spin before they sleep, as OpenMP has it, and where they sleep at once
(OMP_WAIT_POLICY=passive). Every round has all of these in turns. Writes contention.md.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from unittest.mock import patch

import torch

from ssad_hpo.augment import Augmentation
from ssad_hpo.detector import train
from ssad_hpo.numerics import threads
from ssad_hpo.task import Training
from studies.lab.options import parse, study_parser
from studies.lab.results import cores, made_by, markdown_table, write_results

LOADS = ("alone", "two at once", "busy loops")
SPIN: dict[str, str] = {}  # what OpenMP does where nothing is set
PASSIVE = {"OMP_WAIT_POLICY": "passive"}
Way = tuple[int, str]  # threads, and how they wait
Times = list[tuple[float, float]]  # seconds of the clock and of the processor, a round each
_spawn = multiprocessing.get_context("spawn")


def work(pipe: Connection, size: int, steps: int, count: int) -> None:
    """In a process of its own: a short training for warm-up, then one as soon as it is told to."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (64, 1, size, size), generator=generator).to(torch.uint8)
    with threads(count):
        for length in (2, steps):
            if length == steps:
                pipe.send("ready")
                pipe.recv()
            began, spent = time.perf_counter(), time.process_time()
            for _ in train(images, Augmentation("cutout"), Training(steps=length, evaluate_at=(1.0,))):
                pass
    pipe.send((time.perf_counter() - began, time.process_time() - spent))


def loop() -> None:
    while True:
        pass


def seconds(way: Way, load: str, options: argparse.Namespace) -> tuple[float, float]:
    """(of the clock, of the processor) of one training under a load; of two at once their means."""
    count, wait = way
    pipes, workers = [], []
    others = {name: v for name, v in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    with patch.dict(os.environ, others | (PASSIVE if wait == "passive" else SPIN), clear=True):
        for _ in range(2 if load == "two at once" else 1):
            pipe, theirs = _spawn.Pipe()
            arguments = (theirs, options.size, options.steps, count)
            workers.append(_spawn.Process(target=work, args=arguments, daemon=True))
            workers[-1].start()
            pipes.append(pipe)
    for pipe in pipes:
        pipe.recv()
    with busy(cores() if load == "busy loops" else 0):
        for pipe in pipes:
            pipe.send("go")
        told = [pipe.recv() for pipe in pipes]
    for worker in workers:
        worker.join()
    clock, processor = map(statistics.mean, zip(*told, strict=True))
    return clock, processor


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that only count."""
    loops = [_spawn.Process(target=loop, daemon=True) for _ in range(count)]
    for process in loops:
        process.start()
    try:
        yield
    finally:
        for process in loops:
            process.kill()
            process.join()


def runnable(way: Way, load: str) -> int:
    """Threads that want to compute at the same time."""
    return {"alone": way[0], "two at once": 2 * way[0], "busy loops": way[0] + cores()}[load]


def ratio(times: Times, base: Times, which: int) -> float:
    """The median over rounds."""
    return statistics.median(t[which] / b[which] for t, b in zip(times, base, strict=True))


def main() -> None:
    parser = study_parser("contention", __doc__)
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--steps", type=int, default=60, help="of a training")
    parser.add_argument("--rounds", type=int, default=3)
    options = parse(parser)
    if options.smoke:
        options.size, options.steps, options.rounds = 16, 3, 1
    one = (1, "spin")
    ways: list[Way] = [one, (max(2, cores()), "spin"), (max(2, cores()), "passive")]
    took: dict[tuple[Way, str], Times] = {key: [] for key in itertools.product(ways, LOADS)}
    for number in range(options.rounds):
        for way, load in took:
            took[way, load].append(seconds(way, load, options))
        print(f"round {number + 1} of {options.rounds} done, load {os.getloadavg()[0]:.1f}", flush=True)

    lines = []
    for way, load in took:
        slowdown, spent = (ratio(took[way, load], took[one, "alone"], which) for which in (0, 1))
        fair = ratio(took[way, load], took[way, "alone"], 0) / max(1.0, runnable(way, load) / cores())
        lines.append([*way, load, *(f"{figure:.2f}" for figure in (slowdown, fair, spent))])
    text = f"""# What other load does to a training

{made_by("contention", options)}
{options.steps} steps at {options.size} pixels, medians of {options.rounds} rounds.

- time: over that of the same training alone with one thread, in the same round.
- over fair: the time over what a fair scheduler gives, the time alone with as many threads times the threads
  for a core that want to compute.
- work: the processor's seconds over those of the training alone with one thread. What is above 1 is waiting
  that computes nothing; of all figures this one depends least on what else the machine does.

{markdown_table(["threads", "wait", "load", "time", "over fair", "work"], lines)}"""
    write_results(options, "contention", text)


if __name__ == "__main__":
    main()
