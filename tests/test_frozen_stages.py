"""What frozen stages make of an image is shared by all who have these stages, and changes nothing."""

import gc
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

import pytest
import torch

from ssad_hpo import judgement
from ssad_hpo.augment import NONE, Augmentation
from ssad_hpo.combined import CombinedDetector, combine
from ssad_hpo.detector import train, untrained_detector
from ssad_hpo.encoder import FrozenOutputs, FrozenStages
from ssad_hpo.judgement import judge
from ssad_hpo.task import PRETRAINED, Task, Training
from ssad_hpo.task import Augmentation as Hyperparameters
from tests.detectors import textures

SIZE = 64
SHORT = replace(PRETRAINED, steps=2, batch_size=4, precision="float32", weights="none")
CANDIDATES = (Hyperparameters("cutout", {"patch_area": 0.05}), Hyperparameters("cutavg", {"patch_area": 0.1}))


def small_task():
    images = textures(60, size=SIZE)
    return Task("grain", images[:30], images[30:50], images[50:])


def as_it_comes(training, size=SIZE):
    return untrained_detector(training, (1, size, size), Augmentation(NONE), torch.device("cpu"))


def candidates(task):
    for f_aug in CANDIDATES:
        (last,) = train(task.train, f_aug, SHORT)
        yield last.detector


def images_through_the_stem(network, counted):
    """Counts images that the first convolution computes; what passes it by has its own channels still."""

    def count(module, given, output):
        if output.shape[1] == module.out_channels:
            counted.append(len(output))

    network.encoder.model.conv_stem.register_forward_hook(count)


def test_a_second_candidate_sends_only_its_augmented_images_through_frozen_stages():
    task = small_task()
    first, second = candidates(task)
    counts = [], []
    for detector, counted in zip((first, second), counts, strict=True):
        images_through_the_stem(detector.network, counted)
        judge(detector, task)
    everything = 30 + 20 + 10 + 30
    assert sum(counts[0]) == everything + 1  # one asks for the strides of the feature maps
    assert sum(counts[1]) == 30 + 1


def test_sharing_changes_no_bit():
    task, apart = small_task(), small_task()
    for detector in candidates(task):
        shared = judge(detector, task)
        judgement._SHARED.clear()
        alone = judge(
            detector, Task("grain", apart.train.clone(), apart.unlabeled.clone(), apart.held_out.clone())
        )
        judge_again = detector.embed(task.train)
        assert torch.equal(shared.scores, alone.scores) and torch.equal(shared.held_out, alone.held_out)
        assert torch.equal(shared.embeddings.train, judge_again) and shared.criteria == alone.criteria
        judge(detector, task)


def test_stages_with_other_weights_share_nothing():
    task, shared = small_task(), FrozenOutputs()
    first, second = as_it_comes(SHORT), as_it_comes(replace(SHORT, seed=1))
    assert not torch.equal(
        first.network.encoder.model.conv_stem.weight, second.network.encoder.model.conv_stem.weight
    )
    for detector in (first, second, first):
        embeddings, _ = detector.embed(task.train), detector.learn(task.train, shared)
        assert torch.equal(detector.learn(task.train, shared), embeddings)


def test_images_that_are_changed_in_place_are_others():
    task, shared, detector = small_task(), FrozenOutputs(), as_it_comes(SHORT)
    before = detector.learn(task.train, shared)
    task.train.neg_()
    after = detector.learn(task.train, shared)
    assert not torch.equal(before, after) and torch.equal(after, detector.embed(task.train))
    task.train.numpy()[:] //= 2  # of which torch hears nothing
    assert torch.equal(detector.learn(task.train, shared), detector.embed(task.train))


def test_views_of_the_same_memory_are_other_images():
    images, shared, detector = textures(12, size=SIZE), FrozenOutputs(), as_it_comes(SHORT)
    detector.learn(images, shared)
    detector.learn(images[:6], shared)
    for view in (images.mT, images[:1].expand(12, -1, -1, -1), images[::2]):
        assert torch.equal(detector.look(view, shared)[0], detector.embed(view))


def test_what_does_not_fit_into_memory_passes_as_a_whole():
    task, detector = small_task(), as_it_comes(SHORT)
    one_block = FrozenOutputs(most_bytes=40 * 8 * 8 * 4 * 30)
    counted = []
    images_through_the_stem(detector.network, counted)
    expected = detector.embed(task.train)
    counted.clear()
    for _ in range(2):
        assert torch.equal(detector.learn(task.train, one_block), expected)
        detector.look(task.unlabeled, one_block)
    assert sum(counted) == 30 + 20 + 20 + 2  # train images once, unlabelled ones each time


@pytest.mark.parametrize(
    ("encoder", "stages"),
    [
        ("tf_efficientnet_lite0", 4),  # the third makes features as well
        ("tf_efficientnet_lite0", 5),
        ("resnet18", 2),
        ("resnet18", 4),
        ("densenet121", 1),
        ("mobilenetv3_small_100", 3),
        ("convnext_atto", 2),
        ("resnetv2_50", 3),
        ("vit_tiny_patch16_224", 3),
        ("res2net50_14w_8s", 1),
        ("shufflenet_v2_x0_5", 2),
        ("googlenet", 1),
    ],
)
def test_every_encoder_gives_the_same_behind_its_frozen_stages(encoder, stages):
    training = Training(encoder=encoder, frozen_stages=stages, precision="float32", score="patches")
    images = textures(12, size=SIZE)
    shared, alone = FrozenOutputs(), as_it_comes(training)
    expected = alone.learn(images)
    for _ in range(2):
        detector = as_it_comes(training)
        assert torch.equal(detector.learn(images, shared), expected)
        assert torch.equal(detector.normal_patch_scores, alone.normal_patch_scores)


def test_maps_within_frozen_stages_are_not_taken_from_what_passes_them_by():
    training = Training(encoder="resnet18", frozen_stages=5, precision="float32")
    images, shared, detector = textures(12, size=SIZE), FrozenOutputs(), as_it_comes(training)
    detector.fit_patches(images)
    for _ in range(2):
        detector.look(images, shared)
        assert torch.equal(detector.patch_scores(images, shared), detector.patch_scores(images))


def test_an_encoder_without_frozen_stages_has_none_to_share():
    for training in (Training(width=8), Training(encoder="resnet18")):
        stages = FrozenStages(as_it_comes(training).network, "float32")
        assert not stages.modules and not stages.key


def test_members_of_a_combined_detector_share_each_image(tmp_path):
    task = small_task()
    detectors = list(candidates(task))
    judged = [judge(detector, task) for detector in detectors]
    found = combine(judged, heads=True)
    combined = CombinedDetector(tuple(detectors), found.parts)
    images = textures(300, size=SIZE, seed=3)
    parts = zip(combined.detectors, found.parts, strict=True)
    each = [part(*reversed(detector.embed_and_score(images))) for detector, part in parts]
    torch.testing.assert_close(combined.score(images), torch.stack(each).mean(0), rtol=1e-5, atol=1e-5)
    counts = [], []
    for detector, counted in zip(detectors, counts, strict=True):
        images_through_the_stem(detector.network, counted)
    combined.score(images)
    assert sum(counts[0]) == 300 and sum(counts[1]) == 0
    assert combined.heatmaps(images[:4]).shape == (4, SIZE, SIZE)
    assert sum(counts[0]) == 304 and sum(counts[1]) == 0


def test_threads_that_score_with_one_detector_do_not_get_each_others_images():
    task = small_task()
    detectors = list(candidates(task))
    judged = [judge(detector, task) for detector in detectors]
    combined = CombinedDetector(tuple(detectors), combine(judged).parts)
    mine, others = textures(12, size=SIZE, seed=1), textures(12, size=SIZE, seed=2)
    with ThreadPoolExecutor(1) as thread:
        for score in (detectors[1].score, combined.score):
            alone, meanwhile = [score(mine), score(others)], []

            def interrupt(module, given, score=score, meanwhile=meanwhile):
                if not meanwhile:
                    meanwhile.append(thread.submit(score, others))
                    wait(meanwhile, timeout=0.5)  # it may well have to wait for us

            hook = detectors[1].network.encoder.model.blocks[-1].register_forward_pre_hook(interrupt)
            assert torch.equal(score(mine), alone[0])
            assert torch.equal(meanwhile[0].result(), alone[1])
            hook.remove()


def test_what_is_shared_goes_with_its_task():
    task = small_task()
    judge(as_it_comes(SHORT), task)
    assert task in judgement._SHARED
    count = len(judgement._SHARED)
    del task
    gc.collect()
    assert len(judgement._SHARED) == count - 1
