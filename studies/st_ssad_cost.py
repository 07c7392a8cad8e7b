"""What a step of ST-SSAD's hyperparameters costs beside a training step, and whether memory stays flat.

    python -m studies.st_ssad_cost             ten minutes on one core
    python -m studies.st_ssad_cost --smoke     seconds

A plain training step, one with a step of the hyperparameters by first and one by second order are taken in
turns in one process, so that whatever disturbs the machine disturbs all; the middle of their times counts.
All else is as in `Tuning()` and `DEFAULT_TRAINING`, in float32. Then one tuning does 2,000 steps of the
hyperparameters by second order, one at every training step, and its resident memory is read on the way.
Writes st_ssad_cost.md.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ssad_hpo.bilevel import DEFAULT_TRAINING, Tuning, prepare
from ssad_hpo.bilevel.descent import Descent
from ssad_hpo.task import SearchSpace, Task, Training
from studies.lab.options import parse, study_parser
from studies.lab.results import made_by, markdown_table, write_results

SETTINGS = (  # encoder, pixels, kind
    *(("small", 32, kind) for kind in ("cutdiff", "cutpaste", "rotation")),
    ("small", 64, "cutdiff"),
    ("resnet18", 32, "cutdiff"),
)
READ_AT: tuple[int, ...] = (100, 500, 1000, 1500, 2000)


def random_task(pixels: int) -> Task:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (384, 1, pixels, pixels), generator=generator).to(torch.uint8)
    return Task("random", images[:256], images[256:])


def started(task: Task, tuning: Tuning, training: Training) -> Descent:
    first = prepare(task, tuning, training, "cpu")[0]
    return Descent(first.problem, first.point)


def milliseconds(task: Task, kind: str, training: Training, rounds: int) -> dict[str, float]:
    """The median time of each sort of step, after one to warm up."""
    first, second = (started(task, Tuning(SearchSpace(kind), order=order), training) for order in (1, 2))
    sorts: dict[str, Callable[[], object]] = {
        "plain": lambda: second._training_step(second._training_batch()),
        "first": lambda: first._outer_step(first._training_batch()),
        "second": lambda: second._outer_step(second._training_batch()),
    }
    times: dict[str, list[float]] = {name: [] for name in sorts}
    for _ in range(rounds + 1):
        for name, step in sorts.items():
            began = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def memory(task: Task, training: Training, read_at: tuple[int, ...]) -> dict[int, float]:
    """Resident MiB after so many steps of the hyperparameters."""
    tuning = Tuning(SearchSpace("cutdiff"), order=2, detector_steps=1, warm_start=0.0)
    run = started(task, tuning, replace(training, steps=read_at[-1]))
    resident = {}
    for done, _ in enumerate(run.train(until=read_at[-1]), 1):
        if done in read_at:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident[done] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return resident


def main() -> None:
    parser = study_parser("st_ssad_cost", __doc__)
    parser.add_argument("--rounds", type=int, default=40, help="of one step of each sort")
    options = parse(parser)
    torch.set_num_threads(1)
    training = replace(DEFAULT_TRAINING, evaluate_at=(1.0,), precision="float32")
    settings, read_at = SETTINGS, READ_AT
    if options.smoke:
        training, settings = replace(training, batch_size=4, width=2), (("small", 16, "cutdiff"),)
        read_at, options.rounds = (2, 4), 2

    lines = []
    for encoder, pixels, kind in settings:
        taken = milliseconds(random_task(pixels), kind, replace(training, encoder=encoder), options.rounds)
        plain = taken.pop("plain")
        ratios = [f"{value:.0f}, {value / plain:.2f}×" for value in taken.values()]
        lines.append([encoder, pixels, kind, f"{plain:.0f}", *ratios])
        print(*lines[-1], flush=True)
    titles = ["encoder", "px", "tuned", "training step, ms", "first order", "second order"]
    resident = memory(random_task(settings[0][1]), training, read_at)
    growth = resident[read_at[-1]] / resident[read_at[0]] - 1
    read = ", ".join(f"{mib:.0f} MiB after {done:,}" for done, mib in resident.items())

    tuning = Tuning()
    text = f"""# What a step of ST-SSAD's hyperparameters costs

{made_by("st_ssad_cost", options)}
One thread, medians of {options.rounds} steps of each sort, taken in turns. A training step has
{training.batch_size} + {training.batch_size} images. Steps of the hyperparameters include the training step
that they come with; {tuning.virtual_images} +
{tuning.virtual_images} images in the virtual step, {tuning.validation_train} + {tuning.validation_train} +
{tuning.validation_unlabeled} in the validation loss.

{markdown_table(titles, lines)}
Memory, small encoder at {settings[0][1]} pixels: {read}
steps of the hyperparameters: {growth:+.1%} from the first to the last of these.
"""
    write_results(options, "st_ssad_cost", text)


if __name__ == "__main__":
    main()
