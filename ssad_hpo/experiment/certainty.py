"""How sure a choice is, from what it was made of: rivals that are as good, edges of the space. Label-free."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssad_hpo.augment import KINDS, NONE, hyperparameter_of, kind_of
from ssad_hpo.combined import copies_together
from ssad_hpo.criteria import CRITERIA, Criterion, DegenerateError
from ssad_hpo.experiment.outcome import StudyResult
from ssad_hpo.search import Candidate, candidates, ranked
from ssad_hpo.task import Range, SearchSpace

_GROUPS = 20  # of images, each left out once
_ERRORS = 2.0  # standard errors within which two values are the same
_RIVALS = 8  # the next best ones, which are compared with the best
_MOST_ROWS = 1500  # embeddings beyond which leaving out groups of images takes longer than it is worth
_EDGE = 0.03  # share of a range that is its edge
_FIT = ("patch_area", "patch_aspect")  # what a patch that must lie within the image ends by itself


def how_sure(result: StudyResult) -> list[str]:
    """What makes a choice uncertain and what could be tried next, in sentences; often none."""
    settings, selected = result.run.settings, result.selected
    choices = candidates(result.study, result.run.artifacts)
    told = []
    if rivals := rivals_of(selected, choices, settings.criterion):
        told.append(_tie(rivals, selected.number, settings.word, settings.criterion))
    if result.confirmation is not None and (tied := result.confirmation.tied):
        by = f"{settings.criterion} over {len(result.confirmation.seeds)} seeds"
        told.append(_tie(tied, selected.number, settings.word, by))
    if settings.tuning is None:  # a tuning's signs of collapse say so, of every start
        told += at_the_edge(selected, settings.method.space)
        learned = [choice.learned for choice in choices if choice.augmentation.kind != NONE]
        if learned and not any(learned):
            told.append(
                "no trial told augmented images from normal ones: larger patches, other kinds or more "
                "--steps may"
            )
    others = [kind for kind in KINDS if kind not in settings.method.space.kinds]
    unseen = result.evidence is not None and not result.evidence.anomalies_seen
    if unseen and all(choice.augmentation.kind == NONE for choice in choices):
        told.append(
            "candidates that are trained may see anomalies where none is seen: go on with --trials 16"
        )
    elif unseen and others:
        told.append(f"another kind of augmentation may see anomalies where these do not: {', '.join(others)}")
    return told


def rivals_of(selected: Candidate, choices: Sequence[Candidate], criterion: str) -> list[int]:
    """The candidates that a criterion cannot tell from the selected one, as far as its images say.

    Of the next best eight, those that lie within two standard errors of the difference. The error is that of
    leaving out groups of the unlabelled images, and of held-out ones where the criterion is of them, the same
    for both (a jackknife).

    Returns:
        Their numbers, best first; none where the images are too many, or the criterion is of no images.
    """
    if criterion not in CRITERIA:
        return []
    others = [choice for choice in ranked(choices, criterion) if choice.number != selected.number][:_RIVALS]
    own, found = _left_out(selected, criterion), []
    for other in others:
        theirs = _left_out(other, criterion)
        if own is None or theirs is None:
            return []
        gap = other.criteria[criterion] - selected.criteria[criterion]
        if abs(gap) <= _ERRORS * _error_of_difference(theirs, own):
            found.append(other.number)
    return found


def _left_out(choice: Candidate, criterion: str) -> list[NDArray[np.float64]] | None:
    """The criterion without each group of images, (G,), for each set of images that varies."""
    kept, row = choice.kept(arrays_alone=True), CRITERIA[criterion]
    sets: dict[str, Tensor] = {"scores": torch.as_tensor(kept.scores)}
    if kept.held_out is not None:
        sets["held_out"] = torch.as_tensor(kept.held_out)
    embeddings = kept.embeddings
    sets |= {name: getattr(embeddings, name) for name in ("train", "augmented", "unlabeled")}
    of_embeddings = "unlabeled" in row.needs
    rows = sum(len(sets[name]) for name in row.needs if name in sets)
    if not set(row.needs) <= sets.keys() or (of_embeddings and rows > _MOST_ROWS):
        return None
    values = []
    for group in (("unlabeled", "scores"), ("held_out",)):
        if varied := [name for name in group if name in row.needs]:
            images = embeddings.held_out if group == ("held_out",) else embeddings.unlabeled
            count = len(sets[varied[0]])
            rows_of = torch.arange(count)[:, None] if images is None or len(images) != count else images
            index = copies_together(rows_of, _GROUPS)
            try:
                values.append(np.array([_without(row, sets, varied, index != g) for g in index.unique()]))
            except DegenerateError:  # too few images to leave any out
                return None
    return values


def _without(row: Criterion, sets: Mapping[str, Tensor], varied: Sequence[str], left: Tensor) -> float:
    """The criterion of the images that are left of the sets that are varied, and of all of the others."""
    return float(row.function(*(sets[n][left] if n in varied else sets[n] for n in row.needs)))


def _error_of_difference(a: Sequence[NDArray[np.float64]], b: Sequence[NDArray[np.float64]]) -> float:
    variance = 0.0
    for one, other in zip(a, b, strict=True):
        differences = one - other
        variance += (len(one) - 1) * float(differences.var())
    return math.sqrt(variance)


def _tie(rivals: Sequence[int], selected: int, word: str, criterion: str) -> str:
    *first, last = map(str, rivals)
    which = f"{word}s {', '.join(first)} and {last}" if first else f"{word} {last}"
    return (
        f"{which} cannot be told apart from {word} {selected} by {criterion}: the difference is within "
        "two standard errors"
    )


def at_the_edge(selected: Candidate, space: SearchSpace) -> list[str]:
    """Where the chosen hyperparameters lie at the end of what was searched, and the range could go on."""
    told, kind = [], selected.augmentation.kind
    for name, value in selected.augmentation.hyperparameters.items():
        searched, known = space.kinds[kind][name], hyperparameter_of(kind, name)
        if not isinstance(searched, Range) or isinstance(value, Range) or known.coordinate == "degrees":
            continue
        low, high, at = searched.low, searched.high, float(value)
        if searched.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        share = (at - low) / (high - low)
        # By default a patch ends where it fits no longer: there is nothing beyond.
        ends = kind_of(kind).must_fit and name in _FIT and searched.high >= 0.5 * known.high
        if share < _EDGE or (share > 1 - _EDGE and not ends):
            end = "lower" if share < _EDGE else "upper"
            told.append(
                f"{name.replace('_', ' ')} {value:.4g} is at the {end} end of what was searched "
                f"({searched.low:g} to {searched.high:g}): --range {kind}.{name}=LOW:HIGH goes beyond"
            )
    return told
