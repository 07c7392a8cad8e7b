"""Labels change nothing: whatever is done to the names and folders of the unlabelled images, every
trial, criterion and choice stays the same to the last bit; only the figures that judge it may change."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssad_hpo import data
from ssad_hpo.bilevel import Tuning
from ssad_hpo.criteria import CRITERIA
from ssad_hpo.data import find_source
from ssad_hpo.evaluate import auc
from ssad_hpo.experiment import (
    StudyResult,
    evaluate_run,
    open_result,
    open_run,
    read_trajectory,
    run_study,
)
from ssad_hpo.search import Objective, candidates, open_study, read_reseeded, run_search, select
from ssad_hpo.storage import open_journal
from ssad_hpo.task import Search, Task, Training

pytestmark = pytest.mark.usefixtures("workplace")

IMAGE_SIZE = 16
# TPE leans on the history from the 11th trial on.
SEARCH = Search({"cutavg": {}, "cutout": {}}, n_trials=12, pruner="asha")
# The same with a part of train held out, by whose scores candidates are chosen, also with other seeds, and
# combined.
HELD_OUT = Search({"cutavg": {}, "cutout": {}}, "pu_auc", n_trials=11, pruner="asha", combine=3, confirm=2)
SHARE = 0.4
TRAINING = Training(steps=4, batch_size=4, width=2, evaluate_at=(0.5, 0.75, 1.0))


def search(images: Path | data.Source, run: Path) -> StudyResult:
    source = find_source(images, image_size=IMAGE_SIZE) if isinstance(images, Path) else images
    return run_study(source, SEARCH, TRAINING, run=run, tracking_uri=None)


def search_by_held_out(images: Path, run: Path) -> StudyResult:
    source = find_source(images, image_size=IMAGE_SIZE, held_out_share=SHARE)
    return run_study(source, HELD_OUT, TRAINING, run=run, tracking_uri=None)


@pytest.fixture(scope="module")
def published(
    tmp_path_factory: pytest.TempPathFactory, make_category: Callable[..., Path]
) -> Callable[[], StudyResult]:
    """The study of the folder as it was published; the others are compared with it."""
    results: list[StudyResult] = []

    def result() -> StudyResult:
        if not results:
            place = tmp_path_factory.mktemp("published")
            results.append(search(make_category(place / "cloth"), place / "run"))
        return results[0]

    return result


def observations(study: Any) -> list[dict[str, Any]]:
    """All that a search saw and decided, trial by trial; addresses and durations are no part of it."""
    seen = []
    for trial in study.get_trials(deepcopy=False):
        attributes = {k: v for k, v in trial.user_attrs.items() if k not in ("artifacts", "seconds")}
        reported = dict(trial.intermediate_values)
        seen.append({"state": trial.state.name, "params": trial.params, "reported": reported, **attributes})
    return seen


def check_same_search(result: StudyResult, expected: StudyResult) -> None:
    assert observations(result.study) == observations(expected.study)
    for criterion in sorted(CRITERIA.keys() & expected.selected.criteria.keys()):
        chosen = select(result.study, criterion), select(expected.study, criterion)
        assert chosen[0].number == chosen[1].number
    assert result.selected.number == expected.selected.number
    assert result.selected.criteria == expected.selected.criteria
    assert result.selected.augmentation == expected.selected.augmentation
    for mine, theirs in zip(candidates(result.study), candidates(expected.study), strict=True):
        assert mine.number == theirs.number
        assert np.array_equal(mine.scores(), theirs.scores())
    check_same_evidence(result, expected)
    check_same_confirmation(result, expected)


def check_same_confirmation(result: StudyResult, expected: StudyResult) -> None:
    """What other seeds found, and what is chosen by it, to the last bit; durations are no part of it."""
    found = [read_reseeded(r.study) for r in (result, expected)]
    plain = [{place: dataclasses.replace(one, seconds=0) for place, one in of.items()} for of in found]
    assert plain[0] == plain[1]
    mine, theirs = result.confirmation, expected.confirmation
    if mine is None or theirs is None:
        assert mine is theirs
        return
    assert (mine.seeds, mine.values, mine.chosen) == (theirs.seeds, theirs.values, theirs.chosen)


def check_same_evidence(result: StudyResult, expected: StudyResult) -> None:
    """All that is told of held-out images and of the combined detector, to the last bit."""
    mine, theirs = result.evidence, expected.evidence
    if mine is None or theirs is None:
        assert mine is theirs
        return
    told = [(e.p_anomalies, e.shifted, e.members, e.heads) for e in (mine, theirs)]
    assert told[0] == told[1]
    if mine.combined is None or theirs.combined is None:
        assert mine.combined is theirs.combined
        return
    for name in ("scores", "held_out"):
        assert torch.equal(getattr(mine.combined, name), getattr(theirs.combined, name))
    for single in (False, True):
        decides = [r.detector(single=single).calibration for r in (result, expected)]
        assert decides[0] is not None and decides[1] is not None
        assert torch.equal(decides[0].held_out, decides[1].held_out)
    files = [sorted(p for p in r.run.combined.rglob("*") if p.is_file()) for r in (result, expected)]
    assert [p.relative_to(result.run.combined) for p in files[0]] == [
        p.relative_to(expected.run.combined) for p in files[1]
    ]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def rename_the_defects(test: Path) -> None:
    (test / "scratch").rename(test / "a hole")
    (test / "stain").rename(test / "zzz")


def rename_every_file(test: Path) -> None:
    for number, path in enumerate(sorted(test.rglob("*.*"), reverse=True)):
        path.rename(path.with_name(f"image {number * 7919 % 101:03}{path.suffix.upper()}"))


def shuffle_between_the_defects(test: Path) -> None:
    files = sorted((test / "scratch").iterdir()), sorted((test / "stain").iterdir())
    for scratch, stain in zip(*(half[::2] for half in files), strict=True):
        scratch.rename(test / "stain" / f"from scratch {scratch.name}")
        stain.rename(test / "scratch" / f"from stain {stain.name}")


def merge_the_defects(test: Path) -> None:
    for path in (test / "stain").iterdir():
        path.rename(test / "scratch" / f"stain {path.name}")
    (test / "stain").rmdir()


def nest_and_touch(test: Path) -> None:
    (test / "stain" / "deeper" / "still").mkdir(parents=True)
    for path in list((test / "stain").glob("*.*")):
        path.rename(test / "stain" / "deeper" / "still" / path.name)
    for number, path in enumerate(test.rglob("*.*")):
        os.utime(path, (10**9 + number, 10**9 - number))


def remove_the_masks(test: Path) -> None:
    shutil.rmtree(test.parent / "ground_truth")


@pytest.mark.parametrize(
    "change",
    [
        rename_the_defects,
        rename_every_file,
        shuffle_between_the_defects,
        merge_the_defects,
        nest_and_touch,
        remove_the_masks,
    ],
)
def test_names_and_folders_of_the_defects_change_nothing_at_all(
    change: Callable[[Path], None],
    tmp_path: Path,
    make_category: Callable[..., Path],
    published: Callable[[], StudyResult],
) -> None:
    images = make_category(tmp_path / "cloth")
    before = sorted(path.relative_to(images) for path in images.rglob("*"))
    change(images / "test")
    if change is not nest_and_touch:
        assert sorted(path.relative_to(images) for path in images.rglob("*")) != before
    result = search(images, tmp_path / "run")
    check_same_search(result, published())
    assert result.aucs == published().aucs and result.evaluation == published().evaluation


@pytest.fixture(scope="module")
def published_with_held_out(
    tmp_path_factory: pytest.TempPathFactory, make_category: Callable[..., Path]
) -> StudyResult:
    place = tmp_path_factory.mktemp("held out")
    return search_by_held_out(make_category(place / "cloth"), place / "run")


def test_names_and_folders_change_nothing_of_held_out_images_and_the_combined_detector(
    tmp_path: Path, make_category: Callable[..., Path], published_with_held_out: StudyResult
) -> None:
    images = make_category(tmp_path / "cloth")
    for change in (rename_every_file, shuffle_between_the_defects, nest_and_touch, remove_the_masks):
        change(images / "test")
    for number, path in enumerate(sorted((images / "train" / "good").iterdir(), reverse=True)):
        path.rename(path.with_name(f"{number * 5 % 14:02} normal{path.suffix}"))
    result = search_by_held_out(images, tmp_path / "run")
    evidence = published_with_held_out.evidence
    assert evidence is not None and len(evidence.members) in (2, 3)  # as many as were not pruned
    confirmation = published_with_held_out.confirmation
    assert confirmation is not None and len(confirmation.values) == 2
    check_same_search(result, published_with_held_out)
    assert result.evaluation == published_with_held_out.evaluation
    assert result.evaluation is not None and result.evaluation.auc_combined is not None


def test_false_labels_change_the_figure_of_the_combined_detector_and_nothing_else(
    tmp_path: Path, make_category: Callable[..., Path], published_with_held_out: StudyResult
) -> None:
    images = make_category(tmp_path / "cloth")
    (images / "test" / "good").rename(images / "test" / "was good")
    (images / "test" / "scratch").rename(images / "test" / "good")
    result = search_by_held_out(images, tmp_path / "run")
    check_same_search(result, published_with_held_out)
    false = data.read_labels(find_source(images, image_size=IMAGE_SIZE))
    assert false is not None and result.evaluation is not None and result.evidence is not None
    assert result.evidence.combined is not None
    assert result.evaluation.auc_combined == auc(false, result.evidence.combined.scores.numpy())
    assert result.evaluation != published_with_held_out.evaluation


def take_good_away(test: Path) -> None:
    (test / "good").rename(test / "unknown")


def put_all_into_one_folder(test: Path) -> None:
    for path in [p for p in test.rglob("*.*") if p.is_file()]:
        path.rename(test / f"{path.parent.name} {path.name}")
    for folder in [p for p in test.iterdir() if p.is_dir()]:
        folder.rmdir()


@pytest.mark.parametrize("change", [take_good_away, put_all_into_one_folder])
def test_without_ground_truth_the_search_is_the_same_and_nothing_is_judged(
    change: Callable[[Path], None],
    tmp_path: Path,
    make_category: Callable[..., Path],
    published: Callable[[], StudyResult],
) -> None:
    images = make_category(tmp_path / "cloth")
    change(images / "test")
    result = search(images, tmp_path / "run")
    check_same_search(result, published())
    assert published().evaluation is not None
    assert result.aucs is None and result.evaluation is None
    with pytest.raises(ValueError, match="there is no ground truth, so nothing to evaluate"):
        evaluate_run(tmp_path / "run")


def test_a_plain_pair_of_folders_without_labels_gives_the_same_search(
    tmp_path: Path, make_category: Callable[..., Path], published: Callable[[], StudyResult]
) -> None:
    images = make_category(tmp_path / "cloth")
    put_all_into_one_folder(images / "test")
    pair = {"train": str(images / "train" / "good"), "unlabeled": str(images / "test")}
    result = search(data.Source("folders", {**pair, "image_size": IMAGE_SIZE}), tmp_path / "run")
    check_same_search(result, published())
    assert result.aucs is None and result.evaluation is None


def test_false_labels_change_the_figures_and_nothing_else(
    tmp_path: Path, make_category: Callable[..., Path], published: Callable[[], StudyResult]
) -> None:
    images = make_category(tmp_path / "cloth")
    (images / "test" / "good").rename(images / "test" / "was good")
    (images / "test" / "scratch").rename(images / "test" / "good")
    result = search(images, tmp_path / "run")
    check_same_search(result, published())
    false = data.read_labels(find_source(images, image_size=IMAGE_SIZE))
    assert false is not None and false.sum() == 7 + 4
    assert result.aucs == {c.number: auc(false, c.scores()) for c in candidates(result.study)}
    assert result.aucs != published().aucs


def test_inverted_labels_invert_every_auc_and_nothing_else(
    tmp_path: Path, make_category: Callable[..., Path]
) -> None:
    images = make_category(tmp_path / "cloth")
    merge_the_defects(images / "test")
    right = search(images, tmp_path / "right")
    (images / "test" / "good").rename(images / "test" / "other")
    (images / "test" / "scratch").rename(images / "test" / "good")
    inverted = search(images, tmp_path / "inverted")
    check_same_search(inverted, right)
    assert right.aucs is not None and inverted.aucs is not None
    for number, value in right.aucs.items():
        assert inverted.aucs[number] == pytest.approx(1 - value, abs=1e-12)


def test_a_search_that_cannot_read_labels_is_the_same_up_to_its_selection(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_category: Callable[..., Path],
    published: Callable[[], StudyResult],
) -> None:
    class NoLabelsError(Exception):
        pass

    def refuse(source: data.Source) -> None:
        raise NoLabelsError

    monkeypatch.setattr(data, "read_labels", refuse)
    with pytest.raises(NoLabelsError):  # after the search: what follows finds all of it
        search(make_category(tmp_path / "cloth"), tmp_path / "run")
    run = open_run(tmp_path / "run")
    study = open_study(
        open_journal(run.journal), run.settings.study_name, SEARCH, published().run.settings.training
    )
    assert observations(study) == observations(published().study)
    assert select(study).number == published().selected.number
    assert np.array_equal(select(study).scores(), published().selected.scores())


def test_labels_are_read_once_and_after_the_last_trial_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_category: Callable[..., Path], listener: Any
) -> None:
    read = data.read_labels

    def tell(source: data.Source) -> Any:
        listener.heard.append(("labels", source))
        return read(source)

    monkeypatch.setattr(data, "read_labels", tell)
    source = find_source(make_category(tmp_path / "cloth"), image_size=IMAGE_SIZE)
    result = run_study(
        source, SEARCH, TRAINING, run=tmp_path / "run", listeners=[listener], tracking_uri=None
    )
    assert result.evaluation is not None
    events = [event for event, *_ in listener.heard]
    assert events.count("labels") == 1 and events[-1] == "labels"
    assert events.count("ended") == SEARCH.n_trials


def test_a_task_holds_images_only_and_the_objective_is_given_no_more(
    tmp_path: Path, published: Callable[[], StudyResult]
) -> None:
    assert [field.name for field in dataclasses.fields(Task)] == ["name", "train", "unlabeled", "held_out"]
    task = data.load(published().run.settings.source)
    assert vars(task).keys() == {"name", "train", "unlabeled", "held_out"}
    nameless = Task("", task.train, task.unlabeled)
    training = published().run.settings.training
    objective = Objective(nameless, SEARCH, training, artifacts=tmp_path / "artifacts")
    study = open_study(open_journal(tmp_path / "journal"), "study", SEARCH, training)
    run_search(study, objective)
    assert observations(study) == observations(published().study)


# Tuning by gradient


def tune(images: Path, run: Path, listener: Any = None) -> StudyResult:
    return run_study(
        find_source(images, image_size=IMAGE_SIZE),
        Tuning("cutdiff", detector_steps=2, starts=(0.5, 0.9), validation_train=6, validation_unlabeled=6),
        Training(steps=8, batch_size=4, width=2),
        run=run,
        tracking_uri=None,
        listeners=[] if listener is None else [listener],
    )


@pytest.mark.filterwarnings("ignore::ssad_hpo.bilevel.CollapseWarning")
def test_false_labels_change_the_figures_of_a_tuning_and_nothing_else(
    tmp_path: Path, make_category: Callable[..., Path]
) -> None:
    images = make_category(tmp_path / "cloth")
    right = tune(images, tmp_path / "right")
    (images / "test" / "good").rename(images / "test" / "was good")
    (images / "test" / "scratch").rename(images / "test" / "good")
    wrong = tune(images, tmp_path / "wrong")
    check_same_search(wrong, right)
    for mine, theirs in zip(candidates(wrong.study), candidates(right.study), strict=True):
        assert read_trajectory(mine) == read_trajectory(theirs)
    assert right.aucs is not None and wrong.aucs is not None and wrong.aucs != right.aucs


@pytest.mark.filterwarnings("ignore::ssad_hpo.bilevel.CollapseWarning")
def test_false_labels_change_no_look_loss_choice_or_combination_by_held_out_images(
    tmp_path: Path, make_category: Callable[..., Path]
) -> None:
    tuning = Tuning(
        ["cutdiff", "cutout"], loss="pu_auc", detector_steps=2, starts=(0.5, 0.9), validation_train=6,
        validation_unlabeled=6, survivors=2, choose_by="shift", combine=2,
    )  # fmt: skip

    def by_held_out(run: Path) -> StudyResult:
        source = find_source(images, image_size=IMAGE_SIZE, held_out_share=SHARE)
        return run_study(source, tuning, Training(steps=8, batch_size=4, width=2), run=run, tracking_uri=None)

    images = make_category(tmp_path / "cloth")
    right = by_held_out(tmp_path / "right")
    (images / "test" / "good").rename(images / "test" / "was good")
    (images / "test" / "scratch").rename(images / "test" / "good")
    wrong = by_held_out(tmp_path / "wrong")
    check_same_search(wrong, right)
    assert right.evidence is not None and len(right.evidence.members) == 2
    assert right.aucs is not None and wrong.aucs is not None and wrong.aucs != right.aucs


@pytest.mark.filterwarnings("ignore::ssad_hpo.bilevel.CollapseWarning")
def test_a_tuning_reads_labels_once_and_after_its_last_start_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_category: Callable[..., Path], listener: Any
) -> None:
    class NoLabelsError(Exception):
        pass

    def refuse(source: data.Source) -> None:
        listener.heard.append(("labels", source))
        raise NoLabelsError

    images = make_category(tmp_path / "cloth")
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_labels", refuse)
        with pytest.raises(NoLabelsError):
            tune(images, tmp_path / "refused", listener)
    events = [event for event, *_ in listener.heard]
    assert events.count("labels") == 1 and events[-1] == "labels" and events.count("ended") == 2
    check_same_search(open_result(tmp_path / "refused"), tune(images, tmp_path / "judged"))
