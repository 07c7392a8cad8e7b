"""ST-SSAD: what goes wrong in a tuning, what warns of collapse, and settings that cannot be."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from tunings import QUICK, TASK, TINY, quick

import ssad_hpo.bilevel.tuning as bilevel_tuning
from ssad_hpo.bilevel import LOSSES, CollapseWarning, FailedStart, Tuning, tune
from ssad_hpo.criteria import DegenerateError
from ssad_hpo.task import Augmentation, DetectorError, Range

# Tiny trainings end anywhere; what is a sign of collapse has its own tests.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::ssad_hpo.bilevel.CollapseWarning"),
]


def test_a_loss_that_is_not_finite_stops_every_start_and_names_the_hyperparameters(listener):
    def broken(train, augmented, unlabeled):
        return augmented.sum() * float("nan")

    with pytest.raises(DetectorError, match=r"diverged: validation loss nan .* step 6 under cutdiff\(patch_"):
        tune(TASK, quick("cutdiff", loss=broken), TINY, recorder=listener)
    ends = listener.of("ended")
    assert len(ends) == len(QUICK.starts)
    assert all(status == "failed" and "cutdiff(patch_area=" in reason for _, status, _, reason in ends)


def test_a_training_that_diverges_in_its_warm_start_names_the_range():
    with pytest.raises(
        DetectorError, match=r"diverged: loss nan by step 4 under cutdiff\(patch_area=0.002\.\."
    ):
        tune(TASK, quick("cutdiff"), replace(TINY, learning_rate=1e30))


def test_a_training_that_diverges_later_names_the_hyperparameters():
    tuning = quick("cutdiff", warm_start=0.0, detector_steps=4)
    with pytest.raises(DetectorError, match=r"step 4 under cutdiff\(patch_area=0\.0\d+, patch_aspect"):
        tune(TASK, tuning, replace(TINY, learning_rate=1e30))


def test_embeddings_that_collapse_stop_every_start_and_name_the_hyperparameters():
    def collapsed(train, augmented, unlabeled):
        raise DegenerateError("train: expected rows that differ, got 6 identical ones")

    with pytest.raises(
        DetectorError, match=r"start 0: collapsed at step 6 under cutdiff\(.*: train: expected rows"
    ):
        tune(TASK, quick("cutdiff", loss=collapsed), TINY)


def test_a_starting_point_that_fails_fails_alone_also_after_a_resume(listener, tmp_path):
    calls = 0

    def once(train, augmented, unlabeled):
        nonlocal calls
        calls += 1
        loss = LOSSES[QUICK.loss](train, augmented, unlabeled)
        return loss * float("nan") if calls == 1 else loss

    checkpoint, kept = tmp_path / "tuning.pt", []
    tuning = quick("cutdiff", loss=once, starts=(0.5, 0.8))

    def run(**told):
        said = r"^start 0: diverged: validation loss nan .* step 6 under cutdiff\(patch_area="
        with pytest.warns(CollapseWarning, match=said):
            return tune(TASK, tuning, TINY, checkpoint=checkpoint, **told)

    result = run(recorder=listener, keep=lambda index, start: kept.append((index, start)))
    failed, tuned = result.starts
    assert isinstance(failed, FailedStart) and failed.reason.startswith("diverged: validation loss nan")
    assert kept == [(0, failed), (1, tuned)]
    assert result.tuned == (tuned,) and result.kept is tuned and result.chosen == 1
    assert [status for _, status, *_ in listener.of("ended")] == ["failed", "complete"]
    alone = tune(TASK, quick("cutdiff", starts=(0.8,)), TINY)
    assert tuned.trajectory == alone.kept.trajectory
    again = run()
    assert again.starts[0] == failed and again.cost == replace(result.cost, seconds=again.cost.seconds)


def test_a_start_whose_weights_are_no_numbers_leaves_a_checkpoint_that_can_be_read(tmp_path, monkeypatch):
    tuning, checkpoint = quick("cutdiff", starts=(0.5, 0.8)), tmp_path / "tuning.pt"
    advance, calls = bilevel_tuning.advance, []

    def diverges(descent, file, steps):
        calls.append(steps)
        if len(calls) == 1:
            with torch.no_grad():
                next(descent.network.parameters()).fill_(float("nan"))
            raise DetectorError("diverged: loss nan by step 5")
        yield from advance(descent, file, steps)

    monkeypatch.setattr(bilevel_tuning, "advance", diverges)
    with pytest.warns(CollapseWarning, match="start 0: diverged"):
        first = tune(TASK, tuning, TINY, checkpoint=checkpoint)
    with pytest.warns(CollapseWarning, match="start 0: diverged"):
        again = tune(TASK, tuning, TINY, checkpoint=checkpoint)
    assert len(calls) == 2 and again.starts[0] == first.starts[0]
    assert again.cost == replace(first.cost, seconds=again.cost.seconds)


def spread(train, augmented, unlabeled):
    """A loss that drives Z_aug into Z_trn, where smooth alignment's trivial valley lies as well."""
    return (augmented - train).square().sum(1).mean()


def test_a_patch_that_vanishes_is_told_with_its_remedy():
    tuning = Tuning(
        {"cutdiff": {"patch_aspect": 1.0}}, loss=spread, starts=({"patch_area": 0.01},), learning_rate=0.2,
        detector_steps=1, warm_start=0.2, validation_train=10, validation_unlabeled=8,
    )  # fmt: skip
    with pytest.warns(CollapseWarning) as told:
        result = tune(TASK, tuning, replace(TINY, steps=60))
    assert result.augmentation.hyperparameters["patch_area"] == pytest.approx(0.002)
    assert [str(w.message) for w in told] == list(result.warnings)
    bound, chance = result.warnings
    assert "cutdiff.patch_area ended at its lower bound 0.002" in bound and "two_sided_alignment" in bound
    assert "cannot tell augmented images from normal ones" in chance and "start from" in chance
    assert told[0].filename == __file__


def test_a_patch_that_runs_away_is_told():
    """Down this loss augmented images go as far from normal ones as can be: black from edge to edge."""

    def far(train, augmented, unlabeled):
        return -(augmented.mean(0) - train.mean(0)).square().sum()

    augmentation = Augmentation("cutdiff", {"patch_aspect": 1.0})
    tuning = quick(augmentation, loss=far, starts=(0.9,), learning_rate=0.3)
    with pytest.warns(
        CollapseWarning, match=r"patch_area ended at its upper bound 0\.3; it may have run away"
    ):
        tune(TASK, tuning, replace(TINY, width=4, steps=60, batch_size=8))


def test_a_sound_tuning_warns_of_nothing():
    """Black patches of a quarter of the image are told apart at once, and the point hardly moves."""
    tuning = quick("cutout", starts=(0.9,), learning_rate=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = tune(TASK, tuning, replace(TINY, width=4, steps=60, batch_size=8))
    assert result.warnings == ()


# Settings


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss": "dsv"}, r"^loss: expected one of smooth_alignment, .* or a function, got 'dsv'"),
        ({"order": 3}, r"^order: expected one of 1, 2, got 3"),
        ({"detector_steps": 0}, r"^detector_steps: expected a whole number >= 1, got 0"),
        ({"learning_rate": -1.0}, r"^learning_rate: expected a finite number >= 0, got -1.0"),
        ({"virtual_rate": math.inf}, r"^virtual_rate: expected a finite number >= 0, got inf"),
        ({"virtual_rate": 0.0}, r"^virtual_rate: order 2 needs one above 0, got 0"),
        ({"warm_start": 1.0}, r"^warm_start: expected a share of the steps, 0 <= share < 1, got 1.0"),
        ({"warm_start_on": "end"}, r"^warm_start_on: expected one of range, start, got 'end'"),
        ({"validation_train": 1}, r"^validation_train: expected a whole number >= 2, got 1"),
        ({"validation_unlabeled": 1.5}, r"^validation_unlabeled: expected a whole number >= 2, got 1.5"),
        ({"batch_norm": None}, r"^batch_norm: expected one of eval, train, got None"),
        ({"starts": ()}, r"^starts: expected at least one starting point"),
        ({"choose_by": "auc"}, r"^choose_by: expected one of dsv, .*, validation_loss, got 'auc'"),
        ({"temperature": math.nan}, r"^temperature: expected a finite number >= 0, got nan"),
        ({"checkpoint_every": 0}, r"^checkpoint_every: expected a whole number >= 1, got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_out_of_its_range_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(QUICK, **changed)


def test_an_encoder_without_second_derivatives_is_rejected_before_any_step_and_serves_with_order_1():
    training = replace(TINY, encoder="mobilenet_v3_small")
    with pytest.raises(ValueError, match=r"^encoder: order 2 needs second derivatives.*; use order 1$"):
        tune(TASK, quick("cutdiff"), training)
    assert len(tune(TASK, quick("cutdiff", order=1, starts=(0.5,)), training).starts) == 1


@pytest.mark.parametrize(
    ("changed", "others", "message"),
    [
        ({"space": "cutmix"}, {}, r"^augmentation: expected one of cutout, .*, got 'cutmix'"),
        (
            {"space": Augmentation("rotation", {"angle": 30.0})},
            {},
            r"^augmentation: expected a range for what is to be tuned, got rotation\(angle=30\)",
        ),
        (
            {"space": Augmentation("cutout", {"patch_area": Range(0.1, 0.9)})},
            {},
            r"^cutout: a patch of area 0.9 .* does not fit",
        ),
        ({"starts": (1.5,)}, {}, r"^starts: expected a fraction 0..1 of patch_area's range"),
        (
            {"starts": ({"angle": 3.0},)},
            {},
            r"^starts: expected values of patch_area, patch_aspect, got 'angle'",
        ),
        ({"starts": ({"patch_area": 0.5},)}, {}, r"^starts: expected patch_area in 0.002..0.3, got 0.5"),
        (
            {},
            {"training": replace(TINY, steps=2, evaluate_at=(1.0,))},
            r"^steps: expected at least 2 .* got 2 in all",
        ),
        ({}, {"device": "abacus"}, r"^device: expected .*'abacus'"),
        ({}, {"training": replace(TINY, encoder="vgg")}, r"^encoder: expected .*'vgg'"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_a_tuning_that_cannot_be_is_rejected_before_it_begins(changed, others, message):
    with pytest.raises(ValueError, match=message):
        tune(TASK, quick(**{"space": "cutdiff"} | changed), **{"training": TINY} | others)
