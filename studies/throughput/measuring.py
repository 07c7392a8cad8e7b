"""Both pipelines in turns, each in a process of its own, and what the machine could do at best."""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from ssad_hpo.encoder import Network
from studies.throughput.cell import Cell, Run
from studies.throughput.ours import run_ours, split_ours, wait_for
from studies.throughput.plain import run_plain

PIPELINES = ("ours", "plain")
Peaks = dict[tuple[str, str], float]  # (device, precision) -> FLOP/s


@dataclass(frozen=True)
class Result:
    """All that was measured in a cell.

    Attributes:
        steps: of every run.
        runs: for each pipeline, in the order in which they took turns.
        split: one more run of ours, with a stopwatch in it.
        flops: arithmetic of one image in one training step.
    """

    cell: Cell
    steps: int
    runs: dict[str, list[Run]]
    split: Run
    flops: float

    def speeds(self, pipeline: str) -> list[float]:
        """Images per second; both halves of a batch count."""
        return [2 * self.cell.batch * self.steps / run.seconds for run in self.runs[pipeline]]

    def share_of_peak(self, pipeline: str, peaks: Peaks) -> float:
        peak = peaks[self.cell.device, self.cell.precision(pipeline)]
        return statistics.median(self.speeds(pipeline)) * self.flops / peak


def measure(cell: Cell, repeats: int, seconds: float, workers: int) -> Result:
    """Both pipelines in turns, with the number of steps that the slower one does in about `seconds`."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, {}
    for pipeline in PIPELINES:
        pipes[pipeline], theirs = context.Pipe()
        processes[pipeline] = context.Process(target=serve, args=(pipeline, cell, workers, theirs))
        processes[pipeline].start()
        theirs.close()  # so that a process that died is an error here, not a wait without end

    def ask(pipeline: str, what: str, steps: int) -> Run:
        try:
            pipes[pipeline].send((what, steps))
            return pipes[pipeline].recv()
        except (EOFError, OSError) as error:
            processes[pipeline].join()
            code = processes[pipeline].exitcode
            raise RuntimeError(f"{cell}: the process of {pipeline} ended with exit code {code}") from error

    try:
        slowest = max(ask(pipeline, "run", 1).seconds for pipeline in PIPELINES)
        if slowest < seconds / 5:  # first steps are slow, so short ones deserve a second look
            steps = round(seconds / 5 / slowest)
            slowest = max(ask(pipeline, "run", steps).seconds for pipeline in PIPELINES) / steps
        steps = max(1, round(seconds / slowest))
        runs: dict[str, list[Run]] = {pipeline: [] for pipeline in PIPELINES}
        for _ in range(repeats):
            for pipeline in PIPELINES:
                runs[pipeline].append(ask(pipeline, "run", steps))
        split = ask("ours", "split", steps)
    finally:
        for pipeline in PIPELINES:
            pipes[pipeline].close()
            processes[pipeline].join()
    return Result(cell, steps, runs, split, flops_per_image(cell.network(), cell.image_size))


def serve(pipeline: str, cell: Cell, workers: int, pipe: Connection) -> None:
    """A process for one pipeline in one cell: measures as many steps as it is asked for, until hung up."""
    images = cell.images()
    with contextlib.suppress(EOFError):
        while True:
            what, steps = pipe.recv()
            if pipeline == "plain":
                run = run_plain(cell, images, steps, workers)
            elif what == "split":
                run = split_ours(cell, images, steps)
            else:
                run = run_ours(cell, images, steps)
            pipe.send(run)


def flops_per_image(network: Network, image_size: int) -> float:
    """Arithmetic of one image in one training step: convolutions and matrix products, both directions."""
    gradients = {torch.ops.aten.convolution_backward: _flops_of_gradients}
    with FlopCounterMode(display=False, custom_mapping=gradients) as counter:
        network(torch.rand(2, 3, image_size, image_size)).sum().backward()
    return counter.get_total_flops() / 2


def _flops_of_gradients(
    out: Sequence[int],
    images: Sequence[int],
    weight: Sequence[int],
    bias: object,
    stride: object,
    padding: object,
    dilation: object,
    transposed: bool,
    output_padding: object,
    groups: int,
    wanted: Sequence[bool],
    **_: object,
) -> int:
    """Of a convolution: each gradient that is wanted costs what its forward pass does.

    PyTorch's own formula leaves groups out, so that a depthwise gradient counts once for every channel.
    """
    return sum(wanted[:2]) * conv_flop_count(list(images), list(weight), list(out), transposed)


def matrix_product(device: str, precision: str, size: int) -> float:
    """FLOP/s that a product of two square matrices reaches, the best of five."""
    # cuDNN computes float32 convolutions in TF32 by default; the product must be allowed the same.
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    a, b = torch.rand(2, size, size, device=device).to(getattr(torch, precision))
    seconds = []
    for _ in range(5):
        wait_for(device)
        started = time.perf_counter()
        a @ b
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)
