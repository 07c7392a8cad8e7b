"""The study of what a search costs counts steps exactly and goes on after a kill."""

import importlib
from pathlib import Path

import pytest
from study_runs import run_study

ROOT = Path(__file__).parent.parent


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("studies.search_cost")


def trial(steps, dsv=None, auc=None, state="complete"):
    return {"steps": steps, "dsv": dsv, "auc": auc, "state": state}


def cell(study, arm, trials):
    return study.Cell("long", "digits/4", "tpe", arm, 0, trials, study.LONG, Path())


def test_the_sizes_that_the_docstring_states_are_those_of_the_study(study, tmp_path):
    options = study.argparse.Namespace(cells=tmp_path, smoke=False)
    cells = study.cells_of(options)
    assert f"{len(cells)} searches" in study.__doc__
    assert len({cell.path for cell in cells}) == len(cells) and len(study.TASKS) >= 6


def test_the_defaults_of_the_product_are_among_what_was_measured(study):
    from ssad_hpo.task import Search, Training

    product = (Search.reduction_factor, Training.evaluate_at)
    for name in ("short", "again"):
        assert product in study.PARTS[name].arms.values()
        training = study.PARTS[name].training
        assert (training.steps, training.batch_size) == (Training.steps, Training.batch_size)


def test_steps_are_those_of_all_detectors_and_only_whole_ones_are_chosen_from(study):
    trials = [
        trial(500, dsv=0.4, auc=0.7),
        trial(62, state="pruned"),
        trial(500, dsv=0.2, auc=0.6),
        trial(250, state="fail"),
    ]
    (row,) = study.rows_of([cell(study, "asha/4 from 1/8", 4)], [{"searching": 9.0, "trials": trials}])
    assert row["steps"] == 1312 and row["share"] == 1312 / 2000
    assert (row["whole"], row["failed"], row["auc"], row["oracle"]) == (2, 1, 0.6, 0.7)


def test_the_beginning_of_a_search_is_judged_as_a_shorter_search(study):
    trials = [trial(500, dsv=1 - i / 10, auc=i / 10) for i in range(8)]
    rows = study.rows_of([cell(study, "none", 8)], [{"searching": 9.0, "trials": trials}])
    assert [(row["trials"], row["auc"], row["seconds"]) for row in rows] == [(4, 0.3, None), (8, 0.7, 9.0)]


@pytest.mark.slow
def test_a_killed_study_goes_on_and_comes_out_the_same(tmp_path):
    def run(out):
        said = run_study("search_cost", "--cells", tmp_path / "cells", "--out", tmp_path / out)
        return said, (tmp_path / out / "search_cost.csv").read_text()

    _, whole = run("whole")
    kept = sorted((tmp_path / "cells").glob("*.json"))
    kept[0].unlink()
    said, again = run("again")
    assert f"{len(kept) - 1} of {len(kept)} cells are there" in said

    def without_seconds(text):
        return [line.rpartition(",")[0] for line in text.splitlines()]

    assert without_seconds(again) == without_seconds(whole) and "seconds" in whole.splitlines()[0]
    page = (tmp_path / "again" / "search_cost.md").read_text()
    assert "smoke run" in page and "nan" not in page
