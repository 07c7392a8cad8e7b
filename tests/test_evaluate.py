"""Evaluation against slow, obvious references."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssad_hpo.evaluate import auc, evaluate_candidates, rank_agreement
from studies.lab.alignment import evaluate_alignment, mean_grid
from studies.lab.comparing import average_ranks, compare, wilcoxon_greater
from studies.lab.recovery_tables import factor_off


def slow_auc(labels, scores):
    """The share of (anomaly, normal) pairs in the right order, equal scores counting half."""
    wins = [
        (a > n) + (a == n) / 2
        for (a, is_a), (n, is_n) in itertools.product(zip(scores, labels, strict=True), repeat=2)
        if is_a and not is_n
    ]
    return sum(wins) / len(wins)


def slow_ranks(values):
    """1 + how many are better + half of the others that are equal; higher is better."""
    return [1 + sum(w > v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]


def slow_spearman(x, y):
    return np.corrcoef(slow_ranks(x), slow_ranks(y))[0, 1]


def slow_wilcoxon_greater(differences):
    """The share of all sign patterns whose positive rank sum is at least the observed one."""
    differences = [d for d in differences if d != 0]
    sizes = [len(differences) + 1 - r for r in slow_ranks([abs(d) for d in differences])]
    observed = sum(s for s, d in zip(sizes, differences, strict=True) if d > 0)
    sums = [
        sum(s for s, up in zip(sizes, signs, strict=True) if up)
        for signs in itertools.product((0, 1), repeat=len(sizes))
    ]
    return np.mean([total >= observed for total in sums])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), max_size=20))
def test_auc_is_the_share_of_pairs_in_the_right_order(samples):
    samples = [(True, 0), (False, 1), *samples]
    labels, scores = zip(*samples, strict=True)
    assert auc(labels, scores) == pytest.approx(slow_auc(labels, scores), abs=1e-12)


def test_auc_is_1_when_anomalies_score_higher_and_takes_tensors_and_arrays():
    labels = [0, 0, 1, 1]
    assert auc(labels, [0.1, 0.2, 0.3, 0.4]) == 1.0
    assert auc(torch.tensor(labels), torch.tensor([0.1, 0.2, 0.3, 0.4], requires_grad=True)) == 1.0
    assert auc(np.array(labels, dtype=bool), np.array([4, 3, 2, 1])) == 0.0


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1, 1], [1.0, 2.0], "scores: expected one for each of 3 labels, got 2"),
        ([1, 1], [1.0, 2.0], r"labels: expected both 0 \(normal\) and 1 \(anomaly\), got \[1.0\]"),
        ([0, 0], [1.0, 2.0], r"labels: expected both .* got \[0.0\]"),
        ([], [], r"labels: expected both .* got \[\]"),
        ([0, 1, 2], [1.0, 2.0, 3.0], r"labels: expected both .* got \[0.0, 1.0, 2.0\]"),
        ([0, 1], [1.0, float("nan")], "scores: expected finite values, got nan"),
        ([0, 1], [float("inf"), 1.0], "scores: expected finite values, got inf"),
        ([[0, 1]], [1.0, 2.0], r"labels: expected \(N,\), got \(1, 2\)"),
    ],
)
def test_auc_names_what_is_wrong(labels, scores, message):
    with pytest.raises(ValueError, match=message):
        auc(labels, scores)


def test_evaluation_compares_selected_with_oracle_random_and_worst():
    aucs = {3: 0.5, 5: 0.9, 8: 0.7, 9: 0.6}
    criterion = {9: 0.2, 3: 0.8, 5: -0.1, 8: -0.3}
    evaluation = evaluate_candidates(aucs, criterion, selected=8)
    assert evaluation.auc_selected == 0.7
    assert evaluation.auc_oracle == 0.9
    assert evaluation.auc_random == pytest.approx(0.675)
    assert evaluation.auc_worst == 0.5
    assert evaluation.regret == pytest.approx(0.2)
    assert evaluation.n_candidates == 4
    in_order = ([-criterion[trial] for trial in aucs], list(aucs.values()))
    assert evaluation.spearman == pytest.approx(slow_spearman(*in_order))


def test_spearman_is_positive_when_a_lower_criterion_means_a_higher_auc():
    aucs = {0: 0.9, 1: 0.7, 2: 0.5}
    assert evaluate_candidates(aucs, {0: 1, 1: 2, 2: 3}, 0).spearman == pytest.approx(1)
    assert evaluate_candidates(aucs, {0: 3, 1: 2, 2: 1}, 2).spearman == pytest.approx(-1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 5)), min_size=3, max_size=10))
def test_spearman_agrees_with_the_slow_reference_or_is_none(pairs):
    criterion = {trial: float(c) for trial, (c, _) in enumerate(pairs)}
    aucs = {trial: a / 5 for trial, (_, a) in enumerate(pairs)}
    spearman = evaluate_candidates(aucs, criterion, selected=0).spearman
    if len(set(criterion.values())) == 1 or len(set(aucs.values())) == 1:
        assert spearman is None
    else:
        expected = slow_spearman([-c for c in criterion.values()], list(aucs.values()))
        assert spearman == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("aucs", "criterion"),
    [
        ({0: 0.5}, {0: 1.0}),
        ({0: 0.5, 1: 0.7}, {0: 1.0, 1: 2.0}),
        ({0: 0.5, 1: 0.7, 2: 0.9}, {0: 1.0, 1: 1.0, 2: 1.0}),
        ({0: 0.5, 1: 0.5, 2: 0.5}, {0: 1.0, 1: 2.0, 2: 3.0}),
    ],
)
def test_metrics_leave_out_a_spearman_that_is_undefined(aucs, criterion):
    evaluation = evaluate_candidates(aucs, criterion, selected=0)
    assert evaluation.spearman is None
    assert set(evaluation.metrics()) == {
        "auc_selected", "auc_oracle", "auc_random", "auc_worst", "regret", "n_candidates",
    }  # fmt: skip
    assert all(type(value) is float for value in evaluation.metrics().values())


def test_evaluation_does_not_depend_on_the_order_in_which_trials_ended():
    rng = np.random.default_rng(0)
    aucs = dict(enumerate(rng.uniform(size=30).tolist()))
    criterion = dict(enumerate(rng.normal(size=30).tolist()))
    backwards = dict(reversed(aucs.items()))
    assert evaluate_candidates(aucs, criterion, 4) == evaluate_candidates(backwards, criterion, 4)


@pytest.mark.parametrize(
    ("aucs", "criterion", "selected", "message"),
    [
        ({}, {}, 0, "aucs: expected at least one candidate"),
        ({0: 0.5}, {0: 1.0, 2: 1.0}, 0, r"criterion_values: .* difference in \[2\]"),
        ({0: 0.5, 1: 0.5}, {0: 1.0}, 0, r"criterion_values: .* difference in \[1\]"),
        ({0: 0.5}, {0: 1.0}, 7, r"selected: expected one of the trials \[0\], got 7"),
        ({0: 1.5}, {0: 1.0}, 0, r"aucs: expected 0..1, got 1.5 for trial 0"),
        ({0: float("nan")}, {0: 1.0}, 0, "aucs: expected 0..1, got nan for trial 0"),
        ({0: 0.5}, {0: float("inf")}, 0, "criterion_values: expected finite values, got inf for trial 0"),
    ],
)
def test_evaluation_names_what_is_wrong(aucs, criterion, selected, message):
    with pytest.raises(ValueError, match=message):
        evaluate_candidates(aucs, criterion, selected)


def test_average_ranks_give_1_to_the_best_and_share_ties():
    table = {"dsv": [0.9, 0.8, 0.7], "random": [0.6, 0.8, 0.5], "base": [0.7, 0.2, 0.6]}
    ranks = average_ranks(table)
    assert ranks == {"dsv": (1 + 1.5 + 1) / 3, "random": (3 + 1.5 + 3) / 3, "base": (2 + 3 + 2) / 3}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=4, max_size=4), min_size=1, max_size=6))
def test_average_ranks_agree_with_the_slow_reference(tasks):
    table = {f"method {m}": [task[m] / 4 for task in tasks] for m in range(4)}
    expected = np.mean([slow_ranks(task) for task in tasks], axis=0)
    assert list(average_ranks(table).values()) == pytest.approx(list(expected))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "table: expected at least one method"),
        ({"a": [], "b": []}, "on the same tasks, one or more"),
        ({"a": [0.1], "b": [0.1, 0.2]}, "on the same tasks.*'b': 2"),
        ({"a": [float("nan")]}, r"table\['a'\]: expected finite values"),
    ],
)
def test_average_ranks_name_what_is_wrong(table, message):
    with pytest.raises(ValueError, match=message):
        average_ranks(table)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=9).filter(any))
def test_wilcoxon_is_exact_with_ties_and_zeros_in_small_samples(differences):
    b = [0.1 * i for i in range(len(differences))]
    a = [value + 0.1 * d for value, d in zip(b, differences, strict=True)]
    assert wilcoxon_greater(a, b) == pytest.approx(slow_wilcoxon_greater(differences), abs=1e-9)


def test_wilcoxon_is_small_when_a_always_wins_and_large_when_it_always_loses():
    a, b = np.linspace(0.6, 0.9, 10) ** 2, np.linspace(0.1, 0.5, 10)
    assert wilcoxon_greater(a, b) == pytest.approx(1 / 2**10)
    assert wilcoxon_greater(b, a) == 1.0


def test_wilcoxon_of_equal_values_is_1():
    assert wilcoxon_greater([0.5, 0.7], [0.5, 0.7]) == 1.0
    # not equal in floating point, but nobody's advantage
    assert wilcoxon_greater([0.1 + 0.2, 0.3], [0.3, 0.3]) == 1.0


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([0.1], [0.1, 0.2], "b: expected as many values as a, at least 1, got 1 and 2"),
        ([], [], "b: expected as many values as a, at least 1, got 0 and 0"),
        ([float("nan")], [0.1], "a: expected finite values, got nan"),
        ([[0.1]], [0.1], r"a: expected \(N,\), got \(1, 1\)"),
    ],
)
def test_wilcoxon_names_what_is_wrong(a, b, message):
    with pytest.raises(ValueError, match=message):
        wilcoxon_greater(a, b)


def runs(values_by_task):
    return {(task, seed): v for task, values in values_by_task.items() for seed, v in enumerate(values)}


def test_a_comparison_averages_seeds_before_tasks_and_counts_both_units():
    first = runs({"a": [0.9, 0.7], "b": [0.8, 0.8], "c": [0.6, 0.7]})
    second = runs({"a": [0.6, 0.6], "b": [0.8, 0.9], "c": [0.5, 0.5]})
    got = compare(first, second, {"a": 1, "b": 1, "c": 2})
    assert got.difference == pytest.approx(np.mean([0.2, -0.05, 0.15]))
    assert got.p_task == pytest.approx(slow_wilcoxon_greater([4, -1, 3]))
    assert got.p_run == pytest.approx(slow_wilcoxon_greater([3, 1, 0, -1, 1, 2]))
    assert got.low < got.difference < got.high


def test_the_interval_of_a_comparison_resamples_clusters_and_not_tasks():
    tasks = [f"{cluster}{i}" for cluster in "ab" for i in range(20)]
    first, second = runs({t: [0.9 if t[0] == "a" else 0.5] for t in tasks}), runs({t: [0.6] for t in tasks})
    together = compare(first, second, {t: t[0] for t in tasks})
    alone = compare(first, second, {t: t for t in tasks})
    assert (together.low, together.high) == pytest.approx((-0.1, 0.3))  # all of one cluster, or of the other
    assert alone.low > 0 and alone.high < 0.2
    assert together == compare(first, second, {t: t[0] for t in tasks})


def test_a_comparison_needs_the_same_runs_of_both_methods():
    with pytest.raises(ValueError, match="second: expected the runs of first, at least 1, got 1 that only"):
        compare(runs({"a": [0.5, 0.6]}), runs({"a": [0.5]}), {"a": 1})
    with pytest.raises(ValueError, match="at least 1"):
        compare({}, {}, {})


def test_rank_agreement_is_1_where_the_lowest_criterion_goes_with_the_highest_auc():
    assert rank_agreement([0.1, 0.2, 0.4], [0.9, 0.8, 0.6]) == pytest.approx(1)
    assert rank_agreement([0.1, 0.2, 0.4], [0.6, 0.8, 0.9]) == pytest.approx(-1)
    assert rank_agreement([0.1, 0.1, 0.1], [0.6, 0.8, 0.9]) is None
    assert rank_agreement([0.1, 0.2], [0.6, 0.8]) is None


def test_a_grid_holds_means_of_equal_pairs_and_nan_where_there_is_none():
    pairs = [("a", 0), ("a", 1), ("a", 0), ("b", 1), ("c", 0)]
    grid = mean_grid(pairs, [1.0, 2.0, 5.0, 4.0, 9.0], ["b", "a"], [0, 1])
    np.testing.assert_array_equal(grid, [[np.nan, 4.0], [3.0, 2.0]])
    with pytest.raises(ValueError, match=r"^values: expected one for each of 5 pairs, got 1$"):
        mean_grid(pairs, [1.0], ["a"], [0])


def test_alignment_tells_the_diagonal_from_the_rest():
    aucs = [[0.9, 0.5, 0.6], [0.8, 0.7, 0.4], [0.3, 0.2, 1.0]]
    distances = [[0.1, 0.9, 0.8], [0.3, 0.6, 0.7], [1.1, 1.2, 0.5]]
    found = evaluate_alignment(aucs, distances)
    assert found.aligned == pytest.approx((0.9 + 0.7 + 1.0) / 3)
    assert found.misaligned == pytest.approx((0.5 + 0.6 + 0.8 + 0.4 + 0.3 + 0.2) / 6)
    assert found.unbeaten == 2  # by rows: of the second f_gen another f_aug finds more
    assert found.spearman == pytest.approx(slow_spearman(-np.ravel(distances), np.ravel(aucs)))
    assert found.spearman_within == pytest.approx(1.0)


def test_alignment_leaves_failed_pairs_out():
    gap = np.nan
    found = evaluate_alignment([[0.9, gap], [0.7, gap]], [[0.2, gap], [0.8, gap]])
    assert (found.aligned, found.misaligned, found.unbeaten) == (0.9, 0.7, 1)
    assert found.spearman is None and found.spearman_within is None  # two pairs are too few


def test_an_aligned_f_aug_that_shares_the_first_place_is_not_beaten():
    found = evaluate_alignment(np.ones((3, 3)), np.arange(9).reshape(3, 3))
    assert found.unbeaten == 3 and found.spearman is None  # nothing varies that could be ranked


@pytest.mark.parametrize(
    ("aucs", "distances", "complaint"),
    [
        (np.ones((2, 3)), np.ones((2, 3)), r"aucs: expected \(K, K\), got \(2, 3\)"),
        (np.ones((2, 2)), np.ones((3, 3)), r"distances: expected \(2, 2\) as aucs"),
        (np.ones((2, 2)), [[1, np.nan], [1, 1]], r"distances: expected \(2, 2\) as aucs"),
        (np.ones((1, 1)), np.ones((1, 1)), "aucs: expected at least one pair on the diagonal and one off"),
    ],
    ids=["not square", "other shape", "other gaps", "one kind"],
)
def test_alignment_rejects_what_it_cannot_compare(aucs, distances, complaint):
    with pytest.raises(ValueError, match=f"^{complaint}"):
        evaluate_alignment(aucs, distances)


def test_a_factor_is_the_same_above_and_below_and_1_where_nothing_is_missed():
    assert factor_off(0.04, 0.02) == factor_off(0.01, 0.02) == 2
    assert factor_off(3.3, 3.3) == 1


@pytest.mark.parametrize(
    ("found", "true", "message"),
    [(0.0, 1.0, "found: expected a finite number above 0"), (1.0, float("inf"), "true: expected a finite")],
)
def test_a_factor_needs_positive_finite_values(found, true, message):
    with pytest.raises(ValueError, match=message):
        factor_off(found, true)
