"""Deep SVDD: normal images are mapped close to a centre, and what lies far from it is anomalous."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ssad_hpo.baselines.autoencoder import Autoencoder
from ssad_hpo.baselines.training import (
    SCORE_BATCH,
    check_images,
    minimise,
    remove_biases,
    scores_of,
)
from ssad_hpo.encoder import Network, build_network
from ssad_hpo.numerics import seeded, to_float
from ssad_hpo.task import DetectorError, Training

# At 1e-3 Deep SVDD's loss falls further because all images, foreign ones too, move to the centre (random
# noise lies some 30 times nearer than at 1e-4); at 1e-5 it is hardly trained.
DEEP_SVDD_LEARNING_RATE = 3e-4

# Of Deep SVDD's output, and how far from 0 its centre's coordinates must be: Ruff et al.'s own code.
_SVDD_DIMENSIONS, _CENTRE_MARGIN = 32, 0.1
# Mean square of the train embeddings' distances to their mean, in units of the squared centre. Sound
# trainings end between 1e-1 and 6e-6; float32 can hardly tell embeddings apart below this.
_COLLAPSED = 1e-8


@dataclass(frozen=True, eq=False)
class DeepSvdd:
    """A trained Deep SVDD: a network that maps normal images close to a centre.

    Attributes:
        network: encoder and a linear projection, without biases, in evaluation mode.
        centre: (D,) float32, on the network's device.
        image_shape: (C, H, W) of the images that it takes.
        losses: (steps,) float32, the mean squared distance to the centre of every training step.
    """

    network: Network
    centre: Tensor
    image_shape: tuple[int, int, int]
    losses: Tensor = field(repr=False)

    def score(self, images: Tensor) -> Tensor:
        """Squared distances to the centre (N,) float64 of (N, C, H, W) uint8 images.

        Higher is more anomalous; not negative.

        Raises:
            ValueError: if the images are of another type or shape.
            DetectorError: if a score is not finite.
        """
        return scores_of(
            lambda batch: (self.network(batch) - self.centre).square().sum(1),
            self.network,
            self.image_shape,
            images,
        )


def train_deep_svdd(
    images: Tensor,
    training: Training,
    *,
    pretrained: Autoencoder | None = None,
    learning_rate: float = DEEP_SVDD_LEARNING_RATE,
    device: str | torch.device = "cpu",
) -> DeepSvdd:
    """Train an encoder to map images close to a fixed centre [Ruff et al., ICML 2018, one-class Deep SVDD].

    The centre is the mean of the images' initial embeddings, its coordinates at least 0.1 from 0. Neither
    convolutions nor linear layers nor batch norms have a bias, with which a constant function would solve
    the task.

    Args:
        images: (N, C, H, W) uint8, normal images, N >= 2, C 1 or 3.
        training: see the module; `encoder` is "small" or a torchvision classifier (one with batch norm
            and without dropout, such as a ResNet, suits best).
        pretrained: an autoencoder of the same width whose encoder is the start; None for random weights.
        learning_rate: Adam's, annealed along a cosine to 0.
        device: where to train.

    Raises:
        ValueError: for images of another type or shape, or an autoencoder of another size.
        DetectorError: if the loss diverges, or all images have the same embedding (collapse).
    """
    channels, height, width = check_images(images)
    images = images.to(device)
    with seeded(training.seed, images.device):
        network = build_network(
            training.encoder, channels=channels, image_size=(height, width), width=training.width
        )
        network.head = nn.Sequential(nn.Linear(network.features, _SVDD_DIMENSIONS))
    remove_biases(network)
    if pretrained is not None:
        _start_from(pretrained, network, training, channels)
    network.to(images.device)

    with torch.no_grad():
        # In training mode, as the first step will see them; a batch of one has no batch statistics.
        batches = [b for b in images.split(training.batch_size) if len(b) > 1]
        with seeded(training.seed, images.device):
            centre = torch.cat([network(to_float(batch)) for batch in batches]).mean(0)
    margin = torch.where(centre < 0, -_CENTRE_MARGIN, _CENTRE_MARGIN)
    centre = torch.where(centre.abs() < _CENTRE_MARGIN, margin, centre)

    losses = minimise(
        lambda batch: (network(batch) - centre).square().sum(1).mean(),
        network,
        images,
        training,
        learning_rate,
    )
    network.eval()
    _check_spread(network, images, centre)
    return DeepSvdd(network, centre, (channels, height, width), losses)


def _start_from(pretrained: Autoencoder, network: Network, training: Training, channels: int) -> None:
    encoder = pretrained.network.encoder
    if training.encoder != "small" or pretrained.image_shape[0] != channels:
        raise ValueError(
            f"pretrained: expected an autoencoder of images with {channels} channels and the encoder "
            f"'small', got {pretrained.image_shape[0]} channels for the encoder {training.encoder!r}"
        )
    if encoder.features != network.features:
        raise ValueError(
            f"pretrained: expected an autoencoder of width {training.width}, got one of "
            f"{encoder.features} instead of {network.features} features"
        )
    network.encoder.load_state_dict(encoder.state_dict())


@torch.inference_mode()
def _check_spread(network: Network, images: Tensor, centre: Tensor) -> None:
    """Raises DetectorError if Deep SVDD maps all train images to one point."""
    embeddings = torch.cat([network(to_float(batch)) for batch in images.split(SCORE_BATCH)])
    spread = float((embeddings - embeddings.mean(0)).square().sum(1).mean() / centre.square().sum())
    if spread < _COLLAPSED:
        raise DetectorError(
            f"collapsed: Deep SVDD maps all {len(images)} train images to one point (mean squared spread "
            f"{spread:.1g} of the squared centre); use a smaller learning_rate or weight_decay, an encoder "
            "with batch norm, and train images that differ"
        )
