"""Detectors are trained to the last bit alike, they learn, and they fail by name."""

import math
import random
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from detectors import (
    CUTOUT,
    LONG,
    SHORT,
    assert_same_bits,
    augmented_textures,
    learn,
    textures,
    trained,
    weights,
    with_training,
)
from sklearn.metrics import roc_auc_score

from ssad_hpo.augment import augment, jitter
from ssad_hpo.baselines import train_autoencoder, train_deep_svdd
from ssad_hpo.bilevel import Tuning, tune
from ssad_hpo.criteria import DegenerateError, evaluate_all
from ssad_hpo.detector import Transform, resolve_precision, train
from ssad_hpo.encoder import build_network
from ssad_hpo.task import Augmentation, DetectorError, Task, Training

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def learnt():
    """Images, checkpoints and detector of `learn`."""
    return learn()


# Training


def test_a_training_learns_to_tell_augmented_images_apart(learnt):
    _, seen, detector = learnt
    losses = [loss for _, loss, _ in seen]
    assert losses[-1] < losses[0] and losses[-1] < 0.1  # ln 2 = 0.69 is a guess
    normal = textures(80, seed=1)
    anomalies = augmented_textures(textures(80, seed=2), seed=3)
    truth = [0] * 80 + [1] * 80
    for score in ("density", "classifier"):
        judge = with_training(detector, score=score)
        scores = torch.cat([judge.score(normal), judge.score(anomalies)])
        assert roc_auc_score(truth, scores) > 0.99, score  # untrained: 0.92, 0.55


@pytest.mark.parametrize("encoder", ["small", "mobilenet_v3_small"])  # the second has dropout
def test_a_training_goes_on_from_a_checkpoints_state_to_the_same_bits(encoder, tmp_path):
    evaluate_at = (0.25, 0.5, 1.0)
    training = Training(encoder=encoder, width=4, steps=8, batch_size=4, evaluate_at=evaluate_at)
    images = textures(12, channels=3)
    whole = []
    for checkpoint in train(images, CUTOUT, training):
        whole.append((checkpoint.step, checkpoint.loss, weights(checkpoint.detector)))
        torch.save(checkpoint.state, tmp_path / f"{checkpoint.step}.pt")
    for done in range(1, 4):
        state = torch.load(tmp_path / f"{whole[done - 1][0]}.pt", weights_only=True)
        rest = [(c.step, c.loss, weights(c.detector)) for c in train(images, CUTOUT, training, state=state)]
        assert [(step, loss) for step, loss, _ in rest] == [(step, loss) for step, loss, _ in whole[done:]]
        for (*_, mine), (*_, theirs) in zip(rest, whole[done:], strict=True):
            assert_same_bits(mine, theirs)


def slow_training(images, augmentation, training):
    """The training of DSV step by step, with SGD written out; the state of the network at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        network = build_network("small", channels=1, image_size=images.shape[2:], width=training.width)
    generator = torch.Generator().manual_seed(training.seed)
    order = []
    while len(order) < training.steps * training.batch_size:
        order += torch.randperm(len(images), generator=generator).tolist()
    velocity = {name: torch.zeros_like(weight) for name, weight in network.named_parameters()}
    for step in range(training.steps):
        batch = images[order[step * training.batch_size : (step + 1) * training.batch_size]] / 255
        normal = jitter(batch, training.jitter, generator)
        logits = network(torch.cat([normal, augment(normal, augmentation, generator)]))
        chosen = logits.log_softmax(1)
        (-(chosen[: len(batch), 0].mean() + chosen[len(batch) :, 1].mean()) / 2).backward()
        rate = training.learning_rate * (1 + math.cos(math.pi * step / training.steps)) / 2
        with torch.no_grad():
            for name, weight in network.named_parameters():
                slope = weight.grad + training.weight_decay * weight
                velocity[name] = training.momentum * velocity[name] + slope
                weight -= rate * velocity[name]
                weight.grad = None
    return network.state_dict()


@pytest.mark.parametrize(
    "settings",
    [{}, {"batch_size": 6, "seed": 3}, {"weight_decay": 0.1, "momentum": 0.5, "jitter": 0.4, "steps": 3}],
    ids=str,
)
def test_a_training_does_what_the_method_says_step_by_step(settings):
    images, training = textures(10), replace(SHORT, **settings)
    expected = slow_training(images, CUTOUT, training)
    torch.testing.assert_close(weights(trained(images, training)), dict(expected), atol=1e-4, rtol=1e-3)


def test_checkpoints_come_at_the_chosen_steps_of_one_training(learnt):
    _, seen, detector = learnt
    assert [step for step, _, _ in seen] == [20, 40, 80]
    assert not torch.equal(seen[0][2]["head.0.weight"], seen[1][2]["head.0.weight"])
    assert_same_bits(seen[-1][2], weights(detector))


def test_what_is_done_at_a_checkpoint_does_not_change_the_training(learnt):
    images, seen, _ = learnt
    run = train(images, CUTOUT, LONG)
    first = next(run)
    assert not any(module.training for module in first.detector.network.modules())
    first.detector.fit_density(first.detector.embed(images))
    first.detector.embed_augmented(images)
    first.detector.score(images)
    torch.rand(3)
    assert_same_bits(weights(next(run).detector), seen[1][2])
    # Nor does it matter how often the training stops: a single checkpoint sees the same weights.
    once = replace(LONG, evaluate_at=(1.0,))
    *_, last = train(images, CUTOUT, once)
    assert_same_bits(weights(last.detector), seen[2][2])
    assert last.loss == pytest.approx((20 * seen[0][1] + 20 * seen[1][1] + 40 * seen[2][1]) / 80, rel=1e-5)


@pytest.mark.parametrize("encoder", ["small", "mobilenet_v3_small"])  # the second has dropout
def test_the_same_seed_gives_the_same_bits_and_leaves_global_generators_alone(encoder):
    images = textures(10)
    training = replace(SHORT, encoder=encoder)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        detector = trained(images, training)
        results.append({**weights(detector), "scores": detector.score(images)})
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002
    assert_same_bits(*results)


def test_different_seeds_give_different_detectors():
    images = textures(10)
    seeds = [trained(images, replace(SHORT, seed=seed)).score(images) for seed in (0, 1)]
    assert not torch.allclose(*seeds)


def test_the_hyperparameters_change_the_detector():
    images = textures(10)
    areas = [Augmentation("cutout", {"patch_area": area, "patch_aspect": 1.0}) for area in (0.05, 0.2)]
    one, other = (trained(images, SHORT, augmentation).score(images) for augmentation in areas)
    assert not torch.allclose(one, other)


def test_a_training_may_be_left_at_any_checkpoint():
    images = textures(10)
    before = torch.get_rng_state()
    run = train(images, CUTOUT, replace(SHORT, evaluate_at=(0.5, 1.0)))
    checkpoint = next(run)
    run.close()
    assert checkpoint.step == 2
    assert torch.equal(torch.get_rng_state(), before)
    checkpoint.detector.fit_density(checkpoint.detector.embed(images))
    assert checkpoint.detector.score(images).isfinite().all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["cutavg", "cutpaste", "cutdiff", "rotation"])
def test_every_form_of_images_precision_and_augmentation_trains(channels, precision, kind):
    images = textures(6, channels, 16)  # fewer than a batch
    training = replace(SHORT, batch_size=8, precision=precision)
    detector = trained(images, training, Augmentation(kind))
    embeddings = detector.embed(images)
    assert detector.training.precision == precision
    assert embeddings.shape == (6, 32) and embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(6))
    assert detector.score(images).shape == (6,) and detector.score(images).isfinite().all()


def test_bfloat16_computes_with_fewer_digits():
    images = textures(6)
    single, half = (trained(images, replace(SHORT, precision=p)) for p in ("float32", "bfloat16"))
    difference = (single.embed(images) - half.embed(images)).abs().max()
    assert 1e-4 < difference < 0.3


def test_images_that_do_not_fit_the_augmentation_are_an_error_before_training():
    too_large = Augmentation("cutout", {"patch_area": 0.9, "patch_aspect": 3.0})
    with pytest.raises(ValueError, match=r"^cutout: .* does not fit"):
        next(train(textures(4), too_large, SHORT))


@contextmanager
def gradients_in_inference_mode():
    with torch.inference_mode(), torch.enable_grad():
        yield


TRAININGS = {
    "detector": lambda x: next(train(x, Augmentation("cutout", {"patch_area": 0.1}), Training(width=8))),
    "tuning": lambda x: tune(Task("zeros", x, x), Tuning("cutout"), Training(width=8)),
    "autoencoder": lambda x: train_autoencoder(x, Training(width=8)),
    "Deep SVDD": lambda x: train_deep_svdd(x, Training(width=8)),
}


@pytest.mark.parametrize(
    ("named", "surroundings"),
    [
        ("gradients", torch.no_grad),
        ("gradients", torch.inference_mode),
        ("gradients", lambda: gradients_in_inference_mode()),
        ("autocast", lambda: torch.autocast("cpu", torch.bfloat16)),
        ("default device", lambda: torch.device("meta")),
    ],
)
@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)
def test_settings_of_torchs_that_would_make_it_another_training_are_an_error(named, surroundings, training):
    images = torch.zeros(8, 1, 16, 16, dtype=torch.uint8)
    with surroundings(), pytest.raises(ValueError, match=f"torch: .*{named}"):
        training(images)


def test_a_default_dtype_that_would_make_it_another_training_is_an_error():
    images = torch.zeros(8, 1, 16, 16, dtype=torch.uint8)
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(ValueError, match=r"torch: .*float32"):
            next(train(images, Augmentation("cutout", {"patch_area": 0.1}), Training(width=8)))
    finally:
        torch.set_default_dtype(torch.float32)


def test_training_rejects_images_that_are_not_uint8():
    with pytest.raises(ValueError, match=r"^images: expected uint8 .*, got torch.float32"):
        next(train(textures(4) / 255, CUTOUT, SHORT))


# Failures


def test_a_training_that_diverges_is_an_error_that_names_the_hyperparameters():
    absurd = replace(SHORT, steps=10, learning_rate=1e30)
    with pytest.raises(
        DetectorError, match=r"^diverged: loss (nan|inf) by step 10 under cutout\(patch_area=0.05..0.2"
    ):
        next(train(textures(8), CUTOUT, absurd))


def test_embeddings_that_are_not_finite_are_an_error_that_names_the_hyperparameters():
    detector = trained(textures(8))
    with torch.no_grad():
        next(detector.network.encoder.parameters()).fill_(float("nan"))
    with pytest.raises(DetectorError, match=r"^diverged: .*not finite.*cutout\(patch_area=0.05..0.2"):
        detector.embed(textures(8))


def test_an_augmentation_that_blackens_every_image_collapses_and_is_found_out():
    images = textures(12)
    blackening = Augmentation("cutdiff", {"patch_area": 1e6, "patch_aspect": 1.0})
    detector = trained(images, SHORT, blackening)
    train, augmented = detector.embed(images), detector.embed_augmented(images)
    assert len(train.unique(dim=0)) == 12
    with pytest.raises(DegenerateError, match=r"^augmented: expected rows that differ, got 12 identical"):
        evaluate_all(train, augmented, detector.embed(textures(12, seed=1)))


def test_train_embeddings_without_spread_have_no_density():
    detector = trained(textures(8))
    with pytest.raises(DetectorError, match=r"^collapsed: .*cutout\(patch_area=0.05..0.2"):
        detector.fit_density(torch.full((10, 32), 32**-0.5))


# Functions as f_aug

INVERT = Transform("invert", lambda images, _: 1 - images)


def test_a_function_in_place_of_an_augmentation_gives_the_same_bits():
    as_function = Transform("cutout", lambda images, generator: augment(images, CUTOUT, generator))
    images = textures(10)
    one, other = (trained(images, augmentation=f_aug) for f_aug in (CUTOUT, as_function))
    assert_same_bits(weights(one), weights(other))
    assert torch.equal(one.embed_augmented(images), other.embed_augmented(images))


def test_a_detector_learns_to_tell_what_a_function_does():
    images = (textures(40) / 4).byte()  # dark, so that inverted ones are bright
    training = replace(SHORT, steps=60, batch_size=8, score="classifier")
    (checkpoint,) = train(images, INVERT, training)
    assert checkpoint.loss < 0.3  # ln 2 = 0.69 is a guess
    scores = checkpoint.detector.score(torch.cat([images, 255 - images]))
    assert scores[:40].max() < 0.5 < scores[40:].min()


def test_a_detector_trained_with_a_function_is_not_saved_under_another_name(tmp_path):
    detector = trained(textures(10), augmentation=INVERT)
    with pytest.raises(ValueError, match=r"trained with Transform\(name='invert'\), which no file can hold"):
        detector.save(tmp_path / "detector")
    assert not list(tmp_path.iterdir())


# Precision


@pytest.mark.parametrize("capable", [True, False])
def test_auto_precision_on_a_cpu_is_chosen_by_its_capability_and_the_image_size_alone(monkeypatch, capable):
    # Both kinds of machine cannot be had at once.
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable})
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    for settings in (Training(), Training(encoder="resnet18", width=64, steps=9000, batch_size=64, seed=7)):
        chosen = {
            size: resolve_precision(settings, torch.device("cpu"), size**2) for size in (32, 63, 64, 256)
        }
        large = "bfloat16" if capable else "float32"
        assert chosen == {32: "float32", 63: "float32", 64: large, 256: large}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("pixels", [32 * 32, 256 * 256])
def test_a_given_precision_is_kept(precision, pixels):
    assert resolve_precision(Training(precision=precision), torch.device("cpu"), pixels) == precision


def test_a_detector_keeps_the_precision_that_auto_stood_for():
    training = replace(SHORT, precision="auto")
    assert trained(textures(6), training).training.precision == "float32"  # 32 x 32 pixels are few
