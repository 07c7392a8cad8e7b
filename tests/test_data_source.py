"""Addresses of data sets: built-in names, JSON, loaders and their labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import SIZE, make_category, same

from ssad_hpo import data
from ssad_hpo.task import Augmentation, Range

pytestmark = pytest.mark.usefixtures("cache_folder")


@pytest.mark.parametrize(
    "labels", [np.zeros(79, np.int8), np.zeros(80), np.full(80, 2, np.int8)], ids=["few", "floats", "twos"]
)
def test_labels_that_do_not_belong_to_the_images_are_refused(labels):
    with pytest.raises(ValueError, match=r"labels: expected \(80,\) int8 of 0 and 1, got"):
        data.DataSet(data.semantic_data().task, labels)


def test_the_name_of_a_loader_stands_for_its_defaults():
    assert data.builtin("semantic") == data.Source("semantic", {})
    with pytest.raises(ValueError, match="there is no such folder; as a built-in arguments: missing"):
        data.find_source("folder")


def test_a_builtin_name_has_a_task_of_that_name_and_labels():
    for name in ("gravel/cutavg", "brick/cutpaste", "grass/cutdiff/0.01", "gravel/brick", "digits/7/rotated"):
        source = data.builtin(name)
        task, labels = data.load(source), data.read_labels(source)
        assert task.name == name and len(labels) == len(task.unlabeled) and labels.mean() == 0.5
    assert same(data.load(data.builtin("gravel/cutavg")), data.controlled_data().task)


@pytest.mark.parametrize(
    "name",
    ["", "gravel", "sand/cutavg", "gravel/rotation", "gravel/cutavg/big", "gravel/cutavg/1.5",
     "gravel/cutavg/nan", "gravel/cutavg/0.1/2", "digits", "digits/10", "digits/4/others",
     "digits/4/rotated/1", "digits/"],
)  # fmt: skip
def test_an_unknown_name_is_an_error_that_lists_what_there_is(name):
    with pytest.raises(ValueError, match=r"TEXTURE/KIND.*gravel, brick, grass.*cutdiff.*digits/DIGIT"):
        data.builtin(name)


def test_an_address_survives_json_and_gives_the_same_task_and_labels(tmp_path, monkeypatch):
    place = make_category(tmp_path / "bottle")
    anomaly = Augmentation("cutpaste", {"patch_area": 0.1, "angle": Range(-10, 10)})
    monkeypatch.chdir(tmp_path)
    addresses = [
        (
            data.Source("controlled", {"anomaly": anomaly, "seed": 2}),
            data.controlled_data(anomaly=anomaly, seed=2).task,
        ),
        (data.Source("semantic", {"normal": 3}), data.semantic_data(3).task),
        (
            data.Source("folder", {"root": Path(), "anomaly": "crack", "image_size": SIZE}),
            data.load_folder(place, anomaly="crack", image_size=SIZE).task,
        ),
    ]
    monkeypatch.chdir("/")
    for source, task in addresses:
        again = data.Source.from_json(json.loads(json.dumps(source.to_json())))
        assert again == source
        assert same(data.load(again), task) and data.load(again).name == task.name
        assert len(data.read_labels(again)) == len(task.unlabeled)


def test_a_plain_pair_of_folders_has_no_labels(tmp_path):
    place = make_category(tmp_path / "bottle")
    arguments = {"train": place / "train", "unlabeled": place / "test", "image_size": SIZE}
    source = data.Source("folders", arguments)
    assert data.read_labels(source) is None
    assert same(data.load(source), data.load_folder(place, image_size=SIZE).task)


@pytest.mark.parametrize(
    ("loader", "arguments", "message"),
    [
        ("web", {}, "loader: expected one of controlled, semantic, folder, folders, got 'web'"),
        ("folder", {}, "arguments: missing a required argument: 'root'"),
        ("semantic", {"digit": 4}, "arguments: got an unexpected keyword argument 'digit'"),
        ("semantic", {"normal": torch.tensor(4)}, "arguments: .*not JSON serializable"),
        ("folder", {"root": None}, "arguments: .*NoneType"),
    ],
)
def test_an_address_that_cannot_be_is_an_error(loader, arguments, message):
    with pytest.raises(ValueError, match=message):
        data.Source(loader, arguments)


def test_a_folder_keeps_the_size_of_its_images_whatever_the_default_becomes(tmp_path):
    source = data.Source("folder", {"root": str(tmp_path)})
    assert source.arguments["image_size"] == 256 and data.Source.from_json(source.to_json()) == source
    older = {"loader": "folder", "arguments": {"root": str(tmp_path)}}  # of when 128 pixels were the default
    assert data.Source.from_json(older).arguments["image_size"] == 128
