"""Studies, their samplers and pruners by name, and draws that survive a restart.

A sampler that is seeded once and reloaded would repeat its first draws. Here every draw is seeded by the
study's seed, the trial's position and the parameter's name, so what a trial draws depends on these and on
the history alone, and a resumed study draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Container, Sequence
from typing import Any, cast

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from ssad_hpo.quiet import without_warnings
from ssad_hpo.search.record import first_attempt, is_final, is_frozen
from ssad_hpo.task import Search, Training


class SeededSampler(optuna.samplers.BaseSampler):
    """Any Optuna sampler, made anew for every draw with a seed of the draw's own."""

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
        return self._sampler(study, trial).infer_relative_search_space(_drawn(study), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        sampler, study = self._sampler(study, trial), _drawn(study)
        sampler.infer_relative_search_space(study, trial)  # TPE splits the space into its groups here
        return sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        sampler = self._sampler(study, trial, param_name)
        return sampler.sample_independent(_drawn(study), trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._sampler(study, trial).after_trial(study, trial, state, values)


class EnumeratedSampler(optuna.samplers.BaseSampler):
    """The candidates of a list, one a trial, each once; the study stops after the last.

    (Optuna's own GridSampler knows no conditional space.)
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
        def counts(other: FrozenTrial) -> bool:
            return other.state != TrialState.FAIL or is_final(other)

        return super().prune(cast(optuna.Study, _Part(study, counts)), trial)


def _drawn(study: optuna.Study) -> optuna.Study:
    """A study as its sampler may see it: without the pretrained encoder, which has no parameters."""
    return cast(optuna.Study, _Part(study, lambda trial: not is_frozen(trial)))


class _Part:
    """A study of which some trials are not seen."""

    def __init__(self, study: optuna.Study, seen: Callable[[FrozenTrial], bool]) -> None:
        self._study, self._seen = study, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return [trial for trial in self._study.get_trials(deepcopy, states) if self._seen(trial)]

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        trials = self._study._get_trials(deepcopy, states, use_cache)
        return [trial for trial in trials if self._seen(trial)]


def position(study: optuna.Study, trial: FrozenTrial) -> int:
    """A trial's place in the study when interrupted trials and their retries count as one."""
    earlier = study.get_trials(deepcopy=False)[: first_attempt(trial)]
    return sum(first_attempt(t) == t.number and not is_frozen(t) for t in earlier)


def is_exhausted(study: optuna.Study) -> bool:
    """Whether the sampler is a grid of which every candidate was drawn, and none is to be repeated."""
    if not isinstance(study.sampler, EnumeratedSampler):
        return False
    trials = study.get_trials(deepcopy=False)
    drawn = sum(first_attempt(t) == t.number and not is_frozen(t) for t in trials)
    return drawn >= len(study.sampler.candidates) and all(t.state != TrialState.WAITING for t in trials)


def open_study(
    storage: BaseStorage | str, study_name: str, search: Search, training: Training
) -> optuna.Study:
    """Create a study, or open it if it exists, with a sampler whose draws survive a restart.

    Args:
        search: whose sampler draws, and whose pruner stops trials.
        training: at whose evaluation steps trials are stopped.
    """
    return optuna.create_study(
        storage=storage,
        study_name=study_name,
        sampler=make_sampler(search),
        pruner=make_pruner(search, training),
        direction="minimize",
        load_if_exists=True,
    )


def make_sampler(search: Search) -> optuna.samplers.BaseSampler:
    """The sampler of a search; its draws depend on seed, position and history alone.

    A space without ranges has as many candidates as kinds, and any sampler gives each once.
    """
    if not search.space.is_continuous:
        return EnumeratedSampler(search.space.grid(2))
    if search.sampler == "tpe":  # grouped, since the space is conditional
        return SeededSampler(_grouped_tpe, search.seed)
    if search.sampler == "random":
        return SeededSampler(lambda seed: optuna.samplers.RandomSampler(seed=seed), search.seed)
    if search.sampler == "gp":
        return SeededSampler(lambda seed: optuna.samplers.GPSampler(seed=seed), search.seed)
    return EnumeratedSampler(search.space.grid(search.grid_points))


def _grouped_tpe(seed: int) -> optuna.samplers.BaseSampler:
    # `group` is marked experimental since Optuna 2.8; it is the way TPE knows conditional spaces.
    with without_warnings(optuna.exceptions.ExperimentalWarning):
        return optuna.samplers.TPESampler(group=True, seed=seed)


def make_pruner(search: Search, training: Training) -> optuna.pruners.BasePruner:
    """The pruner of a search, which stops trials at the evaluation steps of the training."""
    if search.pruner == "asha":
        first = first_rung(training)
        return CountedOncePruner(min_resource=first, reduction_factor=search.reduction_factor)
    return optuna.pruners.MedianPruner() if search.pruner == "median" else optuna.pruners.NopPruner()


def first_rung(training: Training) -> int:
    """The step of successive halving's first rung; each next one is `reduction_factor` times as far.

    Of the trials that reach a rung, the best of every `reduction_factor` go on. The first evaluation is on
    the first rung, a rung between two evaluations is judged at the later one. A factor of 4 from an eighth
    has rungs at an eighth and a half of the steps.
    """
    # Rounded down, unlike the evaluation itself, so that no later rung lies a step behind its evaluation.
    return max(1, math.floor(training.evaluate_at[0] * training.steps))
