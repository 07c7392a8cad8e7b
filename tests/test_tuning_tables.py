"""Cells that survive a kill, the tables of the studies of ST-SSAD, and their figures."""

import json

import numpy as np
import pytest

from studies.lab.cells import cell_path, run_missing
from studies.lab.figures.gradient_field import Field, gradient_field_figure
from studies.lab.figures.recovery import Trajectory, TrajectoryPanel, trajectories_figure
from studies.lab.recovery_tables import collapsed, competitors, found, keep, rules_table, starts_table
from studies.lab.recovery_tables import tables as recovery_tables
from studies.lab.results import provenance, write_csv
from studies.lab.tuning_tables import (
    BEST_TRIAL,
    METHODS,
    columns,
    cost_table,
    hero_table,
    markdown,
    task_table,
)


def cells_of(table: str) -> dict[str, list[str]]:
    """A Markdown table's lines by their first cell."""
    lines = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines[2:]}


# Cells. `square` lies at the top, since processes import it by name.


def square(cell: tuple[int, str]) -> dict[str, int]:
    number, folder = cell
    if number < 0:
        raise ValueError("no square of that")
    with open(f"{folder}/done.txt", "a") as file:
        file.write(f"{number}\n")
    return {"square": number * number}


def test_cells_that_are_kept_are_not_computed_again_and_all_come_back_in_order(tmp_path, capsys):
    cells = [(number, str(tmp_path)) for number in (3, 1, 2)]

    def path_of(cell):
        return cell_path(tmp_path / "cells", f"cell {cell[0]}", cell)

    first = run_missing(cells[:2], path_of, square, jobs=2)
    (tmp_path / "cells" / "cell-2_torn.partial").write_text("{")  # as a kill leaves it
    again = run_missing(cells, path_of, square, jobs=1)
    assert [kept["square"] for kept in again] == [9, 1, 4] and again[:2] == first
    assert sorted((tmp_path / "done.txt").read_text().split()) == ["1", "2", "3"]
    assert all(kept["seconds"] >= 0 for kept in again)
    assert "2 of 3 cells are there" in capsys.readouterr().out


def test_an_error_in_a_cell_is_raised_and_what_was_done_before_is_kept(tmp_path):
    cells = [(number, str(tmp_path)) for number in (5, -1)]
    paths = {cell: cell_path(tmp_path / "cells", "x", cell) for cell in cells}
    with pytest.raises(ValueError, match="no square"):
        run_missing(cells, paths.get, square, jobs=1)
    assert json.loads(paths[cells[0]].read_text())["square"] == 25 and not paths[cells[1]].exists()


def test_other_settings_are_another_file_and_names_become_file_names(tmp_path):
    paths = {cell_path(tmp_path, "gravel/cutout area 1", settings) for settings in (1, 2, (1, 2))}
    assert len(paths) == 3
    assert all(path.parent == tmp_path and " " not in path.name for path in paths)


def test_rows_with_different_names_make_one_csv_and_provenance_says_where_and_when(tmp_path):
    write_csv([{"a": 1}, {"b": 2, "a": 3}], tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text() == "a,b\n1,\n3,2\n"
    assert "commit" in provenance() and "PyTorch" in provenance() and "cores" in provenance()


# Recovery.


def start_row(area_factor, auc, dsv, validation_loss, start=0.05, seed=0, warned=False, variant="soft"):
    return {
        "variant": variant, "texture": "gravel", "true_area": 0.02, "seed": seed, "start": start,
        "failure": None, "area_factor": area_factor, "aspect_factor": 1.4, "auc": auc, "auc_aligned": 0.95,
        "dsv": dsv, "validation_loss": validation_loss, "warned": warned,
    }  # fmt: skip


def recovery_rows():
    """Two runs of two starts: DSV keeps the right one in both, the validation loss in the second."""
    failed = {**start_row(0, 0, 0, 0, seed=2, variant="mmd"), "failure": "diverged"}
    return [
        start_row(1.5, 0.9, dsv=-0.2, validation_loss=0.5),
        start_row(9.0, 0.6, dsv=0.3, validation_loss=0.2, start=0.2),
        start_row(4.0, 0.7, dsv=0.1, validation_loss=0.4, seed=1, warned=True),
        start_row(2.0, 0.8, dsv=0.0, validation_loss=0.1, start=0.2, seed=1),
        failed,
    ]


def test_an_area_is_found_within_a_factor_of_two_and_never_by_a_failed_tuning():
    assert [found(row) for row in recovery_rows()] == [True, False, False, True, False]


def test_a_detector_far_below_the_aligned_one_has_collapsed_and_is_silent_without_a_warning():
    rows = recovery_rows()
    assert [collapsed(row) for row in rows] == [False, True, True, False, False]
    line = cells_of(starts_table(rows))
    assert line["soft"][:3] == ["4", "50% ± 0", "3.00"]
    assert line["soft"][-4:] == ["1", "2", "1", "0"]  # warned, collapsed, silently, failed
    assert line["mmd"][1] == "0% ± 0" and line["mmd"][-1] == "1"


def test_a_rule_is_right_where_it_keeps_the_start_that_found_the_area():
    rows = recovery_rows()
    runs = competitors(rows[:4])
    assert len(runs) == 2 and keep(runs[0], "dsv") is rows[0] and keep(runs[0], "validation_loss") is rows[1]
    line = cells_of(rules_table(rows))["soft"]
    assert line == ["2", "100%", "50%", "1 of 2", "0.700", "1", "100%", "2 of 2", "0.850", "0", "0.850"]


def test_the_page_of_a_recovery_holds_every_table_even_where_all_of_a_variant_failed():
    page = recovery_tables(recovery_rows())
    assert page.count("\n| --- ") == 3 and "nan" not in page


# Methods against each other.


def method_rows():
    """Two tasks of two train sets, two seeds; ST-SSAD is best by 0.1, RS-CD has two draws."""
    rows = []
    for task, seed in (("a", 0), ("a", 1), ("b", 0), ("b", 1)):
        at = {"task": task, "train_set": f"set {task}", "seed": seed, "draw": 0, "failure": None}
        at |= {"forward": 1000, "backward": 1000, "second": 0, "seconds": 4.0}
        rows += [
            {**at, "method": "ST-SSAD", "auc": 0.9, "forward": 300, "backward": 200, "second": 50},
            {**at, "method": "DSV search", "auc": 0.8},
            {**at, "method": "RS-CD", "auc": 0.6},
            {**at, "method": "RS-CD", "auc": 0.8, "draw": 1},
            {**at, "method": BEST_TRIAL, "auc": 0.95},
        ]
    rows.append({"task": "b", "train_set": "set b", "seed": 1, "method": "AE", "failure": "it diverged"})
    rows += [{**row, "method": "AE", "auc": 0.7} for row in rows if row["method"] == "ST-SSAD"][:3]
    return rows


def test_draws_are_averaged_and_a_failure_counts_as_a_coin():
    table = columns(method_rows())
    assert list(table) == ["AE", "RS-CD", "DSV search", "ST-SSAD", BEST_TRIAL]
    assert table["RS-CD"] == pytest.approx(dict.fromkeys(table["ST-SSAD"], 0.7))
    assert table["AE"]["b", 1] == 0.5 and table["AE"]["a", 0] == 0.7


def test_the_main_table_has_means_ranks_without_the_oracle_and_p_values_of_the_hero():
    lines = cells_of(task_table(method_rows(), "ST-SSAD"))
    assert lines["a"] == ["0.700", "0.700", "0.800", "0.900", "0.950"]
    assert lines["**mean rank**"] == ["3.75", "3.25", "2.00", "1.00", ""]
    assert lines["**p**, unit task"][2:4] == ["0.2500", "ST-SSAD"]  # both of two tasks
    assert lines["**p**, unit task × seed"][2] == "0.0625"  # all of four runs


def test_the_hero_is_compared_with_every_method_over_train_sets():
    lines = cells_of(hero_table(method_rows(), "ST-SSAD"))
    assert lines["DSV search"][1:] == ["+0.100", "+0.100 … +0.100", "0.2500", "0.0625"]
    assert lines["ST-SSAD"][1:] == ["", "", "", ""] and lines["AE"][0] == "0.650 ± 0.050"


def test_costs_are_shares_of_the_search_and_a_second_derivative_counts_twice():
    lines = cells_of(cost_table(method_rows(), "DSV search"))
    assert lines["ST-SSAD"][:5] == ["0.3", "0.2", "0.1", "0.6", "30.0%"]  # 300 + 200 + 2 * 50 of 2000
    assert lines["DSV search"][4:] == ["100.0%", "4.0", "100.0%"] and BEST_TRIAL not in lines


def test_the_page_of_the_table_names_failures_and_compares_each_hero():
    page = markdown(method_rows(), "four runs", ("ST-SSAD", "DSV search"), "DSV search")
    assert "AE on b, seed 1: it diverged" in page and "nan" not in page
    assert page.count("\n| --- ") == 4 and "## DSV search against each method" in page
    assert len(METHODS) == 18


# Figures.


def test_figures_of_trajectories_and_fields_are_png_files(tmp_path):
    ways = [
        Trajectory(texture, start, [5, 9, 13], {"patch_area": [0.2, 0.1, 0.03], "patch_aspect": [1, 1.5, 2]})
        for texture in ("gravel", "brick")
        for start in ("from 0.05", "from 0.2")
    ]
    truth = {"patch_area": 0.02, "patch_aspect": 2.0}
    panels = [TrajectoryPanel("one", truth, ways), TrajectoryPanel("none", truth, [])]
    for images in ([], [("normal", np.zeros((8, 8))), ("f_gen", np.ones((8, 8)))]):
        trajectories_figure(panels, images, "along the way", tmp_path / "ways.png")
        assert (tmp_path / "ways.png").read_bytes().startswith(b"\x89PNG")
    u1, u2 = np.linspace(-1, 1, 5), np.linspace(0, 2, 4)
    slope = np.stack(np.meshgrid(u1, u2), axis=-1)
    field = Field("bowl", u1, u2, np.square(slope).sum(-1) / 2, slope)
    gradient_field_figure({"a": [field, field], "b": [field]}, (0, 0), (1, 1), tmp_path / "field.png")
    assert (tmp_path / "field.png").read_bytes().startswith(b"\x89PNG")


def test_figures_refuse_what_they_cannot_draw(tmp_path):
    u = np.linspace(0, 1, 3)
    with pytest.raises(ValueError, match=r"expected \(3, 3\) and \(3, 3, 2\), got \(3, 3\) and \(3, 3\)"):
        Field("flat", u, u, np.zeros((3, 3)), np.zeros((3, 3)))
    with pytest.raises(ValueError, match="rows"):
        gradient_field_figure({}, (0, 0), (1, 1), tmp_path / "x.png")
    with pytest.raises(ValueError, match="rows\\['a'\\]"):
        gradient_field_figure({"a": []}, (0, 0), (1, 1), tmp_path / "x.png")
    with pytest.raises(ValueError, match="panels"):
        trajectories_figure([], [], "", tmp_path / "x.png")
    apart = [TrajectoryPanel("a", {"angle": 30.0}, []), TrajectoryPanel("b", {"patch_area": 0.1}, [])]
    with pytest.raises(ValueError, match="expected angle in each"):
        trajectories_figure(apart, [], "", tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
