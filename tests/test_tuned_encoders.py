"""ST-SSAD with encoders that a search takes: pretrained, partly frozen, at rates of their own."""

import contextlib
from dataclasses import replace

import pytest
import torch
from held_out import held_out_task
from test_bilevel_resume import Interrupter, Interruption
from tunings import QUICK, all_of, quick, random_task

import ssad_hpo.bilevel.gradient
from ssad_hpo.augment import draw_noise
from ssad_hpo.bilevel import (
    Coordinates,
    TrainingBatch,
    Tuning,
    ValidationBatch,
    bilevel_gradient,
    prepare,
    tune,
)
from ssad_hpo.bilevel.ways import way_of
from ssad_hpo.detector import train, untrained_network
from ssad_hpo.task import Augmentation, Training

# Tiny trainings end anywhere; what is a sign of collapse has its own tests.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::ssad_hpo.bilevel.CollapseWarning"),
]

LITE0 = Training(
    encoder="tf_efficientnet_lite0", frozen_stages=3, encoder_batch_norm="eval", steps=6, batch_size=3,
    learning_rate=0.03, encoder_learning_rate=0.003, evaluate_at=(1.0,), precision="float32",
)  # fmt: skip
TASK = random_task(6, 6, size=32)
SHORT = {"virtual_images": 2, "validation_train": 3, "validation_unlabeled": 3, "starts": (0.6,)}


@pytest.mark.parametrize("order", [1, 2])
def test_frozen_stages_stay_to_the_bit_and_the_rest_moves(order):
    before = untrained_network(LITE0, (1, 32, 32))
    frozen = {n for n, p in before.named_parameters() if not p.requires_grad}
    (tuned,) = tune(TASK, quick("cutdiff", order=order, **SHORT), LITE0).starts
    first, last = dict(before.named_parameters()), dict(tuned.detector.network.named_parameters())
    assert frozen and frozen < first.keys()
    for name in first:
        assert torch.equal(first[name], last[name]) == (name in frozen), name
    areas = [outer.hyperparameters["patch_area"] for outer in tuned.trajectory]
    assert len(set(areas)) == len(areas)


def test_a_pretrained_encoder_is_tuned_from_its_weights():
    training = replace(LITE0, weights="pretrained", frozen_stages=4, encoder_learning_rate=None)
    (tuned,) = tune(TASK, quick("cutdiff", order=1, **SHORT), training).starts
    expected = dict(untrained_network(training, (1, 32, 32)).named_parameters())
    found = dict(tuned.detector.network.named_parameters())
    kept = [n for n, p in expected.items() if not p.requires_grad]
    assert kept and all(torch.equal(found[n], expected[n]) for n in kept)


def test_a_warm_start_trains_like_a_search_at_the_rates_of_both():
    tuning = quick("cutdiff", warm_start=0.5, annealing=True, starts=(0.8,), detector_steps=3)
    descent = way_of(prepare(TASK, tuning, LITE0)[0])
    assert list(descent.train(until=3)) == []
    checkpoint = next(train(TASK.train, Augmentation("cutdiff"), replace(LITE0, evaluate_at=(0.5, 1.0))))
    expected = checkpoint.detector.network.state_dict()
    torch.testing.assert_close(dict(descent.network.state_dict()), dict(expected), rtol=1e-4, atol=1e-5)
    assert [group["lr"] for group in descent.optimizer.param_groups] == pytest.approx(
        [rate * 0.75 for rate in (0.003, 0.03)]  # before the third of six steps
    )


def step_of(training, dtype=torch.float64, size=32):
    """What `bilevel_gradient` takes, of a network for a training."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(18, 1, size, size, generator=generator, dtype=dtype)
    network = untrained_network(training, (1, size, size)).to(dtype)
    coordinates = Coordinates.of(Augmentation("cutdiff"))
    noise = draw_noise(12, generator, images)
    batch = TrainingBatch(images[:4], noise[:4], torch.arange(2).repeat_interleave(4))
    validation = ValidationBatch(images[4:9], noise[4:9], images[9:])
    return network, coordinates, coordinates.start(0.7), batch, validation


def test_second_order_of_a_depthwise_net_with_frozen_stages_is_torchs_own(monkeypatch):
    tuning = Tuning("cutdiff", order=2, virtual_rate=0.5)

    def gradient():
        return bilevel_gradient(*step_of(LITE0), tuning, 0.1)

    ours = gradient()
    monkeypatch.setattr(ssad_hpo.bilevel.gradient, "MixedDerivatives", contextlib.nullcontext)
    torchs = gradient()
    torch.testing.assert_close(ours.hyperparameters, torchs.hyperparameters, rtol=1e-6, atol=1e-12)
    first = bilevel_gradient(*step_of(LITE0), replace(tuning, order=1), 0.1)
    assert first.validation_loss.item() == pytest.approx(ours.validation_loss.item(), rel=1e-9)
    assert not torch.allclose(first.hyperparameters, ours.hyperparameters, rtol=1e-6, atol=0)


def test_an_encoder_at_a_share_of_the_rate_looks_ahead_by_that_share():
    small = Training(width=2)
    wide, narrow = Tuning("cutdiff", order=2, virtual_rate=0.5), Tuning("cutdiff", order=2, virtual_rate=0.05)
    shared = bilevel_gradient(*step_of(small, size=16), wide, 0.1)
    expected = bilevel_gradient(*step_of(small, size=16), narrow)
    torch.testing.assert_close(shared.hyperparameters, expected.hyperparameters, rtol=1e-9, atol=0)
    other = bilevel_gradient(*step_of(small, size=16), wide)
    assert not torch.allclose(other.hyperparameters, expected.hyperparameters, rtol=1e-6, atol=0)


def test_a_descent_looks_ahead_at_the_encoders_own_share():
    (start,) = prepare(TASK, quick("cutdiff", **SHORT), LITE0)
    assert way_of(start).encoder_share == pytest.approx(0.1)
    (start,) = prepare(TASK, quick("cutdiff", **SHORT), replace(LITE0, encoder_learning_rate=None))
    assert way_of(start).encoder_share == 1.0  # drawn weights move with the head


def test_an_encoder_that_stays_as_it_is_has_one_gradient_of_either_order():
    whole = replace(LITE0, frozen_stages=5)
    orders = [bilevel_gradient(*step_of(whole), Tuning("cutdiff", order=order)) for order in (1, 2)]
    torch.testing.assert_close(orders[0].hyperparameters, orders[1].hyperparameters, rtol=1e-9, atol=1e-12)
    assert orders[0].hyperparameters.abs().max() > 0


@pytest.mark.slow  # three networks of timm's, each made and read
def test_a_tuning_with_frozen_stages_goes_on_to_the_same_end(tmp_path):
    tuning = replace(QUICK, order=1, space="cutdiff", checkpoint_every=1, **SHORT)
    whole, checkpoint = all_of(tune(TASK, tuning, LITE0)), tmp_path / "tuning.pt"
    with pytest.raises(Interruption):
        tune(TASK, tuning, LITE0, recorder=Interrupter(2), checkpoint=checkpoint)
    assert all_of(tune(TASK, tuning, LITE0, checkpoint=checkpoint)) == whole


def test_held_out_images_reach_neither_training_nor_density():
    """With a loss that does not ask for them, others in their place change criteria alone."""
    task, others = held_out_task(), held_out_task()
    others = replace(others, held_out=255 - others.held_out)
    results = [
        tune(t, quick("cutdiff", starts=(0.6,)), Training(width=2, steps=12, batch_size=4))
        for t in (task, others)
    ]
    ours, theirs = (result.kept for result in results)
    assert ours.trajectory == theirs.trajectory and torch.equal(ours.scores, theirs.scores)
    assert ours.criteria["pu_auc"] != theirs.criteria["pu_auc"]
