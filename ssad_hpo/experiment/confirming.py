"""Whether a choice stands when the best candidates are trained again with other seeds. Label-free.

The mean over seeds decides among them, the search's own value included: all have as many values, and of
candidates that are alike before anything is measured, the one with the best mean is the best guess, however
they came to be measured. (The values of the search alone, by which they were taken from many, promise too
much.) What is chosen is that candidate's detector of the search, which is there already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import optuna

from ssad_hpo.bilevel import Tuning
from ssad_hpo.experiment.run_folder import Run
from ssad_hpo.search import Candidate, Objective, confirm, further_seeds, read_reseeded, to_confirm

_ERRORS = 2.0  # standard errors within which two means are the same


@dataclass(frozen=True)
class Confirmation:
    """The best candidates of a search, each trained with several seeds.

    Attributes:
        criterion: that was minimised and chooses.
        seeds: of the trainings, the search's own first.
        values: of the criterion by trial, the search's best first, with a value for each seed; nan where a
            training failed.
        failures: what failed, in sentences.
        seconds: that the further trainings took, all together.
    """

    criterion: str
    seeds: tuple[int, ...]
    values: Mapping[int, tuple[float, ...]]
    failures: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def means(self) -> dict[int, float]:
        """Over seeds by trial, lower is better; infinite where a training failed."""
        return {n: m if math.isfinite(m := float(np.mean(v))) else math.inf for n, v in self.values.items()}

    @property
    def spreads(self) -> dict[int, float]:
        """Standard deviations over seeds by trial; nan where a training failed."""
        return {number: float(np.std(values, ddof=1)) for number, values in self.values.items()}

    @property
    def first(self) -> int:
        """The trial that the search alone would choose."""
        return next(iter(self.values))

    @property
    def chosen(self) -> int:
        """The trial with the lowest mean; the search's own choice where each failed with some seed."""
        return min(self.means, key=lambda number: self.means[number])  # of equal ones the search's better

    @property
    def stands(self) -> bool:
        """Whether other seeds choose as the search did."""
        return self.chosen == self.first

    @property
    def error(self) -> float:
        """The standard error of the difference of two means; nan of a single candidate.

        Seeds are the same for all, and what one does to all is no difference: it is left out, as in the
        analysis of randomised blocks.
        """
        whole = np.array([values for values in self.values.values() if np.isfinite(values).all()])
        moved = whole[np.ptp(whole, axis=1) > 0]  # the encoder as it comes may be the same with each seed
        whole = moved if len(moved) > 1 else whole
        if len(whole) < 2:
            return math.nan
        rest = whole - whole.mean(0) - whole.mean(1, keepdims=True) + whole.mean()
        candidates, seeds = whole.shape
        return math.sqrt(2 * float((rest**2).sum()) / ((candidates - 1) * (seeds - 1)) / seeds)

    @property
    def tied(self) -> list[int]:
        """The trials whose means lie within two standard errors of the chosen one's, the best first."""
        means, limit = self.means, _ERRORS * self.error
        close = [n for n in means if n != self.chosen and means[n] - means[self.chosen] <= limit]
        return sorted(close, key=lambda number: means[number])

    def why(self) -> str:
        """What the chosen candidate was chosen by; see `account`."""
        return (
            f"{self.criterion}: {self._value(self.chosen)}, the lowest mean over {len(self.seeds)} seeds "
            f"among the best {len(self.values)}"
        )

    def account(self, word: str) -> list[str]:
        """Whether the choice stands and what it cost, in sentences."""
        count, further, chosen = len(self.values), len(self.seeds) - 1, self.chosen
        who = f"the best {count} {word}s were" if count > 1 else f"{word} {chosen} was"
        value = f"{self.criterion} {self._value(chosen)} over {len(self.seeds)} seeds"
        if not math.isfinite(self.means[chosen]):
            found = f"each failed with one of them, and {word} {chosen} stays as the search chose it"
        elif self.stands:
            found = f"{word} {chosen} stands, {value}"
        else:
            found = (
                f"{word} {chosen}, {value}, takes the place of {word} {self.first}, which the search alone "
                f"would choose, {self._value(self.first)}"
            )
        each = self.seconds / (count * further)
        cost = f"that took {count * further} more trainings of {each:.1f} s"
        return [f"{who} trained again with {further} other seeds: {found}; {cost}", *self.failures]

    def _value(self, number: int) -> str:
        if not math.isfinite(self.means[number]):
            return "failed"
        return f"{self.means[number]:.4g} (spread {self.spreads[number]:.2g})"


def confirm_run(run: Run, study: optuna.Study, objective: Objective) -> None:
    """Train the best candidates of a run's finished search again, where its trials ran, if it asks for that.

    What an earlier process has done stays.
    """
    if run.settings.cluster is None:
        confirm(study, objective)
    else:
        from ssad_hpo import raytune

        raytune.confirm(study, objective, run.settings.cluster)


def confirmation_of(run: Run, study: optuna.Study) -> Confirmation | None:
    """What other seeds say of a run's best candidates; None where that was not asked for, or is not done."""
    search, training = run.settings.method, run.settings.training
    if isinstance(search, Tuning) or not (best := to_confirm(study, search, run.artifacts)):
        return None
    known, seeds = read_reseeded(study), further_seeds(training)
    if any((candidate.number, seed) not in known for candidate in best for seed in seeds):
        return None
    found = {c.number: [known[c.number, seed] for seed in seeds] for c in best}

    def values_of(candidate: Candidate) -> tuple[float, ...]:
        again = (float(one.criteria.get(search.criterion, math.nan)) for one in found[candidate.number])
        return (candidate.criteria[search.criterion], *again)

    return Confirmation(
        criterion=search.criterion,
        seeds=(training.seed, *seeds),
        values={candidate.number: values_of(candidate) for candidate in best},
        failures=tuple(
            f"trial {number} failed with seed {seed}, and is not chosen: {one.reason}"
            for number, ones in found.items()
            for seed, one in zip(seeds, ones, strict=True)
            if one.reason is not None
        ),
        seconds=sum(one.seconds for ones in found.values() for one in ones),
    )


def trainings_to_come(run: Run) -> int:
    """How many trainings with other seeds a run's search ends with, at most."""
    search = run.settings.method
    return 0 if isinstance(search, Tuning) else search.confirm * len(further_seeds(run.settings.training))
