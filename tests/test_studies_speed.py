"""The studies of speed and precision run from end to end; their smoke runs say nothing about speed."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_the_scaling_study_predicts_studies_that_its_fit_has_not_seen(tmp_path):
    run_study("scaling", tmp_path)
    rows = read_rows(tmp_path / "scaling.csv")
    checked = [row for row in rows if row["role"] == "checked"]
    assert checked and all(float(row["predicted"]) > 0 < float(row["measured"]) for row in rows)
    assert {row["workers"] for row in checked} == {"2"}
    page = (tmp_path / "scaling.md").read_text()
    assert "64 GPUs" in page and "None of this was measured on a GPU" in page


def test_the_precision_study_goes_on_where_it_was(tmp_path):
    arguments = ("--jobs", "2", "--cells", str(tmp_path / "cells"))
    run_study("precision", tmp_path, *arguments)
    cells = sorted((tmp_path / "cells").glob("*.json"))
    assert len(cells) == len(read_rows(tmp_path / "precision.csv")) == 2 * 2 * 3 * 2
    whole = (tmp_path / "precision.md").read_text()

    # As after a kill: one cell is missing, another was being written.
    lost, kept = cells[0], cells[1:]
    lost.rename(lost.with_suffix(".partial"))
    before = [cell.stat().st_mtime_ns for cell in kept]
    run_study("precision", tmp_path, *arguments)
    assert [cell.stat().st_mtime_ns for cell in kept] == before
    assert len(list((tmp_path / "cells").glob("*.json"))) == len(cells)
    again = (tmp_path / "precision.md").read_text()
    assert again.partition("## AUC")[2] == whole.partition("## AUC")[2]  # above stand seconds and the date
