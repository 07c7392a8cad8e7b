"""The selection study: its tables against figures worked out by hand, its cells, its folders of images."""

import csv
from pathlib import Path

import numpy as np
import pytest
from held_out import ALWAYS
from study_runs import run_study

from ssad_hpo.consensus import SELECTORS
from studies.lab.selector_tables import (
    ANY_KIND,
    RANDOM_DYNAMIC,
    alignment_table,
    auc_and_rank_tables,
    choices,
    learning_table,
    markdown,
    regret_table,
)

ROOT = Path(__file__).parent.parent


def made_up_rows():
    """Two tasks, two seeds, three candidates; DSV points at the best, the other criteria at the worst."""
    aucs = {("gravel", 0): (0.6, 0.9, 0.7), ("gravel", 1): (0.5, 0.7, 0.8), ("brick", 0): (0.9, 0.5, 0.7)}
    aucs["brick", 1] = (0.8, 0.6, 0.7)
    rows = []
    for (texture, seed), values in aucs.items():
        for candidate, auc in [*zip("abc", values, strict=True), (RANDOM_DYNAMIC, 0.65)]:
            row = {"task": f"{texture}/cutavg", "train_set": texture, "anomaly": "cutavg", "f_aug": "cutout"}
            row |= {"candidate": candidate, "seed": seed, "auc": auc, "separability": 0.2 + auc / 2}
            row |= {"patch_area": 0.1 if candidate == "a" else 0.2, "angle": None, "loss": 1 - auc}
            row |= dict.fromkeys(ALWAYS, auc) | {"dsv": -auc, "discordance": 2 - auc}
            row |= dict.fromkeys(SELECTORS, auc) if candidate != RANDOM_DYNAMIC else {}
            rows.append(row)
    return rows


def cells_of(table):
    """First cell of a line -> the others."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines}


def test_each_column_holds_the_auc_of_what_its_selector_chooses():
    table = choices(made_up_rows())
    run = (("cutout", "gravel/cutavg"), 1)
    expected = {"Avg.": 2 / 3, "Rand.": 0.65, "dsv": 0.8, "base": 0.5, "mc": 0.8, "oracle": 0.8, "worst": 0.5}
    assert {column: table[column][run] for column in expected} == pytest.approx(expected)


def test_the_tables_average_seeds_then_tasks_and_rank_the_columns():
    aucs, ranks = auc_and_rank_tables(choices(made_up_rows()))
    titles, line = cells_of(aucs)["f_aug"], cells_of(aucs)["cutout"]
    shown = dict(zip(titles, line, strict=True))
    assert shown["tasks"] == "2" and cells_of(aucs)["all"] == line
    assert float(shown["DSV"]) == pytest.approx((0.85 + 0.85) / 2)
    assert float(shown["Base"]) == pytest.approx((0.55 + 0.55) / 2)
    by_rank = dict(zip(cells_of(ranks)["f_aug"], cells_of(ranks)["cutout"], strict=True))
    assert by_rank["DSV"] == by_rank["MC"] == by_rank["SEL"] == "3.50"  # six columns share the best AUC
    assert "oracle" not in by_rank


def test_dsv_is_compared_with_each_column_and_regret_is_taken_from_the_oracle():
    rows = made_up_rows()
    lines = cells_of(regret_table(rows))
    assert lines["Base"][:2] == ["0.300 ± 0.050", "+0.300"]  # seeds 0 and 1: 0.35 and 0.25
    assert lines["DSV"][0] == "0.000 ± 0.000"
    assert float(lines["Base"][3]) == 0.25 and float(lines["Base"][4]) == 1 / 16


def test_the_table_of_alignment_says_how_often_the_clamp_hides_the_separability():
    line = cells_of(alignment_table(made_up_rows()))["cutout"]
    # separability is above 1/2 where the AUC is above 0.6: (0.9, 0.7), (0.7, 0.8), (0.9, 0.7), (0.8, 0.7)
    assert line[0] == "cutavg" and float(line[6]) == pytest.approx(8 / 12, abs=0.01)
    assert [float(x) for x in line[4:6]] == [1, 1]


def test_the_table_of_learning_tells_loss_and_choices_by_size():
    lines = [line.strip("| ").split(" | ") for line in learning_table(made_up_rows()).splitlines()[2:]]
    # candidate a (area 0.1) has AUC 0.6, 0.5, 0.9, 0.8 and is the best of both runs on brick
    assert lines[0] == ["cutout", "0.1", "0.30", "0.70", "-0.70", "2"]
    assert [line[-1] for line in lines] == ["2", "2"]


def test_the_choice_among_any_kind_stands_beside_the_single_kinds_and_is_never_averaged_with_them():
    rows = made_up_rows()
    among = [{**row, "f_aug": ANY_KIND, "auc": row["auc"] / 2} for row in rows]
    alone, both = (cells_of(auc_and_rank_tables(choices(r))[0]) for r in (rows, [*rows, *among]))
    assert both["all"] == alone["all"] and float(both[ANY_KIND][10]) == pytest.approx(0.85 / 2, abs=1e-3)
    assert regret_table([*rows, *among]) == regret_table(rows)
    assert regret_table([*rows, *among], any_kind=True) == regret_table(among, any_kind=True)
    assert learning_table([*rows, *among]) == learning_table(rows)
    page = markdown([*rows, *among], "")
    assert "candidates of any kind" in page and "of 4 runs" in page


def test_the_whole_page_holds_every_table():
    page = markdown(made_up_rows(), "three candidates")
    assert page.count("\n| --- ") == 5 and "2 tasks, seeds 0, 1." in page and "nan" not in page


def read_rows(folder):
    """The CSV's rows without the seconds, which no two runs share."""
    with open(folder / "selection_table.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_a_killed_study_goes_on_and_writes_the_table_of_an_uninterrupted_one(tmp_path):
    cells = tmp_path / "cells"
    run_study("selection_table", "--cells", cells, "--out", tmp_path / "whole")
    for cell in sorted(cells.glob("*.json"))[:2]:  # as if a kill had come before these
        cell.unlink()
    said = run_study("selection_table", "--cells", cells, "--out", tmp_path / "again")
    assert "4 of 6 cells are there" in said
    whole, again = read_rows(tmp_path / "whole"), read_rows(tmp_path / "again")
    assert whole == again and len(whole) == 12


@pytest.mark.slow
def test_two_categories_in_the_layout_of_mvtec_ad_go_through_the_study_by_one_option(
    tmp_path, make_category, monkeypatch
):
    monkeypatch.setenv("SSAD_HPO_CACHE", str(tmp_path / "cache"))
    for name in ("cloth", "linen"):
        make_category(tmp_path / "mvtec" / name)
    small = ("--image-size", 32, "--encoder", "small", "--folder-steps", 4)
    run_study(
        "selection_table",
        "--mvtec",
        tmp_path / "mvtec",
        *small,
        "--cells",
        tmp_path / "cells",
        "--out",
        tmp_path,
    )
    rows = read_rows(tmp_path)
    assert {row["train_set"] for row in rows} == {"mvtec-cloth", "mvtec-linen"}
    assert len({row["task"] for row in rows}) == 2 and {row["anomaly"] for row in rows} == {"in the wild"}
    assert all(0 <= float(row["auc"]) <= 1 and np.isfinite(float(row["dsv"])) for row in rows)
    assert "| DSV |" in (tmp_path / "selection_table.md").read_text()
