"""The autoencoder, Deep SVDD and random augmentations: sound trainings, useful scores, named failures."""

import inspect
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from ssad_hpo.augment import KINDS
from ssad_hpo.baselines import random_static, train_autoencoder, train_deep_svdd
from ssad_hpo.baselines import training as baseline_training
from ssad_hpo.data import Source, builtin, load, read_labels
from ssad_hpo.detector import Detector
from ssad_hpo.evaluate import auc
from ssad_hpo.task import Augmentation, DetectorError, Training

SOUND = Training(width=8, steps=80, batch_size=16)
SHORT = Training(width=4, steps=4, batch_size=4, evaluate_at=(1.0,))
TRAINERS = {"autoencoder": train_autoencoder, "Deep SVDD": train_deep_svdd}
every_baseline = pytest.mark.parametrize("train", TRAINERS.values(), ids=TRAINERS)
pytestmark = pytest.mark.usefixtures("one_thread")


def task_of(name, seed, channels=1):
    """Train images, unlabeled images and the labels of a built-in task at 32 pixels, in colour if asked."""
    source = builtin(name)
    source = Source(source.loader, {**source.arguments, "image_size": 32, "seed": seed})
    task = load(source)
    tint = torch.tensor([1.0, 0.7, 0.4])[:channels, None, None]
    train, unlabeled = ((images * tint).round().byte() for images in (task.train, task.unlabeled))
    return train, unlabeled, read_labels(source)


def noise(n, channels=1, height=32, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, height, width), generator=generator).byte()


# What they are for

# Learning rates were chosen on other tasks. With Deep SVDD's 0.8 more than 12 standard errors from chance.
CLEAR = {"autoencoder": 0.9, "Deep SVDD": 0.8}


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize(("task", "channels"), [("digits/7", 1), ("digits/2", 3), ("brick/grass", 1)])
def test_a_baseline_learns_and_finds_other_images(name, task, channels):
    found = []
    for seed in range(3):
        images, unlabeled, labels = task_of(task, seed, channels)
        baseline = TRAINERS[name](images, replace(SOUND, seed=seed))
        assert baseline.losses.shape == (80,) and baseline.losses.dtype == torch.float32
        assert baseline.losses[-8:].mean() < 0.35 * baseline.losses[0]
        found.append(auc(labels, baseline.score(unlabeled)))
    assert np.mean(found) > CLEAR[name], found


@pytest.mark.slow
def test_deep_svdd_finds_other_digits_from_a_pretrained_encoder_too():
    found = []
    for seed in range(2):
        images, unlabeled, labels = task_of("digits/7", seed)
        training = replace(SOUND, seed=seed)
        pretrained = train_autoencoder(images, training)
        before = {name: t.clone() for name, t in pretrained.network.state_dict().items()}
        svdd = train_deep_svdd(images, training, pretrained=pretrained)
        fresh = train_deep_svdd(images, replace(training, steps=1, evaluate_at=(1.0,)))  # fixed before a step
        assert not torch.equal(svdd.centre, fresh.centre)
        assert all(torch.equal(before[n], t) for n, t in pretrained.network.state_dict().items())
        found.append(auc(labels, svdd.score(unlabeled)))
    assert np.mean(found) > CLEAR["Deep SVDD"], found


# What they have in common


@every_baseline
def test_a_baseline_scores_as_a_detector_does(train):
    assert list(inspect.signature(Detector.score).parameters) == ["self", "images"]
    assert list(inspect.signature(type(train(noise(6), SHORT)).score).parameters) == ["self", "images"]


@every_baseline
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 32, 32), (1, 33, 20), (3, 8, 8)], ids=str)
def test_scores_are_finite_not_negative_and_do_not_depend_on_their_batch(train, shape):
    baseline = train(noise(10, *shape), SHORT)
    many = noise(300, *shape, seed=1)  # more than are scored at once
    scores = baseline.score(many)
    assert baseline.image_shape == shape
    assert scores.shape == (300,) and scores.dtype == torch.float64 and not scores.is_cuda
    assert scores.isfinite().all() and (scores >= 0).all() and len(scores.unique()) == 300
    assert not scores.requires_grad
    torch.testing.assert_close(
        torch.cat([baseline.score(i[None]) for i in many[:5]]), scores[:5], rtol=1e-4, atol=0
    )
    assert torch.equal(baseline.score(many), scores)


@every_baseline
def test_a_training_is_its_seeds_alone_and_leaves_all_else_untouched(train):
    images = noise(10)
    original = images.clone()
    torch.manual_seed(5)
    states = torch.get_rng_state(), random.getstate()
    first = train(images, SHORT)
    scores = first.score(images)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert torch.equal(images, original)
    torch.manual_seed(6)
    again = train(images, SHORT)
    assert torch.equal(again.losses, first.losses) and torch.equal(again.score(images), scores)
    other = train(images, replace(SHORT, seed=1))
    assert not torch.equal(other.losses, first.losses)
    assert not any(module.training for module in first.network.modules())


@every_baseline
def test_a_baseline_is_of_the_detectors_size_and_takes_its_settings(train):
    images = noise(10)
    widths = [train(images, replace(SHORT, width=width)) for width in (4, 8)]
    encoders = [b.network.encoder for b in widths]
    assert [encoder.features for encoder in encoders] == [32, 64]
    assert len(train(images, replace(SHORT, steps=7)).losses) == 7
    longer = replace(SHORT, steps=20)
    fast, slow = train(images, longer, learning_rate=1e-3), train(images, longer, learning_rate=1e-6)
    assert fast.losses[0] == slow.losses[0] and fast.losses[-5:].mean() < slow.losses[-5:].mean()


@every_baseline
def test_fewer_images_than_a_batch_are_enough(train):
    assert train(noise(2), SHORT).score(noise(3, seed=1)).shape == (3,)
    assert train(noise(5), SHORT).score(noise(3, seed=1)).shape == (3,)  # one image is left over


@every_baseline
@pytest.mark.parametrize(
    "broken",
    [noise(3) / 255, noise(3)[0], noise(1), noise(3, channels=2)],
    ids=["float", "3-D", "one", "two"],
)
def test_images_that_cannot_be_trained_on_are_rejected(train, broken):
    with pytest.raises(ValueError, match=rf"^images: expected uint8 \(N, C, H, W\).*got {broken.dtype}"):
        train(broken, SHORT)


@every_baseline
@pytest.mark.parametrize("broken", [noise(3) / 255, noise(3, 3), noise(3, 1, 16, 16), noise(3)[0]], ids=str)
def test_images_of_another_type_or_shape_are_not_scored(train, broken):
    baseline = train(noise(4), SHORT)
    with pytest.raises(ValueError, match=r"^images: expected uint8 \(N, 1, 32, 32\), got"):
        baseline.score(broken)


@every_baseline
@pytest.mark.parametrize("learning_rate", [1e3, 1e30])
def test_a_training_that_diverges_says_so_and_names_the_learning_rate(train, learning_rate):
    with pytest.raises(DetectorError, match=r"^diverged: .* learning_rate (1000|1e\+30); use a smaller one"):
        train(noise(10), replace(SHORT, steps=20), learning_rate=learning_rate)


# Autoencoder


def test_the_autoencoders_score_is_the_mean_squared_error_of_what_it_gives_back():
    images = noise(4, 3)
    autoencoder = train_autoencoder(images, SHORT)
    with torch.no_grad():
        back = autoencoder.network(images / 255)
    assert back.shape == images.shape and back.min() >= 0 and back.max() <= 1
    expected = [float(((b - i / 255) ** 2).mean()) for b, i in zip(back, images, strict=True)]
    assert autoencoder.score(images).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_autoencoder_of_a_torchvision_encoder_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"^encoder: .*expected 'small' \(with width 64.*got 'resnet18'"):
        train_autoencoder(noise(4), replace(SHORT, encoder="resnet18"))


# Deep SVDD


def test_deep_svdds_score_is_the_squared_distance_to_a_fixed_centre_away_from_0():
    images = noise(10)
    svdd = train_deep_svdd(images, SHORT)
    with torch.no_grad():
        embeddings = svdd.network(images / 255)
    expected = [float(((z - svdd.centre) ** 2).sum()) for z in embeddings]
    assert svdd.score(images).tolist() == pytest.approx(expected, rel=1e-4)
    assert svdd.centre.abs().min() >= 0.1 and len(svdd.centre.abs().unique()) > 10
    longer = train_deep_svdd(images, replace(SHORT, steps=8))
    assert torch.equal(longer.centre, svdd.centre)


@pytest.mark.parametrize("encoder", ["small", "resnet18"])
def test_deep_svdds_network_has_nothing_that_adds_a_constant(encoder):
    svdd = train_deep_svdd(noise(4), replace(SHORT, encoder=encoder, steps=2))
    names = [name for name, _ in svdd.network.named_parameters()]
    assert names and not [name for name in names if "bias" in name]
    # With all weights at 0 the output is 0, wherever the centre is: no constant function is the centre.
    for weight in svdd.network.parameters():
        weight.data.zero_()
    assert (svdd.network(noise(4) / 255) == 0).all()


@pytest.mark.parametrize("value", [0, 90, 255])
def test_a_collapse_on_images_that_are_all_the_same_is_said_with_the_remedy(value):
    images = torch.full((12, 1, 32, 32), value, dtype=torch.uint8)
    with pytest.raises(DetectorError, match=r"^collapsed: .* all 12 train images to one point .*; use a"):
        train_deep_svdd(images, replace(SHORT, steps=20))


def test_a_collapse_of_different_images_is_detected(monkeypatch):
    """MobileNet's batch norms average so slowly that its embeddings in evaluation mode are all the same."""
    training = replace(SHORT, encoder="mobilenet_v3_small", batch_size=8)
    images = noise(16)
    svdd = train_deep_svdd(images, training)
    assert svdd.score(images).std() > 0
    monkeypatch.setattr(baseline_training, "_measure_batch_statistics", lambda *_: None)
    with pytest.raises(DetectorError, match=r"^collapsed: "):
        train_deep_svdd(images, training)


@pytest.mark.parametrize(
    ("pretrained", "changed", "named"),
    [
        ((noise(4), SHORT), {"width": 8}, "expected an autoencoder of width 8, got one of 32 instead of 64"),
        ((noise(4, 3), SHORT), {}, "expected an autoencoder of images with 1 channels .*got 3"),
        ((noise(4), SHORT), {"encoder": "resnet18"}, "'small', got 1 channels for the encoder 'resnet18'"),
    ],
    ids=["width", "channels", "encoder"],
)
def test_an_autoencoder_of_another_size_is_no_start_for_deep_svdd(pretrained, changed, named):
    with pytest.raises(ValueError, match=f"^pretrained: .*{named}"):
        train_deep_svdd(noise(4), replace(SHORT, **changed), pretrained=train_autoencoder(*pretrained))


# Random augmentations


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_static_augmentation_is_drawn_from_the_default_ranges_by_its_seed(kind):
    state = torch.get_rng_state()
    drawn = [random_static(kind, seed) for seed in range(400)]
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn[:3] == [random_static(kind, seed) for seed in range(3)] and drawn[0] != drawn[1]
    for name, values in Augmentation(kind).hyperparameters.items():
        seen = np.array([augmentation.hyperparameters[name] for augmentation in drawn])
        assert seen.min() >= values.low and seen.max() <= values.high
        # Uniform on the range's own scale.
        np.testing.assert_allclose(
            [np.mean(seen <= values.at(u)) for u in (0.25, 0.5, 0.75)], (0.25, 0.5, 0.75), atol=0.08
        )
    assert isinstance(drawn[0], Augmentation) and drawn[0].kind == kind


def test_a_random_static_augmentation_of_an_unknown_kind_is_rejected():
    with pytest.raises(ValueError, match=r"^augmentation: expected one of cutout"):
        random_static("cutmix", 0)
