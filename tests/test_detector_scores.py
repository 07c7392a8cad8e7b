"""Detectors embed, score, and survive the disk."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from detectors import CUTOUT, SHORT, assert_same_bits, learn, textures, trained, weights, with_training
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf

from ssad_hpo.detector import Detector, Embeddings, train
from ssad_hpo.judgement import judge
from ssad_hpo.task import Task

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def learnt():
    """Images, checkpoints and detector of `learn`."""
    return learn()


# Embeddings


def test_embeddings_are_unit_rows_that_do_not_depend_on_their_batch(learnt):
    images, _, detector = learnt
    many = images.repeat(6, 1, 1, 1)[:300]  # more than are embedded at once
    embeddings = detector.embed(many)
    assert embeddings.shape == (300, 64) and embeddings.dtype == torch.float32 and not embeddings.is_cuda
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(300))
    alone = torch.cat([detector.embed(image[None]) for image in images[:5]])
    torch.testing.assert_close(alone, embeddings[:5], atol=1e-5, rtol=0)
    torch.testing.assert_close(embeddings[60:300], embeddings[:60].repeat(4, 1), atol=1e-5, rtol=0)
    assert len(embeddings[:60].unique(dim=0)) == 60


def test_judging_changes_nothing_in_the_detector(learnt):
    images, _, detector = learnt
    before = weights(detector)
    judge(with_training(detector), Task("images", images, textures(20, seed=4)))
    detector.score(images)
    assert_same_bits(weights(detector), before)


def test_what_a_detector_is_judged_by_are_the_embeddings_of_the_tasks_sets(learnt):
    images, _, detector = learnt
    unlabeled = textures(20, seed=4)
    held_out = textures(15, seed=5)
    own = with_training(detector)  # judging gives it a density
    assert judge(own, Task("images", images, unlabeled)).embeddings.held_out is None
    embeddings = judge(own, Task("images", images, unlabeled, held_out)).embeddings
    assert isinstance(embeddings, Embeddings)
    assert embeddings.held_out is not None and torch.equal(embeddings.held_out, detector.embed(held_out))
    assert torch.equal(embeddings.train, detector.embed(images))
    assert torch.equal(embeddings.unlabeled, detector.embed(unlabeled))
    assert torch.equal(embeddings.augmented, detector.embed_augmented(images))
    assert not any(rows.requires_grad for rows in vars(embeddings).values())


def test_augmented_embeddings_are_the_same_at_every_evaluation_and_not_those_of_train(learnt):
    images, _, detector = learnt
    first = detector.embed_augmented(images)
    torch.rand(5)
    assert torch.equal(detector.embed_augmented(images), first)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(len(images)))
    assert (first - detector.embed(images)).norm(dim=1).median() > 0.1
    other_seed = with_training(detector, seed=1)
    assert not torch.allclose(other_seed.embed_augmented(images), first)


@pytest.mark.parametrize(
    ("contamination", "n", "count"),
    [(None, 20, 20), (0.5, 20, 20), (0.2, 20, 5), (0.1, 20, 3), (0.6, 10, 15), (0.9, 3, 27), (0.05, 57, 3)],
)
def test_contamination_says_how_many_augmented_images_there_are(contamination, n, count):
    training = replace(SHORT, contamination=contamination)
    assert trained(textures(6), training).embed_augmented(textures(n)).shape == (count, 32)


# Scores


def test_density_scores_are_mahalanobis_distances_under_the_ledoit_wolf_covariance(learnt):
    images, _, detector = learnt
    reference = LedoitWolf().fit(detector.embed(images).double().numpy())
    embeddings = detector.embed(textures(20, seed=5))
    inverse = np.linalg.inv(reference.covariance_)
    expected = [mahalanobis(z, reference.location_, inverse) for z in embeddings.double().numpy()]
    scores = detector.density_score(embeddings)
    assert scores.dtype == torch.float64 and scores.shape == (20,)
    assert scores.tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(detector.score(textures(20, seed=5)), scores)


def test_classifier_scores_are_the_probabilities_of_augmented(learnt):
    images, _, detector = learnt
    judge = with_training(detector, score="classifier")
    scores = judge.score(images)
    with torch.no_grad():
        logits = detector.network(images / 255).double()
    expected = [math.exp(b) / (math.exp(a) + math.exp(b)) for a, b in logits.tolist()]
    assert scores.dtype == torch.float64 and scores.min() >= 0 and scores.max() <= 1
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_detector_without_a_density_says_how_it_gets_one(tmp_path):
    *_, last = train(textures(6), CUTOUT, SHORT)
    with pytest.raises(ValueError, match="no density yet; call fit_density"):
        last.detector.score(textures(6))
    with pytest.raises(ValueError, match="no density yet; call fit_density"):
        last.detector.save(tmp_path / "detector")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("broken", "came"),
    [
        (textures(3) / 255, r"torch.float32 \(3, 1, 32, 32\)"),
        (textures(3, channels=3), r"torch.uint8 \(3, 3, 32, 32\)"),
        (textures(3, size=16), r"torch.uint8 \(3, 1, 16, 16\)"),
        (textures(3)[0], r"torch.uint8 \(1, 32, 32\)"),
    ],
    ids=["float", "colour", "small", "single"],
)
@pytest.mark.parametrize("score", ["density", "classifier"])
def test_images_of_another_type_or_shape_are_rejected_by_both(learnt, broken, came, score):
    detector = with_training(learnt[2], score=score)
    for use in (detector.embed, detector.embed_augmented, detector.score):
        with pytest.raises(ValueError, match=rf"^images: expected uint8 \(N, 1, 32, 32\), got {came}$"):
            use(broken)


# On disk

SCORE_ELSEWHERE = """
import sys, numpy as np, torch
from pathlib import Path
from ssad_hpo.detector import Detector
torch.set_num_threads(1)
images = torch.from_numpy(np.load(sys.argv[1]))
for folder in sys.argv[2:]:
    before = torch.get_rng_state()
    detector = Detector.load(Path(folder))
    assert torch.equal(torch.get_rng_state(), before)
    print(*(score.hex() for score in detector.score(images).tolist()))
"""


def test_a_saved_detector_gives_the_same_bits_in_another_process(learnt, tmp_path):
    density = learnt[2]
    classifier = with_training(density, score="classifier")
    images = textures(20, seed=6)
    np.save(tmp_path / "images.npy", images.numpy())
    folders = []
    for name, detector in (("density", density), ("classifier", classifier)):
        folders.append(tmp_path / "detectors" / name)
        detector.save(folders[-1])
    command = [sys.executable, "-c", SCORE_ELSEWHERE, tmp_path / "images.npy", *folders]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [[float.fromhex(score) for score in line.split()] for line in done.stdout.splitlines()]
    assert lines == [density.score(images).tolist(), classifier.score(images).tolist()]


def test_a_loaded_detector_is_the_saved_one(learnt, tmp_path):
    images, _, detector = learnt
    detector.save(tmp_path)
    loaded = Detector.load(tmp_path)
    assert (loaded.augmentation, loaded.training) == (detector.augmentation, detector.training)
    assert loaded.image_shape == (1, 32, 32)
    assert_same_bits(weights(loaded), weights(detector))
    assert torch.equal(loaded.embed_augmented(images), detector.embed_augmented(images))
    assert not any(module.training for module in loaded.network.modules())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_detector_of_a_torchvision_encoder_and_of_colour_images_survives_the_disk(tmp_path, precision):
    images = textures(6, channels=3)
    training = replace(SHORT, steps=2, encoder="mobilenet_v3_small", precision=precision)
    detector = trained(images, training)
    detector.save(tmp_path)
    assert torch.equal(Detector.load(tmp_path).score(images), detector.score(images))


def test_a_detector_on_disk_is_json_and_safetensors_without_pickle(learnt, tmp_path):
    learnt[2].save(tmp_path)
    learnt[2].save(tmp_path)  # over itself
    files = {path.name: path.read_bytes() for path in tmp_path.rglob("*")}
    assert files.keys() == {"detector.json", "detector.safetensors"}
    assert json.loads(files["detector.json"])["training"]["steps"] == 80
    # A safetensors file is the length of its header, the header as JSON, and bare numbers.
    tensors = files["detector.safetensors"]
    header = json.loads(tensors[8 : 8 + int.from_bytes(tensors[:8], "little")])
    assert {"density.mean", "density.whitening"} < header.keys()


def test_a_folder_without_a_detector_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=rf"{folder}: holds no detector"):
            Detector.load(folder)


@pytest.mark.parametrize(
    ("change", "found"), [({"format": 2}, "format 2"), ({"format": "0"}, "format '0'"), ({}, "none")]
)
def test_a_detector_of_another_format_is_rejected_with_the_format_found_and_expected(
    learnt, tmp_path, change, found
):
    learnt[2].save(tmp_path)
    settings = json.loads((tmp_path / "detector.json").read_text())
    del settings["format"]
    (tmp_path / "detector.json").write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=rf"^{tmp_path}: expected a detector of format 1, found {found}$"):
        Detector.load(tmp_path)
