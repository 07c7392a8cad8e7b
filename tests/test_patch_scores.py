"""Scores of patches: what is most anomalous in an image decides, and held-out images stay comparable."""

import pytest
import torch

from ssad_hpo.augment import NONE, Augmentation
from ssad_hpo.detector import Detector, image_scores, untrained_detector
from ssad_hpo.evaluate import auc
from ssad_hpo.judgement import judge
from ssad_hpo.task import DetectorError, Task, Training
from tests.detectors import SHORT, textures, trained, with_training

SIZE = 64
BY_PATCHES = Training(width=8, precision="float32", score="patches")


@pytest.fixture(scope="module")
def task():
    """Fine grain, and a dark spot of six pixels in every other unlabelled image."""
    unlabeled = textures(24, size=SIZE, seed=1)
    unlabeled[::2, :, 20:26, 40:46] = 0
    return Task("grain", textures(48, size=SIZE), unlabeled, textures(24, size=SIZE, seed=2))


@pytest.fixture(scope="module")
def judged(task):
    detector = untrained_detector(BY_PATCHES, (1, SIZE, SIZE), Augmentation("cutout"), torch.device("cpu"))
    return detector, judge(detector, task)


def test_an_image_scores_by_its_most_anomalous_hundredth():
    patches = torch.zeros(2, 20, 20)
    patches[0, 3, 4], patches[0, 5, 5:8] = 8.0, 6.0  # four of 400 cells
    patches[1, 0, 0] = -100.0
    first, second = image_scores(patches)
    assert first == pytest.approx(6.5, abs=0.01) and second == pytest.approx(0.693, abs=0.001)
    assert image_scores(torch.full((1, 2, 2), -90.0)).item() > 0  # it has a logarithm


def test_small_defects_are_found_that_a_whole_images_distance_misses(judged, task):
    detector, of_patches = judged
    truth = (torch.arange(24) % 2 == 0).numpy()
    assert auc(truth, of_patches.scores) > 0.8
    of_whole = detector.density_score(of_patches.embeddings.unlabeled)
    assert auc(truth, of_whole) < auc(truth, of_patches.scores) - 0.1


def test_scores_are_those_of_the_heat_maps_patches(judged, task):
    detector, of_task = judged
    assert torch.equal(detector.score(task.unlabeled), of_task.scores)
    assert torch.equal(image_scores(detector.patch_scores(task.unlabeled)), of_task.scores)
    embeddings, scores = detector.embed_and_score(task.unlabeled)
    assert torch.equal(embeddings, detector.embed(task.unlabeled)) and torch.equal(scores, of_task.scores)


def test_distances_of_patches_are_float32_whatever_the_network_computes_in(judged, task):
    rounded = with_training(judged[0], precision="bfloat16")
    rounded.fit_patches(task.train)
    expected = image_scores(rounded.patch_scores(task.unlabeled))
    torch.testing.assert_close(rounded.score(task.unlabeled), expected, rtol=1e-6, atol=1e-6)


def test_held_out_images_have_no_part_in_what_they_are_compared_by(judged, task):
    detector, of_task = judged
    again = with_training(detector)
    again.fit_patches(task.train, task.held_out)
    assert torch.equal(again.score(task.unlabeled), of_task.scores)
    whole = with_training(detector, score="density")
    whole.fit_patches(task.train, task.held_out)
    assert not torch.equal(whole.patch_scores(task.unlabeled), detector.patch_scores(task.unlabeled))


def test_a_kept_detector_scores_the_same_and_is_not_kept_or_read_without_its_patches(judged, task, tmp_path):
    detector, of_task = judged
    detector.save(tmp_path / "kept")
    assert torch.equal(Detector.load(tmp_path / "kept").score(task.unlabeled), of_task.scores)
    (tmp_path / "kept" / "patches.safetensors").unlink()
    with pytest.raises(ValueError, match=r"kept: lacks patches.safetensors"):
        Detector.load(tmp_path / "kept")
    lacking = with_training(trained(textures(12)), score="patches")
    with pytest.raises(ValueError, match="call fit_patches before save"):
        lacking.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="no density of patches"):
        lacking.score(textures(2))


def test_larger_images_are_embedded_in_smaller_blocks_with_the_same_result(monkeypatch):
    images = textures(20, size=SIZE)
    detector = trained(images, SHORT)
    blocks = [len(block) for block in detector._blocks(images)]
    monkeypatch.setattr("ssad_hpo.detector.model._EMBED_PIXELS", 8 * SIZE * SIZE)
    assert blocks == [20] and [len(block) for block in detector._blocks(images)] == [8, 8, 4]


def test_an_encoder_without_feature_maps_is_refused_before_it_is_trained():
    with pytest.raises(ValueError, match=r"no feature maps.*score density"):
        untrained_detector(
            Training(width=8, score="patches"), (1, 2, 2), Augmentation(NONE), torch.device("cpu")
        )


def test_a_detector_that_knows_nothing_scores_by_its_patches_or_its_density():
    for asked, used in (("patches", "patches"), ("density", "density"), ("classifier", "density")):
        training = Training(width=8, score=asked)
        detector = untrained_detector(training, (1, 32, 32), Augmentation(NONE), torch.device("cpu"))
        assert detector.training.score == used


def test_a_density_of_patches_that_cannot_be_names_the_hyperparameters(task):
    augmentation = Augmentation("cutout", {"patch_area": 0.05, "patch_aspect": 1.0})
    named = r"under cutout\(patch_area=0\.05, patch_aspect=1(\.0)?\)$"

    def untrained():
        return untrained_detector(BY_PATCHES, (1, SIZE, SIZE), augmentation, torch.device("cpu"))

    diverged = untrained()
    next(diverged.network.encoder.parameters()).data.fill_(float("nan"))
    with pytest.raises(DetectorError, match=rf"^diverged: feature maps are not finite {named}"):
        judge(diverged, task)
    flat = Task("flat", torch.zeros(48, 1, SIZE, SIZE, dtype=torch.uint8), task.unlabeled)
    collapsed = untrained()
    for parameter in collapsed.network.encoder.parameters():
        parameter.data.zero_()
    with pytest.raises(DetectorError, match=rf"^collapsed: patches of the train images have no .* {named}"):
        judge(collapsed, flat)
