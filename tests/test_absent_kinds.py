"""A kind of defect that the unlabelled images lack: what is drawn, by what it is judged, what is shown."""

import numpy as np
import pytest
from PIL import Image

from ssad_hpo.augment import NONE
from ssad_hpo.data import Source
from ssad_hpo.evaluate import auc
from ssad_hpo.task import Augmentation
from studies.lab.absent import (
    absent_kinds,
    absent_part,
    absent_summary,
    detectors_by_set,
    draw_without,
    joined,
    judge_by_kind,
    kinds_of,
)
from studies.lab.detectors import TUNED, Cell, candidates
from studies.lab.searching import truth_of

KINDS = np.array(["good"] * 20 + ["crack"] * 10 + ["stain"] * 9 + ["dust"] * 3)


def test_the_kind_is_absent_from_unlabeled_and_all_of_it_judges():
    places = draw_without(KINDS, "crack", 3)
    assert sorted([*places.unlabeled, *places.unseen]) == list(range(len(KINDS)))
    unlabeled, unseen = KINDS[places.unlabeled], KINDS[places.unseen]
    assert "crack" not in unlabeled and (unseen == "crack").sum() == 10
    assert (unlabeled == "good").sum() == (unseen == "good").sum() == 10
    assert np.isin(unlabeled, ("stain", "dust")).sum() == 6 == np.isin(unseen, ("stain", "dust")).sum()
    assert places.unlabeled.tolist() != draw_without(KINDS, "crack", 4).unlabeled.tolist()


def test_both_kinds_are_judged_against_the_same_good_images_and_unlabelled_ones_do_not_count():
    places = draw_without(KINDS, "crack", 0)
    scores = np.random.default_rng(0).normal(size=len(KINDS)) + 2 * (KINDS == "crack") + (KINDS == "stain")
    unseen, shown = scores[places.unseen], KINDS[places.unseen]
    there, alone = judge_by_kind(KINDS, places, "crack")(scores[places.unlabeled], unseen)
    expected = [
        auc(np.isin(shown[some], kinds).astype(int), unseen[some])
        for kinds in (["stain", "dust"], ["crack"])
        for some in [np.isin(shown, ["good", *kinds])]
    ]
    assert [there, alone] == expected and there < alone


def test_a_set_of_one_kind_leaves_none_out_and_kinds_of_few_images_never_stand_alone():
    assert absent_kinds(KINDS) == ["crack", "stain"]
    assert absent_kinds(KINDS[:30]) == []


def test_kinds_are_folders_of_test_in_the_order_of_the_truth(tmp_path, monkeypatch):
    monkeypatch.setenv("SSAD_HPO_CACHE", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    for place, count in (("train/good", 4), ("test/good", 9), ("test/crack", 5), ("test/stain", 3)):
        (tmp_path / "set" / place).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(256, size=(16, 16), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / place / f"{i}.png")
    source = Source("folder", {"root": str(tmp_path / "set"), "image_size": 16})
    kinds = kinds_of(Cell(source, "frozen", TUNED, NONE, Augmentation(NONE)))
    assert ((kinds != "good") == truth_of(source)).all()
    assert {kind: (kinds == kind).sum() for kind in kinds} == {"good": 9, "crack": 5, "stain": 3}


def test_two_tasks_of_a_texture_are_one_set_of_two_kinds():
    first, second, other = (
        Source("controlled", {"texture": texture, "anomaly": anomaly})
        for texture, anomaly in (("gravel", "brick"), ("gravel", "grass"), ("brick", "grass"))
    )
    cells = [Cell(source, "frozen", TUNED, NONE, Augmentation(NONE)) for source in (first, second, other)]
    for source in (first, second, other):
        cells += [Cell(source, "fine-tuned", TUNED, name, f_aug) for name, f_aug in candidates(smoke=True)]
    kept = [{} for _ in cells]
    kept[6] = {"failure": "diverged"}  # of the second task: no candidate of the set
    gravel, brick = detectors_by_set(cells, kept)
    assert (gravel.name, brick.name, gravel.real) == ("gravel", "brick", False)
    assert [cell.name for cell in gravel.frozen] == ["gravel-brick", "gravel-grass"]
    ((one, two),) = gravel.candidates
    assert one.augmentation == two.augmentation and one.source == first and two.source == second


def test_tasks_of_one_detector_are_joined_with_its_good_images_once():
    kinds = [np.array(["good", "a", "good"]), np.array(["b", "good", "good"])]
    tasks = [
        {
            "train": np.ones(2),
            "held_out": np.full(2, i),
            "unlabeled": 10 * i + np.arange(3),
            "scores": np.arange(3),
        }
        for i in (0, 1)
    ]
    arrays, of = joined(tasks, kinds)
    assert of.tolist() == ["good", "a", "good", "b"] and arrays["unlabeled"].tolist() == [0, 1, 2, 10]
    assert arrays["scores"].tolist() == [0, 1, 2, 0] and arrays["held_out"].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"^tasks: expected those of one detector"):
        joined([tasks[0], {**tasks[1], "train": np.zeros(2)}], kinds)


def test_the_table_has_means_over_kinds_and_draws_and_their_difference():
    place = {"how": "fine-tuned", "set": "cloth", "seed": 0}
    rows = [
        {**place, "draw": draw, "absent": kind, "images": 9, "method": method}
        | {"auc_absent": absent + draw / 10, "auc_there": there}
        for draw in (0, 1)
        for kind, method, absent, there in (
            ("crack", "average", 0.6, 0.8),
            ("stain", "average", 0.5, 0.9),
            ("crack", "combined", 0.9, 0.7),
            ("stain", "combined", 0.8, 0.7),
        )
    ]
    page = absent_part("Real sets", rows)
    assert "| average | **0.600** | 0.850 | -0.250 |" in page
    assert "| combined | **0.900** | 0.700 | +0.200 |" in page
    assert "cloth: crack (9), stain (9)." in page and absent_part("Real sets", []) == ""
    first, *others = absent_summary(rows)
    assert len(others) == 3 and (first["absent"], first["auc_absent"], first["auc_there"]) == (
        "crack",
        0.65,
        0.8,
    )
