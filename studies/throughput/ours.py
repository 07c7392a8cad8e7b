"""The library's training path, and where its time goes."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ssad_hpo import judgement
from ssad_hpo.augment import drawing
from ssad_hpo.data import builtin, load
from ssad_hpo.detector import Checkpoint, Detector, train, training
from ssad_hpo.encoder import Network
from ssad_hpo.task import Augmentation, Training
from studies.lab.searching import trained
from studies.throughput.cell import PATCH, Cell, Run, peak_mib

TRIAL_TASK = "gravel/cutavg"


def our_checkpoints(cell: Cell, images: Tensor, steps: int) -> Iterator[Checkpoint]:
    """The library's own training loop, stopping after one step of warm-up and after `steps` more."""
    settings = replace(cell.training, steps=1 + steps, evaluate_at=(1 / (1 + steps), 1.0))
    return train(images, Augmentation(cell.augmentation, PATCH), settings, cell.device)


def run_ours(cell: Cell, images: Tensor, steps: int) -> Run:
    checkpoints = our_checkpoints(cell, images, steps)
    next(checkpoints)
    started = time.perf_counter()
    next(checkpoints)  # its mean loss waits for the device
    return Run(time.perf_counter() - started, {}, peak_mib(cell.device))


def split_ours(cell: Cell, images: Tensor, steps: int) -> Run:
    """As `run_ours`, with a stopwatch around the calls that the training loop makes.

    The stopwatch waits for the device before and after each part, so that on a GPU this is slower than
    the undisturbed loop: shares are read from here, never speeds.
    """
    parts: dict[str, float] = defaultdict(float)
    watched = [
        ("data: uint8 to float", training, "to_float"),
        ("jitter", training, "jitter"),
        ("augmentation", drawing, "apply"),
        ("forward", Network, "forward"),
        ("backward", Tensor, "backward"),
        ("optimiser", torch.optim.SGD, "step"),
    ]
    with stopwatch(parts, cell.device, watched):
        checkpoints = our_checkpoints(cell, images, steps)
        next(checkpoints)
        parts.clear()
        started = time.perf_counter()
        next(checkpoints)
        seconds = time.perf_counter() - started
    rest = {"rest: indexing, loss, schedule": seconds - sum(parts.values())}
    return Run(seconds, {**parts, **rest}, peak_mib(cell.device))


def run_trial(device: str, steps: int) -> Run:
    """One trial at the demo's settings (only `steps` can differ): training, evaluations, density, scores."""
    import sklearn.covariance  # noqa: F401  a process imports it once, not once a trial

    task = load(builtin(TRIAL_TASK))
    parts: dict[str, float] = defaultdict(float)
    watched = [
        *(("embeddings", Detector, name) for name in ("learn", "look", "embed_augmented")),
        ("criteria", judgement, "evaluate_all"),
        ("density fit", Detector, "fit_density"),
        ("scores", Detector, "density_score"),
    ]
    with stopwatch(parts, device, watched):
        started = time.perf_counter()
        augmentation, settings = Augmentation("cutavg", PATCH), Training(steps=steps)
        trained(task, augmentation, settings, device)
        seconds = time.perf_counter() - started
    return Run(seconds, {"training": seconds - sum(parts.values()), **parts}, peak_mib(device))


@contextlib.contextmanager
def stopwatch(parts: dict[str, float], device: str, watched: list[tuple[str, Any, str]]) -> Iterator[None]:
    """Add the seconds spent in functions of the library, given as (part, owner, name), to `parts`.

    Raises:
        RuntimeError: if one of them was never called: the library does that part elsewhere by now.
    """

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            wait_for(device)
            started = time.perf_counter()
            result = function(*args, **kwargs)
            wait_for(device)
            parts[part] += time.perf_counter() - started
            return result

        return call

    with contextlib.ExitStack() as stack:
        for part, owner, name in watched:
            stack.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
        yield
    if missed := [part for part, _, _ in watched if part not in parts]:
        raise RuntimeError(f"stopwatch: expected calls of {', '.join(missed)}, got none")


def wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
