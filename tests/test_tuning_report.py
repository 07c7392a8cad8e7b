"""The report of a tuning: its course, with images along the way."""

from __future__ import annotations

import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tuned_runs import ANOMALY, TUNING, Kills, quick

from ssad_hpo import controlled_data
from ssad_hpo.experiment import StudyInterrupted, StudyResult, report_run
from ssad_hpo.report import Course, ImageRow, Trajectory
from ssad_hpo.report.trajectory import examples_figure, trajectory_figure
from ssad_hpo.task import Range

pytestmark = [
    pytest.mark.usefixtures("workplace"),
    # Tiny trainings end anywhere; that it is told has tests of its own.
    pytest.mark.filterwarnings("ignore::ssad_hpo.bilevel.CollapseWarning"),
]


def test_the_report_of_a_tuning_shows_its_course(tuned: StudyResult) -> None:
    settings = replace(tuned.run.settings, tracking_uri=None)
    replace(tuned.run, settings=settings).write()
    page = report_run("tuned").read_text(encoding="utf-8")
    files = {path.name for path in Path("runs/tuned/report").iterdir()}
    assert {"trajectories.png", "images-along-the-way.png", "auc.png", "images-highest.png"} <= files
    assert "learning-curves.png" not in files
    assert "The tuning&#x27;s course" in page and "patch area" in page
    assert "2 starts down two_sided_alignment, order 1" in page and "4 steps on the range" in page
    assert "0.5 of the range; patch_area 0.2, patch_aspect 1.5" in page
    for path in Path("runs/tuned/report").glob("*.png"):
        with Image.open(path) as image:
            if path.name.startswith("spots-"):  # an image beside its heat map, at its own resolution
                assert image.width == 2 * image.height + 4
                continue
            assert 800 <= image.width <= 1200 and 300 <= image.height <= 1600
            assert np.asarray(image.convert("L")).std() > 5, path


def test_without_labels_and_images_a_tunings_report_has_nothing_that_needs_them() -> None:
    task = controlled_data(anomaly=ANOMALY, image_size=32, n_train=20, n_unlabeled=14).task
    quick(images=task, space="rotation", tuning=replace(TUNING, starts=(0.5,)))
    page = report_run("tuned").read_text(encoding="utf-8")
    without_pictures = re.sub("base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"AUC|regret|oracle|Spearman|by truth", without_pictures)
    files = {path.name for path in Path("runs/tuned/report").iterdir()}
    assert "trajectories.png" in files
    assert not files & {"auc.png", "scores-truth.png", "images-along-the-way.png", "learning-curves.png"}


def test_a_tuning_that_is_not_done_says_so_in_its_report(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(StudyInterrupted):
            quick(listeners=[Kills("progress", 6, signal.SIGINT)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert "1 of 2 starts are not done yet" in report_run("tuned").read_text(encoding="utf-8")


def course_of(starts: int, steps: int) -> Course:
    rng = np.random.default_rng(0)
    times = np.arange(1, steps + 1) * 4
    trajectories = [
        Trajectory(
            i,
            times,
            {"angle": rng.uniform(15, 180, steps + 1)},
            rng.uniform(0, 1, steps),
            rng.normal(size=steps),
        )
        for i in range(starts)
    ]
    return Course("smooth_alignment", 0, 4 * steps, tuple(trajectories))


@pytest.mark.parametrize(("starts", "steps"), [(1, 1), (12, 500)])
def test_one_step_or_many_starts_fit_into_the_figure(starts: int, steps: int, tmp_path: Path) -> None:
    bounds = {"angle": Range(15.0, 180.0)}
    trajectory_figure(course_of(starts, steps), bounds, starts - 1, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert np.asarray(image.convert("L")).std() > 5


def test_a_course_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trajectories: expected at least one"):
        trajectory_figure(course_of(0, 1), {"angle": Range(15.0, 180.0)}, 0, tmp_path / "x.png")
    with pytest.raises(ValueError, match="examples: expected at least one"):
        examples_figure([], tmp_path / "x.png")
    examples_figure([ImageRow("x", "few", np.zeros((2, 3, 8, 8), np.uint8))], tmp_path / "few.png")
    assert (tmp_path / "few.png").is_file() and not (tmp_path / "x.png").exists()
