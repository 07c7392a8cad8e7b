"""The embedded testbeds: textures with a known f_gen, and digits."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from image_folders import digest, same

from ssad_hpo import data
from ssad_hpo.data import testbed
from ssad_hpo.task import Augmentation, Range


def test_a_controlled_task_shares_no_pixel_between_train_and_unlabeled(monkeypatch):
    columns = torch.arange(512).div(2, rounding_mode="floor").to(torch.uint8).expand(512, 512)
    monkeypatch.setattr(testbed, "photograph_of", lambda texture: columns)
    task = data.controlled_data(contamination=0.0, n_train=300, n_unlabeled=300).task
    assert (task.train.min(), task.train.max()) == (0, 149)
    assert (task.unlabeled.min(), task.unlabeled.max()) == (150, 255)


def test_the_controlled_defaults_are_the_published_setting():
    task, labels = data.controlled_data().task, data.controlled_data().labels
    assert task.name == "gravel/cutavg"
    assert task.train.shape == (256, 1, 64, 64) and task.unlabeled.shape == (128, 1, 64, 64)
    assert labels.dtype == np.int8 and labels.shape == (128,) and labels.sum() == 64
    digests = [hashlib.sha256(image.numpy().tobytes()).digest() for image in task.unlabeled]
    assert digests == sorted(digests)


def test_another_texture_can_be_the_anomaly():
    size = {"image_size": 32, "n_train": 4, "n_unlabeled": 20}
    task, labels = (
        data.controlled_data("gravel", "brick", **size).task,
        data.controlled_data("gravel", "brick", **size).labels,
    )
    clean = data.controlled_data("gravel", "brick", contamination=0.0, **size).task
    kept = [(clean.unlabeled == image).flatten(1).all(1).any().item() for image in task.unlabeled]
    assert kept == [label == 0 for label in labels] and task.name == "gravel/brick"
    assert same(data.load(data.builtin("gravel/brick")), data.controlled_data("gravel", "brick").task)


@pytest.mark.parametrize("kind", ["cutout", "cutavg", "cutpaste", "cutdiff", "rotation"])
def test_f_gen_changes_the_labelled_images_and_no_other(kind):
    anomaly = Augmentation(kind, {} if kind == "rotation" else {"patch_area": 0.05})
    size = {"texture": "brick", "n_train": 8, "n_unlabeled": 40, "image_size": 32}
    task = data.controlled_data(anomaly=anomaly, contamination=0.3, **size).task
    clean = data.controlled_data(anomaly=anomaly, contamination=0.0, **size).task
    labels = data.controlled_data(anomaly=anomaly, contamination=0.3, **size).labels
    differing = (task.unlabeled[:, None] != clean.unlabeled[None]).float().mean((2, 3, 4)).amin(1).numpy()
    assert (differing > 0).tolist() == labels.astype(bool).tolist() and labels.sum() == 12
    assert torch.equal(task.train, clean.train)
    if kind in ("cutout", "cutavg"):  # every anomaly differs from its own crop by its patch alone
        assert differing[labels == 1].mean() == pytest.approx(0.05, abs=0.02)


def test_controlled_names_tell_kind_and_area():
    size = {"n_train": 2, "n_unlabeled": 2, "image_size": 32}
    dynamic = Augmentation("cutout", {"patch_area": Range(0.01, 0.1, log=True)})
    assert data.controlled_data("grass", dynamic, **size).task.name == "grass/cutout/0.01-0.1"
    assert data.controlled_data("grass", Augmentation("rotation"), **size).task.name == "grass/rotation"
    small = Augmentation("cutdiff", {"patch_area": 0.01})
    assert data.controlled_data("brick", small, **size).task.name == "brick/cutdiff/0.01"


@pytest.mark.parametrize("load", [data.controlled_data, data.semantic_data])
def test_testbeds_follow_their_seed_alone(load):
    torch.manual_seed(1)
    first = load(seed=3).task
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert same(first, load(seed=3).task) and not torch.equal(first.train, load(seed=4).task.train)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texture": "sand"}, "texture: expected one of gravel, brick, grass, got 'sand'"),
        ({"image_size": 213}, r"image_size: expected 1\.\.212 pixels on a texture, got 213"),
        ({"n_train": 1}, "n_train: expected a whole number >= 2, got 1"),
        ({"n_unlabeled": 2.5}, "n_unlabeled: expected a whole number >= 2, got 2.5"),
        ({"contamination": 1.5}, "contamination: expected a share of anomalies, 0..1, got 1.5"),
        ({"contamination": float("nan")}, "contamination: .*got nan"),
    ],
)
def test_controlled_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.controlled_data(**arguments)


def test_photographs_are_read_without_writing_anywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    for texture in testbed.TEXTURES:
        photograph = testbed.photograph_of(texture)
        assert photograph.shape == (512, 512) and photograph.float().std() > 10
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("anomalies", ["others", "rotated"])
def test_no_digit_image_is_used_twice(anomalies):
    loaded = data.semantic_data(4, anomalies)
    task, labels = loaded.task, loaded.labels
    assert task.train.shape == (90, 1, 32, 32) and task.unlabeled.shape == (80, 1, 32, 32)
    assert labels.shape == (80,) and labels.sum() == 40
    digests = [digest(image.numpy()) for image in (*task.train, *task.unlabeled)]
    assert len(set(digests)) == 170
    turned = {digest(image.rot90(k, (1, 2)).numpy()) for image in task.unlabeled for k in (1, 2, 3)}
    assert not turned & {digest(image.numpy()) for image in task.train}


@pytest.mark.parametrize("anomalies", ["others", "rotated"])
def test_digit_labels_agree_with_the_data_sets_own_targets(anomalies):
    from sklearn.datasets import load_digits

    digits = load_digits()
    originals = np.round(digits.images.astype(np.float32) / 16 * 255).astype(np.uint8)
    target_of = {digest(image): target for image, target in zip(originals, digits.target, strict=True)}
    loaded = data.semantic_data(4, anomalies, image_size=8)
    task, labels = loaded.task, loaded.labels
    for image, label in zip(task.unlabeled[:, 0].numpy(), labels, strict=True):
        upright = [target_of.get(digest(np.rot90(image, k))) for k in range(4)]
        if anomalies == "others":
            assert (upright[0] != 4) == label
        else:
            assert 4 in upright and (upright[0] is None) == label
    assert all(target_of[digest(image)] == 4 for image in task.train.numpy())


def test_every_digit_has_enough_images_for_the_defaults():
    for digit in range(10):
        name = data.load(data.builtin(f"digits/{digit}/rotated")).name
        assert name == f"digits/{digit}/rotated"
    assert data.semantic_data(contamination=0.0).task.unlabeled.shape[0] == 80
    assert data.semantic_data(3, "rotated", contamination=1.0, image_size=64).task.train.shape[-1] == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"normal": 10}, "normal: expected a digit 0..9, got 10"),
        ({"anomalies": "torn"}, "anomalies: expected 'others' or 'rotated', got 'torn'"),
        ({"image_size": 7}, "image_size: expected at least 8 pixels for digits, got 7"),
        ({"n_train": 170}, "expected no more than the 181 images of digit 4 together, got 210"),
        ({"contamination": -0.1}, "contamination: .*got -0.1"),
    ],
)
def test_semantic_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.semantic_data(**arguments)
