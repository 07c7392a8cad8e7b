"""The studies of speed and precision run from end to end; their smoke runs say nothing about speed."""

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import study_runs
import torch

from studies.throughput.measuring import flops_per_image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def run_study(name: str, out: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", f"studies.{name}", "--smoke", "--out", str(out), *arguments]
    # One thread: with more, threads wait for each other wherever something else needs the cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_throughput_study_measures_both_pipelines_and_writes_table_rows_and_plot(tmp_path):
    run_study("throughput", tmp_path)
    rows = read_rows(tmp_path / "throughput.csv")
    speeds = {row["pipeline"]: float(row["value"]) for row in rows if row["measure"] == "images_per_second"}
    assert set(speeds) == {"ours", "plain"} and min(speeds.values()) > 0
    assert {row["precision"] for row in rows if row["measure"] == "flop_per_second"} == {
        "float32",
        "bfloat16",
    }
    parts = {row["measure"] for row in rows if row["pipeline"] == "ours, with stopwatch"}
    assert {f"seconds: {part}" for part in ("jitter", "augmentation", "forward", "backward")} < parts
    page = (tmp_path / "throughput.md").read_text()
    assert "smoke run" in page and "nan" not in page
    assert (tmp_path / "throughput.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("channels", "groups"), [(6, 1), (6, 2), (6, 6)])
def test_the_gradients_of_a_convolution_in_groups_count_as_its_forward_pass_does(channels, groups):
    network = (
        torch.nn.Conv2d(3, channels, 1),
        torch.nn.Conv2d(channels, channels, 3, padding=1, groups=groups),
    )
    first = 2 * 8 * 8 * 3 * channels  # multiplications and additions of an image
    second = 2 * 8 * 8 * 9 * channels * channels // groups
    assert (
        flops_per_image(torch.nn.Sequential(*network), 8) == 2 * first + 3 * second
    )  # no gradient of images


def test_the_scaling_study_predicts_studies_that_its_fit_has_not_seen(tmp_path):
    run_study("scaling", tmp_path)
    rows = read_rows(tmp_path / "scaling.csv")
    checked = [row for row in rows if row["role"] == "checked"]
    assert checked and all(float(row["predicted"]) > 0 < float(row["measured"]) for row in rows)
    assert {row["workers"] for row in checked} == {"2"}
    page = (tmp_path / "scaling.md").read_text()
    assert "64 GPUs" in page and "None of this was measured on a GPU" in page


def test_the_precision_study_goes_on_where_it_was(tmp_path):
    arguments = ("--out", tmp_path, "--cells", tmp_path / "cells")
    study_runs.run_study("precision", *arguments)
    cells = sorted((tmp_path / "cells").glob("*.json"))
    assert len(cells) == len(read_rows(tmp_path / "precision.csv")) == 2 * 2 * 3 * 2
    whole = (tmp_path / "precision.md").read_text()

    # As after a kill: one cell is missing, another was being written.
    lost, kept = cells[0], cells[1:]
    lost.rename(lost.with_suffix(".partial"))
    before = [cell.stat().st_mtime_ns for cell in kept]
    study_runs.run_study("precision", *arguments)
    assert [cell.stat().st_mtime_ns for cell in kept] == before
    assert len(list((tmp_path / "cells").glob("*.json"))) == len(cells)
    again = (tmp_path / "precision.md").read_text()
    assert again.partition("## AUC")[2] == whole.partition("## AUC")[2]  # above stand seconds and the date


def test_the_stacked_study_measures_every_way_of_training_several_detectors(tmp_path):
    run_study("stacked", tmp_path)
    rows = read_rows(tmp_path / "stacked.csv")
    ways = {(row["way"], row["precision"], row["processes"]) for row in rows}
    assert {("vmap", "float32", "1"), ("grouped", "float32", "1"), ("grouped", "bfloat16", "1")} < ways
    assert ("ordinary", "float32", "2") in ways
    assert min(float(row["detector_steps_per_second"]) for row in rows) > 0
    page = (tmp_path / "stacked.md").read_text()
    assert "smoke run" in page and "nan" not in page


def test_the_study_of_sweeps_accounts_for_its_workers_time_and_tracks_in_both_ways(tmp_path):
    run_study("sweep_cost", tmp_path)
    rows = read_rows(tmp_path / "sweep_cost.csv")
    parts = ("fetch", "train", "warm", "checkpoint", "book", "next", "idle")
    for workers in ("1", "2"):
        values = {row["measure"]: float(row["value"]) for row in rows if row["workers"] == workers}
        # What is left over when all parts are taken from the workers' time is time in which they idled.
        assert min(values[part] for part in parts if part != "warm") > -0.01 and values["train"] > 0
        whole = int(workers) * 60 / values["from first start to last end"]
        assert sum(values[part] for part in parts) == pytest.approx(whole, rel=0.01)
    ran = {(row["runner"], row["measure"]): float(row["value"]) for row in rows if row["tracking"] == "on"}
    for runner in ("local", "ray"):
        assert ran[runner, "all trials"] > 0 and (runner, "undelivered then") in ran
    assert ran["local", "CPU of the writer to MLflow"] > 0
    page = (tmp_path / "sweep_cost.md").read_text()
    assert "smoke run" in page and "nan" not in page and "limit of 50 ms" in page


@pytest.mark.parametrize("way", ["vmap", "grouped"])
def test_stacked_detectors_take_the_steps_that_they_would_take_apart(way, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from studies.stacked.ways import Cell, Trainer

    # The same to rounding in float64. In float32 the order of a sum decides which ReLU of a value near 0
    # is open, so that after an update only the losses are alike.
    for precision, tolerance in (("float64", 1e-9), ("float32", 1e-3)):
        one = Cell(32, precision, "ordinary", batch=8)
        apart, together = (
            [Trainer(one, first) for first in range(3)],
            Trainer(replace(one, way=way, detectors=3)),
        )
        for _ in range(3):
            expected = torch.cat([trainer.step() for trainer in apart])
            torch.testing.assert_close(together.step(), expected, rtol=tolerance, atol=0)
        assert len(set(expected.tolist())) == 3
        for k, trainer in enumerate(apart if precision == "float64" else []):
            torch.testing.assert_close(together.state(k), trainer.state(0), rtol=1e-6, atol=1e-9)
