"""The gradient of the validation loss in the hyperparameters, through one virtual training step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ssad_hpo.augment import apply
from ssad_hpo.bilevel.coordinates import Coordinates
from ssad_hpo.bilevel.settings import Tuning


@dataclass(frozen=True)
class TrainingBatch:
    """What one training step sees.

    Attributes:
        images: (B, C, H, W) in [0, 1], jittered normal images.
        noise: (B, 8) from `augment.draw_noise`.
        targets: (2 B,) pretext classes: B times 0 (normal), B times 1 (augmented).
    """

    images: Tensor
    noise: Tensor
    targets: Tensor


@dataclass(frozen=True)
class ValidationBatch:
    """What the validation loss sees.

    Attributes:
        train: (N, C, H, W) in [0, 1], without jitter; the augmented images are made of these.
        noise: (N, 8) from `augment.draw_noise`.
        unlabeled: (M, C, H, W) in [0, 1].
    """

    train: Tensor
    noise: Tensor
    unlabeled: Tensor


@dataclass(frozen=True)
class BilevelGradient:
    """Losses and gradients of one step; no tensor here holds a graph.

    Attributes:
        training_loss: L_trn(theta, a), a scalar.
        validation_loss: L_val(theta'(a), a), a scalar.
        detector: gradients of L_trn in the network's parameters, in their order; None for a parameter
            that the loss does not use. They are those of the training step itself, so that it need not
            be computed twice.
        hyperparameters: (K,) gradient of L_val in the point a.
    """

    training_loss: Tensor
    validation_loss: Tensor
    detector: list[Tensor | None]
    hyperparameters: Tensor


def bilevel_gradient(
    network: nn.Module,
    coordinates: Coordinates,
    point: Tensor,
    training: TrainingBatch,
    validation: ValidationBatch,
    tuning: Tuning,
) -> BilevelGradient:
    """The gradient of L_val(theta'(a), a), theta'(a) = theta - alpha grad_theta L_trn(theta, a) [ST-SSAD].

    With v = grad_theta' L_val, the part through theta' is -alpha times the gradient in a of
    <grad_theta L_trn(theta, a), v>: one vector-Jacobian product, exact, and no second derivative in theta.
    First order drops it and holds theta' constant.

    The network is left in training mode with its parameters as they were. Its running statistics have
    seen the training batch once, as in any training step, and nothing of the virtual step.

    Args:
        network: from `detector.untrained_network`, theta.
        coordinates: what the point means.
        point: (K,) the hyperparameters a.
        training: the batch of L_trn, which the training step that follows takes as well.
        validation: the batch of L_val.
        tuning: loss, order, virtual rate, batch norm of L_val, temperature.

    Raises:
        DegenerateError: from the loss, for embeddings that collapsed or are not finite.
        ValueError: if the loss is no scalar.
    """
    second_order = tuning.order == 2
    point = point.detach().requires_grad_()
    network.train()
    parameters = dict(network.named_parameters())
    # The running statistics of L_val are those from before the training batch. Those after it depend on a,
    # by a path that no gradient takes: the derivative was off by 0.04 to 0.8 % in tests.
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with torch.set_grad_enabled(True):
        seen_by_training = point if second_order else point.detach()
        augmented = _augmented(training.images, training.noise, coordinates, seen_by_training, tuning)
        logits = network(torch.cat([training.images, augmented]))
        training_loss = F.cross_entropy(logits, training.targets)
        slopes = torch.autograd.grad(
            training_loss, list(parameters.values()), create_graph=second_order, allow_unused=True
        )
        # Embeddings are the encoder's alone: of theta' nothing else matters, so v is 0 for the head.
        moved = {
            name: (parameter, slope)
            for (name, parameter), slope in zip(parameters.items(), slopes, strict=True)
            if slope is not None and name.startswith("encoder.")
        }
        virtual = {
            name: (parameter.detach() - tuning.virtual_rate * slope.detach()).requires_grad_(second_order)
            for name, (parameter, slope) in moved.items()
        }
        state = {**virtual, **buffers}
        validation_loss = _validation_loss(network, state, coordinates, point, validation, tuning)
        if second_order:
            direct, *v = torch.autograd.grad(validation_loss, [point, *virtual.values()])
            (through,) = torch.autograd.grad(
                [slope for _, slope in moved.values()], point, [-tuning.virtual_rate * w for w in v]
            )
            gradient = direct + through
        else:
            (gradient,) = torch.autograd.grad(validation_loss, point)
    return BilevelGradient(
        training_loss.detach(),
        validation_loss.detach(),
        [None if slope is None else slope.detach() for slope in slopes],
        gradient,
    )


def _validation_loss(
    network: nn.Module,
    state: dict[str, Tensor],
    coordinates: Coordinates,
    point: Tensor,
    batch: ValidationBatch,
    tuning: Tuning,
) -> Tensor:
    """L_val of unit embeddings with the encoder's tensors in `state`; the network is left in training mode.

    Batch norm in training mode writes its running statistics into the buffers in `state`.
    """
    augmented = _augmented(batch.train, batch.noise, coordinates, point, tuning)
    network.train(tuning.batch_norm == "train")
    state = {f"network.{name}": tensor for name, tensor in state.items()}

    def embed(images: Tensor) -> Tensor:
        features = functional_call(_Features(network), state, images)
        return F.normalize(features, dim=1)

    sizes = [len(batch.train), len(augmented), len(batch.unlabeled)]
    if tuning.order == 1 and tuning.batch_norm == "eval":
        # No image sees another one, and theta' is constant: only the augmented ones need a gradient.
        with torch.no_grad():
            train, unlabeled = embed(torch.cat([batch.train, batch.unlabeled])).split([sizes[0], sizes[2]])
        sets = [train, embed(augmented), unlabeled]
    else:
        sets = list(embed(torch.cat([batch.train, augmented, batch.unlabeled])).split(sizes))
    network.train()
    loss = tuning.loss_function(*sets)
    if loss.shape != ():
        raise ValueError(f"loss: expected a function that returns a scalar, got shape {tuple(loss.shape)}")
    return loss


class _Features(nn.Module):
    """The part of a network that embeddings come from, as a module that `functional_call` can call."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.features_of(images)  # type: ignore[operator]


def _augmented(
    images: Tensor, noise: Tensor, coordinates: Coordinates, point: Tensor, tuning: Tuning
) -> Tensor:
    kind = coordinates.augmentation.kind
    return apply(images, kind, coordinates.values(point), noise, tuning.temperature)
