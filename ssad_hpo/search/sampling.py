"""Samplers and pruners by name, and draws that survive a restart.

A sampler that is seeded once and reloaded would repeat its first draws. Here every draw is seeded by the
study's seed, the trial's position and the parameter's name, so what a trial draws depends on these and on
the history alone, and a resumed study draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import contextlib
import math
import warnings
import zlib
from collections.abc import Callable, Container, Sequence
from typing import Any, cast

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from ssad_hpo.search.objective import FAILURE, RETRY_OF
from ssad_hpo.task import SearchSpace, Training

SAMPLERS = ("tpe", "random", "grid", "gp")
PRUNERS = ("none", "asha", "median")
REDUCTION_FACTOR = 4  # also Optuna's and Ray's own; what it saves: studies/results/search_cost.md


class SeededSampler(optuna.samplers.BaseSampler):
    """Any Optuna sampler, made anew for every draw with a seed of the draw's own.

    Args:
        make: gives the sampler for a seed.
        seed: of the study.
    """

    def __init__(self, make: Callable[[int], optuna.samplers.BaseSampler], seed: int) -> None:
        self._make = make
        self._seed = seed

    def _sampler(
        self, study: optuna.Study, trial: FrozenTrial, name: str = ""
    ) -> optuna.samplers.BaseSampler:
        entropy = [self._seed, position(study, trial), zlib.crc32(name.encode())]
        return self._make(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._sampler(study, trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        sampler = self._sampler(study, trial)
        sampler.infer_relative_search_space(study, trial)  # TPE splits the space into its groups here
        return sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        sampler = self._sampler(study, trial, param_name)
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._sampler(study, trial).after_trial(study, trial, state, values)


class EnumeratedSampler(optuna.samplers.BaseSampler):
    """The candidates of a list, one a trial, each once; the study stops after the last.

    (Optuna's own GridSampler knows no conditional space.)

    Args:
        candidates: parameters of the trials, in order.
    """

    def __init__(self, candidates: Sequence[dict[str, Any]]) -> None:
        self.candidates = list(candidates)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        place = position(study, trial)
        if place >= len(self.candidates):
            raise ValueError(
                f"sampler: the grid has {len(self.candidates)} candidates and all have been tried; "
                "use more grid points or another sampler"
            )
        return self.candidates[place][param_name]

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        if position(study, trial) + 1 >= len(self.candidates):
            with contextlib.suppress(RuntimeError):  # outside of `optimize` there is nothing to stop
                study.stop()


class CountedOncePruner(optuna.pruners.SuccessiveHalvingPruner):
    """Successive halving that does not see interrupted trials.

    Each is repeated, and would otherwise compete twice with the same value.
    """

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        return super().prune(cast(optuna.Study, _WithoutInterrupted(study)), trial)


class _WithoutInterrupted:
    """A study as its pruner may see it."""

    def __init__(self, study: optuna.Study) -> None:
        self._study = study

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = self._study.get_trials(deepcopy, states)
        return [trial for trial in trials if trial.state != TrialState.FAIL or is_final(trial)]


def position(study: optuna.Study, trial: FrozenTrial) -> int:
    """A trial's place in the study when interrupted trials and their retries count as one."""
    first = trial.user_attrs.get(RETRY_OF, trial.number)
    earlier = study.get_trials(deepcopy=False)[:first]
    return sum(RETRY_OF not in t.user_attrs for t in earlier)


def is_exhausted(study: optuna.Study) -> bool:
    """Whether the sampler is a grid of which every candidate was drawn, and none is to be repeated."""
    if not isinstance(study.sampler, EnumeratedSampler):
        return False
    trials = study.get_trials(deepcopy=False)
    drawn = sum(RETRY_OF not in t.user_attrs for t in trials)
    return drawn >= len(study.sampler.candidates) and all(t.state != TrialState.WAITING for t in trials)


def is_final(trial: FrozenTrial) -> bool:
    """Whether a trial need not be run (again): it has a value, was pruned, or failed by its own fault."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or (
        trial.state == TrialState.FAIL and FAILURE in trial.user_attrs
    )


def make_sampler(
    name: str, space: SearchSpace, seed: int, grid_points: int = 4
) -> optuna.samplers.BaseSampler:
    """A sampler whose draws depend on seed, position and history alone.

    Args:
        name: "tpe" (grouped, since the space is conditional), "random", "grid" (every combination of
            `grid_points` values per hyperparameter, each once) or "gp" (a space of one kind only).
        space: what is searched.
        seed: of the study.
        grid_points: of "grid", per hyperparameter.

    Raises:
        ValueError: for an unknown name, or "gp" on a space of several kinds.
    """
    if name == "tpe":
        return SeededSampler(_grouped_tpe, seed)
    if name == "random":
        return SeededSampler(lambda s: optuna.samplers.RandomSampler(seed=s), seed)
    if name == "grid":
        return EnumeratedSampler(space.grid(grid_points))
    if name == "gp":
        if len(space.kinds) > 1:
            raise ValueError(
                f"sampler: 'gp' needs a space of one kind of augmentation, got {', '.join(space.kinds)}; "
                "use 'tpe'"
            )
        return SeededSampler(lambda s: optuna.samplers.GPSampler(seed=s), seed)
    raise ValueError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {name!r}")


def _grouped_tpe(seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        # `group` is marked experimental since Optuna 2.8; it is the way TPE knows conditional spaces.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(group=True, seed=seed)


def make_pruner(
    name: str, training: Training, reduction_factor: int = REDUCTION_FACTOR
) -> optuna.pruners.BasePruner:
    """A pruner of Optuna's by name.

    Args:
        name: "none", "asha" (asynchronous successive halving) or "median".
        training: at whose evaluation steps trials are stopped.
        reduction_factor: of "asha", see `first_rung`.

    Raises:
        ValueError: for an unknown name, or a reduction factor below 2.
    """
    if name == "none":
        return optuna.pruners.NopPruner()
    if name == "asha":
        first = first_rung(training, reduction_factor)
        return CountedOncePruner(min_resource=first, reduction_factor=reduction_factor)
    if name == "median":
        return optuna.pruners.MedianPruner()
    raise ValueError(f"pruner: expected one of {', '.join(PRUNERS)}, got {name!r}")


def first_rung(training: Training, reduction_factor: int) -> int:
    """The step of successive halving's first rung; each next one is `reduction_factor` times as far.

    Of the trials that reach a rung, the best of every `reduction_factor` go on. The first evaluation is on
    the first rung, a rung between two evaluations is judged at the later one. A factor of 4 from an eighth
    has rungs at an eighth and a half of the steps.

    Raises:
        ValueError: for a reduction factor below 2.
    """
    if not isinstance(reduction_factor, int) or reduction_factor < 2:
        raise ValueError(f"reduction_factor: expected a whole number >= 2, got {reduction_factor!r}")
    # Rounded down, unlike the evaluation itself, so that no later rung lies a step behind its evaluation.
    return max(1, math.floor(training.evaluate_at[0] * training.steps))
