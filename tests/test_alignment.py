"""The alignment study: its kinds, figures and numbers, and a run that goes on where it was."""

import csv
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ssad_hpo.detector import train
from ssad_hpo.task import Augmentation
from studies.lab.figures.alignment import alignment_figure, bias_figure

ROOT = Path(__file__).parent.parent


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def study():
    return importlib.import_module("studies.alignment")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# The study's parts


def test_every_kind_changes_images_by_its_generator_alone_and_keeps_shape_and_range(study):
    images = torch.rand(6, 1, 32, 32, generator=seeded(0))
    for name, kind in study.KINDS.items():
        original, state = images.clone(), torch.get_rng_state()
        out, again, other = (study.pseudo_anomalies(images, kind, seeded(s)) for s in (1, 1, 2))
        assert out.shape == images.shape and out.dtype == images.dtype, name
        assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1, name
        assert torch.equal(out, again) and torch.equal(images, original), name
        assert torch.equal(torch.get_rng_state(), state), name
        assert all(not torch.equal(before, after) for before, after in zip(images, out, strict=True)), name
        assert torch.equal(out, other) == (name in ("Flip", "Inversion", "Blur")), name


def test_kinds_do_what_their_names_say(study):
    images = 0.3 + 0.4 * torch.rand(200, 1, 32, 32, generator=seeded(0), dtype=torch.float64)
    flip, invert, noisy, blur = (
        study.pseudo_anomalies(images, study.KINDS[name], seeded(1))
        for name in ("Flip", "Inversion", "Noise", "Blur")
    )
    assert torch.equal(flip, images.flip(2))
    torch.testing.assert_close(invert, 1 - images)
    assert float((noisy - images).std()) == pytest.approx(0.1, rel=0.02)
    # Uncorrelated pixels under Gaussian weights: their variance is multiplied by the sum of squared weights.
    weights = torch.exp(-0.5 * torch.arange(-3.0, 4.0) ** 2)
    shrunk = float((weights / weights.sum()).square().sum())
    inside = blur[..., 3:-3, 3:-3].std() / images.std()
    assert float(inside) == pytest.approx(shrunk, rel=0.03)


@pytest.fixture(scope="module")
def judged(study):
    """One texture and the digits, judged by tiny detectors."""
    kinds = ("CutOut", "Inversion", "Noise")
    textures = study.judge_texture(study.Cell("brick", "Noise", 0, study.SMOKE, kinds))
    digits = study.judge_digit(study.Cell("digits", "Rotation", 0, study.SMOKE, ()))
    return kinds, textures, digits


def test_auc_and_distance_are_those_of_detector_and_images(study, judged):
    kinds, rows, _ = judged
    sizes = study.SMOKE
    task = study.controlled_data(
        "brick", image_size=32, n_train=32, n_unlabeled=32, contamination=0.0, seed=0
    ).task
    *_, checkpoint = train(task.train, study.KINDS["Noise"], sizes.training)
    detector = checkpoint.detector
    z_train, z_augmented = detector.embed(task.train), detector.embed_augmented(task.train)
    detector.fit_density(z_train)
    assert [row["f_gen"] for row in rows] == list(kinds)
    inverted = 255 - task.unlabeled[16:]
    row = rows[1]

    def d(a, b):
        return np.mean([float((x - y).norm()) for x in a for y in b])

    expected = d(z_augmented, detector.embed(inverted)) / d(z_train, z_augmented)
    assert row["distance"] == pytest.approx(expected, rel=1e-4)
    normal, anomalous = detector.score(task.unlabeled[:16]), detector.score(inverted)
    wins = (anomalous[:, None] > normal).double() + (anomalous[:, None] == normal).double() / 2
    assert row["auc"] == pytest.approx(float(wins.mean()))
    assert row["loss"] == checkpoint.loss


def test_the_share_of_every_digit_is_given_for_both_scores(study, judged):
    rows = judged[2]
    assert [(row["score"], row["digit"]) for row in rows] == [
        (score, digit) for score in ("classifier", "density") for digit in range(10)
    ]
    assert all(0 <= row["share"] <= 1 for row in rows)
    # Of 40 images two lie above their 95th percentile: of the digit's others not many more.
    assert all(row["share"] < 0.35 for row in rows if row["digit"] == study.NORMAL_DIGIT)


def test_settings_and_kinds_decide_where_a_training_is_kept(study, tmp_path, monkeypatch):
    cell = study.Cell("brick", "Noise", 0, study.SMOKE, ("CutOut", "Noise"))
    others = [
        replace(cell, seed=1),
        replace(cell, data="grass"),
        replace(cell, f_gens=("CutOut",)),
        replace(cell, sizes=replace(study.SMOKE, training=replace(study.TRAINING, steps=7))),
    ]
    paths = [each.path(tmp_path) for each in (cell, *others)]
    for change in (
        lambda: monkeypatch.setitem(study.KINDS, "CutOut", Augmentation("cutout")),
        lambda: monkeypatch.setattr(study, "PERCENTILE", 0.9),
        lambda: monkeypatch.setattr(study, "N_CALIBRATION", 30),
        lambda: monkeypatch.setattr(study, "NORMAL_DIGIT", 4),
    ):
        change()
        paths.append(cell.path(tmp_path))
        monkeypatch.undo()
    assert len(set(paths)) == 9
    assert cell.path(tmp_path) == paths[0]


# Figures


def test_figures_are_png_files_and_leave_missing_cells_blank(tmp_path):
    gaps = np.array([[0.9, np.nan], [0.2, 1.0]])
    alignment_figure(["CutOut", "Noise"], gaps, 1.2 * gaps, tmp_path / "a.png")
    alignment_figure(["CutOut"], [[np.nan]], [[np.nan]], tmp_path / "b.png")
    bias_figure(["CutOut", "Noise"], ["0", "1"], "1", {"one": gaps, "two": gaps}, tmp_path / "c.png")
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in "abc")


def test_figures_reject_arrays_of_another_shape_and_an_unknown_class(tmp_path):
    with pytest.raises(ValueError, match=r"^distances: expected \(2, 2\), at least 1 each, got \(2,\)$"):
        alignment_figure(["a", "b"], np.ones((2, 2)), np.ones(2), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"^aucs: expected \(0, 0\), at least 1 each, got \(0, 0\)$"):
        alignment_figure([], np.ones((0, 0)), np.ones((0, 0)), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"^shares: expected \(1, 3\), at least 1 each, got \(3, 1\)$"):
        bias_figure(["a"], ["0", "1", "2"], "0", {"one": np.ones((3, 1))}, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"^shares: expected at least one heat map, got none$"):
        bias_figure(["a"], ["0"], "0", {}, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"^normal: expected one of 0, 1, got '2'$"):
        bias_figure(["a"], ["0", "1"], "2", {"one": np.ones((1, 2))}, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


# The whole


@pytest.mark.slow
def test_a_study_that_was_cut_short_goes_on_and_comes_out_the_same(tmp_path):
    def run():
        command = [sys.executable, "-m", "studies.alignment", "--smoke", "--jobs", "2"]
        command += ["--cells", tmp_path / "cells", "--out", tmp_path / "out"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, (tmp_path / "out" / "alignment.csv").read_bytes()

    said, whole = run()
    cells = sorted((tmp_path / "cells").iterdir())
    assert len(cells) == 6 and said.startswith("0 of 6 cells are there")
    rows = list(csv.DictReader(whole.decode().splitlines()))
    assert [row["part"] for row in rows] == ["alignment"] * 9 + ["bias"] * 60
    page = " ".join((tmp_path / "out" / "alignment.md").read_text().split())
    assert "smoke run" in page and "Failed trainings: none" in page and "Spearman" in page
    for picture in ("alignment_auc.png", "alignment_bias.png"):
        assert picture in page
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")

    # As after a kill: one cell is missing, another was being written.
    cells[0].unlink()
    cells[1].rename(cells[1].with_suffix(".partial"))
    untouched = [cell.stat().st_mtime_ns for cell in cells[2:]]
    said, again = run()
    assert said.startswith("4 of 6 cells are there") and again == whole
    assert [cell.stat().st_mtime_ns for cell in cells[2:]] == untouched
    assert sorted((tmp_path / "cells").iterdir()) == cells
