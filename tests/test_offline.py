"""Offline selection: detectors as npz files that a foreign script wrote, with plain NumPy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from held_out import ALWAYS

from ssad_hpo import CRITERIA, select_detectors
from ssad_hpo.consensus import SELECTORS
from ssad_hpo.criteria import Criterion

ROOT = Path(__file__).parent.parent


def write_detectors(folder: Path, count: int = 5, scores: bool = True, held_out: bool = False) -> list[Path]:
    """Unit embeddings in which augmented data lies nearer and nearer to the hidden anomalies."""
    rng = np.random.default_rng(0)
    normal, anomalous = rng.normal(size=8), rng.normal(size=8)
    paths = []
    for i in range(count):
        aim = normal + (anomalous - normal) * (i + 1) / count
        sets = {
            "train": normal + 0.3 * rng.normal(size=(30, 8)),
            "augmented": aim + 0.3 * rng.normal(size=(30, 8)),
            "unlabeled": np.repeat([normal, anomalous], 12, axis=0) + 0.3 * rng.normal(size=(24, 8)),
        }
        arrays = {name: rows / np.linalg.norm(rows, axis=1, keepdims=True) for name, rows in sets.items()}
        if scores:
            arrays["scores"] = rng.normal(size=24)
        if held_out:
            arrays["held_out_scores"] = rng.normal(size=15)
        paths.append(folder / f"detector{i}.npz")
        np.savez(paths[-1], **arrays)
    return paths


def test_every_selector_ranks_as_its_own_function_does(tmp_path):
    paths = write_detectors(tmp_path, held_out=True)
    files = [dict(np.load(path)) for path in paths]
    matrix = np.stack([file["scores"] for file in files], axis=1)
    for name in (*CRITERIA, *SELECTORS):
        ranking = select_detectors(paths, name)
        if name in CRITERIA:
            needs = [{"held_out": "held_out_scores"}.get(need, need) for need in CRITERIA[name].needs]
            given = [[torch.from_numpy(file[need]) for need in needs] for file in files]
            values = np.array([float(CRITERIA[name].function(*arguments)) for arguments in given])
            best = values.argmin()
        else:
            values = SELECTORS[name](matrix)
            best = values.argmax()
        assert ranking.values[name] == pytest.approx(values) and ranking.selected == best
        assert ranking.ranks[name][best] == 1 and len(ranking.ranks[name]) == 5
        assert name == "excess" or sorted(ranking.ranks[name]) == [1, 2, 3, 4, 5]  # that has ties


def test_dsv_chooses_the_detector_whose_augmentation_hits_the_anomalies(tmp_path):
    assert select_detectors(write_detectors(tmp_path)).selected == 4


def test_without_scores_the_criteria_rank_and_a_consensus_is_refused(tmp_path):
    paths = write_detectors(tmp_path, scores=False)
    assert set(select_detectors(paths).ranks) == set(ALWAYS)
    with pytest.raises(ValueError, match="'mc' needs scores in every file"):
        select_detectors(paths, "mc")


def test_a_file_that_cannot_be_used_is_named(tmp_path):
    good = write_detectors(tmp_path, 2)
    arrays = dict(np.load(good[0]))
    broken = {
        "cannot be read as an npz": b"no zip at all",
        "without augmented": {k: v for k, v in arrays.items() if k != "augmented"},
        "expected 24 unlabelled samples": {
            **arrays,
            "unlabeled": arrays["unlabeled"][:9],
            "scores": np.ones(9),
        },
        "scores: expected one for each": {**arrays, "scores": np.ones(3)},
        "held_out_scores: expected one for each": {**arrays, "held_out_scores": np.ones((3, 2))},
        "held_out_scores: expected finite values": {**arrays, "held_out_scores": np.full(3, np.inf)},
        "train: expected finite values": {**arrays, "train": np.full((30, 8), np.nan)},
        "train: expected real numbers": {**arrays, "train": np.full((30, 8), "a")},
    }
    for message, content in broken.items():
        bad = tmp_path / "bad.npz"
        bad.write_bytes(content) if isinstance(content, bytes) else np.savez(bad, **content)
        with pytest.raises(ValueError, match=rf"bad\.npz.*{message}"):
            select_detectors([*good, bad])
    with pytest.raises(ValueError, match="selector: expected one of dsv"):
        select_detectors(good, "auc")
    with pytest.raises(ValueError, match="files: expected at least one detector"):
        select_detectors([])


def test_a_criterion_of_scores_needs_them_in_every_file(tmp_path, monkeypatch):
    monkeypatch.setitem(CRITERIA, "spread", Criterion(lambda scores: -scores.std(), needs=("scores",)))
    assert "spread" in select_detectors(write_detectors(tmp_path), "spread").ranks
    with pytest.raises(ValueError, match="'spread' needs scores in every file"):
        select_detectors(write_detectors(tmp_path, scores=False), "spread")


def test_a_criterion_of_held_out_scores_needs_both_in_every_file(tmp_path):
    told = "'pu_auc' needs scores and held_out_scores in every file, and some have none"
    with pytest.raises(ValueError, match=told):
        select_detectors(write_detectors(tmp_path), "pu_auc")
    paths = write_detectors(tmp_path, held_out=True)
    (tmp_path / "some").mkdir()
    some = [*paths[:2], *write_detectors(tmp_path / "some", 1)]
    assert "pu_auc" not in select_detectors(some).ranks
    with pytest.raises(ValueError, match=told):
        select_detectors(some, "pu_auc")


def test_scores_that_cannot_be_ranked_are_no_reason_to_refuse_a_choice_by_embeddings(tmp_path):
    paths = write_detectors(tmp_path, held_out=True)
    wanted = select_detectors(paths, "dsv")
    for name in ("scores", "held_out_scores"):
        arrays = dict(np.load(paths[1]))
        np.savez(paths[1], **{**arrays, name: np.full_like(arrays[name], 0.1)})
        found = select_detectors(paths, "dsv")
        assert found.selected == wanted.selected and found.values["dsv"] == pytest.approx(
            wanted.values["dsv"]
        )
    with pytest.raises(ValueError, match=r"detector1\.npz: held_out: expected scores that differ"):
        select_detectors(paths, "shift")
    with pytest.raises(ValueError, match="constant scores"):
        select_detectors(paths, "mc")
