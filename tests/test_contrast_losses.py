"""Validation losses of held-out images: what they are low for, their gradients, and what they refuse."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from held_out import held_out_task
from tunings import TASK, TINY, quick

from ssad_hpo.bilevel import HELD_OUT_LOSSES, LOSSES, Tuning, tune
from ssad_hpo.criteria import (
    DegenerateError,
    contrast_alignment,
    density_pu_auc,
    discriminant_pu_auc,
    pu_auc,
    whitened_contrast,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::ssad_hpo.bilevel.CollapseWarning"),
]
every_loss = pytest.mark.parametrize("loss", HELD_OUT_LOSSES.values(), ids=HELD_OUT_LOSSES)
CONTRASTS = [contrast_alignment, whitened_contrast]
DIRECT = [*CONTRASTS, discriminant_pu_auc]


def sets(share=0.5, towards=0, far=3.0, seed=0, n=60, d=8):
    """Train, augmented, unlabeled and held-out rows; anomalies lie `far` along the first axis.

    Augmented rows lie as far along the axis `towards`; each is a train row that was moved.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4, n, d, generator=generator, dtype=torch.float64)
    train, unlabeled, held_out = rows[0], rows[1], rows[2]
    augmented = train.clone()
    augmented[:, towards] += far
    unlabeled[: round(share * n), 0] += 3.0
    return train, augmented, unlabeled, held_out


@pytest.mark.parametrize("loss", DIRECT)
def test_an_augmentation_that_imitates_anomalies_has_a_lower_loss_than_one_that_does_not(loss):
    assert loss(*sets(towards=0)) < loss(*sets(towards=1)) - 0.15


@pytest.mark.parametrize("loss", DIRECT)
@pytest.mark.parametrize("far", [1e-3, 1e-6])
def test_an_augmentation_that_vanishes_has_no_valley(loss, far):
    """Where alignment losses fall, since few anomalies leave the unlabelled images near the train ones."""
    share = 0.1
    aligned, vanished = sets(share), sets(share, towards=1, far=far)
    assert loss(*vanished) > loss(*aligned) + 0.04
    assert LOSSES["smooth_alignment"](*vanished[:3]) < LOSSES["smooth_alignment"](*aligned[:3])


@pytest.mark.parametrize("loss", DIRECT)
def test_how_far_augmented_images_go_along_a_direction_does_not_matter(loss):
    near, far = sets(far=1e-2), sets(far=2.0)
    assert float(loss(*near)) == pytest.approx(float(loss(*far)), abs=0.02)


@every_loss
def test_unlabelled_images_that_are_held_out_ones_rank_and_point_nowhere(loss):
    train, augmented, _, held_out = sets()
    assert float(loss(train, augmented, held_out.clone(), held_out)) == pytest.approx(
        0 if loss in CONTRASTS else -0.5, abs=1e-9
    )


def test_the_smooth_pu_auc_is_near_that_of_its_own_scores():
    train, augmented, unlabeled, held_out = sets()
    centres = train.mean(0), augmented.mean(0)
    within = torch.cat([train - centres[0], augmented - centres[1]])
    moments = within.T @ within / len(within)
    moments += moments.diagonal().mean() * torch.eye(len(moments)).double()
    w = torch.from_numpy(np.linalg.solve(moments.numpy(), (centres[1] - centres[0]).numpy()))
    expected = float(pu_auc(unlabeled @ w, held_out @ w))
    assert float(discriminant_pu_auc(*sets())) == pytest.approx(expected, abs=0.05)
    rest = [(rows - centres[0]) for rows in (train, unlabeled, held_out)]
    moments = rest[0].T @ rest[0] / len(train)
    moments += moments.diagonal().mean() * torch.eye(len(moments)).double()
    distances = [np.einsum("ij,ij->i", r, np.linalg.solve(moments, r.T).T) for r in rest[1:]]
    expected = float(pu_auc(*map(torch.from_numpy, distances)))
    assert float(density_pu_auc(*sets())) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(("n", "d"), [(60, 8), (8, 60)], ids=["many images", "few images"])
def test_the_whitened_contrast_is_a_cosine_in_the_train_covariance(n, d):
    train, augmented, unlabeled, held_out = (rows.numpy() for rows in sets(n=n, d=d))
    rest = train - train.mean(0)
    covariance = rest.T @ rest / n
    covariance += np.trace(covariance) / d * np.eye(d)
    ours, theirs = augmented.mean(0) - train.mean(0), unlabeled.mean(0) - held_out.mean(0)
    inverse = np.linalg.inv(covariance)
    cosine = ours @ inverse @ theirs / np.sqrt((ours @ inverse @ ours) * (theirs @ inverse @ theirs))
    assert float(whitened_contrast(*sets(n=n, d=d))) == pytest.approx(-cosine, rel=1e-9)


def test_directions_in_which_normal_images_differ_much_count_less_in_the_covariance():
    wide = [rows * torch.tensor([1.0, *[10.0] * 7]).double() for rows in sets()]
    assert whitened_contrast(*wide) < contrast_alignment(*wide) - 0.1


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_and_agree_with_differences(loss, dtype):
    given = [rows.to(dtype).requires_grad_() for rows in sets(n=9, d=4)]
    value = loss(*given)
    assert value.dtype == dtype and value.shape == ()
    gradients = torch.autograd.grad(value, given, allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)
    assert (gradients[1] is None) == (loss is density_pu_auc)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(loss, given)


@every_loss
def test_a_set_from_which_nothing_follows_is_named(loss):
    train, augmented, unlabeled, held_out = sets()
    with pytest.raises(DegenerateError, match=r"^held_out: expected rows of train's length 8, got 3"):
        loss(train, augmented, unlabeled, held_out[:, :3])
    with pytest.raises(DegenerateError, match=r"^train: expected rows that differ"):
        loss(train[:1].expand(5, -1), augmented, unlabeled, held_out)
    if loss not in CONTRASTS:
        with pytest.raises(DegenerateError, match=r"^held_out: expected scores that differ, got 60 equal"):
            loss(train, augmented, unlabeled, torch.ones_like(held_out))


# In a tuning


@pytest.mark.parametrize("loss", HELD_OUT_LOSSES)
def test_a_tuning_goes_down_a_loss_of_held_out_images(loss):
    task = held_out_task()
    tuning = quick("cutdiff", loss=loss, order=2, starts=(0.6,), focus=False)
    result = tune(task, tuning, TINY)
    sets_of = result.kept.embeddings
    expected = HELD_OUT_LOSSES[loss](sets_of.train, sets_of.augmented, sets_of.unlabeled, sets_of.held_out)
    assert result.kept.validation_loss == pytest.approx(float(expected))
    areas = [outer.hyperparameters["patch_area"] for outer in result.kept.trajectory]
    assert len(set(areas)) == len(areas)
    # They are part of this loss, and so of its cost.
    plain = tune(task, replace(tuning, loss="two_sided_alignment"), TINY)
    assert result.cost.forward == plain.cost.forward + 4 * len(task.held_out)
    others = replace(task, held_out=255 - task.held_out)
    assert (
        tune(others, quick("cutdiff", loss=loss, starts=(0.6,)), TINY).kept.trajectory
        != result.kept.trajectory
    )


def test_a_task_without_held_out_images_is_refused_with_the_remedy():
    with pytest.raises(
        ValueError, match=r"^loss: pu_auc is of held-out normal images, and tiny has none; give"
    ):
        tune(TASK, quick("cutdiff", loss="pu_auc"), TINY)


def test_a_loss_without_augmented_images_needs_second_order():
    with pytest.raises(ValueError, match=r"^loss: density_pu_auc knows .* use order 2 or another loss"):
        Tuning("cutdiff", loss="density_pu_auc")
