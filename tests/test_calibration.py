"""Conformal p-values, alarms and drift against slow references, and their rates under exchangeability."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectors import textures, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from ssad_hpo.calibration import ALARM_RATE, DRIFT_LEVEL, Calibration
from ssad_hpo.detector import Detector
from ssad_hpo.judgement import judge
from ssad_hpo.task import Task

few_values = st.integers(-3, 3).map(float)  # so that ties are the rule


@settings(max_examples=200, deadline=None)
@given(st.lists(few_values, min_size=1, max_size=12), st.lists(few_values, max_size=6))
def test_a_p_value_is_the_share_of_held_out_scores_at_least_as_high_the_image_itself_among_them(
    held_out: list[float], scores: list[float]
) -> None:
    found = Calibration(torch.tensor(held_out)).p_values(torch.tensor(scores))
    expected = [(1 + sum(h >= s for h in held_out)) / (len(held_out) + 1) for s in scores]
    assert found.tolist() == expected


@settings(max_examples=300, deadline=None)
@given(
    st.lists(few_values, min_size=1, max_size=40),
    st.one_of(st.floats(0.02, 0.99), st.integers(2, 98).map(lambda k: k / 100)),
)
def test_an_alarm_is_a_p_value_of_at_most_the_rate_to_the_last_bit(
    held_out: list[float], rate: float
) -> None:
    calibration, scores = Calibration(torch.tensor(held_out)), torch.arange(-4.0, 5.0)
    if rate < calibration.least_rate:
        with pytest.raises(ValueError, match=r"^alarm_rate: \d+ held-out images keep rates of"):
            calibration.alarms(scores, rate)
        return
    assert torch.equal(calibration.alarms(scores, rate), calibration.p_values(scores) <= rate)


@pytest.mark.parametrize("n", range(1, 140))
def test_rates_that_so_many_images_just_keep_are_kept(n: int) -> None:
    calibration = Calibration(torch.arange(float(n)))
    for k in {1, n // 2, n} - {0}:
        alarms = calibration.alarms(torch.arange(n) + 0.5, k / (n + 1))
        assert int(alarms.sum()) == k  # those above the k-th highest, each between two held-out ones
        assert calibration.realised_rates(k / (n + 1))[0] == k / (n + 1)


def test_p_values_of_exchangeable_images_are_uniform_and_alarms_keep_their_rate() -> None:
    rng, n, draws = np.random.default_rng(0), 19, 4000
    scores = torch.from_numpy(rng.gamma(2.0, size=(draws, n + 1)))
    p_values = torch.cat([Calibration(row[:n]).p_values(row[n:]) for row in scores])
    counts = torch.bincount((p_values * (n + 1)).round().long(), minlength=n + 2)[1:]
    assert len(counts) == n + 1 and chisquare(counts.numpy()).pvalue > 0.001
    kept = np.mean([bool(Calibration(row[:n]).alarms(row[n:], 0.1)) for row in scores])
    assert abs(kept - 0.1) < 3 * math.sqrt(0.09 / draws)


def test_ties_raise_fewer_alarms_never_more() -> None:
    rng, n, draws = np.random.default_rng(1), 19, 3000
    scores = torch.from_numpy(rng.integers(0, 4, (draws, n + 1)).astype(float))
    kept = np.mean([bool(Calibration(row[:n]).alarms(row[n:], 0.1)) for row in scores])
    assert kept < 0.1
    same = Calibration(torch.ones(50))
    assert same.p_values(torch.ones(3)).tolist() == [1.0] * 3 and not same.alarms(torch.ones(3)).any()


@pytest.mark.parametrize(("n", "rate"), [(39, 0.05), (99, 0.1), (19, 0.05)])
def test_the_range_of_realised_rates_holds_nine_in_ten_of_them(n: int, rate: float) -> None:
    rng, draws = np.random.default_rng(2), 2000
    calibrations = [Calibration(torch.from_numpy(rng.random(n))) for _ in range(draws)]
    true = np.array([1 - c.threshold(rate) for c in calibrations])  # scores of normal images are uniform
    mean, low, high = calibrations[0].realised_rates(rate)
    assert true.mean() == pytest.approx(mean, rel=0.05) and mean <= rate
    for tail in (np.mean(true < low), np.mean(true > high)):
        assert tail == pytest.approx(0.05, abs=0.02)


def test_one_held_out_image_keeps_a_rate_of_one_half_alone() -> None:
    calibration = Calibration(torch.zeros(1))
    assert calibration.least_rate == 0.5 and calibration.usual_rate == 0.5
    assert calibration.p_values(torch.tensor([-1.0, 0.0, 1.0])).tolist() == [1, 1, 0.5]
    assert calibration.alarms(torch.tensor([0.0, 1.0]), 0.5).tolist() == [False, True]
    assert calibration.p_values(torch.zeros(0)).shape == (0,)
    assert Calibration(torch.zeros(75)).usual_rate == ALARM_RATE


@pytest.mark.parametrize(
    ("rate", "message"),
    [(0.0, "share"), (1.0, "share"), (float("nan"), "share"), ("0.1", "share"), (True, "share"),
     (0.01, r"10 held-out images keep rates of 0\.091 and more, got 0\.01, which takes 99;")],
)  # fmt: skip
def test_rates_that_cannot_be_are_refused(rate: object, message: str) -> None:
    calibration = Calibration(torch.arange(10.0))
    for refused in (calibration.threshold, calibration.realised_rates, calibration.check_rate):
        with pytest.raises(ValueError, match=f"^alarm_rate: .*{message}"):
            refused(rate)  # type: ignore[operator]


@pytest.mark.parametrize(
    "scores",
    [torch.zeros(2, 2), torch.tensor([1]), torch.tensor([1.0, float("nan")]), [1.0]],
    ids=["of two dimensions", "whole numbers", "NaN", "a list"],
)
def test_scores_that_cannot_be_are_refused(scores: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"^held_out: expected"):
        Calibration(scores)
    for refused in (Calibration(torch.zeros(2)).p_values, Calibration(torch.zeros(2)).drift):
        with pytest.raises(ValueError, match=r"^scores: expected"):
            refused(scores)


def test_no_held_out_score_is_no_calibration() -> None:
    with pytest.raises(ValueError, match=r"^held_out: expected at least one"):
        Calibration(torch.zeros(0))


# Drift


def drifting(share: float, shift: float, size: int, draws: int = 600) -> float:
    """How many batches with a share of clear anomalies, all others shifted, are said to have drifted."""
    rng, found = np.random.default_rng(3), 0
    for _ in range(draws):
        calibration = Calibration(torch.from_numpy(rng.normal(size=75)))
        n = round(share * size)
        batch = np.concatenate([rng.normal(shift, size=size - n), rng.normal(5, size=n)])
        found += calibration.drift(torch.from_numpy(batch)) < DRIFT_LEVEL
    return found / draws


@pytest.mark.parametrize("share", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("size", [10, 60, 300])
def test_batches_with_anomalies_are_not_said_to_drift(share: float, size: int) -> None:
    assert drifting(share, 0.0, size) <= DRIFT_LEVEL + 3 * math.sqrt(DRIFT_LEVEL / 600)


def test_batches_that_are_shifted_as_a_whole_drift_if_they_are_large_enough() -> None:
    assert drifting(0.0, 3.0, 60) > 0.95
    assert drifting(0.0, 3.0, 20) == 0  # might be anomalies, as far as so few can tell
    assert drifting(0.0, -3.0, 60) == 0


def test_drift_is_the_chance_of_so_few_normal_images_below_the_lowest_third() -> None:
    rng, n, normal, draws = np.random.default_rng(4), 12, 9, 20000
    held_out = np.sort(rng.random((draws, n)), axis=1)
    counts = (rng.random((draws, normal)) <= held_out[:, [3]]).sum(1)
    calibration = Calibration(torch.arange(float(n)))
    for low in (0, 1, 3):
        batch = torch.cat([torch.full((low,), 1.0), torch.full((30 - low,), 8.0)])  # 9 in 30 are normal
        assert calibration.drift(batch) == pytest.approx(np.mean(counts <= low), abs=0.01)


# Kept with a detector


def judged_detector() -> tuple[Detector, Task, torch.Tensor]:
    task = Task("textures", textures(40), textures(12, seed=4), textures(20, seed=5))
    detector = trained(task.train)
    found = judge(detector, task)
    assert found.held_out is not None
    return detector, task, found.held_out


def test_a_judged_detector_decides_by_its_held_out_scores_and_so_does_its_copy(tmp_path: Path) -> None:
    detector, task, held_out = judged_detector()
    assert detector.calibration is not None and task.held_out is not None
    assert torch.equal(detector.calibration.held_out, held_out.sort().values)
    detector.save(tmp_path / "detector")
    copy = Detector.load(tmp_path / "detector")
    assert copy.calibration is not None
    assert torch.equal(copy.calibration.held_out, detector.calibration.held_out)
    images = task.train
    expected = Calibration(held_out).p_values(detector.score(images))
    for one in (detector, copy):
        assert torch.equal(one.p_values(images), expected)
        assert torch.equal(one.decide(images, 0.3), expected <= 0.3)
    with pytest.raises(ValueError, match=r"^alarm_rate: "):
        detector.decide(images, 1e-6)


def test_a_detector_without_held_out_images_scores_and_says_why_it_does_not_decide(tmp_path: Path) -> None:
    detector, task, _ = judged_detector()
    judge(detector, Task("textures", task.train, task.unlabeled))
    assert detector.calibration is None
    detector.save(tmp_path / "detector")
    copy = Detector.load(tmp_path / "detector")
    assert copy.calibration is None and torch.equal(copy.score(task.train), detector.score(task.train))
    for refused in (copy.p_values, copy.decide):
        with pytest.raises(ValueError, match="no scores of held-out normal images to decide by; search with"):
            refused(task.train)


def test_held_out_scores_that_are_spoilt_in_the_file_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    detector, *_ = judged_detector()
    detector.save(tmp_path / "detector")
    path = tmp_path / "detector" / "detector.safetensors"
    tensors = load_file(path)
    for spoilt in (
        torch.tensor([1.0, float("nan")]),
        torch.zeros(0),
        torch.zeros(2, 2),
        torch.ones(3).long(),
    ):
        save_file({**tensors, "calibration.held_out": spoilt}, path)
        with pytest.raises(ValueError, match=r"detector: cannot be read as a detector \(.*held_out"):
            Detector.load(tmp_path / "detector")
