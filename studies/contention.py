"""What other load on a machine does to a training, by its threads and by how these wait for each other.

    python studies/contention.py            # some 10 minutes

A training is timed alone, as two at once, and beside a busy loop on each core; with one thread and with one
on each core; where idle threads spin before they sleep, as OpenMP has it, and where they sleep at once
(OMP_WAIT_POLICY=passive). Every round has all of these in turns. Printed are medians of

    slowdown: the time over that of the same training alone with one thread, in the same round;
    over fair: the time over what a fair scheduler would give: the time alone, times runnable threads a core;
    work: the processor's seconds over those of a training alone with one thread. What is above 1 is waiting
        that computes nothing; this figure hardly depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ssad_hpo.augment import Augmentation
from ssad_hpo.detector import train
from ssad_hpo.numerics import threads
from ssad_hpo.task import Training

LOADS = ("alone", "two at once", "busy loops")


@dataclass(frozen=True)
class Way:
    """How a training computes: with how many threads, and how they wait."""

    threads: int
    wait: str

    @property
    def environment(self) -> dict[str, str]:
        """Spinning is what OpenMP does where nothing is set."""
        others = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
        return {**others, **({"OMP_WAIT_POLICY": "passive"} if self.wait == "passive" else {})}


def work(size: int, steps: int, count: int) -> None:
    """In a process of its own: one training for warm-up, then one on demand, as soon as a line comes."""
    images = torch.randint(256, (64, 1, size, size), generator=torch.Generator().manual_seed(0))
    training = Training(steps=steps, evaluate_at=(1.0,))
    with threads(count):
        for _ in train(images.to(torch.uint8), Augmentation("cutout"), Training(steps=2, evaluate_at=(1.0,))):
            pass
        print("ready", flush=True)
        sys.stdin.readline()
        began, spent = time.perf_counter(), time.process_time()
        for _ in train(images.to(torch.uint8), Augmentation("cutout"), training):
            pass
        print(time.perf_counter() - began, time.process_time() - spent, flush=True)


def seconds(way: Way, load: str, options: argparse.Namespace) -> tuple[float, float]:
    """(of the clock, of the processor) of one training under a load; of two at once their means."""
    command = [sys.executable, __file__, "--work", str(way.threads)]
    command += ["--size", str(options.size), "--steps", str(options.steps)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [
        subprocess.Popen(command, env=way.environment, **pipes)
        for _ in range(2 if load == "two at once" else 1)
    ]
    for worker in workers:
        worker.stdout.readline()
    with busy(options.cores if load == "busy loops" else 0):
        for worker in workers:
            worker.stdin.write("\n")
            worker.stdin.flush()
        told = [tuple(map(float, worker.communicate()[0].split())) for worker in workers]
    clock, processor = map(statistics.mean, zip(*told, strict=True))
    return clock, processor


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that only count."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def runnable(way: Way, load: str, cores: int) -> int:
    """Threads that want to compute at the same time."""
    return {"alone": way.threads, "two at once": 2 * way.threads, "busy loops": way.threads + cores}[load]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--steps", type=int, default=150, help="of a training")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)  # threads: this is a worker
    options = parser.parse_args()
    if options.work:
        work(options.size, options.steps, options.work)
        return
    options.cores = os.cpu_count() or 1
    ways = [Way(1, "spin"), Way(options.cores, "spin"), Way(options.cores, "passive")]
    took: dict[tuple[Way, str], list[tuple[float, float]]] = {
        key: [] for key in itertools.product(ways, LOADS)
    }
    for number in range(options.rounds):
        for way, load in took:
            took[way, load].append(seconds(way, load, options))
        print(f"round {number + 1} of {options.rounds} done", file=sys.stderr, flush=True)

    print(f"{options.size} px, {options.steps} steps, {options.cores} cores, medians of {options.rounds}\n")
    print("| threads | wait | load | slowdown | over fair | work |\n| --- | --- | --- | --- | --- | --- |")
    for way, load in took:
        slowdown, work = (ratio(took[way, load], took[ways[0], "alone"], which) for which in (0, 1))
        share = max(1.0, runnable(way, load, options.cores) / options.cores)
        fair = ratio(took[way, load], took[way, "alone"], 0) / share
        print(f"| {way.threads} | {way.wait} | {load} | {slowdown:.2f} | {fair:.2f} | {work:.2f} |")


def ratio(times: list[tuple[float, float]], base: list[tuple[float, float]], which: int) -> float:
    """The median over rounds."""
    return statistics.median(t[which] / b[which] for t, b in zip(times, base, strict=True))


if __name__ == "__main__":
    main()
