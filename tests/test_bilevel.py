"""ST-SSAD: the gradient of a hyperparameter step, the tuning's course, its resume, cost and warnings."""

import contextlib
import gc
import itertools
import math
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_pre_hook

import ssad_hpo.bilevel.gradient
import ssad_hpo.bilevel.tuning
from ssad_hpo.augment import KINDS, apply, check_fits, draw_noise
from ssad_hpo.bilevel import (
    LOSSES,
    CollapseWarning,
    Coordinates,
    FailedStart,
    TrainingBatch,
    Tuning,
    ValidationBatch,
    bilevel_gradient,
    tune,
)
from ssad_hpo.bilevel.checkpoint import write_checkpoint
from ssad_hpo.bilevel.run import Run, Setting
from ssad_hpo.criteria import CRITERIA, DegenerateError, base, evaluate_all
from ssad_hpo.detector import Detector, train, untrained_network
from ssad_hpo.encoder import SmallEncoder
from ssad_hpo.task import Augmentation, DetectorError, Range, Task, Training

TINY = Training(width=2, steps=12, batch_size=4)
QUICK = Tuning(
    order=2,
    detector_steps=2,
    virtual_images=3,
    warm_start=1 / 3,
    validation_train=6,
    validation_unlabeled=5,
    starts=(0.5, 0.8),
    checkpoint_every=2,
)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_order = pytest.mark.parametrize("order", [1, 2])

# Tiny trainings end anywhere; what is a sign of collapse has its own tests.
pytestmark = pytest.mark.filterwarnings("ignore::ssad_hpo.bilevel.CollapseWarning")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors on shared cores are fastest so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_task(n_train=10, n_unlabeled=8, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(60, 200, (n_train + n_unlabeled, 1, size, size), generator=generator)
    images = images.to(torch.uint8)
    images[n_train : n_train + n_unlabeled // 2, :, 4:9, 3:9] = 0
    return Task("tiny", images[:n_train], images[n_train:])


TASK = random_task()


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
    return tuning.loss_function(*(features / features.norm(dim=1, keepdim=True)).split(sizes))


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
    validation = ValidationBatch(*(tensor.float() for tensor in vars(validation).values()))
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


def test_an_encoder_without_second_derivatives_is_rejected_before_any_step_and_serves_with_order_1():
    training = replace(TINY, encoder="mobilenet_v3_small")
    with pytest.raises(ValueError, match=r"^encoder: order 2 needs second derivatives.*; use order 1$"):
        tune(TASK, "cutdiff", QUICK, training)
    assert len(tune(TASK, "cutdiff", replace(QUICK, order=1, starts=(0.5,)), training).starts) == 1


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


# Tuning


def all_of(result):
    """Everything that a tuning gave, in a form that compares bit for bit."""
    return [
        (
            start.start,
            start.augmentation,
            start.trajectory,
            start.criteria,
            start.training_loss,
            start.validation_loss,
            start.warnings,
            [start.scores.tolist(), *(t.tolist() for t in vars(start.embeddings).values())],
            {name: t.tolist() for name, t in start.detector.network.state_dict().items()},
            replace(start.cost, seconds=0),
        )
        for start in result.starts
    ] + [result.chosen, replace(result.cost, seconds=0)]


@every_kind
@every_order
def test_a_tuning_learns_hyperparameters_within_their_bounds_and_gives_a_finished_detector(kind, order):
    result = tune(TASK, kind, replace(QUICK, order=order, learning_rate=0.1), TINY)
    assert len(result.starts) == 2
    for tuned in result.starts:
        assert [outer.step for outer in tuned.trajectory] == [6, 8, 10, 12]
        moved = [outer.hyperparameters for outer in tuned.trajectory]
        assert moved[0] == tuned.start.hyperparameters
        points = [*moved, tuned.augmentation.hyperparameters]
        assert all(a != b for a, b in itertools.pairwise(points))
        for values, (name, bound) in itertools.product(points, Augmentation(kind).hyperparameters.items()):
            assert bound.low <= values[name] <= bound.high
        assert all(
            math.isfinite(loss) for o in tuned.trajectory for loss in (o.training_loss, o.validation_loss)
        )
        # The finished detector is judged as any detector is, with hard edges.
        sets = tuned.detector.embed_task(TASK.train, TASK.unlabeled)
        assert tuned.detector.augmentation == tuned.augmentation
        assert tuned.criteria == evaluate_all(sets.train, sets.augmented, sets.unlabeled)
        default = LOSSES[Tuning().loss](sets.train, sets.augmented, sets.unlabeled)
        assert tuned.validation_loss == pytest.approx(float(default))
        assert torch.equal(tuned.detector.score(TASK.unlabeled), tuned.scores)
    assert result.kept is result.starts[result.chosen]
    assert result.augmentation == result.kept.augmentation and result.detector is result.kept.detector


def test_the_same_seed_gives_the_same_result_and_another_one_another():
    before = torch.get_rng_state()
    first, second = (all_of(tune(TASK, "cutavg", QUICK, TINY)) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)
    assert all_of(tune(TASK, "cutavg", QUICK, replace(TINY, seed=1))) != first


def test_a_fixed_hyperparameter_stays():
    result = tune(TASK, Augmentation("cutdiff", {"patch_aspect": 1.0}), QUICK, TINY)
    assert result.augmentation.hyperparameters["patch_aspect"] == 1.0
    assert set(result.kept.trajectory[0].hyperparameters) == {"patch_area"}


def test_a_finished_detector_survives_the_disk(tmp_path):
    result = tune(TASK, "cutpaste", QUICK, TINY)
    result.detector.save(tmp_path)
    assert torch.equal(Detector.load(tmp_path).score(TASK.unlabeled), result.kept.scores)


def test_starting_points_share_a_warm_start_on_the_range_but_not_one_on_the_start():
    shared = tune(TASK, "cutdiff", QUICK, TINY)
    own = tune(TASK, "cutdiff", replace(QUICK, warm_start_on="start"), TINY)
    cold = tune(TASK, "cutdiff", replace(QUICK, warm_start=0.0), replace(TINY, steps=8))
    forward = [tuned.cost.forward for result in (shared, own, cold) for tuned in result.starts]
    warm = 4 * 2 * TINY.batch_size
    assert forward[0] == forward[1] == forward[2] - warm == forward[3] - warm == forward[4] == forward[5]
    assert shared.cost.forward == sum(forward[:2]) + warm
    assert own.cost.forward == sum(forward[2:4]) and cold.cost.forward == sum(forward[4:])
    # What the second starting point gives does not depend on the first one's having run before it.
    alone = tune(TASK, "cutdiff", replace(QUICK, starts=QUICK.starts[1:]), TINY)
    assert all_of(alone)[0] == all_of(shared)[1]


@pytest.mark.parametrize("warm_start_on", ["range", "start"])
def test_a_warm_start_is_plain_training_on_the_range_or_the_starting_point(warm_start_on):
    tuning = replace(QUICK, warm_start=0.5, warm_start_on=warm_start_on, annealing=True)
    setting = Setting(TASK, Coordinates.of(Augmentation("cutdiff")), tuning, TINY, torch.device("cpu"))
    point = setting.coordinates.start(0.8)
    run = Run(setting, point)
    assert list(run.train(until=setting.warm)) == [] and run.step == 6
    augmentation = setting.coordinates.at(point) if warm_start_on == "start" else Augmentation("cutdiff")
    checkpoint = next(train(TASK.train, augmentation, replace(TINY, evaluate_at=(0.5, 1.0))))
    assert checkpoint.step == 6
    expected = checkpoint.detector.network.state_dict()
    torch.testing.assert_close(dict(run.network.state_dict()), dict(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("choose_by", [*CRITERIA, "validation_loss"])
def test_the_starting_point_lowest_in_the_criterion_is_kept(choose_by):
    tuning = replace(QUICK, loss="mmd_normalised", starts=(0.2, 0.5, 0.9), choose_by=choose_by)
    result = tune(TASK, "cutout", tuning, TINY)
    values = [
        tuned.validation_loss if choose_by == "validation_loss" else tuned.criteria[choose_by]
        for tuned in result.starts
    ]
    assert values[result.chosen] == min(values) < max(values)


@every_order
@pytest.mark.parametrize("batch_norm", ["eval", "train"])
@pytest.mark.parametrize("score", ["density", "classifier"])
def test_the_cost_is_counted_to_the_image(order, batch_norm, score):
    passed = {True: 0, False: 0}

    def count(module, arguments):
        if isinstance(module, SmallEncoder):
            passed[torch.is_grad_enabled()] += len(arguments[0])

    tuning = replace(QUICK, order=order, batch_norm=batch_norm)
    hook = register_module_forward_pre_hook(count)
    try:
        cost = tune(TASK, "cutavg", tuning, replace(TINY, score=score)).cost
    finally:
        hook.remove()
    assert cost.forward == sum(passed.values())
    # What is passed forward with gradients is passed backward, all of it; 2 starts of 4 outer steps.
    assert cost.backward == passed[True]
    assert cost.second == (2 * 4 * 2 * QUICK.virtual_images if order == 2 else 0)
    assert cost.images == cost.forward + cost.backward + 2 * cost.second
    assert cost.seconds > 0


def test_a_contamination_sizes_the_augmented_set_of_the_finished_detector():
    result = tune(TASK, "cutavg", QUICK, replace(TINY, contamination=0.6))
    assert len(result.kept.embeddings.augmented) == 15


def test_a_rate_that_is_annealed_gives_another_detector():
    constant, annealed = (
        tune(TASK, "cutavg", replace(QUICK, annealing=annealing), TINY) for annealing in (False, True)
    )
    assert constant.kept.scores.tolist() != annealed.kept.scores.tolist()


def test_a_recorder_hears_of_every_starting_point(listener):
    result = tune(TASK, "cutdiff", QUICK, TINY, recorder=listener)
    assert [event[:2] for event in listener.heard if event[0] != "progress"] == [
        (event, trial) for trial in "01" for event in ("started", "ended")
    ]
    for index, tuned in enumerate(result.starts):
        steps = [rest for trial, *rest in listener.of("progress") if trial == str(index)]
        assert steps == [
            [
                outer.step,
                {
                    **outer.hyperparameters,
                    "training_loss": outer.training_loss,
                    "validation_loss": outer.validation_loss,
                },
            ]
            for outer in tuned.trajectory
        ]
        _, params, tags = listener.of("started")[index]
        assert params == {"augmentation": "cutdiff", **tuned.start.hyperparameters}
        assert tags == {"augmentation": "cutdiff", "task": "tiny"}
        _, status, metrics, reason = listener.of("ended")[index]
        assert status == "complete" and reason is None and metrics["dsv"] == tuned.criteria["dsv"]
        assert metrics["learned.patch_area"] == tuned.augmentation.hyperparameters["patch_area"]


# Resuming


class Interruption(KeyboardInterrupt):
    pass


class Interrupter:
    """A recorder that interrupts the tuning at its n-th step of the hyperparameters."""

    def __init__(self, at):
        self.left, self.ended = at, []

    def trial_started(self, trial, params, tags):
        pass

    def trial_progress(self, trial, step, metrics):
        self.left -= 1
        if not self.left:
            raise Interruption

    def trial_ended(self, trial, status, metrics, reason=None):
        self.ended.append((trial, status, reason))


@pytest.mark.parametrize("warm_start_on", ["range", "start"])
@pytest.mark.parametrize("at", [1, 3, 5, 8])
def test_an_interrupted_tuning_goes_on_to_the_same_end_bit_for_bit(tmp_path, warm_start_on, at):
    tuning = replace(QUICK, warm_start_on=warm_start_on)
    whole = all_of(tune(TASK, "cutpaste", tuning, TINY))
    checkpoint, interrupter = tmp_path / "deep" / "tuning.pt", Interrupter(at)
    with pytest.raises(Interruption):
        tune(TASK, "cutpaste", tuning, TINY, recorder=interrupter, checkpoint=checkpoint)
    assert interrupter.ended[-1][:2] == (str((at - 1) // 4), "interrupted")
    resumed = Interrupter(0)
    assert all_of(tune(TASK, "cutpaste", tuning, TINY, recorder=resumed, checkpoint=checkpoint)) == whole
    # Something of the first attempt was kept, if it came that far; and no half file lies about.
    assert (-resumed.left < 8) == (at > 2)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


@pytest.mark.parametrize("warm_start_on", ["range", "start"])
def test_a_warm_start_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, warm_start_on):
    tuning = replace(QUICK, warm_start_on=warm_start_on, checkpoint_every=1)  # saved after 2 and 4 steps
    whole, checkpoint = all_of(tune(TASK, "cutpaste", tuning, TINY)), tmp_path / "tuning.pt"
    saved = []

    def write_and_note(path, setting, starts, progress):
        write_checkpoint(path, setting, starts, progress)
        saved.append((progress.warm_start or progress.current or {"step": None})["step"])
        if len(saved) == 1:
            raise Interruption

    monkeypatch.setattr(ssad_hpo.bilevel.tuning, "write_checkpoint", write_and_note)
    with pytest.raises(Interruption):
        tune(TASK, "cutpaste", tuning, TINY, checkpoint=checkpoint)
    assert all_of(tune(TASK, "cutpaste", tuning, TINY, checkpoint=checkpoint)) == whole
    assert saved[:2] == [2, 4]


def test_what_became_of_a_start_is_given_when_it_is_safe_and_again_after_a_resume(tmp_path):
    checkpoint, given = tmp_path / "tuning.pt", []

    def keep(index, tuned):
        assert checkpoint.exists()
        given.append((index, tuned.scores.tolist()))
        if len(given) == 1:
            raise Interruption

    with pytest.raises(Interruption):
        tune(TASK, "cutdiff", QUICK, TINY, checkpoint=checkpoint, keep=keep)
    result = tune(TASK, "cutdiff", QUICK, TINY, checkpoint=checkpoint, keep=keep)
    first, *rest = [(index, tuned.scores.tolist()) for index, tuned in enumerate(result.starts)]
    assert given == [first, first, *rest]


def test_dropout_draws_the_same_after_a_resume(tmp_path):
    training = replace(TINY, encoder="mobilenet_v2", batch_size=2, steps=6)
    tuning = replace(QUICK, starts=(0.5,), checkpoint_every=1)
    task = random_task(4, 4, size=32)
    whole = tune(task, "cutdiff", tuning, training).kept
    checkpoint = tmp_path / "tuning.pt"
    with pytest.raises(Interruption):
        tune(task, "cutdiff", tuning, training, recorder=Interrupter(2), checkpoint=checkpoint)
    resumed = tune(task, "cutdiff", tuning, training, checkpoint=checkpoint).kept
    assert resumed.trajectory == whole.trajectory and torch.equal(resumed.scores, whole.scores)


def test_a_finished_tuning_is_read_from_its_checkpoint_without_training(tmp_path, listener):
    checkpoint = tmp_path / "tuning.pt"
    first = tune(TASK, "cutdiff", QUICK, TINY, checkpoint=checkpoint)
    again = tune(TASK, "cutdiff", QUICK, TINY, recorder=listener, checkpoint=checkpoint)
    assert all_of(again) == all_of(first) and listener.heard == []
    # Another way to choose needs no training either.
    other = tune(TASK, "cutdiff", replace(QUICK, choose_by="std"), TINY, checkpoint=checkpoint)
    assert all_of(other)[:2] == all_of(first)[:2] and other.choose_by == "std"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"task": random_task(seed=1)}, "task"),
        ({"augmentation": "cutout"}, "augmentation"),
        ({"tuning": replace(QUICK, learning_rate=0.1)}, "tuning.learning_rate"),
        ({"tuning": replace(QUICK, loss=base)}, "tuning.loss"),
        ({"tuning": replace(QUICK, starts=(0.4, 0.8))}, "tuning.starts"),
        ({"training": replace(TINY, seed=1)}, "training.seed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_checkpoint_of_another_tuning_is_rejected_and_kept(tmp_path, changed, named):
    checkpoint = tmp_path / "tuning.pt"
    tune(TASK, "cutdiff", QUICK, TINY, checkpoint=checkpoint)
    before = checkpoint.read_bytes()
    given = {"task": TASK, "augmentation": "cutdiff", "tuning": QUICK, "training": TINY} | changed
    with pytest.raises(ValueError, match=rf"another tuning \(differs in {named}\)"):
        tune(**given, checkpoint=checkpoint)
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None], ids=["empty", "text", "cut"])
def test_a_broken_checkpoint_is_named(tmp_path, content):
    checkpoint = tmp_path / "tuning.pt"
    if content is None:
        tune(TASK, "cutdiff", replace(QUICK, starts=(0.5,)), TINY, checkpoint=checkpoint)
        content = checkpoint.read_bytes()[:2000]
    checkpoint.write_bytes(content)
    with pytest.raises(ValueError, match=r"^checkpoint: .*tuning\.pt is no checkpoint of a tuning"):
        tune(TASK, "cutdiff", QUICK, TINY, checkpoint=checkpoint)


# What goes wrong


def test_a_loss_that_is_not_finite_stops_every_start_and_names_the_hyperparameters(listener):
    def broken(train, augmented, unlabeled):
        return augmented.sum() * float("nan")

    with pytest.raises(DetectorError, match=r"diverged: validation loss nan .* step 6 under cutdiff\(patch_"):
        tune(TASK, "cutdiff", replace(QUICK, loss=broken), TINY, recorder=listener)
    ends = listener.of("ended")
    assert len(ends) == len(QUICK.starts)
    assert all(status == "failed" and "cutdiff(patch_area=" in reason for _, status, _, reason in ends)


def test_a_training_that_diverges_in_its_warm_start_names_the_range():
    with pytest.raises(
        DetectorError, match=r"diverged: loss nan by step 4 under cutdiff\(patch_area=0.002\.\."
    ):
        tune(TASK, "cutdiff", QUICK, replace(TINY, learning_rate=1e30))


def test_a_training_that_diverges_later_names_the_hyperparameters():
    tuning = replace(QUICK, warm_start=0.0, detector_steps=4)
    with pytest.raises(DetectorError, match=r"step 4 under cutdiff\(patch_area=0\.0\d+, patch_aspect"):
        tune(TASK, "cutdiff", tuning, replace(TINY, learning_rate=1e30))


def test_embeddings_that_collapse_stop_every_start_and_name_the_hyperparameters():
    def collapsed(train, augmented, unlabeled):
        raise DegenerateError("train: expected rows that differ, got 6 identical ones")

    with pytest.raises(
        DetectorError, match=r"start 0: collapsed at step 6 under cutdiff\(.*: train: expected rows"
    ):
        tune(TASK, "cutdiff", replace(QUICK, loss=collapsed), TINY)


def test_a_starting_point_that_fails_fails_alone_also_after_a_resume(listener, tmp_path):
    calls = 0

    def once(train, augmented, unlabeled):
        nonlocal calls
        calls += 1
        loss = LOSSES[QUICK.loss](train, augmented, unlabeled)
        return loss * float("nan") if calls == 1 else loss

    checkpoint, kept = tmp_path / "tuning.pt", []
    tuning = replace(QUICK, loss=once, starts=(0.5, 0.8))

    def run(**told):
        said = r"^start 0: diverged: validation loss nan .* step 6 under cutdiff\(patch_area="
        with pytest.warns(CollapseWarning, match=said):
            return tune(TASK, "cutdiff", tuning, TINY, checkpoint=checkpoint, **told)

    result = run(recorder=listener, keep=lambda index, start: kept.append((index, start)))
    failed, tuned = result.starts
    assert isinstance(failed, FailedStart) and failed.reason.startswith("diverged: validation loss nan")
    assert kept == [(0, failed), (1, tuned)]
    assert result.tuned == (tuned,) and result.kept is tuned and result.chosen == 1
    assert [status for _, status, *_ in listener.of("ended")] == ["failed", "complete"]
    alone = tune(TASK, "cutdiff", replace(QUICK, starts=(0.8,)), TINY)
    assert tuned.trajectory == alone.kept.trajectory
    again = run()
    assert again.starts[0] == failed and again.cost == replace(result.cost, seconds=again.cost.seconds)


def spread(train, augmented, unlabeled):
    """A loss that drives Z_aug into Z_trn, where smooth alignment's trivial valley lies as well."""
    return (augmented - train).square().sum(1).mean()


def test_a_patch_that_vanishes_is_told_with_its_remedy():
    tuning = Tuning(
        loss=spread, starts=({"patch_area": 0.01},), learning_rate=0.2, detector_steps=1, warm_start=0.2,
        validation_train=10, validation_unlabeled=8,
    )  # fmt: skip
    with pytest.warns(CollapseWarning) as told:
        result = tune(TASK, Augmentation("cutdiff", {"patch_aspect": 1.0}), tuning, replace(TINY, steps=60))
    assert result.augmentation.hyperparameters["patch_area"] == pytest.approx(0.002)
    assert [str(w.message) for w in told] == list(result.warnings)
    bound, chance = result.warnings
    assert "cutdiff.patch_area ended at its lower bound 0.002" in bound and "two_sided_alignment" in bound
    assert "cannot tell augmented images from normal ones" in chance and "start from" in chance
    assert told[0].filename == __file__


def test_a_patch_that_runs_away_is_told():
    """Down this loss augmented images go as far from normal ones as can be: black from edge to edge."""

    def far(train, augmented, unlabeled):
        return -(augmented.mean(0) - train.mean(0)).square().sum()

    tuning = replace(QUICK, loss=far, starts=(0.9,), learning_rate=0.3)
    augmentation = Augmentation("cutdiff", {"patch_aspect": 1.0})
    with pytest.warns(
        CollapseWarning, match=r"patch_area ended at its upper bound 0\.3; it may have run away"
    ):
        tune(TASK, augmentation, tuning, replace(TINY, width=4, steps=60, batch_size=8))


def test_a_sound_tuning_warns_of_nothing():
    """Black patches of a quarter of the image are told apart at once, and the point hardly moves."""
    tuning = replace(QUICK, starts=(0.9,), learning_rate=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = tune(TASK, "cutout", tuning, replace(TINY, width=4, steps=60, batch_size=8))
    assert result.warnings == ()


def test_memory_stays_flat_over_steps():
    training = replace(TINY, steps=400)
    tuning = replace(QUICK, detector_steps=1, warm_start=0.0)
    setting = Setting(TASK, Coordinates.of(Augmentation("cutpaste")), tuning, training, torch.device("cpu"))
    run = Run(setting, setting.coordinates.start(0.5))

    def resident_mb():
        lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
        return int(lines["VmRSS"].split()[0]) / 1024

    measured = []
    for outer in run.train(until=400):
        if outer.step % 100 == 0:
            gc.collect()
            measured.append(resident_mb())
    # Counted by its activations, one step's graph has some 0.3 MB: 300 of them kept would be 90.
    assert len(measured) == 4 and measured[-1] - measured[0] < 10


# Settings


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss": "dsv"}, r"^loss: expected one of smooth_alignment, .* or a function, got 'dsv'"),
        ({"order": 3}, r"^order: expected one of 1, 2, got 3"),
        ({"detector_steps": 0}, r"^detector_steps: expected a whole number >= 1, got 0"),
        ({"learning_rate": -1.0}, r"^learning_rate: expected a finite number >= 0, got -1.0"),
        ({"virtual_rate": math.inf}, r"^virtual_rate: expected a finite number >= 0, got inf"),
        ({"virtual_rate": 0.0}, r"^virtual_rate: order 2 needs one above 0, got 0"),
        ({"warm_start": 1.0}, r"^warm_start: expected a share of the steps, 0 <= share < 1, got 1.0"),
        ({"warm_start_on": "end"}, r"^warm_start_on: expected one of range, start, got 'end'"),
        ({"validation_train": 1}, r"^validation_train: expected a whole number >= 2, got 1"),
        ({"validation_unlabeled": 1.5}, r"^validation_unlabeled: expected a whole number >= 2, got 1.5"),
        ({"batch_norm": None}, r"^batch_norm: expected one of eval, train, got None"),
        ({"starts": ()}, r"^starts: expected at least one starting point"),
        ({"choose_by": "auc"}, r"^choose_by: expected one of dsv, .*, validation_loss, got 'auc'"),
        ({"temperature": math.nan}, r"^temperature: expected a finite number >= 0, got nan"),
        ({"checkpoint_every": 0}, r"^checkpoint_every: expected a whole number >= 1, got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_out_of_its_range_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(QUICK, **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"augmentation": "cutmix"}, r"^augmentation: expected one of cutout, .*, got 'cutmix'"),
        (
            {"augmentation": Augmentation("rotation", {"angle": 30.0})},
            r"^augmentation: expected a range for what is to be tuned, got rotation\(angle=30\)",
        ),
        (
            {"augmentation": Augmentation("cutout", {"patch_area": Range(0.1, 0.9)})},
            r"^cutout: a patch of area 0.9 .* does not fit",
        ),
        (
            {"tuning": replace(QUICK, starts=(1.5,))},
            r"^starts: expected a fraction 0..1 of patch_area's range",
        ),
        (
            {"tuning": replace(QUICK, starts=({"angle": 3.0},))},
            r"^starts: expected values of patch_area, patch_aspect, got 'angle'",
        ),
        (
            {"tuning": replace(QUICK, starts=({"patch_area": 0.5},))},
            r"^starts: expected patch_area in 0.002..0.3, got 0.5",
        ),
        (
            {"training": replace(TINY, steps=2, evaluate_at=(1.0,))},
            r"^steps: expected at least 2 .* got 2 in all",
        ),
        ({"device": "abacus"}, r"^device: expected .*'abacus'"),
        ({"training": replace(TINY, encoder="vgg")}, r"^encoder: expected .*'vgg'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_tuning_that_cannot_be_is_rejected_before_it_begins(changed, message):
    given = {"task": TASK, "augmentation": "cutdiff", "tuning": QUICK, "training": TINY} | changed
    with pytest.raises(ValueError, match=message):
        tune(**given)
