"""Held-out normal images: criteria of scores against slow references, the permutation test, setting aside."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from held_out import ALWAYS, MEASURED_ALWAYS, held_out_task, without_held_out
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ssad_hpo.criteria import (
    CRITERIA,
    DegenerateError,
    error_of,
    evaluate_all,
    measured,
    p_anomalies,
    pu_auc,
    shifted_as_a_whole,
)
from ssad_hpo.criteria.held_out import pu_auc_error
from ssad_hpo.detector import untrained_detector
from ssad_hpo.evaluate import auc
from ssad_hpo.judgement import check_criterion, judge
from ssad_hpo.search import Objective
from ssad_hpo.task import Augmentation, Search, Training

OF_SCORES = ("pu_auc", "excess", "shift")
TAILS = (Fraction(1, 20), Fraction(1, 10), Fraction(1, 5), Fraction(3, 10))
every_criterion = pytest.mark.parametrize("name", OF_SCORES)
# Few different values, so that there are ties within and across the sets.
scores_of = st.lists(st.integers(-6, 6), min_size=2, max_size=30)


# References: one pair, one tail at a time.


def above(u: float, h: float) -> float:
    return 1.0 if u > h else 0.5 if u == h else 0.0


def slow_pu_auc(unlabeled: list[int], held_out: list[int]) -> float:
    return -float(np.mean([above(u, h) for u in unlabeled for h in held_out]))


def slow_pu_auc_error(unlabeled: list[int], held_out: list[int]) -> float:
    """DeLong's: the variance of each image's share of won pairs, in both sets."""
    of_unlabeled = [np.mean([above(u, h) for h in held_out]) for u in unlabeled]
    of_held_out = [np.mean([above(u, h) for u in unlabeled]) for h in held_out]
    return float(np.sqrt(sum(np.var(won, ddof=1) / len(won) for won in (of_unlabeled, of_held_out))))


def slow_thresholds(held_out: list[int]) -> list[Fraction]:
    """The quantiles where tails begin, as fractions, without rounding."""
    ordered, found = sorted(map(Fraction, held_out)), []
    for tail in TAILS:
        place = (1 - tail) * (len(ordered) - 1)
        low = place.__floor__()
        high = min(low + 1, len(ordered) - 1)
        found.append(ordered[low] + (ordered[high] - ordered[low]) * (place - low))
    return found


def slow_tails(unlabeled: list[int], held_out: list[int]) -> list[tuple[float, float, float]]:
    """(excess, share of unlabelled above, tail) of each tail."""
    found = []
    for tail, threshold in zip(TAILS, slow_thresholds(held_out), strict=True):
        share = sum(u > threshold for u in unlabeled) / len(unlabeled)
        found.append(((share - float(tail)) / float(tail) ** 0.5, share, float(tail)))
    return found


def slow_excess(unlabeled: list[int], held_out: list[int]) -> float:
    return -max(found for found, _, _ in slow_tails(unlabeled, held_out))


def slow_excess_error(unlabeled: list[int], held_out: list[int]) -> float:
    _, share, tail = max(slow_tails(unlabeled, held_out), key=lambda found: found[0])
    q, n = (share * len(unlabeled) + 2) / (len(unlabeled) + 4), len(unlabeled)
    return float(np.sqrt((q * (1 - q) / n + tail * (1 - tail) / len(held_out)) / tail))


def slow_shift(unlabeled: list[int], held_out: list[int]) -> float:
    return float((np.mean(held_out) - np.mean(unlabeled)) / np.std(held_out))


def slow_shift_error(unlabeled: list[int], held_out: list[int]) -> float:
    distance, of_scores = -slow_shift(unlabeled, held_out), np.var(unlabeled) / np.var(held_out)
    apart = [(h - np.mean(held_out)) / np.std(held_out) for h in held_out]
    influences = [z + distance / 2 * (z**2 - 1) for z in apart]  # on the mean and on its unit
    return float(np.sqrt(of_scores / len(unlabeled) + np.mean(np.square(influences)) / len(held_out)))


SLOW = {
    "pu_auc": (slow_pu_auc, slow_pu_auc_error),
    "excess": (slow_excess, slow_excess_error),
    "shift": (slow_shift, slow_shift_error),
}


@every_criterion
@settings(max_examples=150, deadline=None)
@given(unlabeled=scores_of, held_out=scores_of, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_a_criterion_of_scores_and_its_error_agree_with_the_slow_reference(
    name: str, unlabeled: list[int], held_out: list[int], dtype: torch.dtype
) -> None:
    row, sets = CRITERIA[name], [torch.tensor(values, dtype=dtype) for values in (unlabeled, held_out)]
    before = [values.clone() for values in sets]
    if name == "shift" and len(set(held_out)) == 1:
        with pytest.raises(DegenerateError, match=r"^held_out: expected scores that differ, got \d+ equal"):
            row.function(*sets)
        return
    # Where a score is a quantile itself, rounding decides.
    assume(name != "excess" or not {Fraction(u) for u in unlabeled} & set(slow_thresholds(held_out)))
    assert row.error is not None
    for function, slow in zip((row.function, row.error), SLOW[name], strict=True):
        value = function(*sets)
        assert value.shape == () and value.dtype == torch.float64
        assert float(value) == pytest.approx(slow(unlabeled, held_out), abs=1e-12, rel=1e-9)
    assert all(torch.equal(values, old) for values, old in zip(sets, before, strict=True))


@every_criterion
def test_a_criterion_of_scores_falls_as_unlabelled_scores_rise_and_knows_no_order_or_unit(name: str) -> None:
    criterion, generator = CRITERIA[name].function, torch.Generator().manual_seed(1)
    unlabeled, held_out = (torch.randn(n, generator=generator).double() for n in (40, 30))
    value = float(criterion(unlabeled, held_out))
    assert float(criterion(unlabeled + 1, held_out)) < value
    assert float(criterion(unlabeled.flip(0), held_out.flip(0))) == pytest.approx(value)
    assert float(criterion(3 * unlabeled + 7, 3 * held_out + 7)) == pytest.approx(value)
    assert list(CRITERIA[name].needs) == ["scores", "held_out"]


@every_criterion
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_standard_error_is_that_of_a_bootstrap(name: str, share: float) -> None:
    rng = np.random.default_rng(3)
    unlabeled, held_out = rng.normal(size=90), rng.normal(size=80)
    unlabeled[: round(share * 90)] += 2
    row = CRITERIA[name]
    assert row.error is not None
    values = [
        float(row.function(*(torch.from_numpy(rng.choice(s, len(s))) for s in (unlabeled, held_out))))
        for _ in range(600)
    ]
    error = float(row.error(torch.from_numpy(unlabeled), torch.from_numpy(held_out)))
    assert error == pytest.approx(np.std(values), rel=0.4 if name == "excess" else 0.2)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_pu_auc_is_one_half_and_the_share_of_anomalies_times_what_the_auc_is_above_it(share: float) -> None:
    rng, n = np.random.default_rng(5), 8000
    labels = (np.arange(n) < round(share * n)).astype(np.int8)
    scores, held_out = rng.normal(size=n) + 1.1 * labels, rng.normal(size=n)
    right = auc(labels, scores)
    unlabeled, normal = torch.from_numpy(scores), torch.from_numpy(held_out)
    # Two samples of normal images take part, and each estimate has an error of its own.
    anomalous, good = unlabeled[: round(share * n)], unlabeled[round(share * n) :]
    error = float(pu_auc_error(unlabeled, normal)), share * float(pu_auc_error(anomalous, good))
    assert max(error) < 0.01 and right > 0.75
    assert -float(pu_auc(unlabeled, normal)) == pytest.approx(
        0.5 + share * (right - 0.5), abs=3 * np.hypot(*error)
    )


def test_excess_sees_few_clear_anomalies_better_than_pu_auc_does() -> None:
    rng, gains = np.random.default_rng(6), {"pu_auc": [], "excess": []}
    for _ in range(20):
        normal, held_out = (torch.from_numpy(rng.normal(size=500)) for _ in range(2))
        few = normal + 8 * (torch.arange(500) < 20)
        for name, gained in gains.items():
            value, error = (getattr(CRITERIA[name], which) for which in ("function", "error"))
            fall = float(value(normal, held_out)) - float(value(few, held_out))
            gained.append(fall / float(error(few, held_out)))
    assert np.mean(gains["excess"]) > np.mean(gains["pu_auc"]) > 0.5


BROKEN = {
    "is empty": (lambda scores: scores[:0], r"\(0,\)"),
    "is 2-D": (lambda scores: scores[None], r"\(1, 9\)"),
    "has a NaN": (lambda scores: scores.index_fill(0, torch.tensor([1]), float("nan")), "NaN or infinity"),
    "is of whole numbers": (lambda scores: scores.long(), "torch.int64"),
    "is no tensor": (lambda scores: scores.tolist(), "list"),
}


@pytest.mark.parametrize(
    "function", [f for n in OF_SCORES for f in (CRITERIA[n].function, CRITERIA[n].error)]
)
@pytest.mark.parametrize("argument", [0, 1])
@pytest.mark.parametrize("what", BROKEN)
def test_a_criterion_of_scores_names_the_set_that(function: object, argument: int, what: str) -> None:
    sets, (spoil, came) = [torch.arange(9.0), torch.arange(9.0)], BROKEN[what]
    sets[argument] = spoil(sets[argument])
    with pytest.raises(DegenerateError, match=rf"^{('scores', 'held_out')[argument]}: expected .*{came}"):
        function(*sets)  # type: ignore[operator]


# The permutation test


def correlated(
    rng: np.random.Generator, n_unlabeled: int, n_held_out: int, candidates: int = 6, anomalies: int = 0
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Scores of candidates that see the same images: the first ones among the unlabelled are anomalies."""
    common = rng.normal(size=n_unlabeled + n_held_out)
    common[:anomalies] += 3
    rows = 0.9 * common + 0.45 * rng.normal(size=(candidates, len(common)))
    rows = torch.from_numpy(rows)
    return list(rows[:, :n_unlabeled]), list(rows[:, n_unlabeled:])


def test_without_anomalies_p_is_below_one_in_twenty_about_as_often() -> None:
    rng = np.random.default_rng(7)
    p = [p_anomalies(*correlated(rng, 30, 25), permutations=199, seed=draw) for draw in range(200)]
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.09
    assert 0.4 < np.mean(p) < 0.6 and min(p) >= 1 / 200 and max(p) <= 1


def test_p_finds_anomalies_that_one_candidate_among_many_sees() -> None:
    rng = np.random.default_rng(8)
    assert p_anomalies(*correlated(rng, 40, 40, anomalies=20)) < 0.01
    unlabeled, held_out = correlated(rng, 40, 40)
    assert p_anomalies(unlabeled, held_out) > 0.05
    unlabeled[4][:30] += 4
    assert p_anomalies(unlabeled, held_out) < 0.01


def test_p_is_that_of_all_permutations_counted_one_by_one() -> None:
    rng = np.random.default_rng(9)
    unlabeled, held_out = correlated(rng, 4, 4, candidates=2, anomalies=1)
    pooled = [np.concatenate([u, h]) for u, h in zip(unlabeled, held_out, strict=True)]

    def largest(chosen: tuple[int, ...]) -> float:
        rest = [i for i in range(8) if i not in chosen]
        return max(np.mean([above(row[i], row[j]) for i in chosen for j in rest]) for row in pooled)

    reached = [largest(chosen) >= largest((0, 1, 2, 3)) for chosen in itertools.combinations(range(8), 4)]
    estimated = p_anomalies(unlabeled, held_out, permutations=20_000)
    assert estimated == pytest.approx(np.mean(reached), abs=0.015)
    assert p_anomalies(unlabeled, held_out, seed=1) == p_anomalies(unlabeled, held_out, seed=1)


def test_p_of_no_candidate_or_of_uneven_ones_is_refused() -> None:
    scores = torch.arange(5.0)
    with pytest.raises(DegenerateError, match=r"^held_out: expected scores of 0 detectors, at least one"):
        p_anomalies([], [])
    with pytest.raises(DegenerateError, match=r"^held_out: expected scores of 2 detectors, .*got 1"):
        p_anomalies([scores, scores], [scores])
    with pytest.raises(DegenerateError, match=r"^scores: expected as many of each detector"):
        p_anomalies([scores, scores[:4]], [scores, scores])


def test_a_shift_as_a_whole_is_told_from_anomalies() -> None:
    rng = np.random.default_rng(10)
    held_out, normal = (torch.from_numpy(rng.normal(size=100)) for _ in range(2))
    half = torch.where(torch.arange(100) < 50, normal + 4, normal)
    assert not shifted_as_a_whole(normal, held_out) and not shifted_as_a_whole(half, held_out)
    assert shifted_as_a_whole(normal + 3, held_out)
    assert not shifted_as_a_whole(normal[:6] + 3, held_out)  # six images say too little


# Judging with and without


def test_what_needs_held_out_images_is_measured_where_there_are_some() -> None:
    task = held_out_task()
    training = Training(width=2, steps=8)
    detector = untrained_detector(training, (1, 16, 16), Augmentation("cutout"), torch.device("cpu"))
    judged = judge(detector, task)
    assert judged.criteria.keys() == set(measured()) and error_of("pu_auc") in measured()
    assert judged.held_out is not None and task.held_out is not None
    assert torch.equal(judged.held_out, detector.score(task.held_out))
    assert judged.criteria["pu_auc"] == float(pu_auc(judged.scores, judged.held_out))
    without = judge(detector, without_held_out(task))
    assert without.criteria == {name: judged.criteria[name] for name in MEASURED_ALWAYS}
    assert without.held_out is None and without.embeddings.held_out is None
    sets = judged.embeddings
    assert "pu_auc" not in evaluate_all(sets.train, sets.augmented, sets.unlabeled, judged.scores)


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_of_images_that_a_task_lacks_is_refused_with_both_remedies(name: str) -> None:
    check_criterion("criterion", name, held_out_task())
    task = without_held_out(held_out_task())
    if name in ALWAYS:
        Objective(task, Search(criterion=name))
        return
    with pytest.raises(
        ValueError, match=rf"^criterion: {name} is of held-out .*--held-out.*--held-out-share"
    ):
        Objective(task, Search(criterion=name))


@pytest.mark.parametrize("value", [0.1, 0.7, 3.0])
@pytest.mark.parametrize("count", [3, 7, 50, 57])
def test_scores_that_are_all_the_same_are_no_scale_whatever_rounding_makes_of_them(value, count):
    same = torch.full((count,), value, dtype=torch.float64)
    with pytest.raises(DegenerateError, match="held_out: expected scores that differ"):
        CRITERIA["shift"].function(torch.linspace(0, 1, 20).double(), same)


@pytest.mark.parametrize("draw", ["normal", "exponential", "lognormal"])
def test_the_error_of_shift_is_its_spread_over_draws_for_skewed_scores_too(draw):
    rng, row = np.random.default_rng(0), CRITERIA["shift"]
    values, errors = [], []
    for _ in range(400):
        held_out, unlabeled = (torch.from_numpy(getattr(rng, draw)(size=count)) for count in (75, 150))
        unlabeled[:75] += 2
        values.append(float(row.function(unlabeled, held_out)))
        errors.append(float(row.error(unlabeled, held_out)))
    assert 0.75 < np.mean(errors) / np.std(values) < 1.25
