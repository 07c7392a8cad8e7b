"""Folders of images become tasks: layouts, categories, order, labels."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from image_folders import SIZE, digest, make_category, pixels_of, same, save
from PIL import Image

from ssad_hpo import data

pytestmark = pytest.mark.usefixtures("cache_folder")


def test_a_task_of_a_folder_has_images_and_no_labels(tmp_path):
    task = data.load_folder(make_category(tmp_path / "bottle"), image_size=SIZE).task
    assert [field.name for field in dataclasses.fields(task)] == [
        "name",
        "train",
        "unlabeled",
        "held_out",
    ]
    assert task.train.shape == (4, 3, SIZE, SIZE) and task.unlabeled.shape == (12, 3, SIZE, SIZE)
    assert task.train.dtype == task.unlabeled.dtype == torch.uint8


def test_images_and_labels_agree_with_a_slow_reading_sorted_by_pixel_digest(tmp_path):
    place = make_category(tmp_path / "bottle")
    rows = [
        (digest(pixels_of(path)), int(path.parent.name != "good"), pixels_of(path))
        for path in (place / "test").rglob("*.png")
    ]
    rows.sort(key=lambda row: row[:2])
    loaded = data.load_folder(place, image_size=SIZE)
    task, labels = loaded.task, loaded.labels
    assert np.array_equal(task.unlabeled.numpy(), np.stack([row[2] for row in rows]))
    assert labels.dtype == np.int8 and labels.tolist() == [row[1] for row in rows]
    train = sorted((pixels_of(path) for path in (place / "train").rglob("*.png")), key=digest)
    assert np.array_equal(task.train.numpy(), np.stack(train))


def test_renaming_defect_folders_changes_no_pixel_of_the_task(tmp_path):
    place = make_category(tmp_path / "bottle")
    before = data.load_folder(place, image_size=SIZE).task
    (place / "test" / "crack").rename(place / "test" / "a_new_name")
    (place / "test" / "good").rename(place / "test" / "z")
    assert same(before, data.load_folder(place, image_size=SIZE).task)


def test_shuffling_file_names_across_folders_changes_no_pixel_of_the_task(tmp_path):
    place = make_category(tmp_path / "bottle")
    before = data.load_folder(place, image_size=SIZE).task
    paths = sorted((place / "test").rglob("*.png"))
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)
    assert same(before, data.load_folder(place, image_size=SIZE).task)


@pytest.mark.parametrize("cached", [True, False])
def test_a_plain_pair_of_copied_folders_gives_the_same_task(tmp_path, monkeypatch, cached):
    place = make_category(tmp_path / "bottle")
    if not cached:
        monkeypatch.setenv("SSAD_HPO_CACHE", "")
    published = data.load_folder(place, image_size=SIZE).task
    for half in ("train", "test"):
        for i, path in enumerate(sorted((place / half).rglob("*.png"), reverse=True)):
            copy = tmp_path / "plain" / half / f"{i}.PNG"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    plain = data.load_folders(tmp_path / "plain" / "train", tmp_path / "plain" / "test", image_size=SIZE).task
    assert same(published, plain) and published.content_hash == plain.content_hash
    assert (published.name, plain.name) == ("bottle", "images")


def test_identical_images_are_listed_normal_first_and_keep_their_number(tmp_path):
    place = make_category(tmp_path / "bottle", defects=("crack",), n=2)
    shutil.copy(place / "test" / "crack" / "000.png", place / "test" / "good" / "copy.png")
    save(place / "test" / "good" / "copy.bmp", Image.open(place / "test" / "crack" / "000.png"))
    loaded = data.load_folder(place, image_size=SIZE)
    task, labels = loaded.task, loaded.labels
    twin = torch.from_numpy(pixels_of(place / "test" / "crack" / "000.png").copy())
    where = [i for i, image in enumerate(task.unlabeled) if torch.equal(image, twin)]
    assert len(labels) == len(task.unlabeled) == 6
    assert labels[where].tolist() == [0, 0, 1]


def test_an_anomaly_selects_its_folder_and_the_good_one(tmp_path):
    place = make_category(tmp_path / "bottle")
    task = data.load_folder(tmp_path, "bottle", "scratch", image_size=SIZE).task
    wanted = [p for folder in ("good", "scratch") for p in (place / "test" / folder).iterdir()]
    expected = sorted((digest(pixels_of(path)), int(path.parent.name != "good")) for path in wanted)
    assert task.name == "bottle/scratch"
    assert [digest(image.numpy()) for image in task.unlabeled] == [row[0] for row in expected]
    labels = data.load_folder(tmp_path, "bottle", "scratch", image_size=SIZE).labels
    assert labels.tolist() == [row[1] for row in expected]


@pytest.mark.parametrize("anomaly", ["dent", "good", "../train", ""])
def test_an_anomaly_without_a_folder_is_an_error_that_lists_those_there(tmp_path, anomaly):
    make_category(tmp_path / "bottle")
    with pytest.raises(data.DataError, match=r"anomaly: .*found: crack, scratch"):
        data.load_folder(tmp_path, "bottle", anomaly, image_size=SIZE)


@pytest.mark.parametrize("layout", ["images directly in test", "no test/good"])
def test_a_test_folder_without_ground_truth_has_no_labels_and_the_same_task(tmp_path, layout):
    place = make_category(tmp_path / "bottle")
    before = data.load_folder(place, image_size=SIZE).task
    if layout == "no test/good":
        (place / "test" / "good").rename(place / "test" / "part1")
    else:
        (place / "test" / "crack" / "000.png").rename(place / "test" / "000.png")
    assert same(before, data.load_folder(place, image_size=SIZE).task)
    assert data.load_folder(place, image_size=SIZE).labels is None
    with pytest.raises(data.DataError, match="anomaly: expected a folder beside"):
        data.load_folder(place, anomaly="scratch", image_size=SIZE)


def test_train_images_may_lie_directly_in_train(tmp_path):
    place = make_category(tmp_path / "bottle")
    before = data.load_folder(place, image_size=SIZE).task
    for path in (place / "train" / "good").iterdir():
        path.rename(place / "train" / path.name)
    (place / "train" / "good").rmdir()
    assert same(before, data.load_folder(place, image_size=SIZE).task)
    (place / "train").rename(place / "bad")
    (place / "train").mkdir()
    (place / "bad").rename(place / "train" / "bad")
    with pytest.raises(data.DataError, match=r"train/good: .*no such folder"):
        data.load_folder(place, image_size=SIZE)


def test_one_category_needs_no_name_and_several_are_listed(tmp_path):
    make_category(tmp_path / "bottle", n=2)
    (tmp_path / "license").mkdir()
    assert data.load_folder(tmp_path, image_size=SIZE).task.name == "bottle"
    make_category(tmp_path / "cable", n=2)
    assert data.find_categories(tmp_path) == ["bottle", "cable"]
    assert data.find_categories(tmp_path / "cable") == []
    for wrong in (None, "screw", "../bottle"):
        with pytest.raises(data.CategoryError, match="bottle, cable"):
            data.load_folder(tmp_path, wrong, image_size=SIZE)
    with pytest.raises(data.DataError, match="expected train/good and test/"):
        data.load_folder(tmp_path / "license")


def test_a_relative_root_gets_its_folders_name(tmp_path, monkeypatch):
    monkeypatch.chdir(make_category(tmp_path / "bottle", n=2))
    assert data.load_folder(".", image_size=SIZE).task.name == "bottle"


def test_hidden_files_and_other_files_are_ignored(tmp_path):
    place = make_category(tmp_path / "bottle")
    before = data.load_folder(place, image_size=SIZE).task
    for name in (".DS_Store", "._000.png", "notes.txt", ".thumbs/1.png"):
        path = place / "test" / "good" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"nothing")
    assert same(before, data.load_folder(place, image_size=SIZE).task)


def test_linked_folders_are_followed_and_circles_end(tmp_path):
    place = make_category(tmp_path / "bottle")
    before = data.load_folder(place, image_size=SIZE).task
    (place / "test" / "good").rename(tmp_path / "elsewhere")
    (place / "test" / "good").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(place / "test")
    assert data.find_images(tmp_path / "elsewhere")[0].name == "000.png"
    (tmp_path / "elsewhere" / "circle").unlink()
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "elsewhere")
    assert same(before, data.load_folder(place, image_size=SIZE).task)
    assert data.load_folder(place, image_size=SIZE).labels.sum() == 8


def test_a_pair_of_folders_that_shares_a_file_is_an_error(tmp_path):
    place = make_category(tmp_path / "bottle")
    with pytest.raises(data.DataError, match="is in train and in unlabeled"):
        data.load_folders(place / "train", place)


def test_a_link_to_itself_is_one_unreadable_file_and_no_end_of_the_folder(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("b.png")
    found = data.find_images(tmp_path)
    assert [path.name for path in found] == ["a.png", "b.png"]
    _, read, lost = data.read_images(found, 8, 1, skip_unreadable=True)
    assert read == found[:1] and "b.png" in lost[0]
