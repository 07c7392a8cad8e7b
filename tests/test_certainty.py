"""How sure a choice is said to be: ties, edges of the space, and that none of it needs a label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from starting import start_study

from ssad_hpo import controlled_data
from ssad_hpo.criteria import evaluate_all
from ssad_hpo.detector import Embeddings
from ssad_hpo.experiment import how_sure, report_run
from ssad_hpo.experiment.certainty import at_the_edge, rivals_of
from ssad_hpo.judgement import Judged
from ssad_hpo.search import Candidate
from ssad_hpo.search.store import MemoryStore
from ssad_hpo.task import Augmentation, Range, SearchSpace, Training

pytestmark = pytest.mark.usefixtures("workplace")

TINY = Training(steps=4, batch_size=4, width=2, evaluate_at=(0.5, 1.0))


def candidate(number: int, store: MemoryStore, lift: float, noise: float, seed: int = 0) -> Candidate:
    """One whose unlabelled scores and embeddings are so far above the held-out and train ones."""
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.randn(60, generator=generator).double()
    scores = torch.randn(80, generator=generator).double() + lift
    own = torch.Generator().manual_seed(seed + 1 + number)
    scores += noise * torch.randn(80, generator=own).double()
    rows = torch.nn.functional.normalize(torch.randn(240, 6, generator=generator), dim=1)
    train, augmented, unlabeled = rows.split(80)
    sets = Embeddings(
        train, augmented, torch.nn.functional.normalize(unlabeled + lift * train.mean(0), dim=1)
    )
    criteria = evaluate_all(sets.train, sets.augmented, sets.unlabeled, scores, held_out)
    detector: Any = None
    address = store.put(str(number), Judged(criteria, sets, scores, held_out), detector)
    return Candidate(number, Augmentation("cutavg", {"patch_area": 0.1}), criteria, 0.1, 4, address)


@pytest.mark.parametrize("criterion", ["shift", "pu_auc"])
def test_equals_are_told_to_be_and_what_is_clearly_worse_is_not(criterion: str) -> None:
    store = MemoryStore()
    choices = [
        candidate(0, store, 1.0, 0.3),
        candidate(1, store, 1.0, 0.3),
        candidate(2, store, 1.0, 0.3),
        candidate(3, store, 0.0, 0.3),
    ]
    best = min(choices[:3], key=lambda c: c.criteria[criterion])
    others = {c.number for c in choices[:3]} - {best.number}
    assert set(rivals_of(best, choices, criterion)) == others


def test_the_error_is_of_the_difference_on_the_same_images() -> None:
    """Scores that go up and down together are told apart by a difference below the error of each alone."""
    store = MemoryStore()
    choices = [candidate(0, store, 0.3, 0.0), candidate(1, store, 0.2, 0.0)]
    first, second = choices
    gap = second.criteria["shift"] - first.criteria["shift"]
    assert 0 < gap < first.criteria["shift_error"]
    assert rivals_of(first, choices, "shift") == []


def test_ties_are_found_of_criteria_of_embeddings_too() -> None:
    store = MemoryStore()
    choices = [candidate(0, store, 0.0, 0.0), candidate(1, store, 0.0, 0.0, seed=9)]
    best = min(choices, key=lambda c: c.criteria["base"])
    assert rivals_of(best, choices, "base") == [1 - best.number]
    assert rivals_of(best, choices, "validation_loss") == []


def test_a_hyperparameter_at_the_end_of_what_was_searched_is_told_with_the_option() -> None:
    space = SearchSpace({"cutavg": {"patch_area": Range(0.01, 0.1, log=True), "patch_aspect": 1.0}})

    def told(area: float) -> list[str]:
        augmentation = Augmentation("cutavg", {"patch_area": area, "patch_aspect": 1.0})
        return at_the_edge(Candidate(0, augmentation, {}, 0.1, 4, ""), space)

    assert told(0.03) == []
    (low,), (high,) = told(0.0101), told(0.0995)
    assert "lower end" in low and "--range cutavg.patch_area=LOW:HIGH" in low and "upper end" in high


def test_a_patch_that_could_be_no_larger_is_at_no_edge() -> None:
    augmentation = Augmentation("cutavg", {"patch_area": 0.299, "patch_aspect": 1.0})
    assert at_the_edge(Candidate(0, augmentation, {}, 0.1, 4, ""), SearchSpace("cutavg")) == []


def test_report_and_sentences_say_the_same(workplace: Path) -> None:
    task = controlled_data(image_size=16, n_train=20, n_unlabeled=14).task
    space = SearchSpace({"cutavg": {"patch_area": Range(0.01, 0.011, log=True), "patch_aspect": 1.0}})
    result = start_study(task, space=space, n_trials=3, training=TINY, tracking_uri=None, run="s")
    told = how_sure(result)
    tie = [sentence for sentence in told if "cannot be told apart" in sentence]
    assert len(tie) == 1 and f"from trial {result.selected.number} by dsv" in tie[0]
    page = report_run("s", task=task).read_text()
    assert tie[0][1:] in page
