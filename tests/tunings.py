"""Tiny tunings for the tests of `bilevel`: a task, a training and settings that end in a moment."""

from dataclasses import replace

import pytest
import torch

from ssad_hpo.augment import KINDS
from ssad_hpo.bilevel import Tuning
from ssad_hpo.task import Task, Training

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


def quick(space, **changed):
    """The tuning QUICK of another kind of augmentation, and with other settings."""
    return replace(QUICK, space=space, **changed)


def random_task(n_train=10, n_unlabeled=8, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(60, 200, (n_train + n_unlabeled, 1, size, size), generator=generator)
    images = images.to(torch.uint8)
    images[n_train : n_train + n_unlabeled // 2, :, 4:9, 3:9] = 0
    return Task("tiny", images[:n_train], images[n_train:])


TASK = random_task()


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
            [start.scores.tolist(), *(t.tolist() for t in vars(start.embeddings).values() if t is not None)],
            {name: t.tolist() for name, t in start.detector.network.state_dict().items()},
            replace(start.cost, seconds=0),
        )
        for start in result.starts
    ] + [result.chosen, replace(result.cost, seconds=0)]


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
