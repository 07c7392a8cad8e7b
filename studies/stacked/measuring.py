"""Which cells are measured, and how: all ways of a group in turns, in this process or in two others."""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing.synchronize import Barrier

import torch

from studies.stacked.ways import Cell, Trainer

Groups = list[list[Cell]]
Speeds = dict[Cell, list[float]]

_trainer = functools.cache(Trainer)
_start: Barrier | None = None


def begin_together(barrier: Barrier) -> None:
    global _start
    _start = barrier


def steps_per_second(cell: Cell, seconds: float, first: int = 0) -> float:
    """Detector-steps a second of this process; worker processes of `begin_together` begin together."""
    torch.set_num_threads(cell.threads)
    trainer = _trainer(replace(cell, threads=1), first)
    trainer.step()  # warm-up
    finish(cell)
    if _start is not None:
        _start.wait(timeout=60)
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        trainer.step()
        steps += cell.detectors
    finish(cell)
    return steps / (time.perf_counter() - began)


def finish(cell: Cell) -> None:
    if cell.device == "cuda":
        torch.cuda.synchronize()


def cells(options: argparse.Namespace) -> Groups:
    """For each size and precision the ways that take turns; the first is the ordinary one."""
    groups, threads = [], options.threads
    for size, precision in itertools.product(options.sizes, ("float32", "bfloat16")):
        one = Cell(size, precision, "ordinary", batch=options.batch, device=options.device)
        group = [*(replace(one, threads=n) for n in threads), replace(one, processes=2)]
        # Under bf16 autocast, vmap's batch norm refuses float32 statistics (PyTorch 2.14).
        for way in ("vmap", "grouped") if precision == "float32" else ("grouped",):
            ways = itertools.product(options.detectors, threads)
            group += [replace(one, way=way, detectors=k, threads=n) for k, n in ways]
        groups.append(group)
    return groups


def measured(groups: Groups, repeats: int, seconds: float) -> Speeds:
    context = multiprocessing.get_context("spawn")
    speeds: Speeds = {cell: [] for group in groups for cell in group}
    with ProcessPoolExecutor(2, context, begin_together, (context.Barrier(2),)) as pool:
        for group, repeat in itertools.product(groups, range(-1, repeats)):
            for cell in reversed(group) if repeat % 2 else group:
                duration = seconds if repeat >= 0 else 0.0  # the first round is warm-up
                if cell.processes == 1:
                    speed = steps_per_second(cell, duration)
                else:
                    both = [pool.submit(steps_per_second, cell, duration, k) for k in range(2)]
                    speed = sum(future.result() for future in both)
                if repeat >= 0:
                    speeds[cell].append(speed)
            print(f"{group[0].size} px {group[0].precision}, repeat {repeat + 1}", flush=True)
    return speeds
