"""Hyperparameters that move before the detector trains, with a pretrained encoder as it comes.

What it makes of all images is taken once, so that a step passes a few augmented images and no others. The
starting points that end lowest then train a detector each, as a search does, with what was found for them.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssad_hpo.augment import apply, draw_noise
from ssad_hpo.bilevel.cost import Cost
from ssad_hpo.bilevel.problem import Problem
from ssad_hpo.bilevel.result import OuterStep
from ssad_hpo.criteria import DegenerateError
from ssad_hpo.detector import train, untrained_network
from ssad_hpo.encoder import Network
from ssad_hpo.numerics import to_float
from ssad_hpo.task import Augmentation, DetectorError

_COMPARED = 32  # images whose augmented copies say where a starting point arrived
_COMPARED_STREAM = 1  # added to the seed: other noise than that of the steps


class Staged:
    """A point that moves down the validation loss of the encoder as it comes, then a training at its end.

    Those of one tuning draw the same images and noise; all that a checkpoint must hold is in `state`.

    Attributes:
        network: theta; of the encoder as it comes until the training is done.
        point: (K,) float64, the hyperparameters.
        step: steps done, those of the hyperparameters first.
        trajectory: the steps of the hyperparameters so far.
        training_loss: mean cross-entropy of the training.
        cost: of this starting point alone.
    """

    def __init__(self, problem: Problem, point: Tensor) -> None:
        self.problem, self.as_it_comes = problem, problem.as_it_comes
        self.train_images = problem.task.train.to(problem.device)
        self.point = point.to(problem.device, copy=True)
        self.adam = torch.optim.Adam([self.point], lr=problem.tuning.learning_rate)
        self.generator = torch.Generator(problem.device).manual_seed(problem.training.seed)
        self.step = 0
        self.trajectory: list[OuterStep] = []
        self.training_loss = math.log(2)
        self.cost = Cost()
        self._trained: Network | None = None

    @property
    def network(self) -> Network:
        """The trained one, or the encoder as it comes."""
        return self.as_it_comes.evaluation.detector.network if self._trained is None else self._trained

    @property
    def augmentation(self) -> Augmentation:
        """What was found until now."""
        return self.problem.coordinates.at(self.point)

    @property
    def trained(self) -> int:
        """Training steps done."""
        return max(0, self.step - self.problem.tuning.steps_before)

    def train(self, until: int) -> Iterator[OuterStep]:
        """Do steps up to `until`, yield every one of the hyperparameters; a training is done as a whole.

        Raises:
            DetectorError: for a loss or gradient that is not finite, or embeddings that collapsed; it
                names the hyperparameters.
        """
        problem, before = self.problem, self.problem.tuning.steps_before
        while self.step < min(until, before):
            began = time.monotonic()
            self._outer_step()
            self.step += 1
            self.cost += Cost(seconds=time.monotonic() - began)
            yield self.trajectory[-1]
        if self.step < until:
            began, training = time.monotonic(), replace(problem.training, evaluate_at=(1.0,))
            (last,) = train(problem.task.train, self.augmentation, training, problem.device)
            self._trained, self.training_loss, self.step = last.detector.network, last.loss, until
            passed = 2 * training.batch_size * training.steps
            self.cost += Cost(forward=passed, backward=passed, seconds=time.monotonic() - began)

    def look(self) -> float:
        """The validation loss where the point is, with hard edges; lower is better.

        Raises:
            DetectorError: if it is not finite.
        """
        began, seed = time.monotonic(), self.problem.training.seed + _COMPARED_STREAM
        generator = torch.Generator(self.problem.device).manual_seed(seed)
        images = to_float(self.train_images[:_COMPARED])
        with torch.no_grad():
            loss = self._loss(images, draw_noise(len(images), generator, images), self.point, 0.0)
        self.cost += Cost(forward=len(images), seconds=time.monotonic() - began)
        if not loss.isfinite():
            raise DetectorError(
                f"diverged: validation loss {float(loss)} before the training under {self.augmentation}"
            )
        return float(loss)

    def state(self) -> dict[str, Any]:
        """All that changes, as tensors, numbers and containers; it shares memory with the run."""
        return {
            "network": None if self._trained is None else self._trained.state_dict(),
            "point": self.point,
            "adam": self.adam.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "trajectory": [asdict(outer) for outer in self.trajectory],
            "training_loss": self.training_loss,
            "cost": asdict(self.cost),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        if state["network"] is not None:
            channels, height, width = self.problem.task.train.shape[1:]
            network = untrained_network(self.problem.training, (channels, height, width), self.problem.device)
            network.load_state_dict(state["network"])
            self._trained = network.to(self.problem.device).eval()
        self.point.copy_(state["point"])
        self.adam.load_state_dict(copy.deepcopy(state["adam"]))
        self.generator.set_state(state["generator"].cpu())
        self.step = state["step"]
        self.trajectory = [OuterStep(**outer) for outer in state["trajectory"]]
        self.training_loss = state["training_loss"]
        self.cost = Cost(**state["cost"])

    def _outer_step(self) -> None:
        problem, tuning = self.problem, self.problem.tuning
        order = torch.randperm(len(self.train_images), generator=self.generator, device=problem.device)
        images = to_float(self.train_images[order[: tuning.validation_train]])
        noise = draw_noise(len(images), self.generator, images)
        point = self.point.detach().requires_grad_()
        with torch.enable_grad():
            loss = self._loss(images, noise, point, tuning.temperature)
            (gradient,) = torch.autograd.grad(loss, point)
        loss = loss.detach()
        if not (loss.isfinite() and gradient.isfinite().all()):
            raise DetectorError(
                f"diverged: validation loss {float(loss)} with gradient {gradient.tolist()} at step "
                f"{self.step + 1} before the training under {self.augmentation}"
            )
        numbers = problem.coordinates.numbers(self.point)
        self.trajectory.append(OuterStep(self.step + 1, numbers, None, float(loss)))
        for group in self.adam.param_groups:  # along a cosine to 0: a few noisy steps come to rest
            group["lr"] = tuning.learning_rate * (1 + math.cos(math.pi * self.step / tuning.steps_before)) / 2
        self.point.grad = gradient
        self.adam.step()
        problem.coordinates.project(self.point)
        self.cost += Cost(forward=len(images), backward=len(images))

    def _loss(self, images: Tensor, noise: Tensor, point: Tensor, temperature: float) -> Tensor:
        problem, (learned, unlabeled, held_out) = self.problem, self.as_it_comes.embeddings
        kind, values = problem.coordinates.augmentation.kind, problem.coordinates.values(point)
        features = self.as_it_comes.evaluation.detector.network.features_of(
            apply(images, kind, values, noise, temperature)
        )
        # As many rows as of train images: the losses weigh sets by their numbers.
        times = math.ceil(len(learned) / len(images))
        augmented = F.normalize(features, dim=1).repeat(times, 1)[: len(learned)]
        try:
            return problem.tuning.loss_of(learned, augmented, unlabeled, held_out)
        except DegenerateError as error:
            raise DetectorError(
                f"collapsed before the training under {self.augmentation}: {error}"
            ) from error
