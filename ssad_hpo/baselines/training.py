"""What the autoencoder and Deep SVDD share: how they are trained on plain images, and how they score."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ssad_hpo.encoder import draws
from ssad_hpo.numerics import check_surroundings, draw_batches, seeded, to_float
from ssad_hpo.task import DetectorError, Training

# A loss that ends so many times higher than it began has diverged: it was below 1 in sound trainings.
_DIVERGED = 2
SCORE_BATCH = 256


def minimise(
    loss_of: Callable[[Tensor], Tensor],
    network: nn.Module,
    images: Tensor,
    training: Training,
    learning_rate: float,
) -> Tensor:
    """Train a network on batches of (N, C, H, W) uint8 images; the (steps,) losses."""
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate, weight_decay=training.weight_decay)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    generator = torch.Generator(images.device).manual_seed(training.seed)
    losses = torch.zeros(training.steps, device=images.device)
    network.train()
    with seeded(training.seed, images.device, draws=draws(network)):
        for step, batch in enumerate(draw_batches(len(images), training, generator)):
            loss = loss_of(to_float(images[batch]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            annealing.step()
            losses[step] = loss.detach()
        _measure_batch_statistics(network, images, training)
    losses = losses.cpu()
    first, last = float(losses[0]), float(losses[-max(1, training.steps // 10) :].mean())
    if not losses.isfinite().all() or last > _DIVERGED * first:
        raise DetectorError(
            f"diverged: the loss went from {first:.3g} to {last:.3g} with learning_rate {learning_rate:g}; "
            "use a smaller one"
        )
    return losses


@torch.no_grad()
def _measure_batch_statistics(network: nn.Module, images: Tensor, training: Training) -> None:
    """Batch norms get the statistics of the finished network over all images.

    Their running averages lag behind a short training: with torchvision's MobileNet, whose momentum is
    0.01, every embedding of Deep SVDD would be the same after 150 steps.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches that follow
    # A batch of one image has no batch statistics.
    for batch in images.split(training.batch_size):
        if len(batch) > 1:
            network(to_float(batch))


@torch.inference_mode()
def scores_of(
    score_of: Callable[[Tensor], Tensor],
    network: nn.Module,
    image_shape: tuple[int, int, int],
    images: Tensor,
) -> Tensor:
    """(N,) float64 scores on the CPU of (N, C, H, W) uint8 images, in blocks; checked before and after."""
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != image_shape:
        expected = ", ".join(map(str, image_shape))
        raise ValueError(f"images: expected uint8 (N, {expected}), got {images.dtype} {tuple(images.shape)}")
    device = next(network.parameters()).device
    with torch.autocast(device.type, enabled=False):  # of a user's
        blocks = [score_of(to_float(block.to(device))) for block in images.split(SCORE_BATCH)]
    scores = torch.cat(blocks).double().cpu()
    if not scores.isfinite().all():
        raise DetectorError("diverged: the scores are not finite")
    return scores


def check_images(images: Tensor) -> tuple[int, int, int]:
    """Channels, height and width."""
    check_surroundings()
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) < 2 or images.shape[1] not in (1, 3):
        raise ValueError(
            "images: expected uint8 (N, C, H, W) with N >= 2 and C 1 or 3, "
            f"got {images.dtype} {tuple(images.shape)}"
        )
    channels, height, width = images.shape[1:]
    return channels, height, width


def remove_biases(network: nn.Module) -> None:
    """No convolution, linear layer or batch norm adds a constant any more; nor do batch norms scale."""
    for module in network.modules():
        of_attention = isinstance(module, NonDynamicallyQuantizableLinear)  # which cannot do without
        if isinstance(module, _ConvNd | nn.Linear | _BatchNorm) and not of_attention:
            module.register_parameter("bias", None)
        if isinstance(module, _BatchNorm):
            module.register_parameter("weight", None)
