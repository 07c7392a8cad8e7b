"""Every criterion against golden values and a slow, obvious reference; symmetries, gradients, errors."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ssad_hpo.criteria import (
    CRITERIA,
    Criterion,
    DegenerateError,
    base,
    discordance,
    dsv,
    evaluate_all,
    mmd_normalised,
    separability,
    smooth_alignment,
    soft_alignment,
    two_sided_alignment,
)

GOLDEN = Path(__file__).parent / "golden"
ARGUMENTS = ("train", "augmented", "unlabeled")
LOSSES_ALONE = {"mmd_normalised": mmd_normalised, "two_sided_alignment": two_sided_alignment}
# Criteria of embeddings; those of scores are in test_held_out.py.
OF_SETS = {name: row.function for name, row in CRITERIA.items() if row.needs == ARGUMENTS}
FUNCTIONS = {**OF_SETS, "separability": separability, **LOSSES_ALONE}
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
every_function = pytest.mark.parametrize("name", FUNCTIONS)
# Relative accuracy in the type that the values are computed in.
ACCURACY = {torch.float32: 2e-5, torch.float64: 1e-10}
pytestmark = pytest.mark.usefixtures("one_thread")


def random_sets(seed, sizes=(9, 7, 8), d=5, dtype=torch.float64, spread=1.0):
    """Three sets, each about a mean of its own; a small spread makes them three clusters."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(3, 1, d, dtype=torch.float64, generator=generator)
    return [
        (mean + spread * torch.randn(n, d, dtype=torch.float64, generator=generator)).to(dtype)
        for mean, n in zip(means, sizes, strict=True)
    ]


def slow_values(train, augmented, unlabeled):
    """All criteria straight from the formulas: one pair at a time, in float64."""
    train, augmented, unlabeled = (rows.double().cpu().numpy() for rows in (train, augmented, unlabeled))
    either = [*train, *augmented]
    across = [math.dist(z, other) for z in either for other in unlabeled]
    within = [math.dist(z, other) for z in train for other in augmented]
    values = {"base": np.mean(across) / 2, "std": -np.std(across)}
    values["mmd"] = math.dist(np.mean(either, axis=0), np.mean(unlabeled, axis=0)) ** 2
    values["discordance"] = values["base"] / (np.mean(within) / 2 + 1e-8)
    centre = np.mean(train, axis=0)
    projections = [
        (z - centre) @ (other - centre) / np.linalg.norm(other - centre)
        for z in unlabeled
        for other in augmented
    ]
    values["separability"] = np.std(projections) / (np.mean(within) / 2)
    values["dsv"] = values["discordance"] - min(values["separability"], 0.5) / values["discordance"]
    values["dsv_unclamped"] = values["discordance"] - values["separability"] / values["discordance"]

    everything = np.array([*either, *unlabeled])
    middle = everything.mean(axis=0)
    size = math.sqrt(np.mean([math.dist(z, middle) ** 2 for z in everything]))
    values["mmd_normalised"] = values["mmd"] / size**2
    mean_train, mean_augmented = ((rows.mean(axis=0) - middle) / size for rows in (train, augmented))
    smooth, soft, nearness = [], [], []
    for z in (unlabeled - middle) / size:
        to_train, to_augmented = math.dist(z, mean_train), math.dist(z, mean_augmented)
        smooth.append((to_train + to_augmented) / 2)
        soft.append(-0.2 * math.log(math.exp(-to_train / 0.2) + math.exp(-to_augmented / 0.2)))
        nearness.append(math.exp(-to_augmented / 0.2))
    values |= {"smooth_alignment": np.mean(smooth), "soft_alignment": np.mean(soft)}
    return values | {"two_sided_alignment": np.mean(soft) - 0.2 * math.log(np.mean(nearness))}


def gradients(function, sets):
    sets = [rows.clone().requires_grad_() for rows in sets]
    return torch.autograd.grad(function(*sets), sets, allow_unused=True, materialize_grads=True)


def test_the_table_holds_the_criteria_that_rank_detectors():
    assert list(CRITERIA) == [
        "dsv",
        "discordance",
        "base",
        "mmd",
        "std",
        "smooth_alignment",
        "soft_alignment",
        "dsv_unclamped",
        "pu_auc",
        "excess",
        "shift",
    ]
    assert all(criterion.function.__name__ == name for name, criterion in CRITERIA.items())


# Values


def golden_cases():
    cases = []
    with np.load(GOLDEN / "criteria_embeddings.npz") as arrays:
        stored = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    for case, expected in json.loads((GOLDEN / "criteria_expected.json").read_text()).items():
        tolerance = 1e-3 if case == "collapsed_augmented" else 1e-4
        sets = [stored[f"{case}/{key}"] for key in "abc"]
        cases.append(pytest.param(sets, expected, tolerance, id=case))
    return cases


@pytest.mark.parametrize(("sets", "expected", "tolerance"), golden_cases())
def test_every_value_is_the_golden_one(sets, expected, tolerance):
    expected = {name: value for name, value in expected.items() if name != "separability_clamped"}
    expected["dsv_unclamped"] = expected["discordance"] - expected["separability"] / expected["discordance"]
    assert evaluate_all(*sets) == pytest.approx(expected, rel=tolerance)
    single = {name: float(FUNCTIONS[name](*sets)) for name in expected}
    assert single == pytest.approx(expected, rel=tolerance)


@every_function
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(9, 7, 8), (2, 2, 2), (3, 20, 5)], ids=str)
@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_a_criterion_is_a_scalar_that_agrees_with_the_slow_reference(name, device, dtype, sizes, spread):
    sets = [rows.to(device) for rows in random_sets(0, sizes, dtype=dtype, spread=spread)]
    before = [rows.clone() for rows in sets]
    value, expected = FUNCTIONS[name](*sets), slow_values(*sets)[name]
    assert value.shape == () and value.dtype == dtype and value.device == sets[0].device
    assert float(value) == pytest.approx(expected, rel=ACCURACY[dtype])
    if name not in LOSSES_ALONE:
        assert evaluate_all(*sets)[name] == pytest.approx(expected, rel=ACCURACY[dtype])
    assert all(torch.equal(rows, old) for rows, old in zip(sets, before, strict=True))


@every_function
def test_a_criterion_is_accurate_on_tight_sets_far_from_the_origin(name):
    sets = [rows + 100 for rows in random_sets(1, (40, 30, 50), dtype=torch.float32, spread=0.01)]
    assert float(FUNCTIONS[name](*sets)) == pytest.approx(slow_values(*sets)[name], rel=1e-3)


@every_function
def test_a_criterion_does_not_depend_on_the_order_of_rows(name):
    sets = random_sets(2)
    generator = torch.Generator().manual_seed(3)
    shuffled = [rows[torch.randperm(len(rows), generator=generator)] for rows in sets]
    assert float(FUNCTIONS[name](*shuffled)) == pytest.approx(float(FUNCTIONS[name](*sets)), rel=1e-12)


@every_function
def test_a_criterion_does_not_depend_on_where_the_sets_lie_and_how_they_are_turned(name):
    sets = random_sets(4)
    rotation, _ = torch.linalg.qr(random_sets(5, (5, 2, 2))[0])
    moved = [(rows - 3) @ rotation for rows in sets]
    assert float(FUNCTIONS[name](*moved)) == pytest.approx(float(FUNCTIONS[name](*sets)), rel=1e-10)


@pytest.mark.parametrize(
    "name",
    [
        "dsv",
        "dsv_unclamped",
        "discordance",
        "separability",
        "smooth_alignment",
        "soft_alignment",
        *LOSSES_ALONE,
    ],
)
@pytest.mark.parametrize("factor", [0.01, 30.0])
def test_a_relative_criterion_does_not_depend_on_a_common_scale(name, factor):
    sets = random_sets(6)
    scaled = FUNCTIONS[name](*(factor * rows for rows in sets))
    assert float(scaled) == pytest.approx(float(FUNCTIONS[name](*sets)), rel=1e-5)  # L_dis adds 1e-8


# What the values mean


def clusters(unlabeled_share, n=400, d=32, spread=0.02, apart=1.0, seed=7):
    """Train about one point, augmented about another; the given share of unlabeled lies about the latter."""
    generator = torch.Generator().manual_seed(seed)
    noise = spread * torch.randn(3, n, d, generator=generator, dtype=torch.float64)
    train, augmented, unlabeled = noise
    augmented[:, 0] += apart
    unlabeled[: round(unlabeled_share * n), 0] += apart
    return train, augmented, unlabeled


def test_dsv_is_negative_for_aligned_clusters():
    assert float(dsv(*clusters(0.5))) < -0.25
    assert float(dsv(*clusters(0.2))) < 0.1


def test_dsv_rejects_the_false_positive_of_base():
    mixed = clusters(0.5, apart=0.0)
    aligned = clusters(0.5)
    assert float(base(*mixed)) < float(base(*aligned))  # Base takes the mixture for the better one
    assert float(dsv(*mixed)) > 0.6


def test_dsv_rises_when_the_augmented_miss_the_anomalies():
    train, augmented, unlabeled = clusters(0.5)
    elsewhere = augmented + torch.eye(32, dtype=torch.float64)[1] * 2
    assert float(dsv(train, elsewhere, unlabeled)) > float(dsv(train, augmented, unlabeled)) + 0.5


def test_separability_is_not_clamped_and_1_for_separated_balanced_clusters():
    sets = clusters(0.5, spread=1e-4)
    assert float(separability(*sets)) == pytest.approx(1, abs=1e-3)
    assert float(dsv(*sets)) == pytest.approx(0.5 - 0.5 / 0.5, abs=1e-2)


@pytest.mark.parametrize(("contamination", "aligned", "merged"), [(0.2, 1.02, 0.80), (0.5, 1.00, 1.34)])
def test_smooth_alignment_has_the_trivial_valley_that_the_method_computes(contamination, aligned, merged):
    train, augmented, unlabeled = clusters(contamination, d=1, spread=1e-6)
    assert float(smooth_alignment(train, augmented, unlabeled)) == pytest.approx(aligned, abs=0.005)
    assert float(smooth_alignment(train, augmented - 1, unlabeled)) == pytest.approx(merged, abs=0.005)


def test_soft_alignment_asks_for_the_nearer_mean_only():
    train, augmented, unlabeled = clusters(0.5, d=1, spread=1e-4)
    # Normalised, the clusters are 2 apart: every point is at distance 0 of one mean and 2 of the other.
    assert float(soft_alignment(train, augmented, unlabeled)) == pytest.approx(0, abs=0.01)
    assert float(smooth_alignment(train, augmented, unlabeled)) == pytest.approx(1, abs=0.01)
    assert float(soft_alignment(train, augmented - 2, unlabeled)) > 0.4


def test_two_sided_alignment_does_not_reward_augmented_embeddings_that_leave_everything():
    train, augmented, unlabeled = clusters(0.2)
    away = augmented + 20 * (augmented.mean(0) - train.mean(0))
    assert float(soft_alignment(train, away, unlabeled)) < float(soft_alignment(train, train, unlabeled))
    aligned, merged, left = (
        float(two_sided_alignment(train, z, unlabeled)) for z in (augmented, train, away)
    )
    assert aligned < merged < left


# Streaming


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_streamed_value_is_the_one_with_gradients(name, dtype):
    sets = random_sets(8, (630, 400, 1030), d=4, dtype=dtype)  # 1,030 x 1,030 pairs: four blocks of 1,024
    with_gradient = FUNCTIONS[name](*(rows.requires_grad_() for rows in sets))
    assert with_gradient.requires_grad
    with torch.no_grad():
        streamed = FUNCTIONS[name](*sets)
    assert not streamed.requires_grad and streamed.dtype == dtype
    assert float(streamed) == pytest.approx(with_gradient.item(), rel=ACCURACY[dtype])
    if name not in LOSSES_ALONE:
        assert evaluate_all(*sets)[name] == pytest.approx(with_gradient.item(), rel=ACCURACY[dtype])


MEASURE_MEMORY = """
import torch
from ssad_hpo.criteria import CRITERIA, evaluate_all, separability
of_sets = [c.function for c in CRITERIA.values() if c.needs == ("train", "augmented", "unlabeled")]
torch.set_num_threads(1)

def peak_mb():  # of this program; getrusage would count the one that started it
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0]) / 1024

generator = torch.Generator().manual_seed(0)
sets = [torch.randn(n, 64, generator=generator) for n in (3000, 3000, 6000)]
few = [rows[:50] for rows in sets]
evaluate_all(*few), [function(*few) for function in of_sets]  # what the first call loads is not counted
start = peak_mb()
evaluate_all(*sets)
for function in (*of_sets, separability):
    function(*sets)
streamed = peak_mb() - start
held = torch.cdist(torch.cat(sets[:2]), sets[2])  # 6,000 x 6,000 float32: 137 MiB
print(streamed, peak_mb() - start)
"""


def test_streaming_holds_a_small_part_of_all_pairs():
    done = subprocess.run([sys.executable, "-c", MEASURE_MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    streamed, all_pairs = map(float, done.stdout.split())
    assert all_pairs > 120  # the meter sees one matrix of all pairs
    assert streamed < 60


# Gradients


@every_function
@pytest.mark.parametrize(("spread", "clamped"), [(0.25, False), (1.0, True)])
def test_gradients_agree_with_finite_differences(name, spread, clamped):
    sets = random_sets(10, (5, 4, 6), d=3, spread=spread)
    assert (float(separability(*sets)) > 0.5) == clamped  # DSV has a bend at 0.5
    assert torch.autograd.gradcheck(FUNCTIONS[name], [rows.requires_grad_() for rows in sets])


@every_function
def test_second_gradients_agree_with_finite_differences(name):
    sets = random_sets(10, (4, 3, 4), d=2)
    assert torch.autograd.gradgradcheck(FUNCTIONS[name], [rows.requires_grad_() for rows in sets])


def coincident_sets():
    """Sets in which rows are equal to each other, and to the means that distances are taken to."""
    train = random_sets(11, (6, 2, 2))[0]
    symmetric = torch.tensor([[1.0, 2], [-1, -2], [3, -1], [-3, 1]], dtype=torch.float64)
    zero = torch.zeros(1, 2, dtype=torch.float64)
    return {
        "augmented equals train": (train, train.clone(), train.flip(1)),
        "all are equal": (train, train.clone(), train.clone()),
        "an unlabeled row equals both means": (symmetric, 2 * symmetric, torch.cat([symmetric, zero])),
        "an augmented row equals train's mean": (symmetric, torch.cat([symmetric, zero]), 2 * symmetric),
        "doubles within a set": (train[[0, 0, 1]], train[[2, 2, 3]], train[[0, 2, 2]]),
    }


@every_function
@pytest.mark.parametrize("case", coincident_sets())
def test_gradients_are_finite_to_second_order_where_points_coincide(name, case):
    sets = [rows.clone().requires_grad_() for rows in coincident_sets()[case]]
    value = FUNCTIONS[name](*sets)
    first = torch.autograd.grad(value, sets, create_graph=True, allow_unused=True, materialize_grads=True)
    assert all(g.isfinite().all() for g in first)
    slope = sum(g.square().sum() for g in first)
    assert slope.requires_grad
    second = torch.autograd.grad(slope, sets, allow_unused=True, materialize_grads=True)
    assert all(g.isfinite().all() for g in second)


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_functional_gradients_are_those_of_autograd(name, dtype):
    sets = random_sets(12, dtype=dtype)
    expected = gradients(FUNCTIONS[name], sets)
    assert any(g.abs().max() > 0 for g in expected)
    together = torch.func.grad(FUNCTIONS[name], argnums=(0, 1, 2))(*sets)
    for argument, both, reference in zip(range(3), together, expected, strict=True):
        alone = torch.func.grad(FUNCTIONS[name], argnums=argument)(*sets)
        assert both.dtype == alone.dtype == dtype
        torch.testing.assert_close(both, reference)
        torch.testing.assert_close(alone, reference)


@every_function
def test_one_argument_that_wants_a_gradient_is_enough(name):
    sets = random_sets(13)
    for argument, expected in enumerate(gradients(FUNCTIONS[name], sets)):
        given = [rows.clone().requires_grad_(i == argument) for i, rows in enumerate(sets)]
        FUNCTIONS[name](*given).backward()
        torch.testing.assert_close(given[argument].grad, expected)


# Degenerate input

# What is broken -> how, and what the message says came.
BROKEN = {
    "is empty": (lambda rows: rows[:0], r"\(0, 5\)"),
    "has one row": (lambda rows: rows[:1], r"\(1, 5\)"),
    "has no columns": (lambda rows: rows[:, :0], r"\(\d, 0\)"),
    "is 1-D": (lambda rows: rows[0], r"\(5,\)"),
    "is 3-D": (lambda rows: rows[None], r"\(1, \d, 5\)"),
    "has identical rows": (lambda rows: rows[:1].repeat(4, 1), "4 identical ones"),
    "has rows that rounding alone tells apart": (
        lambda rows: rows[:1] * (1 + torch.finfo(rows.dtype).eps * torch.arange(4.0)[:, None]),
        "4 identical ones",
    ),
    "has a NaN": (
        lambda rows: rows.index_fill(0, torch.tensor([1]), float("nan")),
        "NaN or infinity in 1 rows",
    ),
    "has an infinity": (
        lambda rows: rows.index_fill(0, torch.tensor([0, 2]), -float("inf")),
        "NaN or infinity in 2 rows",
    ),
    "is of whole numbers": (lambda rows: (10 * rows).long(), "torch.int64"),
    "is no tensor": (lambda rows: rows.tolist(), "list"),
    "has rows of another length": (lambda rows: rows[:, :4], "4"),
}


@pytest.mark.parametrize("function", [*FUNCTIONS.values(), evaluate_all], ids=lambda f: f.__name__)
@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("what", BROKEN)
def test_a_criterion_names_the_set_that(function, argument, what):
    sets = dict(zip(ARGUMENTS, random_sets(14, dtype=torch.float32), strict=True))
    spoil, came = BROKEN[what]
    sets[argument] = spoil(sets[argument])
    # Lengths are compared with train's, so a train of another length shows in the next set.
    named, came = ("augmented", "5") if (argument, came) == ("train", "4") else (argument, came)
    with pytest.raises(DegenerateError, match=rf"^{named}: expected .*{came}"):
        function(**sets)


def test_a_train_set_without_rows_is_named_even_when_nothing_else_is_right():
    empty = torch.zeros(0, 3)
    with pytest.raises(DegenerateError, match=r"^train: "):
        dsv(empty, empty, empty)


def test_sets_that_are_close_together_are_not_degenerate():
    sets = [1 + 1e-5 * rows for rows in random_sets(15, dtype=torch.float32)]
    assert float(discordance(*sets)) == pytest.approx(slow_values(*sets)["discordance"], rel=1e-2)


def test_a_criterion_of_scores_is_left_out_where_there_are_none(monkeypatch):
    monkeypatch.setitem(CRITERIA, "spread", Criterion(lambda scores: -scores.std(), needs=("scores",)))
    sets, scores = random_sets(16), torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    assert "spread" not in evaluate_all(*sets)
    assert evaluate_all(*sets, scores) == {**evaluate_all(*sets), "spread": -1.0}


def test_a_criterion_that_needs_what_nobody_gives_is_refused():
    with pytest.raises(
        ValueError, match="needs: expected some of train, augmented, unlabeled, scores, held_out, got x"
    ):
        Criterion(dsv, needs=("train", "x"))
