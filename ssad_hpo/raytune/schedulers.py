"""Ray Tune's schedulers by name, stopping poor trials by the criterion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import optuna
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from ssad_hpo.search import REDUCTION_FACTOR, first_rung, is_final, position
from ssad_hpo.task import Training

SCHEDULERS = ("asha", "median", "none")


def make_scheduler(
    name: str, criterion: str, training: Training, reduction_factor: int = REDUCTION_FACTOR
) -> TrialScheduler | None:
    """A scheduler of Ray Tune's by name, that stops trials by the criterion at the evaluation steps.

    Args:
        name: "asha" (asynchronous successive halving), "median" or "none".
        criterion: to be minimised.
        training: whose evaluation steps count.
        reduction_factor: of "asha", see `ssad_hpo.search.first_rung`.

    Raises:
        ValueError: for an unknown name, or a reduction factor below 2.
    """
    by: dict[str, Any] = {"time_attr": "step", "metric": criterion, "mode": "min"}
    if name == "asha":
        first = first_rung(training, reduction_factor)
        return ASHAScheduler(
            max_t=training.steps, grace_period=first, reduction_factor=reduction_factor, **by
        )
    if name == "median":
        # Else trials would be paused until there are enough to compare them with.
        by["min_time_slice"] = math.inf
        return MedianStoppingRule(grace_period=training.evaluation_steps[0], **by)
    if name == "none":
        return None
    raise ValueError(f"scheduler: expected one of {', '.join(SCHEDULERS)}, got {name!r}")


@dataclass(frozen=True)
class _Earlier:
    """All that a scheduler asks of a trial which is over."""

    trial_id: str


def replay(scheduler: TrialScheduler, study: optuna.Study, criterion: str) -> None:
    """Have a new scheduler compare with what earlier trials of the study reported."""
    controller: Any = SimpleNamespace(get_live_trials=list)
    for trial in study.get_trials(deepcopy=False):
        if not is_final(trial) or not trial.intermediate_values:
            continue
        stand_in: Any = _Earlier(f"before-{position(study, trial)}")
        scheduler.on_trial_add(controller, stand_in)
        results = [{"step": step, criterion: value} for step, value in trial.intermediate_values.items()]
        for result in results:
            # What a scheduler would stop, now that it knows the others, it wants to hear no more of.
            if scheduler.on_trial_result(controller, stand_in, result) == TrialScheduler.STOP:
                break
        scheduler.on_trial_complete(controller, stand_in, results[-1])
