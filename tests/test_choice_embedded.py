"""The choice on the embedded tasks: one training for several tasks, with both kinds of held-out images."""

import numpy as np
import pytest
import torch
from study_runs import run_study

from ssad_hpo.data import load
from ssad_hpo.detector import Embeddings
from ssad_hpo.task import Training
from studies.choice_embedded import ALIKE, SHIFTED, column_title, of_task, shifted
from studies.lab.choosing import Draw, Seen, combined_scores, figures, judge_of
from studies.lab.embedded import digit_sets, texture_sets, with_held_out


def kept(tasks, shifts):
    """Arrays of a detector, each filled with a number of its own."""
    arrays = {"train": np.zeros(1), "augmented": np.ones(1)}
    names = ("unlabeled", "scores", "held_out", "held_out_scores")
    for place in range(tasks):
        arrays |= {f"{place}_{name}": np.full(1, 10 * (place + 1) + i) for i, name in enumerate(names)}
    return arrays | (
        {f"shifted_{name}": np.full(1, 90 + i) for i, name in enumerate(names[2:])} if shifts else {}
    )


def test_a_task_has_its_own_images_and_either_kind_of_held_out_ones():
    own = {name: float(values[0]) for name, values in of_task(kept(2, True), 1, ALIKE).items()}
    assert own == {
        "train": 0, "augmented": 1, "unlabeled": 20, "scores": 21, "held_out": 22, "held_out_scores": 23,
    }  # fmt: skip
    other = {name: float(values[0]) for name, values in of_task(kept(2, True), 1, SHIFTED).items()}
    assert other == own | {"held_out": 90, "held_out_scores": 91}
    assert of_task(kept(2, False), 0, SHIFTED) is None


@pytest.mark.parametrize("sets", [texture_sets, digit_sets])
def test_tasks_of_a_train_set_share_their_train_images_and_shifted_held_out_ones_come_from_their_side(sets):
    (first, *_) = sets(0, Training())
    tasks = [load(with_held_out(source)) for source in first.sources]
    assert len({task.name for task in tasks}) == len(tasks)
    for task in tasks:
        assert torch.equal(task.train, tasks[0].train) and len(task.held_out) >= 40
    other = shifted(with_held_out(first.sources[0]))
    if other is not None:
        assert torch.equal(load(other).train, tasks[0].train)
        assert not torch.equal(load(other).held_out, tasks[0].held_out)


@pytest.mark.slow  # it embeds with the real encoder as well
def test_a_killed_study_goes_on_and_its_page_has_every_part(tmp_path):
    cells = tmp_path / "cells"
    run_study("choice_embedded", "--cells", cells, "--out", tmp_path / "whole")
    page = (tmp_path / "whole" / "choice_embedded.md").read_text()
    for part in (f"four kinds, {ALIKE}: anomalies as they are", f"four kinds, {SHIFTED}: anomalies 0.1"):
        assert f"## Textures, {part}" in page
    assert f"## Digits, one kind, {ALIKE}" in page and f"## Digits, one kind, {SHIFTED}" not in page
    assert "| frozen with head |" in page and "\n0 failed" in page
    next(cells.glob("*_random-dynamic_*.json")).unlink()
    said = run_study("choice_embedded", "--cells", cells, "--out", tmp_path / "again")
    assert "7 of 8 cells are there" in said
    assert (tmp_path / "again" / "choice_embedded.csv").read_text() == (
        tmp_path / "whole" / "choice_embedded.csv"
    ).read_text()


def test_tasks_are_shown_by_their_train_images():
    assert [column_title(name) for name in ("gravel/cutout/0.02", "digits/7")] == ["gravel", "digits"]


def detectors(count, gaps):
    """Detectors whose scores of the first 20 of 60 unlabelled images lie a gap above the held-out ones."""
    generator = torch.Generator().manual_seed(0)

    def rows(n):
        return torch.nn.functional.normalize(torch.randn(n, 6, generator=generator), dim=1)

    for i in range(count):
        scores = np.exp(
            torch.randn(60, generator=generator).numpy() + np.where(np.arange(60) < 20, gaps[i], 0)
        )
        held_out = np.exp(torch.randn(40, generator=generator).numpy())
        sets = Embeddings(rows(50), rows(50), rows(60), rows(40))
        yield Seen(scores, held_out, sets, scores, sets.unlabeled)


def test_a_search_ends_with_the_best_eight_by_shift_or_with_the_encoder_where_nothing_is_seen():
    judge = judge_of((np.arange(60) < 20).astype(np.int8), Draw(np.arange(60), np.arange(60)))
    *seen, frozen = detectors(12, gaps := [3.0, 0, 2, 0, 1, 0, 2.5, 0, 1.5, 0, 0.5, 2])
    best = sorted([*seen, frozen], key=lambda one: one.criteria["shift"])[:8]
    found = figures(seen, [], frozen, judge)
    assert found["as a search ends"] == judge(*combined_scores(best, heads=True))
    assert found["as a search ends"] != found["combined, all and frozen"]
    *seen, frozen = detectors(12, [0.0] * len(gaps))
    assert figures(seen, [], frozen, judge)["as a search ends"] == judge(frozen.scores, frozen.unseen_scores)
