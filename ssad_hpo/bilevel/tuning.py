"""The tuning: one starting point after the other, each trained, judged and compared without labels."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from ssad_hpo.augment import check_fits
from ssad_hpo.bilevel.as_it_comes import AsItComes
from ssad_hpo.bilevel.checkpoint import CheckpointFile, advance, take_up, warm_up
from ssad_hpo.bilevel.coordinates import Coordinates
from ssad_hpo.bilevel.cost import Cost
from ssad_hpo.bilevel.gradient import check_second_derivatives
from ssad_hpo.bilevel.looking import first_look, take_up_look, tell_steps
from ssad_hpo.bilevel.problem import Problem, Start
from ssad_hpo.bilevel.result import (
    CollapseWarning,
    EndedStart,
    FailedStart,
    TunedStart,
    TuningResult,
    collapse_signs,
)
from ssad_hpo.bilevel.settings import INDIRECT_LOSSES, Tuning, fits_kind
from ssad_hpo.bilevel.standing import standing_of
from ssad_hpo.bilevel.ways import Way, way_of
from ssad_hpo.criteria import VALIDATION_LOSS
from ssad_hpo.detector import check_device, untrained_network
from ssad_hpo.encoder import NONE
from ssad_hpo.judgement import check_criterion, check_held_out
from ssad_hpo.numerics import check_surroundings, prepare_allocator
from ssad_hpo.task import DetectorError, Recorder, Task, Teller, Training

FAILURE = "failure"  # in the state of a starting point: why it could not be tuned to the end
# Steps and batches of the trials that the loss, the rates and batch norm's mode were chosen by.
DEFAULT_TRAINING = Training(steps=500, batch_size=64, evaluate_at=(1.0,))


def prepare(
    task: Task, tuning: Tuning, training: Training, device: str | torch.device = "cpu"
) -> list[Start]:
    """A tuning's starting points, with what they work on; whatever cannot be is found here, before it begins.

    Raises:
        ValueError: as `tune`.
    """
    check_surroundings()
    check_device(device)
    tuning.warm_start_steps(training.steps)
    if tuning.choose_by != VALIDATION_LOSS:
        check_criterion("choose_by", tuning.choose_by, task)
    if tuning.steps_before and training.weights == NONE:
        raise ValueError(
            "steps_before: an encoder without weights sees nothing before it trains; give it pretrained ones "
            "(weights), or 0"
        )
    if tuning.needs_held_out:
        check_held_out("loss", str(tuning.loss), task)
    channels, height, width = task.train.shape[1:]
    # An encoder that cannot be, or not with this order, says so now.
    places = [(Coordinates.of(augmentation), augmentation) for augmentation in tuning.augmentations]
    for _, augmentation in places:
        # All pairs within the bounds fit, so every point of a trajectory does.
        check_fits(augmentation, height=height, width=width)
    points = _points(tuning, [coordinates for coordinates, _ in places])
    network = untrained_network(training, (channels, height, width))
    moving = any(p.requires_grad for n, p in network.named_parameters() if n.startswith("encoder."))
    if tuning.loss in INDIRECT_LOSSES and not (moving and training.encoder_learning_rate != 0):
        raise ValueError(
            f"loss: {tuning.loss} knows the augmentation by what it teaches the encoder, which stays as it "
            "is; freeze fewer stages, give it a learning rate, or use another loss"
        )
    if tuning.order == 2 and training.encoder != "small":
        check_second_derivatives(network, (channels, height, width))
    prepare_allocator(torch.device(device), height * width)
    if training.precision == "auto":
        training = replace(training, precision="float32")
    at = torch.device(device)
    as_it_comes = AsItComes(task, tuning, training, at)
    return [
        Start(Problem(task, coordinates, tuning, training, at, as_it_comes), point)
        for coordinates, point in points
    ]


def _points(tuning: Tuning, places: list[Coordinates]) -> list[tuple[Coordinates, Tensor]]:
    """Every start with every kind; values by name with the kinds that have them all."""
    points = []
    for given in tuning.starts:
        fitting = [c for c in places if fits_kind(given, c.bounds.keys())]
        # Where none fits, the first one says what is wrong.
        points += [(coordinates, coordinates.start(given)) for coordinates in fitting or places[:1]]
    order = {id(coordinates): place for place, coordinates in enumerate(places)}
    return sorted(points, key=lambda pair: order[id(pair[0])])


def tune(
    task: Task,
    tuning: Tuning,
    training: Training | None = None,
    *,
    device: str | torch.device = "cpu",
    recorder: Recorder | None = None,
    checkpoint: str | Path | None = None,
    keep: Callable[[int, EndedStart], None] | None = None,
) -> TuningResult:
    """Learn an augmentation's hyperparameters by gradient, before the detector trains or meanwhile (ST-SSAD).

    Training steps alternate with steps of the hyperparameters down the validation loss of train, augmented
    and unlabeled images (see `bilevel_gradient`), or come after these, with `steps_before`. Several starting
    points run in turn, of several kinds if the space has them (with `survivors`, only the best of them after
    a first look); the one whose finished detector is lowest in `tuning.choose_by` is kept. One that diverges
    or collapses on its way ends there, as a `FailedStart`, and the others go on. Labels have no part in it.

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
            the hyperparameters. Or if the encoder as it comes, which steps before the training need, cannot
            be judged.
    """
    starts = prepare(task, tuning, training or DEFAULT_TRAINING, device)
    file = CheckpointFile(None if checkpoint is None else Path(checkpoint), starts)
    tell = Teller(recorder, task=task.name)
    _share_warm_start(starts[0], file)
    if tuning.steps_before and not file.progress.finished:
        _ = starts[0].problem.as_it_comes.embeddings  # one that cannot be judged ends the tuning
    over, done = first_look(starts, file, tell), 0
    ended: list[EndedStart] = []
    for index, start in enumerate(starts):
        if index in over:
            ended.append(over[index])
        elif done < len(file.progress.finished):
            ended.append(_read_end(start, file, done))
            done += 1
        else:
            ended.append(_descend(start, index, file, tell))
            done += 1
        if keep is not None:
            keep(index, ended[-1])

    warm_start = file.progress.warm_start
    with file.reading():
        shared = Cost() if warm_start is None else Cost(**warm_start["cost"])
    as_it_comes = starts[0].problem.as_it_comes
    if tuning.steps_before:
        shared += as_it_comes.cost
    cost = sum((end.cost for end in ended), shared)
    result = TuningResult(tuple(ended), tuning.choose_by, cost, as_it_comes)
    failed = [
        f"start {index}: {end.reason}" for index, end in enumerate(ended) if isinstance(end, FailedStart)
    ]
    if not result.tuned:
        raise DetectorError(f"no starting point could be tuned: {'; '.join(failed)}")
    for sign in (*failed, *result.warnings):
        warnings.warn(sign, CollapseWarning, stacklevel=2)
    return result


def _share_warm_start(start: Start, file: CheckpointFile) -> None:
    """Warm up once for all starting points, if they share it, or what is left of that."""
    problem = start.problem
    if problem.tuning.warm_start_on != "range" or not problem.warm:
        return
    descent = way_of(start)
    if file.progress.warm_start is not None:
        with file.reading():
            descent.load(file.progress.warm_start)
    for _ in warm_up(descent):
        file.progress.warm_start = copy.deepcopy(descent.state())
        file.save()


def _read_end(start: Start, file: CheckpointFile, place: int) -> TunedStart | FailedStart:
    """What became of a starting point whose end is in the checkpoint."""
    way = way_of(start)
    with file.reading():
        state = file.progress.finished[place]
        if (reason := state.get(FAILURE)) is not None:
            return FailedStart(start.augmentation, reason, Cost(**state["cost"]))
        way.load(state)
    return _finish(way, start)


def _descend(start: Start, index: int, file: CheckpointFile, tell: Teller) -> TunedStart | FailedStart:
    """Bring a starting point to its end, from its look or where an earlier process left it, if one did."""
    progress, way = file.progress, way_of(start)
    if progress.looks and progress.current is None:
        with file.reading():
            take_up_look(way, progress.looks[index])
    else:
        take_up(way, file)
    tell.start(index, start.augmentation)
    ended: TunedStart | FailedStart
    try:
        last = start.problem.tuning.last_step(start.problem.training.steps)
        tell_steps(index, advance(way, file, last), tell)
        if start.problem.tuning.steps_before:
            tell.progress(index, last, {"training_loss": way.training_loss})
        ended, end = _finish(way, start), way.state()
        tell.end(index, "complete", _metrics(ended))
    except DetectorError as error:
        tell.failure(index, error)
        ended = FailedStart(start.augmentation, str(error), way.cost)
        # Without its weights, which may not be finite; nothing goes on from them.
        end = {FAILURE: str(error), "cost": asdict(way.cost)}
    except BaseException as error:
        tell.failure(index, error)
        raise
    progress.finished.append(end)
    if progress.looks:
        progress.looks[index]["state"] = None
    progress.current = None
    file.save()
    return ended


def _finish(way: Way, start: Start) -> TunedStart:
    """Judge the finished detector of a starting point, without labels and with hard edges."""
    problem, standing, loss = way.problem, standing_of(way), way.training_loss
    before, tolerance = bool(problem.tuning.steps_before), problem.tuning.tolerance
    signs = collapse_signs(problem.coordinates, way.point, loss, tolerance, before=before)
    return TunedStart(
        start=start.augmentation,
        augmentation=way.augmentation,
        trajectory=tuple(way.trajectory),
        detector=standing.detector,
        judged=standing.judged,
        training_loss=loss,
        validation_loss=standing.validation_loss,
        warnings=signs,
        cost=way.cost + standing.cost,
    )


def _metrics(tuned: TunedStart) -> dict[str, float]:
    """What is told of a starting point at its end.

    Not under the names of the trajectory: those are of mini-batches, and before the last step.
    """
    learned = {f"learned.{n}": float(v) for n, v in tuned.augmentation.hyperparameters.items()}  # type: ignore[arg-type]
    return {**tuned.criteria, **learned, "finished.validation_loss": tuned.validation_loss}
