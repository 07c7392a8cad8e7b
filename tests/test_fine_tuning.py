"""The study of the settings of fine-tuning: what is changed, what is compared with what, what is shown."""

import argparse
import dataclasses

import numpy as np
import pytest
import torch
from study_runs import run_study

from ssad_hpo.augment import NONE
from ssad_hpo.detector.training import encoder_rate
from ssad_hpo.task import Augmentation, Task
from studies.fine_tuning import (
    ALL,
    DEFAULT,
    FACTORS,
    FROZEN,
    cells_of,
    default_list,
    set_table,
    table,
    variants,
)
from studies.lab.detectors import TUNED, Cell, trained


def options(**changed):
    given = {"factors": list(FACTORS), "smoke": False, "seeds": 2, "real": None, "image_size": 128}
    return argparse.Namespace(**given | changed)


def test_a_variant_differs_from_the_default_by_its_factor_alone():
    default, *others = variants(list(FACTORS), TUNED)
    assert default.training == TUNED and len(others) == sum(map(len, FACTORS.values()))
    for variant in others:
        factor = variant.how.split()[0]
        changed = {
            field.name
            for field in dataclasses.fields(TUNED)
            if getattr(variant.training, field.name) != getattr(TUNED, field.name)
        }
        assert changed - {"encoder_learning_rate"} == {factor} - {FROZEN, "encoder_learning_rate"}
        if factor != "encoder_learning_rate":
            assert encoder_rate(variant.training) == encoder_rate(TUNED)
    assert len({variant.how for variant in others}) == len(others)


def test_cells_are_two_candidates_for_each_set_seed_and_variant_and_the_frozen_encoder_once_a_set():
    cells = cells_of(options(factors=["frozen_stages", "steps"]))
    of = {how: [cell for cell in cells if cell.how == how] for how in dict.fromkeys(c.how for c in cells)}
    assert list(of) == [DEFAULT, "frozen_stages 0", FROZEN, "steps 5", "steps 80"]
    assert [len(some) for some in of.values()] == [24, 24, 6, 24, 24]
    assert {(c.candidate, c.augmentation.kind) for c in of[DEFAULT]} == {
        ("0.005", "cutpaste"),
        ("0.05", "cutdiff"),
    }
    assert {c.training.steps for c in of["steps 80"]} == {80}


@pytest.mark.slow  # the pretrained encoder is loaded
def test_with_all_stages_frozen_a_training_scores_as_the_encoder_as_it_comes():
    images = np.random.default_rng(0).integers(256, size=(20, 1, 32, 32), dtype=np.uint8)
    pixels = torch.from_numpy(images)
    task = Task("noise", pixels[:12], pixels[12:])
    training = dataclasses.replace(TUNED, frozen_stages=5, steps=2, batch_size=4)
    one = cells_of(options(factors=[]))[0]
    found = [
        trained(Cell(one.source, how, training, "", f_aug), task)[0]
        for how, f_aug in ((DEFAULT, one.augmentation), (FROZEN, Augmentation(NONE)))
    ]
    first, second = (detector.embed(task.unlabeled) for detector in found)
    assert torch.equal(first, second)


@pytest.mark.slow  # the pretrained encoder is loaded
def test_with_no_stage_frozen_a_detector_is_trained_whatever_its_variant_is_called():
    images = np.random.default_rng(0).integers(256, size=(12, 1, 32, 32), dtype=np.uint8)
    (cell, *_) = (
        cell for cell in cells_of(options(factors=["frozen_stages"])) if cell.how == "frozen_stages 0"
    )
    training = dataclasses.replace(cell.training, steps=1, batch_size=4)
    _, loss = trained(
        dataclasses.replace(cell, training=training), Task("noise", *torch.from_numpy(images).split((8, 4)))
    )
    assert loss is not None and 0 < loss < 10


def made_up_rows():
    rows = []
    for name, seed, patches in (("a", 0, 0.8), ("a", 1, 0.9), ("b", 0, 0.6), ("b", 1, 0.6)):
        for kind, more in (("cutpaste", 0.0), ("cutdiff", 0.1)):
            row = {"set": name, "seed": seed, "f_aug": kind, "seconds": 9.0}
            rows.append(row | {"how": DEFAULT, "auc_patches": patches + more, "auc_whole": 0.5})
            if (name, seed, kind) != ("b", 1, "cutdiff"):  # could not be trained
                moved = 0.02 if name == "a" else -0.04
                rows.append(row | {"how": "steps 5", "auc_patches": patches + more + moved, "auc_whole": 0.6})
    for name, value in (("a", 0.7), ("b", 0.9)):
        rows.append(
            {"set": name, "seed": 0, "f_aug": "none", "how": FROZEN, "auc_patches": value, "auc_whole": 0.5}
            | {"seconds": 3.0}
        )
    return rows


def lines_of(text):
    lines = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
    return {line[0]: line[1:] for line in lines}


def test_differences_are_of_the_same_candidate_set_and_seed():
    lines = lines_of(table(made_up_rows()))
    assert lines["default"] == ["0.775", "0.500", "± 0.025", "± 0.000", "4", "9"]
    # b with seed 1 has one candidate, compared with that candidate of the default alone
    assert lines["steps 5"][2:] == ["-0.010 ± 0.030", "+0.100 ± 0.000", "4", "9"]
    assert lines[f"frozen_stages {ALL}"][:1] + lines[f"frozen_stages {ALL}"][4:] == ["0.800", "4", "3"]
    by_set = lines_of(set_table(made_up_rows()))
    assert by_set["steps 5"] == ["+0.020", "-0.040"] and by_set[f"frozen_stages {ALL}"] == [
        "-0.200",
        "+0.250",
    ]


def test_a_variant_of_which_the_default_is_lacking_has_no_difference():
    rows = [row for row in made_up_rows() if row["how"] == "steps 5" or row["set"] == "a"]
    assert lines_of(set_table(rows))["steps 5"] == ["+0.020", "–"]
    one_seed = [row for row in rows if row["seed"] == 0]
    assert lines_of(table(one_seed))["default"][2:4] == ["", ""]


def test_the_list_of_defaults_is_that_of_the_training():
    assert default_list(["steps", "encoder_learning_rate"]) == (
        "- `steps` 20; also 5, 80\n- `encoder_learning_rate` 0.003; also 0.0003, 0.03\n"
    )


@pytest.mark.slow
def test_a_study_whose_cells_are_kept_trains_none_again(tmp_path):
    arguments = ("--factors", "score", "--cells", tmp_path / "cells", "--out", tmp_path)
    assert "0 of 2 cells are there" in run_study("fine_tuning", *arguments)
    first = (tmp_path / "fine_tuning.csv").read_text()
    assert "2 of 2 cells are there" in run_study("fine_tuning", *arguments)
    assert (tmp_path / "fine_tuning.csv").read_text() == first
    page = (tmp_path / "fine_tuning.md").read_text()
    assert "| score classifier | " in page and "smoke run" in page
