"""Ray Tune's schedulers by name, stopping poor trials by the criterion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import optuna
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from ssad_hpo.search import first_rung, is_final, position
from ssad_hpo.task import Search, Training


def make_scheduler(search: Search, training: Training) -> TrialScheduler | None:
    """The scheduler of Ray Tune's for a search's pruner, which stops trials at the evaluation steps."""
    by: dict[str, Any] = {"time_attr": "step", "metric": search.criterion, "mode": "min"}
    if search.pruner == "asha":
        first, factor = first_rung(training), search.reduction_factor
        return ASHAScheduler(max_t=training.steps, grace_period=first, reduction_factor=factor, **by)
    if search.pruner == "median":
        # Else trials would be paused until there are enough to compare them with.
        by["min_time_slice"] = math.inf
        return MedianStoppingRule(grace_period=training.evaluation_steps[0], **by)
    return None


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
