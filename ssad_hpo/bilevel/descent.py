"""One starting point on its way: the training steps, and every few of them a step of the hyperparameters."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssad_hpo.augment import Value, apply, draw_noise, jitter
from ssad_hpo.bilevel.cost import Cost
from ssad_hpo.bilevel.focus import EVERY, standing_out
from ssad_hpo.bilevel.gradient import TrainingBatch, ValidationBatch, bilevel_gradient
from ssad_hpo.bilevel.problem import Problem
from ssad_hpo.bilevel.result import OuterStep, last_training_loss
from ssad_hpo.bilevel.settings import Tuning
from ssad_hpo.criteria import DegenerateError
from ssad_hpo.detector import Detector, untrained_network
from ssad_hpo.detector.training import encoder_rate, optimizer_of
from ssad_hpo.encoder import draws
from ssad_hpo.numerics import autocast, draw_batches, seed_at, seeded, to_float
from ssad_hpo.task import Augmentation, DetectorError


class Descent:
    """A network and a point that are trained in turn; all that a checkpoint must hold is in `state`.

    Descents of one problem draw the same batches and noise: they differ by their starting points alone, and
    by which unlabelled images stand out, where these decide what is looked at.

    Attributes:
        network: theta.
        point: (K,) float64, the hyperparameters.
        step: training steps done.
        trajectory: the steps of the hyperparameters so far.
        cost: of this descent; see `load`.
    """

    def __init__(self, problem: Problem, point: Tensor) -> None:
        self.problem, training = problem, problem.training
        self.train_images = problem.task.train.to(problem.device)
        self.unlabeled_images = problem.task.unlabeled.to(problem.device)
        held_out = problem.task.held_out if problem.tuning.needs_held_out else None
        self.held_out_images = None if held_out is None else held_out.to(problem.device)
        self.focused: Tensor | None = None  # places of the unlabelled images that are looked at; None for all
        channels, height, width = problem.task.train.shape[1:]
        network = untrained_network(training, (channels, height, width), problem.device)
        self.network = network.to(problem.device).train()
        self.draws = draws(self.network)
        self.moving = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimizer = optimizer_of(self.network, training)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]  # before any annealing
        rate = training.learning_rate
        self.encoder_share = encoder_rate(training) / rate if rate else 1.0
        self.point = point.to(problem.device, copy=True)
        self.adam = torch.optim.Adam([self.point], lr=problem.tuning.learning_rate)
        self.generator = torch.Generator(problem.device).manual_seed(training.seed)
        self.batches = draw_batches(len(self.train_images), training, self.generator)
        self.targets = torch.arange(2, device=problem.device).repeat_interleave(training.batch_size)
        self.step = 0
        self.trajectory: list[OuterStep] = []
        self.cost = Cost()
        self._losses: list[Tensor] = []  # since the last outer step

    def train(self, until: int) -> Iterator[OuterStep]:
        """Do training steps up to `until`, and yield every step of the hyperparameters when it is done.

        Whenever this yields or ends, `state` is whole.

        Raises:
            DetectorError: for a loss or gradient that is not finite, or embeddings that collapsed; it
                names the hyperparameters.
        """
        problem, tuning = self.problem, self.problem.tuning
        while self.step < until:
            began = time.monotonic()
            outer, moving = None, self.step + 1 - problem.warm
            # Seeded at every step, dropout draws the same after a resume.
            seed = seed_at(problem.training.seed, self.step)
            with seeded(seed, problem.device, draws=self.draws):
                batch = self._training_batch()
                if moving > 0 and moving % tuning.detector_steps == 0:
                    outer = self._outer_step(batch)
                else:
                    self._training_step(batch)
            if self.step + 1 == problem.warm:
                self._mean_loss()
            self.step += 1
            self.cost += Cost(seconds=time.monotonic() - began)
            if outer is not None:
                self.trajectory.append(outer)
                yield outer

    def state(self) -> dict[str, Any]:
        """All that changes, as tensors, numbers and containers; it shares memory with the run."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "point": self.point,
            "adam": self.adam.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "focused": self.focused,
            "trajectory": [asdict(outer) for outer in self.trajectory],
            "cost": asdict(self.cost),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.load_warm_start(state)
        self.point.copy_(state["point"])
        self.adam.load_state_dict(copy.deepcopy(state["adam"]))
        self.focused = state.get("focused")  # there was none once
        self.trajectory = [OuterStep(**outer) for outer in state["trajectory"]]
        self.cost = Cost(**state["cost"])

    def load_warm_start(self, state: dict[str, Any]) -> None:
        """Begin after another descent's warm start, at one's own point; its cost is not taken over."""
        self.network.load_state_dict(state["network"])
        # An optimizer keeps the tensors that it is given, and writes into them.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.generator.set_state(state["generator"].cpu())
        self.step = state["step"]

    @property
    def trained(self) -> int:
        """Training steps done."""
        return self.step

    @property
    def training_loss(self) -> float:
        """Mean cross-entropy over the last tenth of the steps of the hyperparameters."""
        return last_training_loss(tuple(self.trajectory))

    @property
    def augmentation(self) -> Augmentation:
        """What the detector is trained with now: static, or whole ranges in a warm start on them."""
        return self._ranged or self.problem.coordinates.at(self.point)

    @property
    def _ranged(self) -> Augmentation | None:
        """What a warm start on ranges trains with at this step: the kinds of the space in turn."""
        if self.step >= self.problem.warm or self.problem.tuning.warm_start_on != "range":
            return None
        kinds = self.problem.tuning.augmentations
        return kinds[self.step % len(kinds)]

    def _training_batch(self) -> TrainingBatch:
        images = to_float(self.train_images[self.batches[self.step]])
        images = jitter(images, self.problem.training.jitter, self.generator)
        return TrainingBatch(images, draw_noise(len(images), self.generator, images), self.targets)

    def _validation_batch(self) -> ValidationBatch:
        tuning = self.problem.tuning
        train = self._some(self.train_images, tuning.validation_train)
        noise = draw_noise(len(train), self.generator, train)
        seen = self.unlabeled_images if self.focused is None else self.unlabeled_images[self.focused]
        unlabeled = self._some(seen, tuning.validation_unlabeled)
        held_out = None
        if self.held_out_images is not None:
            held_out = self._some(self.held_out_images, tuning.validation_held_out)
        return ValidationBatch(train, noise, unlabeled, held_out)

    def _some(self, images: Tensor, count: int) -> Tensor:
        order = torch.randperm(len(images), generator=self.generator, device=self.generator.device)
        return to_float(images[order[:count]])

    def _training_step(self, batch: TrainingBatch) -> None:
        problem, ranged = self.problem, self._ranged
        kind = problem.coordinates.augmentation.kind if ranged is None else ranged.kind
        hyperparameters: Mapping[str, Value] = (
            problem.coordinates.values(self.point) if ranged is None else ranged.hyperparameters
        )
        augmented = apply(batch.images, kind, hyperparameters, batch.noise, problem.tuning.temperature)
        with autocast(problem.device, problem.training):
            logits = self.network(torch.cat([batch.images, augmented]))
        loss = F.cross_entropy(logits.float(), batch.targets)
        gradients = torch.autograd.grad(loss, self.moving, allow_unused=True)
        self._descend(loss, gradients)
        self.cost += Cost(forward=len(batch.targets), backward=len(batch.targets))

    def _focus(self) -> None:
        """Choose the unlabelled images to look at, by the density of the detector as it is."""
        task, training = self.problem.task, self.problem.training
        if task.held_out is None:
            return
        channels, height, width = task.train.shape[1:]
        detector = Detector(self.network.eval(), self.augmentation, training, (channels, height, width))
        detector.fit_density(detector.embed(task.train))
        found = [detector.density_score(detector.embed(images)) for images in (task.unlabeled, task.held_out)]
        self.focused = standing_out(*found).to(self.problem.device)
        self.network.train()
        self.cost += Cost(forward=sum(map(len, task.sets().values())))

    def _outer_step(self, batch: TrainingBatch) -> OuterStep:
        """A step of the point, looking ahead by part of a training batch, and the training step with it."""
        problem, tuning = self.problem, self.problem.tuning
        if tuning.focuses and len(self.trajectory) % EVERY == 0:
            self._focus()
        ahead, validation = batch.first(tuning.virtual_images), self._validation_batch()
        try:
            found = bilevel_gradient(
                self.network, problem.coordinates, self.point, ahead, validation, tuning, self.encoder_share
            )
        except DegenerateError as error:
            raise DetectorError(
                f"collapsed at step {self.step + 1} under {self.augmentation}: {error}"
            ) from error
        if not (found.validation_loss.isfinite() and found.hyperparameters.isfinite().all()):
            raise DetectorError(
                f"diverged: validation loss {float(found.validation_loss)} with gradient "
                f"{found.hyperparameters.tolist()} at step {self.step + 1} under {self.augmentation}"
            )
        self._training_step(batch)
        outer = OuterStep(
            self.step + 1,
            problem.coordinates.numbers(self.point),
            self._mean_loss(),
            float(found.validation_loss),
        )
        self.point.grad = found.hyperparameters
        self.adam.step()
        problem.coordinates.project(self.point)
        self.cost += _cost_of_gradient(ahead, validation, tuning)
        return outer

    def _descend(self, loss: Tensor, gradients: tuple[Tensor | None, ...]) -> None:
        for parameter, gradient in zip(self.moving, gradients, strict=True):
            parameter.grad = gradient
        if self.problem.tuning.annealing:
            done = self.step / self.problem.training.steps
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * done)) / 2
        self.optimizer.step()
        self._losses.append(loss.detach())

    def _mean_loss(self) -> float:
        """The mean training loss since it was last asked for."""
        mean = float(torch.stack(self._losses).mean())
        self._losses.clear()
        if not math.isfinite(mean):
            raise DetectorError(f"diverged: loss {mean} by step {self.step + 1} under {self.augmentation}")
        return mean


def _cost_of_gradient(ahead: TrainingBatch, validation: ValidationBatch, tuning: Tuning) -> Cost:
    augmented = len(validation.train)
    unseen = len(validation.unlabeled) + (0 if validation.held_out is None else len(validation.held_out))
    validated = len(validation.train) + augmented + unseen
    stepped = len(ahead.targets) if tuning.virtual_rate else 0
    if tuning.order == 2:
        return Cost(forward=stepped + validated, backward=stepped + validated, second=stepped)
    with_gradient = augmented if tuning.batch_norm == "eval" else validated
    return Cost(forward=stepped + validated, backward=stepped + with_gradient)
