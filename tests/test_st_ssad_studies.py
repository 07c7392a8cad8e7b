"""The studies of ST-SSAD run from end to end, go on after a kill, and count costs exactly."""

import csv
import importlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from study_runs import run_study
from torch.nn.modules.module import register_module_forward_pre_hook

ROOT = Path(__file__).parent.parent


def study(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module(f"studies.{name}")


def read_rows(path):
    """The CSV's rows without seconds, which no two runs share."""
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(file)]


def test_the_sizes_that_the_docstrings_state_are_those_of_the_studies(monkeypatch, tmp_path):
    recovery, table = study("st_ssad_recovery", monkeypatch), study("st_ssad_table", monkeypatch)
    options = recovery.argparse.Namespace(
        cells=tmp_path, smoke=False, seeds=3, ablate=False, by_share=False, contamination=0.5, orders=(1, 2),
        textures=recovery.TEXTURES,
    )  # fmt: skip
    cells = recovery.cells_of(options)
    ablation, by_share = (
        recovery.cells_of(recovery.argparse.Namespace(**{**vars(options), part: True}))
        for part in ("ablate", "by_share")
    )
    for these, tunings in ((cells, 180), (ablation, 114), (by_share, 162)):
        assert sum(cell.tuning is not None for cell in these) == tunings
        assert len({cell.path for cell in these}) == len(these)
        assert f"{tunings}\ntunings" in recovery.__doc__ or f"{tunings} tunings" in recovery.__doc__
    assert not {cell.seed for cell in cells} & {cell.seed for cell in ablation}

    options = table.argparse.Namespace(
        cells=tmp_path, smoke=False, first_seed=0, seeds=2, steps=500, mvtec=None, augmentation=None,
        device="cpu", short=False,
    )  # fmt: skip
    cells = table.cells_of(options)
    searches, tunings = (sum(c.method in m for c in cells) for m in ({table.SEARCH}, table.TUNED))
    said = f"{searches} searches of 16 trials, {tunings} tunings and {len(cells) - searches - tunings} plain"
    assert said in table.__doc__ and len({cell.path for cell in cells}) == len(cells)


def test_no_starting_point_of_the_recovery_has_found_the_area_already(monkeypatch):
    recovery = study("st_ssad_recovery", monkeypatch)
    factors = [recovery.factor_off(start, true) for start in recovery.STARTS for true in recovery.AREAS]
    assert min(factors) > 2


def test_descent_on_a_grid_ends_where_no_neighbour_is_lower(monkeypatch):
    field = study("gradient_field", monkeypatch)
    loss = np.array([[3.0, 2.0, 5.0, 4.0], [4.0, 3.5, 6.0, 1.0], [5.0, 4.0, 6.0, 2.0]])
    ends = field.ends_of_descent(loss)
    assert ends[0, 0].tolist() == [0, 1] and ends[2, 0].tolist() == [0, 1] and ends[2, 3].tolist() == [1, 3]
    assert ends[0, 1].tolist() == [0, 1] and ends[1, 2].tolist() == [1, 3]


def test_the_toy_problem_is_aligned_and_collapsed_where_the_figure_says(monkeypatch):
    field = study("gradient_field", monkeypatch)
    train, augmented, unlabeled = field.toy_sets(0.5)(torch.tensor(field.ALIGNED))
    anomalies = unlabeled[: len(unlabeled) // 2]
    assert torch.allclose(augmented.mean(0), torch.ones(2).double())
    assert (anomalies.mean(0) - augmented.mean(0)).norm() < 0.1
    collapsed = field.toy_sets(0.5)(torch.tensor(field.COLLAPSED))[1]
    assert torch.allclose(collapsed.mean(0), train.mean(0))


@pytest.mark.parametrize(
    "method", ["AE", "D-SVDD", "RS-CO", "RD-CP", "DSV search", "ST-SSAD", "FO", "PU-AUC"]
)
def test_the_cost_of_every_method_is_the_number_of_images_that_pass_its_encoder(
    method, monkeypatch, tmp_path, workplace
):
    table = study("st_ssad_table", monkeypatch)
    (train_set,) = [s for s in table.texture_sets(0) if s.name == "brick"]
    small = {"image_size": 16, "n_train": 41, "n_unlabeled": 20}  # 41 = 5 * 8 + 1: a last batch of one
    source = train_set.sources[0]
    source = table.Source(source.loader, {**source.arguments, **small})
    training = replace(table.TRAINING, steps=8, width=2, batch_size=8)
    train_set = replace(train_set, sources=(source,))
    cell = table.Cell(method, train_set, training, 2, "cpu", tmp_path)
    passed = {"forward": 0, "backward": 0}

    def count(module, inputs):
        if isinstance(module, torch.nn.Conv2d) and module.in_channels == 1:  # an encoder's first
            passed["forward"] += len(inputs[0])
            passed["backward"] += len(inputs[0]) * torch.is_grad_enabled()

    with register_module_forward_pre_hook(count):
        ((_, outcomes),) = table.run_cell(cell)["tasks"].items()
    assert outcomes[0]["method"] == method
    assert {name: outcomes[0][name] for name in passed} == passed
    assert 0 <= outcomes[0]["auc"] <= 1


@pytest.mark.slow
def test_the_gradient_field_writes_table_rows_and_picture(tmp_path):
    run_study("gradient_field", "--out", tmp_path)
    rows = read_rows(tmp_path / "gradient_field.csv")
    assert len(rows) == 10 and all(
        sum(float(v) for k, v in row.items() if k.startswith("ends")) == pytest.approx(1) for row in rows
    )
    assert (tmp_path / "gradient_field.png").read_bytes().startswith(b"\x89PNG")
    assert "smoke run" in (tmp_path / "gradient_field.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("part", [[], ["--ablate"], ["--by-share"]], ids=["table", "ablation", "by-share"])
def test_a_killed_recovery_study_goes_on_and_comes_out_the_same(part, tmp_path):
    cells, arguments = tmp_path / "cells", ["--cells", tmp_path / "cells", "--jobs", "1", *part]
    run_study("st_ssad_recovery", *arguments, "--out", tmp_path / "whole")
    kept = sorted(cells.glob("*.json"))
    kept[0].rename(kept[0].with_suffix(".partial"))  # as a kill leaves it
    kept[1].unlink()
    said = run_study("st_ssad_recovery", *arguments, "--out", tmp_path / "again")
    assert f"{len(kept) - 2} of {len(kept)} cells are there" in said
    names = {"--ablate": "st_ssad_ablation", "--by-share": "st_ssad_recovery_by_share"}
    name = names["".join(part)] if part else "st_ssad_recovery"
    whole, again = (read_rows(tmp_path / place / f"{name}.csv") for place in ("whole", "again"))
    assert whole == again and len(whole) == (3 * 7 * 2 if "--by-share" in part else 2 * 2 * 2)
    assert (tmp_path / "again" / f"{name}.png").exists() == (not part)
    page = (tmp_path / "again" / f"{name}.md").read_text()
    assert "smoke run" in page and "| nan " not in page


@pytest.mark.slow
def test_a_killed_table_goes_on_and_comes_out_the_same(tmp_path):
    cells, arguments = tmp_path / "cells", ["--cells", tmp_path / "cells", "--jobs", "1"]
    run_study("st_ssad_table", *arguments, "--out", tmp_path / "whole")
    kept = sorted(cells.glob("*.json"))
    for path in kept[::9]:
        path.unlink()
    said = run_study("st_ssad_table", *arguments, "--out", tmp_path / "again")
    assert f"{len(kept) - len(kept[::9])} of {len(kept)} cells are there" in said
    whole, again = (read_rows(tmp_path / place / "st_ssad_table.csv") for place in ("whole", "again"))
    assert whole == again
    methods = {row["method"] for row in whole}
    from studies.lab.tuning_tables import BEYOND, METHODS

    assert methods == {*METHODS, *BEYOND} and not any(row["failure"] for row in whole)
    page = (tmp_path / "again" / "st_ssad_table.md").read_text()
    assert "smoke run" in page and "nan" not in page


@pytest.mark.slow
def test_the_talks_pairs_are_taken_from_a_folder_as_far_as_they_are_there(
    tmp_path, make_category, monkeypatch
):
    monkeypatch.setenv("SSAD_HPO_CACHE", str(tmp_path / "cache"))
    root = make_category(tmp_path / "mvtec" / "tile")
    (root / "test" / "scratch").rename(root / "test" / "crack")
    (root / "test" / "stain").rename(root / "test" / "oil")
    arguments = ["--mvtec", tmp_path / "mvtec", "--image-size", 32, "--encoder", "small"]
    run_study("st_ssad_table", *arguments, "--cells", tmp_path / "cells", "--out", tmp_path)
    rows = read_rows(tmp_path / "st_ssad_table.csv")
    assert {row["task"] for row in rows} == {"tile/crack", "tile/oil"}
    assert not any(row["failure"] for row in rows)


def test_the_talks_pairs_are_23(monkeypatch):
    pairs = study("st_ssad_table", monkeypatch).PAIRS
    assert sum(len(anomalies.split()) for anomalies in pairs.values()) == 23


@pytest.mark.slow
def test_the_cost_study_compares_the_three_sorts_of_steps_and_reads_memory(tmp_path):
    run_study("st_ssad_cost", "--out", tmp_path)
    page = (tmp_path / "st_ssad_cost.md").read_text()
    ratios = [float(number) for number in re.findall(r"([0-9.]+)×", page)]
    assert "smoke run" in page and "nan" not in page and "MiB after 4" in page
    assert len(ratios) == 2 and min(ratios) > 0
