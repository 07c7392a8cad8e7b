"""The gradient of the validation loss in the hyperparameters, through one virtual training step."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ssad_hpo.augment import apply
from ssad_hpo.bilevel.coordinates import Coordinates
from ssad_hpo.bilevel.second_order import MixedDerivatives
from ssad_hpo.bilevel.settings import Tuning


@dataclass(frozen=True)
class TrainingBatch:
    """What one training step sees, or a virtual one.

    Attributes:
        images: (B, C, H, W) in [0, 1], jittered normal images.
        noise: (B, 8) from `augment.draw_noise`.
        targets: (2 B,) pretext classes: B times 0 (normal), B times 1 (augmented).
    """

    images: Tensor
    noise: Tensor
    targets: Tensor

    def first(self, count: int) -> TrainingBatch:
        """Its first images with their augmented ones, at most as many as there are."""
        kept = min(count, len(self.images))
        targets = self.targets[[*range(kept), *range(len(self.images), len(self.images) + kept)]]
        return TrainingBatch(self.images[:kept], self.noise[:kept], targets)


@dataclass(frozen=True)
class ValidationBatch:
    """What the validation loss sees.

    Attributes:
        train: (N, C, H, W) in [0, 1], without jitter; the augmented images are made of these.
        noise: (N, 8) from `augment.draw_noise`.
        unlabeled: (M, C, H, W) in [0, 1].
        held_out: (L, C, H, W) in [0, 1], for the losses that need them.
    """

    train: Tensor
    noise: Tensor
    unlabeled: Tensor
    held_out: Tensor | None = None


@dataclass(frozen=True)
class BilevelGradient:
    """What one step of the hyperparameters needs; no tensor here holds a graph.

    Attributes:
        validation_loss: L_val(theta'(a), a), a scalar.
        hyperparameters: (K,) gradient of L_val in the point a.
    """

    validation_loss: Tensor
    hyperparameters: Tensor


def bilevel_gradient(
    network: nn.Module,
    coordinates: Coordinates,
    point: Tensor,
    training: TrainingBatch,
    validation: ValidationBatch,
    tuning: Tuning,
    encoder_share: float = 1.0,
) -> BilevelGradient:
    """The gradient of L_val(theta'(a), a), theta'(a) = theta - alpha grad_theta L_trn(theta, a).

    With v = grad_theta' L_val, the part through theta' is -alpha times the gradient in a of
    <grad_theta L_trn(theta, a), v>: one vector-Jacobian product, exact, and no second derivative in theta.
    First order drops it and holds theta' constant. What is frozen of theta stays in theta', and where the
    whole encoder is, both orders are the same.

    The network is left in training mode, its parameters and running statistics as they were.

    Args:
        network: from `detector.untrained_network`, theta.
        point: (K,) the hyperparameters a.
        training: the batch of L_trn; batch norm in the virtual step uses its statistics.
        tuning: loss, order, virtual rate, batch norm of L_val, temperature.
        encoder_share: of the virtual rate, for the encoder: alpha is their product. A pretrained encoder that
            trains at a tenth of the head's rate looks ahead by a tenth as well.

    Raises:
        DegenerateError: from the loss, for embeddings that collapsed or are not finite.
        ValueError: if the loss is no scalar.
    """
    second_order = tuning.order == 2
    point = point.detach().requires_grad_()
    network.train()
    # The running statistics of L_val are those from before the virtual step. Those after it depend on a,
    # by a path that no gradient takes: the derivative was off by 0.04 to 0.8 % in tests.
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with torch.enable_grad():
        rate = tuning.virtual_rate * encoder_share
        slopes = _slopes(network, coordinates, point, training, tuning) if rate else {}
        virtual = {
            name: parameter.detach().clone()
            for name, parameter in network.named_parameters()
            if name.startswith("encoder.")
        }
        for name, slope in slopes.items():
            virtual[name].sub_(slope.detach(), alpha=rate).requires_grad_(second_order)
        state = {**virtual, **buffers}
        validation_loss = _validation_loss(network, state, coordinates, point, validation, tuning)
        moved = [virtual[name] for name in slopes] if second_order else []
        direct, *v = torch.autograd.grad(validation_loss, [point, *moved], materialize_grads=True)
        gradient = direct
        along = {name: -rate * w for name, w in zip(slopes, v, strict=False) if slopes[name].requires_grad}
        if along:
            depending = [slopes[name] for name in along]
            (through,) = torch.autograd.grad(depending, point, list(along.values()))
            gradient = direct + through
    return BilevelGradient(validation_loss.detach(), gradient)


def _slopes(
    network: nn.Module, coordinates: Coordinates, point: Tensor, batch: TrainingBatch, tuning: Tuning
) -> dict[str, Tensor]:
    """Gradients of L_trn in the encoder's parameters, by name; with second order they depend on the point.

    Embeddings are the encoder's alone: of theta' the head is of no concern.
    """
    second_order = tuning.order == 2
    augmented = _augmented(
        batch.images, batch.noise, coordinates, point if second_order else point.detach(), tuning
    )
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with MixedDerivatives() if second_order else nullcontext():
        logits = functional_call(network, buffers, (torch.cat([batch.images, augmented]),))
    loss = F.cross_entropy(logits, batch.targets)
    parameters = {
        name: p for name, p in network.named_parameters() if name.startswith("encoder.") and p.requires_grad
    }
    if not parameters:
        return {}
    slopes = torch.autograd.grad(
        loss, list(parameters.values()), create_graph=second_order, allow_unused=True
    )
    return {n: slope for n, slope in zip(parameters, slopes, strict=True) if slope is not None}


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

    seen = [batch.train, batch.unlabeled, *([] if batch.held_out is None else [batch.held_out])]
    if tuning.order == 1 and tuning.batch_norm == "eval":
        # No image sees another one, and theta' is constant: only the augmented ones need a gradient.
        with torch.no_grad():
            embedded = list(embed(torch.cat(seen)).split([len(images) for images in seen]))
        embedded.insert(1, embed(augmented))
    else:
        seen.insert(1, augmented)
        embedded = list(embed(torch.cat(seen)).split([len(images) for images in seen]))
    network.train()
    loss = tuning.loss_of(*embedded)
    if loss.shape != ():
        raise ValueError(f"loss: expected a function that returns a scalar, got shape {tuple(loss.shape)}")
    return loss


def check_second_derivatives(network: nn.Module, image_shape: tuple[int, ...]) -> None:
    """Raise ValueError if a network holds an operation that torch cannot differentiate twice.

    Args:
        network: from `detector.untrained_network`; its running statistics change.
    """
    images = torch.zeros(2, *image_shape, requires_grad=True)
    with torch.enable_grad(), MixedDerivatives():
        logits = network.train()(images)
    moving = [parameter for parameter in network.parameters() if parameter.requires_grad]
    slopes = torch.autograd.grad(logits.square().sum(), moving, create_graph=True, allow_unused=True)
    slopes = tuple(slope for slope in slopes if slope is not None and slope.requires_grad)
    try:
        torch.autograd.grad(slopes, images, [torch.ones_like(slope) for slope in slopes])
    except RuntimeError as error:  # "derivative for aten::... is not implemented"
        raise ValueError(f"encoder: order 2 needs second derivatives, and {error}; use order 1") from error


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
