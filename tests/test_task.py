"""What is declared: tasks, ranges, augmentations, search spaces and trainings keep their promises."""

import dataclasses
import json
import math

import optuna
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ssad_hpo.augment import KINDS
from ssad_hpo.task import Augmentation, Range, SearchSpace, Task, Training

DEFAULT_RANGES = {kind: {n: h.range for n, h in row.hyperparameters.items()} for kind, row in KINDS.items()}
every_kind = pytest.mark.parametrize("kind", DEFAULT_RANGES)


def images(n=4, channels=1, height=6, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8, generator=generator)


# Task


@pytest.mark.parametrize("field", ["train", "unlabeled"])
@pytest.mark.parametrize(
    ("broken", "came"),
    [
        (images().float(), "torch.float32"),
        (images().long(), "torch.int64"),
        (images().numpy(), "uint8"),
        (images().tolist(), "list"),
        (None, "NoneType"),
        (images(n=1), r"\(1, 1, 6, 5\)"),
        (images(n=0), r"\(0, 1, 6, 5\)"),
        (images(channels=2), r"\(4, 2, 6, 5\)"),
        (images(channels=4), r"\(4, 4, 6, 5\)"),
        (images()[:, 0], r"\(4, 6, 5\)"),
        (images()[None], r"\(1, 4, 1, 6, 5\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_task_rejects_broken_images_by_the_name_of_their_field(field, broken, came):
    given = {"train": images(), "unlabeled": images(), field: broken}
    with pytest.raises(ValueError, match=rf"^{field}: expected .*, got {came}$"):
        Task("some", **given)


@pytest.mark.parametrize("other", [images(channels=3), images(height=7), images(width=6)], ids="CHW")
def test_a_task_rejects_unlabeled_images_of_another_shape_than_train(other):
    with pytest.raises(ValueError, match=r"^unlabeled: expected images of train's shape \(1, 6, 5\), got"):
        Task("some", images(), other)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_task_takes_two_images_of_each_set_in_grey_and_colour(channels):
    task = Task("some", images(2, channels), images(2, channels, seed=1))
    assert task.train.shape == task.unlabeled.shape == (2, channels, 6, 5)


def test_a_task_is_frozen():
    task = Task("some", images(), images())
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.train = images(seed=1)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["train", "unlabeled"]), st.integers(0, 3), st.integers(0, 29), st.integers(1, 255))
def test_the_content_hash_changes_with_any_pixel(field, image, pixel, change):
    sets = {"train": images(), "unlabeled": images(seed=1)}
    before = Task("some", **sets).content_hash
    sets[field][image].view(-1)[pixel] += change  # uint8 wraps around
    assert Task("some", **sets).content_hash != before


def test_the_content_hash_does_not_change_with_the_name_or_the_memory_layout():
    train, unlabeled = images(channels=3), images(channels=3, seed=1)
    rearranged = train.contiguous(memory_format=torch.channels_last)
    assert rearranged.stride() != train.stride()
    first = Task("one", train, unlabeled).content_hash
    assert Task("two", train.clone(), unlabeled.clone()).content_hash == first
    assert Task("one", rearranged, unlabeled).content_hash == first
    assert len(first) == 64 and int(first, 16) > 0


def test_the_content_hash_tells_where_train_ends_and_how_images_are_shaped():
    rows = images(8)
    hashes = {
        Task("some", rows[:4], rows[4:]).content_hash,
        Task("some", rows[:3], rows[3:]).content_hash,
        Task("some", rows[4:], rows[:4]).content_hash,
        Task("some", rows[:4].reshape(4, 1, 5, 6), rows[4:].reshape(4, 1, 5, 6)).content_hash,
    }
    assert len(hashes) == 4


# Range


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [
        (1.0, 1.0, False),
        (2.0, 1.0, False),
        (float("nan"), 1.0, False),
        (0.0, float("nan"), False),
        (float("-inf"), 1.0, False),
        (0.0, float("inf"), False),
        (0.0, 1.0, True),
        (-1.0, 1.0, True),
    ],
)
def test_a_range_rejects_ends_that_span_nothing(low, high, log):
    with pytest.raises(ValueError, match=r"^Range: "):
        Range(low, high, log)


def test_a_range_walks_evenly_or_on_the_log_scale():
    assert [Range(-45.0, 45.0).at(f) for f in (0, 0.25, 0.5, 1)] == [-45.0, -22.5, 0.0, 45.0]
    assert [Range(0.01, 1.0, log=True).at(f) for f in (0, 0.5, 1)] == pytest.approx([0.01, 0.1, 1.0])


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-3, 10), st.floats(1e-3, 10), st.booleans(), st.floats(0, 1))
@example(0.07, 0.11, True, math.nextafter(1, 0))  # 0.07 * (0.11 / 0.07) is above 0.11
def test_a_range_never_leaves_its_ends(a, b, log, fraction):
    if a == b:
        return
    span = Range(min(a, b), max(a, b), log)
    assert span.low <= span.at(fraction) <= span.high
    assert (span.at(0.0), span.at(1.0)) == (span.low, span.high)


# Augmentation


@every_kind
def test_an_augmentation_fills_in_the_default_ranges(kind):
    assert dict(Augmentation(kind).hyperparameters) == DEFAULT_RANGES[kind]
    for name in DEFAULT_RANGES[kind]:
        given = Augmentation(kind, {name: 0.25}).hyperparameters
        assert given == {**DEFAULT_RANGES[kind], name: 0.25}


@every_kind
def test_an_augmentation_names_a_hyperparameter_that_is_not_a_finite_number(kind):
    for name in DEFAULT_RANGES[kind]:
        for value in (float("nan"), float("inf"), float("-inf")):
            with pytest.raises(
                ValueError, match=rf"^{kind}\.{name}: expected a finite number.*, got {value}"
            ):
                Augmentation(kind, {name: value})


@pytest.mark.parametrize("name", ["patch_area", "patch_aspect"])
@pytest.mark.parametrize("value", [0.0, -0.1, Range(-0.1, 0.2), Range(0.0, 0.2)], ids=str)
def test_an_augmentation_rejects_sizes_that_are_not_positive(name, value):
    with pytest.raises(ValueError, match=rf"^cutout\.{name}: expected a finite number above 0, got"):
        Augmentation("cutout", {name: value})


def test_an_augmentation_takes_angles_below_zero():
    assert Augmentation("cutpaste", {"angle": -30.0}).hyperparameters["angle"] == -30.0


def test_an_unknown_augmentation_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"cutout, cutavg, cutpaste, cutdiff, rotation, got 'cutmix'"):
        Augmentation("cutmix")


def test_an_unknown_hyperparameter_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"^cutout: .*patch_area, patch_aspect, got 'angle'"):
        Augmentation("cutout", {"angle": 3.0})


def test_an_augmentation_is_frozen_and_keeps_a_copy_of_what_it_was_given():
    given = {"patch_area": 0.1}
    augmentation = Augmentation("cutout", given)
    given["patch_area"] = 0.2
    assert augmentation.hyperparameters["patch_area"] == 0.1
    with pytest.raises(dataclasses.FrozenInstanceError):
        augmentation.kind = "cutavg"


def test_an_augmentation_shows_its_kind_and_all_its_hyperparameters():
    shown = str(Augmentation("cutpaste", {"patch_area": 0.05, "angle": Range(-10.0, 10.0)}))
    assert shown == "cutpaste(patch_area=0.05, patch_aspect=0.3..3.3, angle=-10..10)"


# SearchSpace

MIXED = {"cutout": {"patch_aspect": 1.0}, "cutpaste": {"angle": Range(-10.0, 10.0)}, "rotation": {}}


def test_a_space_may_be_a_name_a_sequence_of_names_or_a_mapping():
    assert SearchSpace("cutavg") == SearchSpace(["cutavg"]) == SearchSpace({"cutavg": {}})
    assert SearchSpace(("cutavg", "rotation")) == SearchSpace(
        {"cutavg": {}, "rotation": DEFAULT_RANGES["rotation"]}
    )
    assert SearchSpace("cutavg") != SearchSpace("cutout")
    assert SearchSpace("cutavg") != SearchSpace({"cutavg": {"patch_aspect": 1.0}})


@pytest.mark.parametrize("nothing", [[], {}, ()], ids=repr)
def test_an_empty_space_is_rejected(nothing):
    with pytest.raises(ValueError, match=r"^SearchSpace: expected at least one augmentation, got none"):
        SearchSpace(nothing)


@pytest.mark.parametrize("unknown", ["cutmix", ["cutout", "cutmix"], {"cutmix": {}}], ids=repr)
def test_a_space_rejects_an_unknown_kind(unknown):
    with pytest.raises(ValueError, match="got 'cutmix'"):
        SearchSpace(unknown)


def test_a_space_rejects_an_unknown_hyperparameter():
    with pytest.raises(ValueError, match="got 'size'"):
        SearchSpace({"cutout": {"size": 1.0}})


def test_a_space_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SearchSpace("cutout").kinds = {}


@pytest.mark.parametrize("kinds", [MIXED, list(DEFAULT_RANGES), {"cutout": {"patch_aspect": 1}}], ids=repr)
def test_a_space_survives_json(kinds):
    space = SearchSpace(kinds)
    assert SearchSpace.from_json(json.loads(json.dumps(space.to_json()))) == space


def test_a_space_suggests_what_a_fixed_trial_fixes():
    space = SearchSpace(MIXED)
    params = {"augmentation": "cutout", "cutout.patch_area": 0.05}
    expected = Augmentation("cutout", {"patch_area": 0.05, "patch_aspect": 1.0})
    assert space.suggest(optuna.trial.FixedTrial(params)) == expected
    assert space.augmentation(params) == expected


def test_a_study_sees_a_conditional_space_and_its_parameters_give_the_augmentation_back():
    space = SearchSpace(MIXED)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    own = {
        "cutout": {"cutout.patch_area"},
        "cutpaste": {"cutpaste.patch_area", "cutpaste.patch_aspect", "cutpaste.angle"},
        "rotation": {"rotation.angle"},
    }
    seen = set()
    for _ in range(40):
        trial = study.ask()
        augmentation = space.suggest(trial)
        assert set(trial.params) == {"augmentation"} | own[augmentation.kind]
        assert space.augmentation(trial.params) == augmentation
        for name, value in augmentation.hyperparameters.items():
            allowed = space.kinds[augmentation.kind][name]
            assert isinstance(value, float)
            assert (
                value == allowed if not isinstance(allowed, Range) else allowed.low <= value <= allowed.high
            )
        seen.add(augmentation.kind)
        study.tell(trial, 0.0)
    assert seen == set(own)


def test_a_study_knows_which_ranges_are_logarithmic():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trial = study.ask()
    SearchSpace("cutpaste").suggest(trial)
    logarithmic = {name: bool(d.log) for name, d in trial.distributions.items() if name != "augmentation"}
    assert logarithmic == {
        "cutpaste.patch_area": True,
        "cutpaste.patch_aspect": True,
        "cutpaste.angle": False,
    }


def test_the_grid_holds_every_combination_once_with_the_ends():
    space = SearchSpace(MIXED)
    grid = space.grid(3)
    assert len(grid) == 3 + 3**3 + 3
    assert len({tuple(sorted(point.items())) for point in grid}) == len(grid)
    areas = [point["cutout.patch_area"] for point in grid if point["augmentation"] == "cutout"]
    assert areas == pytest.approx([0.002, (0.002 * 0.3) ** 0.5, 0.3])
    assert {point["rotation.angle"] for point in grid if point["augmentation"] == "rotation"} == {
        15,
        97.5,
        180,
    }
    for point in grid:
        augmentation = space.augmentation(point)
        assert space.suggest(optuna.trial.FixedTrial(point)) == augmentation


def test_the_grid_of_a_kind_without_a_range_is_one_point():
    fixed = {"cutout": {"patch_area": 0.1, "patch_aspect": 1.0}, "rotation": {}}
    grid = SearchSpace(fixed).grid(2)
    assert [point["augmentation"] for point in grid] == ["cutout", "rotation", "rotation"]
    assert grid[0] == {"augmentation": "cutout"}


def test_a_grid_needs_two_points():
    with pytest.raises(ValueError, match=r"^points: expected at least 2 .*, got 1"):
        SearchSpace("cutout").grid(1)


# Training


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *[(name, value) for name in ("width", "steps") for value in (0, -1, 2.0, "2", None)],
        *[("batch_size", value) for value in (1, 0, 8.0)],
        *[("seed", value) for value in (-1, 0.5, None)],
        *[
            (name, value)
            for name in ("learning_rate", "momentum", "weight_decay", "jitter")
            for value in (-0.1, float("nan"), float("inf"))
        ],
        ("jitter", 0.6),
        *[("contamination", value) for value in (0.0, 1.0, -0.1, 1.5, float("nan"))],
        ("score", "distance"),
        ("precision", "float16"),
        *[
            ("evaluate_at", value)
            for value in (
                (),
                (0.5,),
                (0.5, 0.9),
                (1.0, 0.5),
                (0.75, 0.5, 1.0),
                (0.5, 0.5, 1.0),
                (0.0, 1.0),
                (-0.5, 1.0),
                (0.001, 1.0),
                (0.5, 1.0, 1.5),
            )
        ],
    ],
)
def test_a_training_names_the_setting_that_is_out_of_its_range(setting, value):
    with pytest.raises(ValueError, match=rf"^{setting}: expected .*, got "):
        Training(**{setting: value})


@pytest.mark.parametrize("fraction", [float("nan"), float("inf")])
def test_a_training_names_evaluate_at_when_a_fraction_is_not_finite(fraction):
    with pytest.raises(ValueError, match=r"^evaluate_at: "):
        Training(evaluate_at=(fraction, 1.0))


def test_a_training_evaluates_at_the_steps_nearest_to_its_fractions():
    assert Training(steps=150, evaluate_at=(0.5, 0.75, 1.0)).evaluation_steps == (75, 112, 150)
    assert Training(steps=1, evaluate_at=(1.0,)).evaluation_steps == (1,)
    assert Training(steps=10, evaluate_at=[0.1, 1]).evaluate_at == (0.1, 1.0)


def test_a_training_is_frozen_and_comes_back_from_json():
    training = Training(encoder="resnet18", contamination=0.1, evaluate_at=(0.5, 1.0), seed=3)
    assert Training(**json.loads(json.dumps(dataclasses.asdict(training)))) == training
    with pytest.raises(dataclasses.FrozenInstanceError):
        training.steps = 1
