"""What becomes of candidates when labels are out of reach: every choice, average and combination, judged.

Kept detectors are looked at as if `unlabeled` held a part of their test images only: with another share of
anomalies, and, to be judged by, images that no method has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ssad_hpo.combined import combine
from ssad_hpo.consensus import SELECTORS
from ssad_hpo.criteria import CRITERIA, NO_EVIDENCE, evaluate_all, p_anomalies
from ssad_hpo.detector import Embeddings
from ssad_hpo.evaluate import auc
from ssad_hpo.task import COMBINED

TOP = 3
_DRIVER = COMBINED.criterion  # of searches of folders: it chooses, and whom to combine
Arrays = Mapping[str, np.ndarray]
Figures = dict[str, tuple[float, float]]  # method -> two AUCs; oracle and worst are those by the second
Scores = np.ndarray | torch.Tensor
Judge = Callable[[Scores, Scores], tuple[float, float]]  # by scores of the unlabelled and the unseen images


@dataclass(frozen=True)
class Draw:
    """Places in a set's test images: `unlabeled`, and the rest, which only judges.

    Attributes:
        unlabeled, unseen: places.
    """

    unlabeled: np.ndarray
    unseen: np.ndarray


def draw(labels: np.ndarray, share: float | None, seed: int) -> Draw:
    """A half of the test images as `unlabeled`, its anomalies thinned out to a share; None leaves them.

    The other half keeps its anomalies, so that detectors are judged by as many at every share.
    """
    generator = np.random.default_rng(seed)
    halves: list[list[int]] = [[], []]
    for value in (0, 1):
        places = generator.permutation(np.flatnonzero(labels == value))
        half = len(places) // 2
        kept = places[:half]
        if value == 1 and share is not None:
            kept = kept[: round(share / (1 - share) * len(halves[0]))]
        halves[0].extend(kept)
        halves[1].extend(places[half:])
    return Draw(np.sort(halves[0]), np.sort(halves[1]))


def judge_of(labels: np.ndarray, places: Draw) -> Judge:
    """AUC on the unlabelled images (NaN where these have no anomalies) and on unseen ones.

    Args:
        labels: (N,) of all test images.
        places: the draw.
    """
    truths = labels[places.unlabeled], labels[places.unseen]

    def judged(scores: Scores, unseen: Scores) -> tuple[float, float]:
        both = zip(truths, (scores, unseen), strict=True)
        return tuple(auc(t, s) if t.any() else float("nan") for t, s in both)  # type: ignore[return-value]

    return judged


@dataclass(frozen=True, eq=False)
class Seen:
    """A kept detector on a draw; what `combine` takes."""

    scores: np.ndarray
    held_out: np.ndarray
    embeddings: Embeddings
    unseen_scores: np.ndarray
    unseen: torch.Tensor

    @classmethod
    def of(cls, arrays: Arrays, places: Draw, prefix: str = "") -> Seen:
        """Of `arrays_of`; the prefix "whole_" takes scores by density of detectors that score by patches."""
        sets = [torch.from_numpy(arrays[name]) for name in ("train", "augmented", "unlabeled", "held_out")]
        unlabeled = sets[2]
        sets[2] = unlabeled[places.unlabeled]
        return cls(
            arrays[f"{prefix}scores"][places.unlabeled],
            arrays[f"{prefix}held_out_scores"],
            Embeddings(*sets),
            arrays[f"{prefix}scores"][places.unseen],
            unlabeled[places.unseen],
        )

    @cached_property
    def criteria(self) -> dict[str, float]:
        """All criteria on the draw; groups of candidates ask for them again."""
        sets = self.embeddings
        scores = torch.from_numpy(self.scores), torch.from_numpy(self.held_out)
        return evaluate_all(sets.train, sets.augmented, sets.unlabeled, *scores)


def figures(
    candidates: Sequence[Seen],
    dynamic: Sequence[Seen],
    frozen: Seen | None,
    judged: Judge,
    whole: Sequence[Seen] = (),
) -> Figures:
    """Two AUCs of every method, as they are judged.

    Args:
        candidates: that a choice is made among.
        dynamic: detectors of randomly drawn sizes, which need no choice.
        frozen: the pretrained encoder as it comes.
        judged: has the labels, and nothing else has.
        whole: the candidates again with scores of whole images, where theirs are of patches.
    """

    def together(members: Sequence[Seen], heads: bool) -> tuple[float, float]:
        return judged(*combined_scores(members, heads=heads))

    def with_ridge(members: Sequence[Seen]) -> tuple[float, float]:
        found = combine(members, heads=False)
        parts = zip(found.parts, members, strict=True)
        unseen = torch.stack([part(m.unseen_scores, m.unseen) for part, m in parts]).mean(0)
        heads = [ridge_head(m) for m in members]
        of_unlabeled, of_unseen = (torch.stack([head[i] for head in heads]).mean(0) for i in (0, 1))
        return judged(found.scores + of_unlabeled, unseen + of_unseen)

    single = [judged(c.scores, c.unseen_scores) for c in candidates]
    criteria = [c.criteria for c in candidates]
    of_unseen = [pair[1] for pair in single]
    table: Figures = {"average": _mean(single)}
    if dynamic:
        table["random dynamic"] = _mean([judged(d.scores, d.unseen_scores) for d in dynamic])
        table["dynamic, averaged"] = together(dynamic, heads=False)
    if frozen is not None:
        table |= as_it_comes(frozen, judged)
    matrix = np.stack([c.scores for c in candidates], axis=1)
    for name, selector in SELECTORS.items():
        table[name] = single[int(np.argmax(selector(matrix)))]
    for name in CRITERIA:
        table[name] = single[int(np.argmin([row[name] for row in criteria]))]
    first = sorted(range(len(candidates)), key=lambda i: criteria[i]["pu_auc"])[:TOP]
    for title, members in (("all", candidates), (f"top {TOP}", [candidates[i] for i in first])):
        table[f"z-average, {title}"] = together(members, heads=False)
        table[f"combined, {title}"] = together(members, heads=True)
    if whole:
        table["z-average, all, by both scores"] = together([*candidates, *whole], heads=False)
        table["combined, all, by both scores"] = together([*candidates, *whole], heads=True)
    table["ridge heads, all"] = with_ridge(candidates)
    if frozen is not None:
        table["combined, all and frozen"] = together([*candidates, frozen], heads=True)
    # What a search does: without evidence of anomalies there is nothing to choose by, and no head.
    members = [*candidates, *([] if frozen is None else [frozen])]
    if sees_anomalies(members):
        best = sorted(members, key=lambda m: m.criteria[_DRIVER])[: COMBINED.combine]
        table["as a search ends"] = together(best, heads=True)
    else:
        table["as a search ends"] = table["z-average, all" if frozen is None else "frozen"]
    table["oracle"] = single[int(np.argmax(of_unseen))]
    table["worst"] = single[int(np.argmin(of_unseen))]
    return table


def as_it_comes(frozen: Seen, judged: Judge) -> Figures:
    """Two AUCs of the encoder as it comes, with its own head, and as a search of no candidate ends."""
    table = {
        "frozen": judged(frozen.scores, frozen.unseen_scores),
        "frozen with head": judged(*combined_scores([frozen], heads=True)),
    }
    return {
        **table,
        "as a first look ends": table["frozen with head" if sees_anomalies([frozen]) else "frozen"],
    }


def sees_anomalies(members: Sequence[Seen]) -> bool:
    """Whether the unlabelled images stand out against held-out ones by any of the detectors."""
    scores = [[torch.from_numpy(of) for of in (m.scores, m.held_out)] for m in members]
    return p_anomalies(*map(list, zip(*scores, strict=True))) < NO_EVIDENCE


def combined_scores(members: Sequence[Seen], *, heads: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What detectors make of the unlabelled and of the unseen images together; see `combine`."""
    found = combine(members, heads=heads)
    parts = zip(found.parts, members, strict=True)
    return found.scores, torch.stack([part(m.unseen_scores, m.unseen) for part, m in parts]).mean(0)


def ridge_head(seen: Seen) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the unlabelled and the unseen images by a ridge regression of unlabelled against held-out.

    The simple contrast head: in five folds, each image by the head that was not fitted to it, unseen
    ones by the mean head; both sets of equal weight, the ridge a tenth of the mean eigenvalue; in standard
    deviations of the held-out images.
    """
    assert seen.embeddings.held_out is not None
    sets = [rows.double() for rows in (seen.embeddings.unlabeled, seen.embeddings.held_out)]
    folds = [torch.arange(len(rows)) % 5 for rows in sets]
    values = [torch.zeros(len(rows)).double() for rows in sets]
    unseen = torch.zeros(len(seen.unseen)).double()
    for fold in range(5):
        kept = [rows[places != fold] for rows, places in zip(sets, folds, strict=True)]
        rows, (n, m) = torch.cat(kept), (len(kept[0]), len(kept[1]))
        weight = torch.cat([torch.full((n,), 0.5 / n), torch.full((m,), 0.5 / m)]).double()
        targets = torch.cat([torch.ones(n), -torch.ones(m)]).double()
        rest = rows - weight @ rows
        covariance = rest.T @ (rest * weight[:, None])
        ridge = 0.1 * covariance.diagonal().mean() * torch.eye(len(covariance)).double()
        weights = torch.linalg.solve(covariance + ridge, (rest * weight[:, None]).T @ targets)
        for value, all_rows, places in zip(values, sets, folds, strict=True):
            value[places == fold] = all_rows[places == fold] @ weights - weight @ rows @ weights
        unseen += (seen.unseen.double() @ weights - weight @ rows @ weights) / 5
    centre, spread = values[1].mean(), values[1].std(correction=0)
    return (values[0] - centre) / spread, (unseen - centre) / spread


def _mean(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    transductive, inductive = np.mean(pairs, axis=0)
    return float(transductive), float(inductive)
