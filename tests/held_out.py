"""Held-out images, and what is measured with and without them."""

from __future__ import annotations

from dataclasses import replace

from ssad_hpo import controlled_data
from ssad_hpo.criteria import CRITERIA, error_of
from ssad_hpo.task import Task

# Criteria that every task has images for.
ALWAYS = tuple(name for name, row in CRITERIA.items() if "held_out" not in row.needs)
# What is measured on a task without held-out images.
MEASURED_ALWAYS = {*ALWAYS, *(error_of(n) for n in ALWAYS if CRITERIA[n].error is not None), "separability"}


def without_held_out(task: Task) -> Task:
    return replace(task, held_out=None)


def held_out_task(n_held_out: int = 13, image_size: int = 16) -> Task:
    return controlled_data(image_size=image_size, n_train=24, n_unlabeled=16, n_held_out=n_held_out).task
