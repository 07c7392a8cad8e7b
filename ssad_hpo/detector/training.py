"""A training: the network that it begins with, and the loop, a classifier of normal against augmented images.

As in DSV (Yoo et al., ECML PKDD 2023, section 2.1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssad_hpo.augment import check_fits, jitter
from ssad_hpo.detector.model import Detector
from ssad_hpo.detector.transform import Transform, pseudo_anomalies
from ssad_hpo.encoder import NONE, Network, build_network, draws, map_strides
from ssad_hpo.numerics import (
    autocast,
    check_surroundings,
    draw_batches,
    prepare_allocator,
    resolve_precision,
    seed_at,
    seeded,
    to_float,
)
from ssad_hpo.task import Augmentation, DetectorError, Training

_PRETRAINED_SHARE = 0.1  # of the head's learning rate, for a pretrained encoder


@dataclass(frozen=True)
class Checkpoint:
    """A detector in the course of its training.

    Attributes:
        step: training steps done.
        detector: the detector at this step, without a density; valid until the training goes on.
        loss: mean cross-entropy over the steps since the last checkpoint.
        state: what `train` needs to go on from here: tensors and plain values, for `torch.save`; valid
            until the training goes on.
    """

    step: int
    detector: Detector
    loss: float
    state: dict[str, Any]


def train(
    images: Tensor,
    augmentation: Augmentation | Transform,
    training: Training,
    device: str | torch.device = "cpu",
    state: dict[str, Any] | None = None,
) -> Iterator[Checkpoint]:
    """Train a detector to tell `images` from `augment(images)`, and hand it out at the chosen steps.

    Args:
        images: (N, C, H, W) uint8, normal images.
        augmentation: f_aug; ranges are drawn anew for every image. Of a `Transform` nothing is checked.
        training: settings; its seed decides initial weights, batches, jitter and augmentation.
        device: where to train.
        state: of a checkpoint of this same training: go on after it, to the same bits on the same machine.

    Yields:
        A `Checkpoint` after each of `training.evaluation_steps`, or those that are left; the last is the
        whole training.

    Raises:
        ValueError: for images of another type, a patch of the augmentation that does not fit, or settings of
            torch's (default dtype, autocast, no gradients) by which it would be another training.
        DetectorError: if the loss is not finite; it names the hyperparameters.
    """
    check_surroundings()
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images: expected uint8 (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
    device = torch.device(device)
    channels, height, width = images.shape[1:]
    if isinstance(augmentation, Augmentation):
        check_fits(augmentation, height=height, width=width)
    prepare_allocator(device, height * width)
    network = untrained_network(training, (channels, height, width), device)
    precision = resolve_precision(training, device, height * width, depthwise=network.depthwise)
    training = replace(training, precision=precision)
    network.to(device)
    optimizer = optimizer_of(network, training)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    generator = torch.Generator(device).manual_seed(training.seed)
    images = images.to(device)
    batches = draw_batches(len(images), training, generator)
    targets = torch.arange(2, device=device).repeat_interleave(training.batch_size)
    detector = Detector(network, augmentation, training, (channels, height, width))
    if state is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        annealing.load_state_dict(state["annealing"])
        generator.set_state(state["generator"])
    done = 0 if state is None else state["step"]

    for start, end in itertools.pairwise((0, *training.evaluation_steps)):
        if end <= done:
            continue
        network.train()
        total = torch.zeros((), device=device)
        with seeded(seed_at(training.seed, start), device, draws=draws(network)):
            for step in range(start, end):
                normal = jitter(to_float(images[batches[step]]), training.jitter, generator)
                augmented = pseudo_anomalies(normal, augmentation, generator)
                with autocast(device, training):
                    logits = network(torch.cat([normal, augmented]))
                loss = F.cross_entropy(logits.float(), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                annealing.step()
                total += loss.detach()
        mean_loss = float(total) / (end - start)
        if not math.isfinite(mean_loss):
            raise DetectorError(f"diverged: loss {mean_loss} by step {end} under {augmentation}")
        network.eval()
        state = {
            "step": end,
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "annealing": annealing.state_dict(),
            "generator": generator.get_state(),
        }
        yield Checkpoint(end, detector, mean_loss, state)


def untrained_network(
    training: Training, image_shape: tuple[int, int, int], device: torch.device | None = None
) -> Network:
    """The network that a training begins with, on the CPU; weights follow the training's seed.

    Raises:
        ValueError: for an encoder that is unknown, cannot take such images, or lacks the feature maps that
            scores of patches are made of; or weights that cannot be had.
    """
    channels, height, width = image_shape
    with seeded(training.seed, device):
        network = build_network(
            training.encoder,
            channels=channels,
            image_size=(height, width),
            width=training.width,
            weights=training.weights,
        )
    if training.score == "patches":
        with torch.inference_mode():
            map_strides(network.eval(), torch.zeros(1, *image_shape))
        network.train()
    network.hold(training.frozen_stages, batch_norm=training.encoder_batch_norm == "eval")
    return network


def untrained_detector(
    training: Training,
    image_shape: tuple[int, int, int],
    augmentation: Augmentation,
    device: torch.device,
) -> Detector:
    """A detector of weights as they come, which does not score by its classifier: that knows nothing yet."""
    pixels = image_shape[1] * image_shape[2]
    network = untrained_network(training, image_shape, device)
    precision = resolve_precision(training, device, pixels, depthwise=network.depthwise)
    score = "density" if training.score == "classifier" else training.score
    training = replace(training, precision=precision, score=score)
    return Detector(network.to(device).eval(), augmentation, training, image_shape)


def optimizer_of(network: Network, training: Training) -> torch.optim.SGD:
    """SGD on what of a network moves, the encoder at a rate of its own if it has one.

    Searches and tunings train by it.
    """
    groups: list[dict[str, Any]]
    if training.encoder_learning_rate is None and training.weights == NONE:
        groups = [{"params": list(network.parameters())}]
    else:
        encoder = [p for p in network.encoder.parameters() if p.requires_grad]
        groups = [{"params": encoder, "lr": encoder_rate(training)}] if encoder else []
        groups.append({"params": list(network.head.parameters())})
    return torch.optim.SGD(
        groups,
        lr=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
    )


def encoder_rate(training: Training) -> float:
    """The encoder's learning rate: its own, else the head's, or a tenth of that if it is pretrained."""
    if training.encoder_learning_rate is not None:
        return training.encoder_learning_rate
    return training.learning_rate * (1.0 if training.weights == NONE else _PRETRAINED_SHARE)
