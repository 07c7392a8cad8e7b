"""ST-SSAD: the course of a tuning, what it gives, its cost, and whom it tells."""

import gc
import itertools
import math
from dataclasses import replace

import pytest
import torch
from held_out import ALWAYS
from torch.nn.modules.module import register_module_forward_pre_hook
from tunings import QUICK, TASK, TINY, all_of, every_kind, every_order, quick

from ssad_hpo.bilevel import LOSSES, Tuning, prepare, tune
from ssad_hpo.bilevel.descent import Descent
from ssad_hpo.criteria import evaluate_all
from ssad_hpo.detector import Detector, train
from ssad_hpo.encoder import SmallEncoder
from ssad_hpo.judgement import judge
from ssad_hpo.task import Augmentation

# Tiny trainings end anywhere; what is a sign of collapse has its own tests.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::ssad_hpo.bilevel.CollapseWarning"),
]


@every_kind
@every_order
def test_a_tuning_learns_hyperparameters_within_their_bounds_and_gives_a_finished_detector(kind, order):
    result = tune(TASK, quick(kind, order=order, learning_rate=0.1), TINY)
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
        sets = judge(tuned.detector, TASK).embeddings
        assert tuned.detector.augmentation == tuned.augmentation
        assert tuned.criteria == evaluate_all(sets.train, sets.augmented, sets.unlabeled)
        default = LOSSES[Tuning().loss](sets.train, sets.augmented, sets.unlabeled)
        assert tuned.validation_loss == pytest.approx(float(default))
        assert torch.equal(tuned.detector.score(TASK.unlabeled), tuned.scores)
    assert result.kept is result.starts[result.chosen]
    assert result.augmentation == result.kept.augmentation and result.detector is result.kept.detector


def test_the_same_seed_gives_the_same_result_and_another_one_another():
    before = torch.get_rng_state()
    first, second = (all_of(tune(TASK, quick("cutavg"), TINY)) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)
    assert all_of(tune(TASK, quick("cutavg"), replace(TINY, seed=1))) != first


def test_a_fixed_hyperparameter_stays():
    result = tune(TASK, quick(Augmentation("cutdiff", {"patch_aspect": 1.0})), TINY)
    assert result.augmentation.hyperparameters["patch_aspect"] == 1.0
    assert set(result.kept.trajectory[0].hyperparameters) == {"patch_area"}


def test_a_finished_detector_survives_the_disk(tmp_path):
    result = tune(TASK, quick("cutpaste"), TINY)
    result.detector.save(tmp_path)
    assert torch.equal(Detector.load(tmp_path).score(TASK.unlabeled), result.kept.scores)


def test_starting_points_share_a_warm_start_on_the_range_but_not_one_on_the_start():
    shared = tune(TASK, quick("cutdiff"), TINY)
    own = tune(TASK, quick("cutdiff", warm_start_on="start"), TINY)
    cold = tune(TASK, quick("cutdiff", warm_start=0.0), replace(TINY, steps=8))
    forward = [tuned.cost.forward for result in (shared, own, cold) for tuned in result.starts]
    warm = 4 * 2 * TINY.batch_size
    assert forward[0] == forward[1] == forward[2] - warm == forward[3] - warm == forward[4] == forward[5]
    assert shared.cost.forward == sum(forward[:2]) + warm
    assert own.cost.forward == sum(forward[2:4]) and cold.cost.forward == sum(forward[4:])
    # What the second starting point gives does not depend on the first one's having run before it.
    alone = tune(TASK, quick("cutdiff", starts=QUICK.starts[1:]), TINY)
    assert all_of(alone)[0] == all_of(shared)[1]


@pytest.mark.parametrize("warm_start_on", ["range", "start"])
def test_a_warm_start_is_plain_training_on_the_range_or_the_starting_point(warm_start_on):
    tuning = quick("cutdiff", warm_start=0.5, warm_start_on=warm_start_on, annealing=True)
    problem = prepare(TASK, tuning, TINY)[0].problem
    point = problem.coordinates.start(0.8)
    descent = Descent(problem, point)
    assert list(descent.train(until=problem.warm)) == [] and descent.step == 6
    augmentation = problem.coordinates.at(point) if warm_start_on == "start" else Augmentation("cutdiff")
    checkpoint = next(train(TASK.train, augmentation, replace(TINY, evaluate_at=(0.5, 1.0))))
    assert checkpoint.step == 6
    expected = checkpoint.detector.network.state_dict()
    torch.testing.assert_close(dict(descent.network.state_dict()), dict(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("choose_by", [*ALWAYS, "validation_loss"])
def test_the_starting_point_lowest_in_the_criterion_is_kept(choose_by):
    tuning = quick("cutout", loss="mmd_normalised", starts=(0.2, 0.5, 0.9), choose_by=choose_by)
    result = tune(TASK, tuning, TINY)
    values = [
        tuned.validation_loss if choose_by == "validation_loss" else tuned.criteria[choose_by]
        for tuned in result.starts
    ]
    assert values[result.chosen] == min(values) < max(values)


@every_order
@pytest.mark.parametrize("batch_norm", ["eval", "train"])
@pytest.mark.parametrize("score", ["density", "patches", "classifier"])
def test_the_cost_is_counted_to_the_image(order, batch_norm, score):
    passed = {True: 0, False: 0}

    def count(module, arguments):
        if isinstance(module, SmallEncoder) and len(arguments[0]) > 1:  # one image shows how large maps are
            passed[torch.is_grad_enabled()] += len(arguments[0])

    tuning = quick("cutavg", order=order, batch_norm=batch_norm)
    hook = register_module_forward_pre_hook(count)
    try:
        cost = tune(TASK, tuning, replace(TINY, score=score)).cost
    finally:
        hook.remove()
    assert cost.forward == sum(passed.values())
    # What is passed forward with gradients is passed backward, all of it; 2 starts of 4 outer steps.
    assert cost.backward == passed[True]
    assert cost.second == (2 * 4 * 2 * QUICK.virtual_images if order == 2 else 0)
    assert cost.images == cost.forward + cost.backward + 2 * cost.second
    assert cost.seconds > 0


def test_a_contamination_sizes_the_augmented_set_of_the_finished_detector():
    result = tune(TASK, quick("cutavg"), replace(TINY, contamination=0.6))
    assert len(result.kept.embeddings.augmented) == 15


def test_a_rate_that_is_annealed_gives_another_detector():
    constant, annealed = (
        tune(TASK, quick("cutavg", annealing=annealing), TINY) for annealing in (False, True)
    )
    assert constant.kept.scores.tolist() != annealed.kept.scores.tolist()


def test_a_recorder_hears_of_every_starting_point(listener):
    result = tune(TASK, quick("cutdiff"), TINY, recorder=listener)
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


@pytest.mark.slow
def test_memory_stays_flat_over_steps():
    training = replace(TINY, steps=200)
    tuning = quick("cutpaste", detector_steps=1, warm_start=0.0)
    problem = prepare(TASK, tuning, training)[0].problem
    descent = Descent(problem, problem.coordinates.start(0.5))

    def resident_mb():
        lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
        return int(lines["VmRSS"].split()[0]) / 1024

    measured = []
    for outer in descent.train(until=200):
        if outer.step % 50 == 0:
            gc.collect()
            measured.append(resident_mb())
    # Counted by its activations, one step's graph has some 0.3 MB: 150 of them kept would be 45.
    assert len(measured) == 4 and measured[-1] - measured[0] < 10
