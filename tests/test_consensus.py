"""Consensus selectors against golden values, slow and obvious references, and their symmetries."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssad_hpo import consensus
from ssad_hpo.consensus import SELECTORS, hits, mc, sel

GOLDEN = Path(__file__).parent / "golden"
every_selector = pytest.mark.parametrize("selector", SELECTORS.values(), ids=SELECTORS.keys())


def random_scores(seed, n_samples=40, n_models=6, decimals=None):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(n_samples, 1)) + rng.uniform(0.3, 3, n_models) * rng.normal(
        size=(n_samples, n_models)
    )
    return scores if decimals is None else np.round(scores, decimals)


def tau_b(x, y):
    """Kendall's tau-b by its definition, all pairs."""
    sign_x, sign_y = np.sign(x[:, None] - x[None]), np.sign(y[:, None] - y[None])
    return (sign_x * sign_y).sum() / np.sqrt((sign_x**2).sum() * (sign_y**2).sum())


def inverse_ranks(scores):
    """1 / (1 + samples above + half of the other samples that are equal), sample by sample."""
    above = (scores[None] > scores[:, None]).sum(axis=1)
    equal = (scores[None] == scores[:, None]).sum(axis=1)
    return 1 / (above + (equal + 1) / 2)


def slow_mc(scores):
    models = range(scores.shape[1])
    return [np.mean([tau_b(scores[:, m], scores[:, k]) for k in models if k != m]) for m in models]


def slow_hits(scores):
    votes, hub = inverse_ranks(scores), np.ones(scores.shape[1])
    for _ in range(20_000):
        authority = votes @ hub
        hub = votes.T @ (authority / np.linalg.norm(authority))
        hub /= np.linalg.norm(hub)
    return hub


def slow_sel(scores):
    """The final taus and the trusted models, straight from their definitions."""
    votes, models = inverse_ranks(scores), range(scores.shape[1])
    taus = [tau_b(scores[:, m], votes.mean(axis=1)) for m in models]
    trusted, joined_at = [int(np.argmax(taus))], [max(taus)]
    while True:
        # Rounded: the reference sums in another order than the code, ties must stay ties in both.
        target = np.round(votes[:, trusted].mean(axis=1), 12)
        taus = [tau_b(scores[:, m], target) for m in models]
        left = [m for m in models if m not in trusted]
        if not left or max(taus[m] for m in left) < np.mean(joined_at):
            return taus, trusted
        trusted.append(max(left, key=lambda m: taus[m]))
        joined_at.append(taus[trusted[-1]])


def select_trusted(scores):
    return consensus._select(scores)[0]


@pytest.mark.parametrize("name", SELECTORS)
def test_selectors_equal_the_golden_values(name):
    expected = json.loads((GOLDEN / "consensus_expected.json").read_text())
    scores = np.load(GOLDEN / "consensus_scores.npy")
    np.testing.assert_allclose(SELECTORS[name](scores), expected[name], rtol=0, atol=1e-9)


def test_select_trusts_the_golden_models_in_the_golden_order():
    expected = json.loads((GOLDEN / "consensus_expected.json").read_text())
    assert select_trusted(np.load(GOLDEN / "consensus_scores.npy")) == expected["sel_trusted"]


@pytest.mark.parametrize("decimals", [None, 0], ids=["distinct", "tied"])
@pytest.mark.parametrize("seed", range(5))
def test_selectors_agree_with_slow_references(seed, decimals):
    scores = random_scores(seed, decimals=decimals)
    taus, trusted = slow_sel(scores)
    np.testing.assert_allclose(mc(scores), slow_mc(scores), rtol=0, atol=1e-12)
    np.testing.assert_allclose(hits(scores), slow_hits(scores), rtol=0, atol=1e-12)
    np.testing.assert_allclose(sel(scores), taus, rtol=0, atol=1e-12)
    assert select_trusted(scores) == trusted


def test_select_trusts_all_models_that_agree_perfectly():
    scores = random_scores(0)[:, :1] * [1.0, 2.0, 3.0]
    assert select_trusted(scores) == [0, 1, 2]
    np.testing.assert_allclose(sel(scores), 1)


@every_selector
def test_selectors_give_float64_merits_one_per_model_and_leave_scores_alone(selector):
    scores = random_scores(1)
    before = scores.copy()
    merits = selector(scores)
    assert merits.shape == (6,) and merits.dtype == np.float64 and np.isfinite(merits).all()
    np.testing.assert_array_equal(scores, before)


@every_selector
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selectors_take_tensors_with_gradients(selector, dtype):
    scores = torch.tensor(random_scores(2)).to(dtype).requires_grad_()
    np.testing.assert_array_equal(selector(scores), selector(scores.detach().double().numpy()))


@every_selector
def test_selectors_do_not_prefer_an_outlier(selector):
    scores = random_scores(3)
    scores[:, 4] = -scores[:, 0]
    assert np.argmin(selector(scores)) == 4


@every_selector
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), decimals=st.sampled_from([None, 0]), data=st.data())
def test_permuting_models_permutes_merits_and_permuting_samples_changes_none(selector, seed, decimals, data):
    scores = random_scores(seed, n_samples=25, decimals=decimals)
    models = data.draw(st.permutations(range(scores.shape[1])))
    samples = data.draw(st.permutations(range(scores.shape[0])))
    merits = selector(scores)
    np.testing.assert_allclose(selector(scores[samples]), merits, rtol=0, atol=1e-12)
    # SELECT settles equal taus by the column's number, which a permutation changes.
    if selector is not sel or not has_equal_taus(scores):
        np.testing.assert_allclose(selector(scores[:, models]), merits[models], rtol=0, atol=1e-12)


def has_equal_taus(scores):
    votes, trusted = inverse_ranks(scores), select_trusted(scores)
    for joined in [range(scores.shape[1]), *(trusted[:n] for n in range(1, len(trusted) + 1))]:
        target = np.round(votes[:, list(joined)].mean(axis=1), 12)
        taus = np.sort([tau_b(column, target) for column in scores.T])
        if np.diff(taus).min() < 1e-12:
            return True
    return False


@every_selector
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_merits_depend_on_the_order_of_scores_alone(selector, seed):
    scores = random_scores(seed, n_samples=25)
    np.testing.assert_array_equal(selector(np.exp(scores / 5) * 7 - 100), selector(scores))


@every_selector
def test_the_same_scores_give_the_same_merits_to_the_last_bit(selector):
    scores = random_scores(4, n_samples=200, n_models=12)
    np.testing.assert_array_equal(selector(scores), selector(scores))


@every_selector
@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.zeros(5), r"scores: expected \(n_samples, n_models\) .* got \(5,\)"),
        (np.zeros((5, 1)), r"at least 2 of each, got \(5, 1\)"),
        (np.zeros((1, 5)), r"at least 2 of each, got \(1, 5\)"),
        (np.zeros((0, 0)), r"at least 2 of each, got \(0, 0\)"),
        (np.array([[1, np.nan], [2, 3]]), r"expected finite scores, .* columns \[1\]"),
        (np.array([[np.inf, 1], [2, 3]]), r"expected finite scores, .* columns \[0\]"),
        (np.array([[1.0, 4], [2, 4]]), r"tell samples apart, got constant scores in columns \[1\]"),
        (np.ones((3, 9)), r"columns \[0, 1, 2, 3, 4\] and 4 more"),
    ],
)
def test_selectors_name_what_is_wrong_with_scores(selector, scores, message):
    with pytest.raises(ValueError, match=message):
        selector(scores)


def test_select_rejects_models_that_contradict_each_other_perfectly():
    with pytest.raises(ValueError, match="scores: expected models with some consensus"):
        sel(np.array([[1.0, 2.0], [2.0, 1.0]]))


@pytest.mark.parametrize("n_samples", [200, 300, 66_000])
def test_mc_counts_right_where_the_integer_type_of_ranks_changes(n_samples):
    rng = np.random.default_rng(0)
    scores = rng.permuted(np.tile(np.arange(n_samples)[:, None], 2), axis=0).astype(float)
    scores[:, 1] += scores[:, 0]
    from scipy.stats import kendalltau

    expected = kendalltau(scores[:, 0], scores[:, 1]).statistic
    np.testing.assert_allclose(mc(scores), [expected, expected], rtol=0, atol=1e-12)
