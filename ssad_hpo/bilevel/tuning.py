"""The tuning: one starting point after the other, each trained, judged and compared without labels."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ssad_hpo.augment import check_fits
from ssad_hpo.bilevel.checkpoint import CheckpointFile
from ssad_hpo.bilevel.coordinates import Coordinates
from ssad_hpo.bilevel.descent import Descent, Problem
from ssad_hpo.bilevel.gradient import check_second_derivatives
from ssad_hpo.bilevel.result import (
    CollapseWarning,
    Cost,
    FailedStart,
    OuterStep,
    TunedStart,
    TuningResult,
    collapse_signs,
    last_training_loss,
)
from ssad_hpo.bilevel.settings import Tuning
from ssad_hpo.criteria import VALIDATION_LOSS, DegenerateError
from ssad_hpo.detector import Detector, check_device, untrained_network
from ssad_hpo.judgement import check_criterion, judge
from ssad_hpo.numerics import prepare_allocator
from ssad_hpo.task import DetectorError, Recorder, Task, Teller, Training

FAILURE = "failure"  # in the state of a starting point: why it could not be tuned to the end
# Steps and batches of the trials that the loss, the rates and batch norm's mode were chosen by.
DEFAULT_TRAINING = Training(steps=500, batch_size=64, evaluate_at=(1.0,))


def prepare(
    task: Task, tuning: Tuning, training: Training, device: str | torch.device = "cpu"
) -> tuple[Problem, list[Tensor]]:
    """What a tuning works with, and its starting points; whatever cannot be is found here, before it begins.

    Raises:
        ValueError: as `tune`.
    """
    check_device(device)
    tuning.warm_start_steps(training.steps)
    if tuning.choose_by != VALIDATION_LOSS:
        check_criterion("choose_by", tuning.choose_by, task)
    if training.frozen_stages or training.encoder_learning_rate is not None:
        raise ValueError(
            "training: a tuning moves the whole encoder at one rate, expected frozen_stages 0 and no "
            "encoder_learning_rate; leave them out, or search"
        )
    coordinates = Coordinates.of(tuning.augmentation)
    channels, height, width = task.train.shape[1:]
    # All pairs within the bounds fit, so every point of a trajectory does.
    check_fits(tuning.augmentation, height=height, width=width)
    starts = [coordinates.start(start) for start in tuning.starts]
    # An encoder that cannot be, or not with this order, says so now.
    network = untrained_network(training, (channels, height, width))
    if tuning.order == 2 and training.encoder != "small":
        check_second_derivatives(network, (channels, height, width))
    prepare_allocator(torch.device(device), height * width)
    if training.precision == "auto":
        training = replace(training, precision="float32")
    return Problem(task, coordinates, tuning, training, torch.device(device)), starts


def tune(
    task: Task,
    tuning: Tuning,
    training: Training | None = None,
    *,
    device: str | torch.device = "cpu",
    recorder: Recorder | None = None,
    checkpoint: str | Path | None = None,
    keep: Callable[[int, TunedStart | FailedStart], None] | None = None,
) -> TuningResult:
    """Learn an augmentation's hyperparameters by gradient while the detector trains (ST-SSAD).

    Training steps alternate with steps of the hyperparameters down the validation loss of train,
    augmented and unlabeled images (see `bilevel_gradient`). Several starting points run in turn; the one
    whose finished detector is lowest in `tuning.choose_by` is kept. One that diverges or collapses on its
    way ends there, as a `FailedStart`, and the others go on. Labels have no part in it.

    Args:
        task: images, without labels.
        tuning: what is tuned, and how.
        training: the detector; `DEFAULT_TRAINING` if None. `steps` are those of one starting point, its
            warm start included; `evaluate_at` has no use; `seed` decides everything that is drawn.
            The precision "auto" is float32; with "bfloat16" the steps of the hyperparameters stay in
            float32.
        device: where to compute.
        recorder: hears of every starting point as a trial, keyed by its index.
        checkpoint: a file that progress is written to; if it exists, the tuning goes on from it and ends
            with the same result, bit for bit, as one that was not interrupted.
        keep: given the index of every starting point and what became of it as soon as it is in the
            checkpoint; after a resume those that were finished before as well.

    Warns:
        CollapseWarning: if the kept starting point shows a sign of collapse (each is also in `warnings` of
            its `TunedStart`), and for every starting point that failed.

    Raises:
        ValueError: for an augmentation with nothing to tune or patches that do not fit, a starting point
            outside the bounds, too few steps, a device or encoder that cannot be, or another tuning's
            checkpoint.
        DetectorError: if every starting point diverged or collapsed, or the shared warm start did; it names
            the hyperparameters.
    """
    problem, starts = prepare(task, tuning, training or DEFAULT_TRAINING, device)
    file = CheckpointFile(None if checkpoint is None else Path(checkpoint), problem, starts)
    tell = Teller(recorder, task=task.name)
    _share_warm_start(problem, starts[0], file)
    ended: list[TunedStart | FailedStart] = []
    for index, start in enumerate(starts):
        descent = Descent(problem, start)
        if index < len(file.progress.finished):
            with file.reading():
                state = file.progress.finished[index]
                descent.load(state)
                reason = state.get(FAILURE)
            ended.append(_finish(descent, start) if reason is None else _failed(descent, start, reason))
        else:
            ended.append(_descend(descent, start, index, file, tell))
        if keep is not None:
            keep(index, ended[-1])

    warm_start = file.progress.warm_start
    with file.reading():
        shared = Cost() if warm_start is None else Cost(**warm_start["cost"])
    result = TuningResult(tuple(ended), tuning.choose_by, sum((end.cost for end in ended), shared))
    failed = [
        f"start {index}: {end.reason}" for index, end in enumerate(ended) if isinstance(end, FailedStart)
    ]
    if not result.tuned:
        raise DetectorError(f"no starting point could be tuned: {'; '.join(failed)}")
    for sign in (*failed, *result.warnings):
        warnings.warn(sign, CollapseWarning, stacklevel=2)
    return result


def _share_warm_start(problem: Problem, start: Tensor, file: CheckpointFile) -> None:
    """Warm up once for all starting points, if they share it, or what is left of that."""
    if problem.tuning.warm_start_on != "range" or not problem.warm:
        return
    descent = Descent(problem, start)
    if file.progress.warm_start is not None:
        with file.reading():
            descent.load(file.progress.warm_start)
    for _ in _warm_up(descent):
        file.progress.warm_start = copy.deepcopy(descent.state())
        file.save()


def _descend(
    descent: Descent, start: Tensor, index: int, file: CheckpointFile, tell: Teller
) -> TunedStart | FailedStart:
    """Bring a starting point to its end, from where an earlier process left it, if one did."""
    progress, ended_by = file.progress, {}
    with file.reading():
        if progress.current is not None:
            descent.load(progress.current)
        elif progress.warm_start is not None:
            descent.load_warm_start(progress.warm_start)
    tell.start(index, descent.problem.coordinates.at(start))
    ended: TunedStart | FailedStart
    try:
        for outer in _steps(descent, file):
            losses = {"training_loss": outer.training_loss, "validation_loss": outer.validation_loss}
            tell.progress(index, outer.step, {**outer.hyperparameters, **losses})
        ended = _finish(descent, start)
        tell.end(index, "complete", _metrics(ended))
    except DetectorError as error:
        tell.failure(index, error)
        ended, ended_by = _failed(descent, start, str(error)), {FAILURE: str(error)}
    except BaseException as error:
        tell.failure(index, error)
        raise
    progress.finished.append({**descent.state(), **ended_by})
    progress.current = None
    file.save()
    return ended


def _steps(descent: Descent, file: CheckpointFile) -> Iterator[OuterStep]:
    """Every step of the hyperparameters, with checkpoints on the way."""
    tuning = descent.problem.tuning
    for _ in _warm_up(descent):
        file.progress.current = descent.state()
        file.save()
    for outer in descent.train(until=descent.problem.training.steps):
        yield outer
        if len(descent.trajectory) % tuning.checkpoint_every == 0:
            file.progress.current = descent.state()
            file.save()


def _warm_up(descent: Descent) -> Iterator[None]:
    """What is left of a warm start, in stretches as long as those between two checkpoints."""
    stretch = descent.problem.tuning.checkpoint_every * descent.problem.tuning.detector_steps
    while descent.step < descent.problem.warm:
        for _ in descent.train(until=min(descent.step + stretch, descent.problem.warm)):
            pass  # no step of the hyperparameters comes before the end of the warm start
        yield


def _failed(descent: Descent, start: Tensor, reason: str) -> FailedStart:
    return FailedStart(descent.problem.coordinates.at(start), reason, descent.cost)


def _finish(descent: Descent, start: Tensor) -> TunedStart:
    """Judge the finished detector of a starting point, without labels and with hard edges."""
    began = time.monotonic()
    problem, augmentation = descent.problem, descent.augmentation
    task, tuning, training = problem.task, problem.tuning, problem.training
    channels, height, width = task.train.shape[1:]
    detector = Detector(descent.network.eval(), augmentation, training, (channels, height, width))
    judged = judge(detector, task, descent.step)
    sets = judged.embeddings
    try:
        validation_loss = float(tuning.loss_function(sets.train, sets.augmented, sets.unlabeled))
    except DegenerateError as error:
        raise DetectorError(f"collapsed at step {descent.step} under {augmentation}: {error}") from error
    unseen = len(sets.unlabeled) + (0 if sets.held_out is None else len(sets.held_out))
    passed = len(sets.train) + len(sets.augmented) + unseen
    if training.score == "classifier":
        passed += unseen
    trajectory = tuple(descent.trajectory)
    training_loss = last_training_loss(trajectory)
    signs = collapse_signs(problem.coordinates, descent.point, training_loss, tolerance=tuning.learning_rate)
    return TunedStart(
        start=problem.coordinates.at(start),
        augmentation=augmentation,
        trajectory=trajectory,
        detector=detector,
        judged=judged,
        training_loss=training_loss,
        validation_loss=validation_loss,
        warnings=signs,
        cost=descent.cost + Cost(forward=passed, seconds=time.monotonic() - began),
    )


def _metrics(tuned: TunedStart) -> dict[str, float]:
    """What is told of a starting point at its end.

    Not under the names of the trajectory: those are of mini-batches, and before the last step.
    """
    learned = {f"learned.{n}": float(v) for n, v in tuned.augmentation.hyperparameters.items()}  # type: ignore[arg-type]
    return {**tuned.criteria, **learned, "finished.validation_loss": tuned.validation_loss}
