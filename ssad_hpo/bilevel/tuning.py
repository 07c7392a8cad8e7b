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
from ssad_hpo.bilevel.checkpoint import Progress, read_checkpoint, write_checkpoint
from ssad_hpo.bilevel.coordinates import Coordinates
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
from ssad_hpo.bilevel.run import Run, Setting
from ssad_hpo.bilevel.settings import Tuning
from ssad_hpo.criteria import DegenerateError, evaluate_all
from ssad_hpo.detector import Detector, check_device, untrained_network
from ssad_hpo.detector.numerics import prepare_allocator
from ssad_hpo.task import Augmentation, DetectorError, Recorder, Task, Training

FAILURE = "failure"  # in the state of a starting point: why it could not be tuned to the end
# Steps and batches of the trials that the loss, the rates and batch norm's mode were chosen by.
DEFAULT_TRAINING = Training(steps=500, batch_size=64)


def prepare(
    task: Task,
    augmentation: Augmentation,
    tuning: Tuning,
    training: Training,
    device: str | torch.device = "cpu",
) -> tuple[Setting, list[Tensor]]:
    """What a tuning works with, and its starting points; whatever cannot be is found here, before it begins.

    Raises:
        ValueError: as `tune`.
    """
    check_device(device)
    tuning.warm_start_steps(training.steps)
    coordinates = Coordinates.of(augmentation)
    channels, height, width = task.train.shape[1:]
    # All pairs within the bounds fit, so every point of a trajectory does.
    check_fits(augmentation, height=height, width=width)
    starts = [coordinates.start(start) for start in tuning.starts]
    # An encoder that cannot be, or not with this order, says so now.
    network = untrained_network(training, (channels, height, width))
    if tuning.order == 2 and training.encoder != "small":
        check_second_derivatives(network, (channels, height, width))
    prepare_allocator(torch.device(device), height * width)
    if training.precision == "auto":
        training = replace(training, precision="float32")
    return Setting(task, coordinates, tuning, training, torch.device(device)), starts


def tune(
    task: Task,
    augmentation: Augmentation | str,
    tuning: Tuning | None = None,
    training: Training | None = None,
    *,
    device: str | torch.device = "cpu",
    recorder: Recorder | None = None,
    checkpoint: str | Path | None = None,
    keep: Callable[[int, TunedStart | FailedStart], None] | None = None,
) -> TuningResult:
    """Learn an augmentation's hyperparameters by gradient while the detector trains [ST-SSAD].

    Training steps alternate with steps of the hyperparameters down the validation loss of train,
    augmented and unlabeled images (see `bilevel_gradient`). Several starting points run in turn; the one
    whose finished detector is lowest in `tuning.choose_by` is kept. One that diverges or collapses on its
    way ends there, as a `FailedStart`, and the others go on. Labels have no part in it.

    Args:
        task: images, without labels.
        augmentation: what to tune: hyperparameters given as ranges, within them; those given as numbers
            stay. A kind's name stands for its default ranges.
        tuning: how; `Tuning()` if None.
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
    tuning, training = tuning or Tuning(), training or DEFAULT_TRAINING
    augmentation = Augmentation(augmentation) if isinstance(augmentation, str) else augmentation
    setting, starts = prepare(task, augmentation, tuning, training, device)
    coordinates, training = setting.coordinates, setting.training

    file = None if checkpoint is None else Path(checkpoint)
    progress = Progress() if file is None else read_checkpoint(file, setting, starts)

    def save() -> None:
        if file is not None:
            write_checkpoint(file, setting, starts, progress)

    if tuning.warm_start_on == "range" and setting.warm:
        run = Run(setting, starts[0])
        if progress.warm_start is not None:
            run.load(progress.warm_start)
        for _ in _warm_up(run):
            progress.warm_start = copy.deepcopy(run.state())
            save()

    ended: list[TunedStart | FailedStart] = []
    for index, start in enumerate(starts):
        run = Run(setting, start)
        if index < len(progress.finished):
            run.load(progress.finished[index])
            reason = progress.finished[index].get(FAILURE)
            ended.append(_finish(run, start) if reason is None else _failed(run, start, reason))
        else:
            if progress.current is not None:
                run.load(progress.current)
            elif progress.warm_start is not None:
                run.load_warm_start(progress.warm_start)
            told = _Telling(recorder, str(index), task)
            told.start(coordinates.at(start))
            try:
                for _ in _warm_up(run):
                    progress.current = run.state()
                    save()
                for outer in run.train(until=training.steps):
                    told.progress(outer)
                    if len(run.trajectory) % tuning.checkpoint_every == 0:
                        progress.current = run.state()
                        save()
                tuned = _finish(run, start)
            except DetectorError as error:
                told.failure(error)
                ended.append(_failed(run, start, str(error)))
                progress.finished.append({**run.state(), FAILURE: str(error)})
            except BaseException as error:
                told.failure(error)
                raise
            else:
                told.end(tuned)
                ended.append(tuned)
                progress.finished.append(run.state())
            progress.current = None
            save()
        if keep is not None:
            keep(index, ended[-1])

    shared = Cost() if progress.warm_start is None else Cost(**progress.warm_start["cost"])
    result = TuningResult(tuple(ended), tuning.choose_by, sum((end.cost for end in ended), shared))
    failed = [
        f"start {index}: {end.reason}" for index, end in enumerate(ended) if isinstance(end, FailedStart)
    ]
    if not result.tuned:
        raise DetectorError(f"no starting point could be tuned: {'; '.join(failed)}")
    for sign in (*failed, *result.warnings):
        warnings.warn(sign, CollapseWarning, stacklevel=2)
    return result


def _warm_up(run: Run) -> Iterator[None]:
    """What is left of a run's warm start, in stretches as long as those between two checkpoints."""
    stretch = run.setting.tuning.checkpoint_every * run.setting.tuning.detector_steps
    while run.step < run.setting.warm:
        for _ in run.train(until=min(run.step + stretch, run.setting.warm)):
            pass  # no step of the hyperparameters comes before the end of the warm start
        yield


def _failed(run: Run, start: Tensor, reason: str) -> FailedStart:
    return FailedStart(run.setting.coordinates.at(start), reason, run.cost)


def _finish(run: Run, start: Tensor) -> TunedStart:
    """Judge the finished detector of a starting point, without labels and with hard edges."""
    began = time.monotonic()
    setting, augmentation = run.setting, run.augmentation
    task, shape = setting.task, setting.task.train.shape
    detector = Detector(run.network.eval(), augmentation, setting.training, (shape[1], shape[2], shape[3]))
    sets = detector.embed_task(task.train, task.unlabeled)
    try:
        criteria = evaluate_all(sets.train, sets.augmented, sets.unlabeled)
        validation_loss = float(setting.tuning.loss_function(sets.train, sets.augmented, sets.unlabeled))
    except DegenerateError as error:
        raise DetectorError(f"collapsed at step {run.step} under {augmentation}: {error}") from error
    detector.fit_density(sets.train)
    judged = len(sets.train) + len(sets.augmented) + len(sets.unlabeled)
    if setting.training.score == "density":
        scores = detector.density_score(sets.unlabeled)
    else:
        scores = detector.score(task.unlabeled)
        judged += len(task.unlabeled)
    if not scores.isfinite().all():
        raise DetectorError(f"diverged: scores are not finite under {augmentation}")
    trajectory = tuple(run.trajectory)
    training_loss = last_training_loss(trajectory)
    signs = collapse_signs(
        setting.coordinates, run.point, training_loss, tolerance=setting.tuning.learning_rate
    )
    return TunedStart(
        start=setting.coordinates.at(start),
        augmentation=augmentation,
        trajectory=trajectory,
        detector=detector,
        embeddings=sets,
        scores=scores,
        criteria=criteria,
        training_loss=training_loss,
        validation_loss=validation_loss,
        warnings=signs,
        cost=run.cost + Cost(forward=judged, seconds=time.monotonic() - began),
    )


class _Telling:
    """What a recorder, if there is one, hears of one starting point."""

    def __init__(self, recorder: Recorder | None, trial: str, task: Task) -> None:
        self.recorder, self.trial, self.task = recorder, trial, task

    def start(self, augmentation: Augmentation) -> None:
        if self.recorder is not None:
            params = {"augmentation": augmentation.kind, **augmentation.hyperparameters}
            tags = {"augmentation": augmentation.kind, "task": self.task.name}
            self.recorder.trial_started(self.trial, params, tags)

    def progress(self, outer: OuterStep) -> None:
        if self.recorder is not None:
            losses = {"training_loss": outer.training_loss, "validation_loss": outer.validation_loss}
            self.recorder.trial_progress(self.trial, outer.step, {**outer.hyperparameters, **losses})

    def end(self, tuned: TunedStart) -> None:
        if self.recorder is not None:
            # Not under the names of the trajectory: those are of mini-batches, and before the last step.
            learned = {f"learned.{n}": float(v) for n, v in tuned.augmentation.hyperparameters.items()}  # type: ignore[arg-type]
            finished = {"finished.validation_loss": tuned.validation_loss}
            self.recorder.trial_ended(self.trial, "complete", {**tuned.criteria, **learned, **finished})

    def failure(self, error: BaseException) -> None:
        if self.recorder is not None:
            failed = isinstance(error, DetectorError)
            reason = str(error) if failed else repr(error)
            self.recorder.trial_ended(self.trial, "failed" if failed else "interrupted", {}, reason)
