"""The network that a training begins with."""

from __future__ import annotations

import torch

from ssad_hpo.encoder import Network, build_network, map_strides
from ssad_hpo.numerics import seeded
from ssad_hpo.task import Training


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
