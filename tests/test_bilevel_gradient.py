"""ST-SSAD: the gradient of a hyperparameter step, and the coordinates that it moves in."""

import contextlib
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from tunings import every_kind, every_order

import ssad_hpo.bilevel.gradient
from ssad_hpo.augment import apply, check_fits, draw_noise
from ssad_hpo.bilevel import LOSSES, Coordinates, TrainingBatch, Tuning, ValidationBatch, bilevel_gradient
from ssad_hpo.criteria import base
from ssad_hpo.detector import untrained_network
from ssad_hpo.task import Augmentation, Range, Training

pytestmark = pytest.mark.usefixtures("one_thread")


# The gradient. The reference: the virtual step unrolled with plain autograd, nothing shared with `bilevel`.


def tiny_step(kind, seed=0, dtype=torch.float64, loss="soft_alignment", **settings):
    """A network, coordinates, a point, both batches and a tuning, as `bilevel_gradient` takes them."""
    generator = torch.Generator().manual_seed(seed)
    # Away from 0 and 1, where clamping bends the gradient.
    images = 0.3 + 0.4 * torch.rand(17, 1, 16, 16, generator=generator, dtype=dtype)
    network = untrained_network(Training(width=2, seed=seed), (1, 16, 16)).to(dtype)
    for norm in network.modules():
        if isinstance(norm, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            # Running statistics that differ from a batch's, and units that are not all alike
            norm.running_mean.normal_(0, 0.1, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
            norm.bias.data.normal_(0, 0.3, generator=generator)
    coordinates = Coordinates.of(Augmentation(kind))
    values = {"patch_area": 0.12, "patch_aspect": 1.3, "angle": 20.0}
    point = coordinates.start({name: values[name] for name in coordinates.bounds})
    training = TrainingBatch(
        images[:4], draw_noise(4, generator, images), torch.arange(2).repeat_interleave(4)
    )
    validation = ValidationBatch(images[4:9], draw_noise(5, generator, images), images[9:])
    tuning = Tuning(loss=loss, **{"virtual_rate": 0.5, "temperature": 1.0} | settings)
    return network, coordinates, point, training, validation, tuning


def unrolled_loss(network, coordinates, point, training, validation, tuning, constant_at=None):
    """L_val(theta'(a), a), differentiable in a; with `constant_at` theta' is that of another point."""
    parameters = dict(network.named_parameters())
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    kind, temperature = coordinates.augmentation.kind, tuning.temperature

    def changed(images, noise, at):
        return apply(images, kind, coordinates.values(at), noise, temperature)

    at = point if constant_at is None else constant_at
    network.train()
    both = torch.cat([training.images, changed(training.images, training.noise, at)])
    seen = {name: buffer.clone() for name, buffer in buffers.items()}
    logits = functional_call(network, (parameters, seen), (both,))
    targets = F.one_hot(training.targets, 2).to(logits)
    training_loss = -(targets * logits.log_softmax(1)).sum(1).mean()
    slopes = torch.autograd.grad(training_loss, list(parameters.values()), create_graph=True)
    virtual = {
        name: parameter - tuning.virtual_rate * slope
        for (name, parameter), slope in zip(parameters.items(), slopes, strict=True)
    }
    if constant_at is not None:
        virtual = {name: parameter.detach() for name, parameter in virtual.items()}
    network.train(tuning.batch_norm == "train")
    sets = torch.cat(
        [validation.train, changed(validation.train, validation.noise, point), validation.unlabeled]
    )
    inner = {n.removeprefix("encoder."): t for n, t in {**virtual, **buffers}.items() if "encoder." in n}
    features = functional_call(network.encoder, inner, ((sets - network.mean) / network.std,))
    sizes = [len(validation.train), len(validation.train), len(validation.unlabeled)]
    return tuning.loss_of(*(features / features.norm(dim=1, keepdim=True)).split(sizes))


@every_kind
@every_order
@pytest.mark.parametrize("loss", [*LOSSES, base])
@pytest.mark.parametrize("batch_norm", ["eval", "train"])
def test_the_gradient_of_a_step_agrees_with_finite_differences(kind, order, loss, batch_norm):
    step = tiny_step(kind, loss=loss, order=order, batch_norm=batch_norm)
    network, coordinates, point, *rest = step
    untouched = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = bilevel_gradient(*step)
    network.load_state_dict(untouched)  # running statistics
    constant_at = point if order == 1 else None

    def value(at):
        return unrolled_loss(network, coordinates, at, *rest, constant_at=constant_at).item()

    # So small a step that no ReLU bends within it (there theta' jumps), and the source of CutPaste's patch,
    # which moves by whole pixels, stays where it is.
    differences = [
        (value(point + 1e-7 * e) - value(point - 1e-7 * e)) / 2e-7 for e in torch.eye(len(point)).double()
    ]
    assert found.validation_loss.item() == pytest.approx(value(point), rel=1e-9)
    assert found.hyperparameters.abs().max() > 1e-6
    torch.testing.assert_close(found.hyperparameters, point.new_tensor(differences), rtol=1e-4, atol=1e-7)


@every_kind
@every_order
@pytest.mark.parametrize("batch_norm", ["eval", "train"])
def test_the_gradient_of_a_step_is_that_of_the_unrolled_step(kind, order, batch_norm):
    step = tiny_step(kind, seed=1, order=order, batch_norm=batch_norm)
    network, coordinates, point, *rest = step
    untouched = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = bilevel_gradient(*step)
    network.load_state_dict(untouched)
    at = point.clone().requires_grad_()
    constant_at = point if order == 1 else None
    (expected,) = torch.autograd.grad(
        unrolled_loss(network, coordinates, at, *rest, constant_at=constant_at), at
    )
    torch.testing.assert_close(found.hyperparameters, expected, rtol=1e-8, atol=1e-12)


@every_kind
def test_the_second_order_is_more_than_the_first(kind):
    first, second = (bilevel_gradient(*tiny_step(kind, order=order)).hyperparameters for order in (1, 2))
    assert not torch.allclose(first, second, rtol=1e-2, atol=0)


def test_the_gradient_in_float32_is_that_in_float64():
    network, coordinates, point, training, validation, tuning = step = tiny_step("cutdiff")
    expected = bilevel_gradient(*step).hyperparameters
    network, _, _, training, validation, _ = tiny_step("cutdiff")
    training = replace(training, images=training.images.float(), noise=training.noise.float())
    validation = ValidationBatch(*(getattr(validation, n).float() for n in ("train", "noise", "unlabeled")))
    found = bilevel_gradient(network.float(), coordinates, point, training, validation, tuning)
    assert found.validation_loss.dtype == torch.float32 and found.hyperparameters.dtype == torch.float64
    torch.testing.assert_close(found.hyperparameters, expected, rtol=1e-2, atol=1e-5)


@every_order
@pytest.mark.parametrize("batch_norm", ["eval", "train"])
def test_a_step_leaves_the_network_as_it_was(order, batch_norm):
    step = tiny_step("cutavg", order=order, batch_norm=batch_norm)
    network = step[0]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = bilevel_gradient(*step)
    assert network.training and all(module.training for module in network.modules())
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    assert not (found.validation_loss.requires_grad or found.hyperparameters.requires_grad)


@pytest.mark.parametrize("encoder", ["resnet18", "densenet121"])
def test_the_derivatives_written_out_are_those_of_torch(encoder, monkeypatch):
    def gradient():
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(24, 1, 32, 32, generator=generator, dtype=torch.float64)
        network = untrained_network(Training(encoder=encoder), (1, 32, 32)).to(torch.float64)
        coordinates = Coordinates.of(Augmentation("cutdiff"))
        noise = draw_noise(12, generator, images)
        training = TrainingBatch(images[:4], noise[:4], torch.arange(2).repeat_interleave(4))
        validation = ValidationBatch(images[4:10], noise[4:10], images[10:])
        torch.manual_seed(0)  # dropout
        tuning = Tuning(virtual_rate=0.5)
        return bilevel_gradient(network, coordinates, coordinates.start(0.5), training, validation, tuning)

    ours = gradient()
    monkeypatch.setattr(ssad_hpo.bilevel.gradient, "MixedDerivatives", contextlib.nullcontext)
    torchs = gradient()
    assert ours.validation_loss.item() == pytest.approx(torchs.validation_loss.item(), rel=1e-9)
    torch.testing.assert_close(ours.hyperparameters, torchs.hyperparameters, rtol=1e-6, atol=1e-9)


def test_the_virtual_step_sees_the_first_images_of_a_batch_and_their_augmented_ones():
    *_, training, _, _ = tiny_step("cutdiff")
    first = training.first(3)
    assert torch.equal(first.images, training.images[:3]) and torch.equal(first.noise, training.noise[:3])
    assert first.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(training.first(9).targets, training.targets)


def test_a_step_needs_no_gradient_mode_of_its_caller():
    expected = bilevel_gradient(*tiny_step("cutdiff")).hyperparameters
    with torch.no_grad():
        assert torch.equal(bilevel_gradient(*tiny_step("cutdiff")).hyperparameters, expected)


def test_a_loss_that_is_no_scalar_is_rejected():
    with pytest.raises(ValueError, match=r"^loss: expected a function that returns a scalar, got shape \(5,"):
        bilevel_gradient(*tiny_step("cutdiff", loss=lambda train, augmented, unlabeled: train))


# Coordinates


@every_kind
def test_coordinates_are_the_logarithms_of_sizes_and_angles_in_radians(kind):
    coordinates = Coordinates.of(Augmentation(kind))
    values = {"patch_area": 0.05, "patch_aspect": 2.0, "angle": 30.0}
    point = coordinates.start({name: values[name] for name in coordinates.bounds})
    encoded = {"patch_area": math.log(0.05), "patch_aspect": math.log(2), "angle": math.pi / 6}
    assert point.tolist() == pytest.approx([encoded[name] for name in coordinates.bounds])
    assert coordinates.at(point).hyperparameters == pytest.approx(
        {name: values[name] for name in coordinates.bounds}
    )


@every_kind
def test_a_point_that_leaves_its_bounds_is_put_back_and_fits_there(kind):
    coordinates = Coordinates.of(Augmentation(kind))
    n = len(coordinates.bounds)
    for direction in itertools.product((-1, 1), repeat=n):
        point = coordinates.start(0.5) + 100 * torch.tensor(direction)
        coordinates.project(point)
        for (name, bound), sign in zip(coordinates.bounds.items(), direction, strict=True):
            end = bound.low if sign < 0 else bound.high
            assert coordinates.numbers(point)[name] == pytest.approx(end, rel=1e-12)
            assert bound.low <= coordinates.numbers(point)[name] <= bound.high
        sides = ["lower" if sign < 0 else "upper" for sign in direction]
        assert coordinates.at_bounds(point, 1e-9) == list(zip(coordinates.bounds, sides, strict=True))
        check_fits(coordinates.at(point), height=16, width=16)
    inside = coordinates.start(0.5)
    unmoved = inside.clone()
    coordinates.project(inside)
    assert torch.equal(inside, unmoved) and coordinates.at_bounds(inside, 1e-9) == []


def test_a_starting_point_is_a_fraction_of_the_first_range_or_values():
    coordinates = Coordinates.of(Augmentation("cutavg", {"patch_area": Range(0.01, 0.16, log=True)}))
    assert coordinates.numbers(coordinates.start(0.25)) == pytest.approx(
        {"patch_area": 0.02, "patch_aspect": Augmentation("cutavg").hyperparameters["patch_aspect"].at(0.5)}
    )
    named = coordinates.start({"patch_aspect": 0.5})
    assert coordinates.numbers(named) == pytest.approx({"patch_area": 0.04, "patch_aspect": 0.5})
