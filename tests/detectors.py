"""Detectors for tests, of images with a smooth grain."""

from dataclasses import replace

import torch

from ssad_hpo.augment import augment
from ssad_hpo.detector import Checkpoint, train
from ssad_hpo.task import Augmentation, Range, Training

CUTOUT = Augmentation("cutout", {"patch_area": Range(0.05, 0.2, log=True), "patch_aspect": 1.0})
LONG = Training(width=8, steps=80, batch_size=16, evaluate_at=(0.25, 0.5, 1.0), precision="float32")
SHORT = Training(width=4, steps=4, batch_size=4, evaluate_at=(1.0,), precision="float32")


def textures(n, channels=1, size=32, seed=0):
    """uint8 images of a smooth, bright grain."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, size // 4, size // 4, generator=generator)
    grain = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    fine = torch.rand(n, channels, size, size, generator=generator)
    return (255 * (0.3 + 0.5 * grain + 0.2 * fine)).byte()


def augmented_textures(images, seed):
    out = augment(images / 255, CUTOUT, torch.Generator().manual_seed(seed))
    return (255 * out).round().byte()


def trained(images, training=SHORT, augmentation=CUTOUT):
    """The last checkpoint's detector, with its density."""
    *_, last = train(images, augmentation, training)
    last.detector.fit_density(last.detector.embed(images))
    return last.detector


def with_training(detector, **settings):
    """The same network and density, judged under other settings."""
    return replace(detector, training=replace(detector.training, **settings))


def weights(detector):
    return {name: tensor.clone() for name, tensor in detector.network.state_dict().items()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def learn():
    """A training that has had the time to learn: images, checkpoints (step, loss, weights), detector."""
    images = textures(60)
    seen = []
    for checkpoint in train(images, CUTOUT, LONG):
        assert isinstance(checkpoint, Checkpoint)
        seen.append((checkpoint.step, checkpoint.loss, weights(checkpoint.detector)))
    checkpoint.detector.fit_density(checkpoint.detector.embed(images))
    return images, seen, checkpoint.detector
