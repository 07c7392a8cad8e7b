"""What runs in a trial: train a detector, report its criteria, leave everything on the checkpoints."""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import tune

from ssad_hpo.bounds import is_number
from ssad_hpo.detector import untrained_network
from ssad_hpo.encoder import NONE, NamedEncoder, given_weights
from ssad_hpo.files import FileError, check_archive, reading
from ssad_hpo.judgement import evaluations
from ssad_hpo.quiet import without_warnings
from ssad_hpo.raytune.ledger import CHECKPOINT
from ssad_hpo.search import Objective
from ssad_hpo.search.store import write_trial
from ssad_hpo.task import DetectorError, Search, Task, Training

KEPT = "kept"  # the folder of a last checkpoint with scores, embeddings and detector
_PROGRESS_FILE = "progress.pt"
_MOST_BYTES = 64 * 2**30


# What a node is to blame for, and no candidate.
_OF_THE_NODE = (OSError, MemoryError, torch.OutOfMemoryError)


def trainable(objective: Objective) -> Callable[[dict[str, Any]], None]:
    """A function trainable for `tune.Tuner`, with images and pretrained weights once in Ray's object store.

    Its configuration is what `SearchSpace.suggest` draws: "augmentation" and "KIND.NAME". At each
    evaluation step it reports the criteria, "loss" and "step" with a checkpoint, from which Ray goes on
    elsewhere if the worker dies. A trial that fails reports a criterion of nan, its "status" and its
    "reason", and ends well as far as Ray is concerned, which is not to try it again. It takes as many
    threads as `tune.with_resources` gives it CPUs, and trains where the objective trains.
    """
    function: Callable[[dict[str, Any]], None] = tune.with_parameters(
        train_detector,
        task_name=objective.task.name,
        search=objective.search,
        training=objective.training,
        device=str(objective.device),
        weights=weights_of(objective),
        **arrays_of(objective.task),
    )
    return function


def train_detector(
    config: dict[str, Any],
    task_name: str,
    search: Search,
    training: Training,
    device: str,
    train: np.ndarray,
    unlabeled: np.ndarray,
    held_out: np.ndarray | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
) -> None:
    """One trial; see `trainable`."""
    cpus = tune.get_context().get_trial_resources().required_resources.get("CPU", 1)
    torch.set_num_threads(max(1, int(cpus)))
    reports: list[dict[str, Any]] = []
    try:
        task = task_of(task_name, train, unlabeled, held_out)
        with taken_weights(training, weights):
            _train(config, task, search, training, device, reports)
    except Exception as error:
        # The border where a sweep must go on: whatever a trial raises fails this trial, with its reason. What
        # is a fault of the node's may be tried again.
        ours = isinstance(error, DetectorError)
        tune.report(
            {
                search.criterion: math.nan,
                "step": reports[-1]["step"] if reports else 0,
                "status": "interrupted" if isinstance(error, _OF_THE_NODE) else "failed",
                "reason": str(error)
                if ours
                else f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
            }
        )


def _train(
    config: dict[str, Any],
    task: Task,
    search: Search,
    training: Training,
    device: str,
    reports: list[dict[str, Any]],
) -> None:
    state = _take_up(config, training, reports)
    before = reports[-1]["seconds"] if reports else 0.0
    if reports and state is None:
        return  # it was through already
    started = time.monotonic()
    augmentation = search.space.augmentation(config)
    for evaluation in evaluations(task, augmentation, training, device, state):
        with tempfile.TemporaryDirectory(prefix="ssad_hpo-") as name:
            folder = Path(name)
            last = evaluation.step == training.steps
            if last:
                (folder / KEPT).mkdir()
                write_trial(folder / KEPT, evaluation.judged, evaluation.detector)
            seconds = round(before + time.monotonic() - started, 3)
            reports.append({**evaluation.metrics, "step": evaluation.step, "seconds": seconds})
            saved = {"reports": reports, "state": None if last else evaluation.state}
            buffer = io.BytesIO()  # torch's own writer does not say that a disk is full
            torch.save(saved, buffer)
            (folder / _PROGRESS_FILE).write_bytes(buffer.getbuffer())
            # Where a scheduler stops a trial, this does not return: what it leaves is on the checkpoint.
            try:
                tune.report(reports[-1], checkpoint=tune.Checkpoint.from_directory(folder))
            except RuntimeError as error:  # Ray's way to say that this node does not reach the checkpoints
                raise OSError(f"{' '.join(str(error).split()):.600}") from error


def _take_up(
    config: dict[str, Any], training: Training, reports: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Go on from a checkpoint: say again what was reported up to it, and give the training's state.

    The checkpoint is this trial's own, after its worker died, or that of the trial which this one repeats,
    after the driver died. None where there is none, or nothing is left to train.
    """
    checkpoint = tune.get_checkpoint() or (
        tune.Checkpoint(config[CHECKPOINT]) if CHECKPOINT in config else None
    )
    if checkpoint is None:
        return None
    try:
        with checkpoint.as_directory() as folder:
            told, state = read_progress(Path(folder))
            for report in told:
                last = report["step"] == training.steps
                reports.append(report)
                tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder) if last else None)
    except (FileNotFoundError, FileError):
        return None  # the earlier attempt's files are gone or damaged: from the start
    return state


def read_progress(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The reports of a trial up to a checkpoint, and the state of its training; None at its end.

    Raises:
        FileError: for a file that `trainable` did not write. OSError: if it cannot be opened.
    """
    path = folder / _PROGRESS_FILE
    with reading(path, "cannot be read as a trial's checkpoint", "remove it, to begin the trial anew"):
        check_archive(path, _MOST_BYTES)
        # weights_only: what others may write is not unpickled.
        saved = torch.load(path, map_location="cpu", weights_only=True)
        reports, state = saved["reports"], saved["state"]
        if not reports or not isinstance(state, dict | None):
            raise ValueError("expected reports and a state")
        if not all(is_number(report[name]) for report in reports for name in ("step", "seconds")):
            raise ValueError("expected reports with a step and seconds")
        return reports, state


def arrays_of(task: Task) -> Mapping[str, np.ndarray]:
    """The images of a task as arrays, which alone Ray lays into shared memory that a node's workers read."""
    return {name: images.numpy() for name, images in task.sets().items()}


def weights_of(objective: Objective) -> Mapping[str, np.ndarray] | None:
    """Pretrained weights of the encoder as this process has them, for `taken_weights`; None without any."""
    training = objective.training
    if training.weights == NONE:
        return None
    channels, height, width = objective.task.train.shape[1:]
    encoder = untrained_network(training, (channels, height, width)).encoder
    assert isinstance(encoder, NamedEncoder)
    # Ray shares the memory of arrays that are in order, which the network's channels last are not.
    return {name: tensor.cpu().contiguous().numpy() for name, tensor in encoder.model.state_dict().items()}


def taken_weights(
    training: Training, weights: Mapping[str, np.ndarray] | None
) -> contextlib.AbstractContextManager[None]:
    """Trainings inside begin with the driver's weights, whatever this node has, or has not, by their name."""
    if weights is None:
        return contextlib.nullcontext()
    tensors = {name: _tensor(array) for name, array in weights.items()}
    return given_weights(training.encoder, training.weights, tensors)


def task_of(name: str, train: np.ndarray, unlabeled: np.ndarray, held_out: np.ndarray | None = None) -> Task:
    """A task of images in Ray's shared memory, which are not copied."""
    unseen = None if held_out is None else _tensor(held_out)
    return Task(name, _tensor(train), _tensor(unlabeled), unseen)


def _tensor(array: np.ndarray) -> torch.Tensor:
    # Shared memory is read-only, and nothing writes to a task's images or to given weights.
    with without_warnings(UserWarning, ".*not writable"):
        return torch.from_numpy(array)
