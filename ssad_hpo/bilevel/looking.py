"""A first look at many starting points: all are tuned for a while, and those that judge best go on.

One rung of successive halving (Jamieson and Talwalkar, AISTATS 2016), with the label-free criterion that also
chooses in the end, or, before any training, the validation loss. What a look found is a dictionary in the
checkpoint: "state" of the starting point, for those that may go on; "point", "step" and "cost"; "value",
which is lower for better ones, or "failure".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from ssad_hpo.bilevel.before import Staged
from ssad_hpo.bilevel.checkpoint import CheckpointFile, advance, take_up
from ssad_hpo.bilevel.cost import Cost
from ssad_hpo.bilevel.problem import Start
from ssad_hpo.bilevel.result import FailedStart, OuterStep, StoppedStart
from ssad_hpo.bilevel.standing import standing_of
from ssad_hpo.bilevel.ways import Way, way_of
from ssad_hpo.bounds import is_number
from ssad_hpo.criteria import VALIDATION_LOSS
from ssad_hpo.task import DetectorError, Teller

Look = dict[str, Any]


def first_look(
    starts: list[Start], file: CheckpointFile, tell: Teller
) -> dict[int, StoppedStart | FailedStart]:
    """Tune all starting points for a while, and end those that do not go on; none if all are to go on.

    Args:
        starts: of the tuning.
        file: progress; looks that it has are not done again.
        tell: hears of every starting point, that it waits after its look, and of those that end there.

    Returns:
        Index -> what became of a starting point that ended. The others have a state in the checkpoint.
    """
    tuning, looks = starts[0].problem.tuning, file.progress.looks
    if tuning.survivors is None or tuning.survivors >= len(starts):
        return {}
    for index in range(len(looks), len(starts)):
        looks.append(_look(starts[index], index, file, tell))
        _forget(looks, tuning.survivors)
        file.progress.current = None
        file.save()
    ended: dict[int, StoppedStart | FailedStart] = {}
    with file.reading():
        going_on = set(_best(looks, tuning.survivors))
        for index, (start, look) in enumerate(zip(starts, looks, strict=True)):
            if index not in going_on:
                ended[index] = _ended(start, look)
    begun = bool(file.progress.finished or file.progress.current)
    for index, end in ended.items():
        if isinstance(end, StoppedStart) and not begun:
            when = f"after {end.step} steps" if end.step else "before the training"
            said = f"{tuning.look_by} {end.value:.4g} {when} was not among the lowest"
            # Not among the values of mini-batches, if it is the validation loss.
            name = f"look.{tuning.look_by}" if tuning.look_by == VALIDATION_LOSS else tuning.look_by
            tell.end(index, "pruned", {name: end.value}, said)
    return ended


def _look(start: Start, index: int, file: CheckpointFile, tell: Teller) -> Look:
    problem = start.problem
    until = problem.tuning.look_steps(problem.training.steps)
    way, found = way_of(start), {}
    take_up(way, file)
    tell.start(index, start.augmentation)
    try:
        tell_steps(index, advance(way, file, until), tell)
        found = {"value": _value(way), "state": way.state()}
        tell.end(index, "interrupted", reason="waits for the first look at the other starting points")
    except DetectorError as error:
        tell.failure(index, error)
        found = {"state": None, "failure": str(error)}
    except BaseException as error:
        tell.failure(index, error)
        raise
    return {**found, "point": way.point.clone(), "step": way.trained, "cost": asdict(way.cost)}


def _value(way: Way) -> float:
    """What starting points are compared by after a look; its cost becomes part of the way's."""
    if isinstance(way, Staged):
        return way.look()
    standing = standing_of(way)
    way.cost += standing.cost
    return standing.value(way.problem.tuning.look_by)


def take_up_look(way: Way, look: Look) -> None:
    """Go on after a look; its judging is part of the cost."""
    way.load(look["state"])
    way.cost = Cost(**look["cost"])


def tell_steps(index: int, steps: Iterable[OuterStep], tell: Teller) -> None:
    """Tell every step of the hyperparameters, as it is done."""
    for outer in steps:
        trained = {} if outer.training_loss is None else {"training_loss": outer.training_loss}
        losses = {**trained, "validation_loss": outer.validation_loss}
        tell.progress(index, outer.step, {**outer.hyperparameters, **losses})


def _best(looks: list[Look], count: int) -> list[int]:
    """Indices of the lowest, earlier ones first among equals."""
    values = {index: look["value"] for index, look in enumerate(looks) if "failure" not in look}
    if not all(map(is_number, values.values())):
        raise ValueError("expected a number for each look")
    return sorted(values, key=lambda index: (values[index], index))[:count]


def _forget(looks: list[Look], survivors: int) -> None:
    """Drop the networks of those that cannot go on any more: a checkpoint holds `survivors` at most."""
    best = _best(looks, survivors)
    for index, look in enumerate(looks):
        if index not in best:
            look["state"] = None


def _ended(start: Start, look: Look) -> StoppedStart | FailedStart:
    cost = Cost(**look["cost"])
    if "failure" in look:
        return FailedStart(start.augmentation, str(look["failure"]), cost)
    reached = start.problem.coordinates.at(look["point"])
    return StoppedStart(start.augmentation, reached, int(look["step"]), float(look["value"]), cost)
