"""How a starting point goes its way: its hyperparameters move while the detector trains, or before."""

from __future__ import annotations

from ssad_hpo.bilevel.before import Staged
from ssad_hpo.bilevel.descent import Descent
from ssad_hpo.bilevel.problem import Start

Way = Descent | Staged


def way_of(start: Start) -> Way:
    """A starting point before its first step."""
    problem = start.problem
    if problem.tuning.steps_before:
        return Staged(problem, start.point)
    return Descent(problem, start.point)
