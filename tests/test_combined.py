"""Candidates that score together: contrast heads and their folds, scales, files, and whole runs."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from combined_runs import CLEAR, clear_run
from conftest import Ended
from sklearn.covariance import LedoitWolf

from ssad_hpo import data
from ssad_hpo.combined import (
    Combination,
    CombinedDetector,
    can_be_combined,
    combine,
    contrast_head,
    copies_together,
    head_weight,
    is_combined,
)
from ssad_hpo.detector import Detector, Embeddings
from ssad_hpo.evaluate import auc
from ssad_hpo.experiment import StudyResult, load_detector, open_result, resume_study
from ssad_hpo.search import candidates
from ssad_hpo.search.store import Kept
from ssad_hpo.task import DetectorError

pytestmark = pytest.mark.usefixtures("workplace")


def unit_rows(rng: np.random.Generator, n: int, d: int = 6) -> torch.Tensor:
    rows = rng.normal(size=(n, d)) + np.arange(d)
    return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def made_up(seed: int, n_unlabeled: int = 21, n_held_out: int = 16, d: int = 6, further: float = 0.0) -> Kept:
    """A candidate of noise; `further` moves a third of the unlabelled images apart, with their scores."""
    rng = np.random.default_rng(seed)
    sets = [unit_rows(rng, n, d) for n in (30, 5, n_unlabeled, n_held_out)]
    scores = [np.exp(rng.normal(seed, 1 + seed, n)) for n in (n_unlabeled, n_held_out)]
    moved = sets[2][-(n_unlabeled // 3) :]
    moved[:, 0] += further
    scores[0][-(n_unlabeled // 3) :] *= 1 + 9 * (further > 0)
    return Kept(scores[0], Embeddings(*sets), None, scores[1])


def slow_heads(
    sets: Embeddings, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Cross-fitted scores of both sets, one image at a time, and the mean of the heads for others."""
    assert sets.held_out is not None
    unlabeled, held_out = sets.unlabeled.double().numpy(), sets.held_out.double().numpy()
    precision = np.linalg.inv(LedoitWolf().fit(sets.train.double().numpy()).covariance_)

    def head(fold: int) -> Callable[[np.ndarray], np.ndarray]:
        kept = [i for i in range(len(unlabeled)) if i % 5 != fold]
        suspicious = sorted(kept, key=lambda i: -scores[i])[: max(1, round(0.2 * len(kept)))]
        centre = np.mean([row for i, row in enumerate(held_out) if i % 5 != fold], axis=0)
        direction = precision @ (unlabeled[suspicious].mean(0) - centre)
        return lambda rows: (rows - centre) @ direction

    heads = [head(fold) for fold in range(5)]
    own = [
        np.array([heads[i % 5](row[None])[0] for i, row in enumerate(rows)]) for rows in (unlabeled, held_out)
    ]
    return own[0], own[1], lambda rows: np.mean([head(rows) for head in heads], axis=0)


def slow_weight(unlabeled: np.ndarray, held_out: np.ndarray) -> float:
    pairs = [(u > h) + (u == h) / 2 for u in unlabeled for h in held_out]
    n, m = len(unlabeled), len(held_out)
    return float(np.clip(((np.mean(pairs) - 0.5) / np.sqrt((n + m + 1) / (12 * n * m)) - 2.5) / 2, 0, 1))


# Heads


@pytest.mark.parametrize("sizes", [(23, 17), (40, 8), (9, 30)], ids=str)
@pytest.mark.parametrize("d", [3, 60])
def test_a_contrast_head_is_the_slow_one_of_all_folds_but_ones_own(sizes: tuple[int, int], d: int) -> None:
    kept = made_up(0, *sizes, d)
    others = unit_rows(np.random.default_rng(1), 12, d)
    head, *scores = contrast_head(kept.embeddings, torch.from_numpy(kept.scores))
    own_unlabeled, own_held_out, mean = slow_heads(kept.embeddings, kept.scores)
    scale = np.abs(own_unlabeled).max()
    assert scores[0].numpy() == pytest.approx(own_unlabeled, abs=1e-6 * scale)
    assert scores[1].numpy() == pytest.approx(own_held_out, abs=1e-6 * scale)
    assert head(others).numpy() == pytest.approx(mean(others.numpy()), abs=1e-6 * scale)


@pytest.mark.parametrize("which", ["unlabeled", "held_out"])
def test_no_image_is_scored_by_a_head_that_was_fitted_on_it(which: str) -> None:
    sets = made_up(1, 20, 20).embeddings
    suspicion = torch.arange(20).double() % 7  # of the highest: 6 and 13
    other, row = unit_rows(np.random.default_rng(5), 1)[0], 13

    def scores_with(changed: torch.Tensor) -> list[torch.Tensor]:
        rows = getattr(sets, which).clone()
        rows[row] = changed
        return list(contrast_head(dataclasses.replace(sets, **{which: rows}), suspicion)[1:])

    mine = getattr(sets, which)[row]
    before, after, halfway = scores_with(mine), scores_with(other), scores_with((mine + other) / 2)
    fold = torch.arange(20) % 5 == row % 5
    for one, another in zip(before, after, strict=True):
        mates = fold.clone()
        mates[row] = False
        assert torch.equal(one[mates], another[mates])  # their head does not know the image that changed
        assert ((one - another).abs() > 1e-9)[~fold].all()  # all other heads do
    # Its own score is a linear function of it, as it would not be if it had a part in the fit.
    own = 0 if which == "unlabeled" else 1
    middle = (before[own][row] + after[own][row]) / 2
    assert float(halfway[own][row]) == pytest.approx(float(middle), rel=1e-9)
    assert float(before[own][row]) != pytest.approx(float(after[own][row]), abs=1e-6)


def test_heads_see_no_difference_between_two_sets_of_noise_with_more_features_than_images() -> None:
    seen = []
    for seed in range(10):
        kept = made_up(seed, 30, 30, 100)
        _, of_unlabeled, of_held_out = contrast_head(kept.embeddings, torch.from_numpy(kept.scores))
        labels = np.repeat([1, 0], 30).astype(np.int8)
        seen.append(auc(labels, torch.cat([of_unlabeled, of_held_out]).numpy()))
    assert 0.2 < np.mean(seen) < 0.65  # heads that had seen their own images would have 1


def test_heads_of_two_held_out_images_have_two_folds() -> None:
    kept = made_up(3, 7, 2)
    head, of_unlabeled, of_held_out = contrast_head(kept.embeddings, torch.from_numpy(kept.scores))
    assert of_unlabeled.isfinite().all() and of_held_out.isfinite().all() and head.weights.shape == (6,)


@pytest.mark.parametrize("further", [0.0, 0.3, 0.5, 2.0])
def test_heads_count_as_far_above_chance_as_their_own_scores_are(further: float) -> None:
    rng = np.random.default_rng(4)
    unlabeled, held_out = rng.normal(further, 1, 60), rng.normal(0, 1, 50)
    found = head_weight(torch.from_numpy(unlabeled), torch.from_numpy(held_out))
    assert found == pytest.approx(slow_weight(unlabeled, held_out), abs=1e-9)
    assert found == {0.0: 0, 2.0: 1}.get(further, found)


# Combinations


def standardised(scores: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    return (scores - held_out.mean()) / held_out.std()


@pytest.mark.parametrize(("heads", "further"), [(True, 2.0), (True, 0.0), (False, 2.0)])
def test_a_combination_is_the_mean_of_what_the_method_defines(heads: bool, further: float) -> None:
    kept = [made_up(seed, 60, 50, further=further) for seed in range(3)]
    together = combine(kept, heads=heads)
    parts: dict[str, list[np.ndarray]] = {"scores": [], "held_out": []}
    for candidate in kept:
        assert candidate.held_out is not None
        normal = np.log(candidate.held_out)
        parts["scores"].append(standardised(np.log(candidate.scores), normal))
        parts["held_out"].append(standardised(normal, normal))
    expected = {name: np.mean(values, axis=0) for name, values in parts.items()}
    found = [slow_heads(candidate.embeddings, expected["scores"]) for candidate in kept]
    of_heads = [np.mean([standardised(head[i], head[1]) for head in found], axis=0) for i in (0, 1)]
    weight = slow_weight(*of_heads) if heads else 0.0
    assert together.head_weight == pytest.approx(weight, abs=1e-6)
    assert (weight > 0) == (heads and further > 0)  # noise has no head
    for name, values, heads_of in zip(expected, expected.values(), of_heads, strict=True):
        assert getattr(together, name).numpy() == pytest.approx(values + weight * heads_of, abs=1e-6)
    assert float(together.held_out.mean()) == pytest.approx(0, abs=1e-9) and len(together.parts) == 3
    assert all((part.head is not None) == (weight > 0) for part in together.parts)


def test_what_cannot_be_combined_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^candidates: expected at least one"):
        combine([])
    kept = made_up(0)
    with pytest.raises(ValueError, match=r"^candidates: a combination needs held-out normal images"):
        combine([Kept(kept.scores, kept.embeddings, None)])
    with pytest.raises(DetectorError, match="scores of the held-out images are all the same"):
        combine([Kept(kept.scores, kept.embeddings, None, np.ones(16))])


# Whole runs


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    return clear_run(tmp_path_factory.mktemp("together") / "run", combine=3)


def combination_of(result: StudyResult) -> Combination:
    assert result.evidence is not None and result.evidence.combined is not None
    return result.evidence.combined


def test_a_run_combines_its_best_candidates_and_keeps_their_detectors(together: StudyResult) -> None:
    evidence = together.evidence
    assert evidence is not None and evidence.anomalies_seen and evidence.heads
    ranked = sorted(candidates(together.study), key=lambda c: (c.criteria["pu_auc"], c.number))
    assert evidence.members == tuple(c.number for c in ranked[:3])
    assert together.selected.number == evidence.members[0]
    assert all(candidate.kept().detector is not None for candidate in ranked[:3])  # though keep is 1
    kept = [candidate.kept() for candidate in ranked[:3]]
    assert torch.equal(combination_of(together).scores, combine(kept).scores)
    labels = data.read_labels(CLEAR)
    assert labels is not None and together.evaluation is not None
    assert together.evaluation.auc_combined == auc(labels, combination_of(together).scores.numpy())
    assert together.evaluation.metrics()["auc_combined"] == together.evaluation.auc_combined


def test_new_images_are_scored_by_all_members_and_the_means_of_their_heads(together: StudyResult) -> None:
    evidence, images = together.evidence, data.load(CLEAR).unlabeled
    assert evidence is not None
    by_number = {candidate.number: candidate for candidate in candidates(together.study)}
    members = [by_number[number].kept() for number in evidence.members]
    logs = [np.log(kept.held_out) for kept in members if kept.held_out is not None]
    suspicion = [
        standardised(np.log(kept.scores), normal) for kept, normal in zip(members, logs, strict=True)
    ]
    expected, weight = np.zeros(len(images)), combination_of(together).head_weight
    for kept, normal in zip(members, logs, strict=True):
        assert kept.detector is not None
        rows = kept.detector.embed(images)
        _, own_held_out, mean = slow_heads(kept.embeddings, np.mean(suspicion, axis=0))
        expected += standardised(np.log(kept.detector.density_score(rows).numpy()), normal) / 3
        expected += weight * standardised(mean(rows.double().numpy()), own_held_out) / 3
    combined = load_detector(together.run.folder)
    assert isinstance(combined, CombinedDetector) and combined.image_shape == (1, 16, 16)
    assert combined.score(images).numpy() == pytest.approx(expected, abs=1e-5)
    assert combined.score(images[:0]).shape == (0,)


LOAD_AND_SCORE = """
import sys, numpy as np, torch
from ssad_hpo.experiment import load_detector
torch.set_num_threads(1)
images, scores, *folders = sys.argv[1:]
images = torch.from_numpy(np.load(images))
np.save(scores, np.stack([load_detector(folder).score(images).numpy() for folder in folders]))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_combined_detector_in_another_process_scores_the_same(
    together: StudyResult, tmp_path: Path
) -> None:
    images, combined = data.load(CLEAR).unlabeled, load_detector(together.run.folder)
    assert is_combined(together.run.combined) and isinstance(combined, CombinedDetector)
    combined.save(tmp_path / "copy")
    np.save(tmp_path / "images.npy", images.numpy())
    here = combined.score(images).numpy()
    files = [tmp_path / "images.npy", tmp_path / "scores.npy", together.run.combined, tmp_path / "copy"]
    subprocess.run([sys.executable, "-c", LOAD_AND_SCORE, *map(str, files)], check=True)
    assert np.array_equal(np.load(tmp_path / "scores.npy"), [here, here])
    assert not list(tmp_path.glob("*.partial"))


def test_one_candidate_is_what_a_search_without_combining_ends_with(
    together: StudyResult, tmp_path: Path
) -> None:
    alone = clear_run(tmp_path / "alone")
    assert [t.value for t in alone.study.trials] == [t.value for t in together.study.trials]
    assert alone.selected.number == together.selected.number
    assert alone.evidence is not None and together.evidence is not None
    assert alone.evidence.combined is None and alone.evidence.members == ()
    assert alone.evidence.p_anomalies == together.evidence.p_anomalies
    assert alone.evaluation is not None and alone.evaluation.auc_combined is None
    assert "auc_combined" not in alone.evaluation.metrics() and not alone.run.combined.exists()
    single, images = load_detector(alone.run.folder), data.load(CLEAR).unlabeled
    assert isinstance(single, Detector)
    assert np.array_equal(single.score(images).numpy(), alone.selected.scores())
    assert sum(c.kept().detector is not None for c in candidates(alone.study)) < 5
    same = load_detector(together.run.folder, single=True)
    assert isinstance(same, Detector) and torch.equal(same.score(images), single.score(images))


def test_heads_stay_out_where_they_are_not_wanted_or_no_anomaly_is_seen(
    together: StudyResult, tmp_path: Path
) -> None:
    result = clear_run(tmp_path / "run", combine=2, contrast_heads=False)
    assert result.evidence is not None and result.evidence.anomalies_seen and not result.evidence.heads
    # What looks like normal images has no head to tell noise from noise.
    folder = shutil.copytree(together.run.folder, tmp_path / "clean")
    for path in (folder / "artifacts").glob("*/arrays.npz"):
        with np.load(path) as file:
            arrays = dict(file)
        n = len(arrays["held_out_scores"])
        arrays["held_out_scores"] = np.sort(arrays["scores"])[:: len(arrays["scores"]) // n][:n] + 1e-3
        np.savez(path, **arrays)
    clean = open_result(folder)
    assert clean.evidence is not None and not clean.evidence.anomalies_seen
    assert clean.evidence.combined is not None and not clean.evidence.heads


def test_detectors_that_are_spoilt_spoil_neither_the_choice_nor_what_is_told_of_it(
    together: StudyResult, tmp_path: Path
) -> None:
    folder = shutil.copytree(together.run.folder, tmp_path / "spoilt")
    for path in (folder / "artifacts").rglob("detector.safetensors"):
        path.write_bytes(b"")
    spoilt = open_result(folder)
    assert torch.equal(combination_of(spoilt).scores, combination_of(together).scores)
    assert spoilt.evaluation == together.evaluation
    with pytest.raises(ValueError, match="detector"):
        load_detector(folder)
    assert isinstance(load_detector(folder / "combined"), CombinedDetector)


def test_a_run_that_goes_on_combines_anew(together: StudyResult, tmp_path: Path) -> None:
    folder = shutil.copytree(together.run.folder, tmp_path / "longer")
    longer, whole = resume_study(folder, n_trials=7), clear_run(tmp_path / "whole", n_trials=7, combine=3)
    assert longer.evidence is not None and whole.evidence is not None
    assert longer.evidence.members == whole.evidence.members
    assert torch.equal(combination_of(longer).scores, combination_of(whole).scores)
    images = data.load(CLEAR).unlabeled
    saved = [load_detector(result.run.combined).score(images) for result in (longer, whole)]
    assert torch.equal(*saved)


def test_score_is_of_the_combined_detector_and_with_single_of_the_selected_one(
    together: StudyResult, tmp_path: Path, call: Callable[..., Ended]
) -> None:
    from PIL import Image

    images = data.load(CLEAR).unlabeled[:3]
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{i}.png")
    files = [tmp_path / f"{i}.png" for i in range(3)]

    def said(*words: str | Path) -> list[float]:
        ended = call("score", *words, *files)
        assert ended.code == 0, ended
        return [float(line.split(",")[1]) for line in ended.out.splitlines()[-3:]]

    combined = load_detector(together.run.folder).score(images).tolist()
    single = together.selected.detector().score(images).tolist()
    assert said(together.run.folder) == pytest.approx(combined, abs=1e-4)
    assert said(together.run.combined) == pytest.approx(combined, abs=1e-4)
    assert said(together.run.folder, "--single") == pytest.approx(single, abs=1e-4)
    assert combined != pytest.approx(single, abs=1e-2)


def test_copies_of_an_image_stay_in_one_fold() -> None:
    rows = unit_rows(np.random.default_rng(0), 12)
    assert copies_together(rows, 5).tolist() == [i % 5 for i in range(12)]
    twice = copies_together(rows.repeat_interleave(2, 0), 5)
    assert twice.tolist() == [i % 5 for i in range(12) for _ in range(2)]
    assert copies_together(rows[:1].repeat(4, 1), 3).tolist() == [0, 1, 2, 0]


def test_copies_of_normal_images_do_not_make_heads_see_anomalies() -> None:
    weights = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        unlabeled = unit_rows(rng, 50, 64).repeat_interleave(2, 0)
        sets = Embeddings(unit_rows(rng, 80, 64), unit_rows(rng, 5, 64), unlabeled, unit_rows(rng, 100, 64))
        scores = torch.from_numpy(rng.normal(size=50)).repeat_interleave(2)
        _, of_unlabeled, of_held_out = contrast_head(sets, scores)
        weights.append(head_weight(of_unlabeled, of_held_out))
    assert weights == [0.0] * 8


def test_a_candidate_whose_held_out_scores_are_all_the_same_is_no_scale() -> None:
    assert not can_be_combined(np.full(57, 0.1)) and not can_be_combined(np.linspace(1e-14, 1e-13, 20))
    assert can_be_combined(np.linspace(0.1, 0.2, 20))
