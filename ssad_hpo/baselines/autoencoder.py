"""A convolutional autoencoder: what it cannot reconstruct is anomalous."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssad_hpo.baselines.training import check_images, minimise, remove_biases, scores_of
from ssad_hpo.encoder import SmallEncoder, memory_format_of
from ssad_hpo.numerics import seeded
from ssad_hpo.task import Training

# Measured over 150 steps on digits 0, 1 and 4, brick against gravel, gravel against brick, and grass with
# CutDiff. The autoencoder's loss ends up to 4 times higher at 3e-4 (on digits; alike on gravel and grass)
# and within a tenth of this at 3e-3.
AUTOENCODER_LEARNING_RATE = 1e-3
_MEAN, _STD = 0.449, 0.226  # ImageNet's, averaged over channels: nearly what Deep SVDD's network subtracts


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """A trained convolutional autoencoder.

    Attributes:
        network: encoder and decoder, in evaluation mode.
        image_shape: (C, H, W) of the images that it takes.
        losses: (steps,) float32, the mean squared error of every training step.
    """

    network: AutoencoderNetwork
    image_shape: tuple[int, int, int]
    losses: Tensor = field(repr=False)

    def score(self, images: Tensor) -> Tensor:
        """Reconstruction errors (N,) float64 of (N, C, H, W) uint8 images; higher is more anomalous.

        The squared error of a pixel with values in 0..1, averaged over pixels and channels: 0..1.

        Raises:
            ValueError: if the images are of another type or shape.
            DetectorError: if a score is not finite.
        """
        return scores_of(
            lambda batch: (self.network(batch) - batch).square().mean((1, 2, 3)),
            self.network,
            self.image_shape,
            images,
        )


def train_autoencoder(
    images: Tensor,
    training: Training,
    *,
    learning_rate: float = AUTOENCODER_LEARNING_RATE,
    device: str | torch.device = "cpu",
) -> Autoencoder:
    """Train the small encoder with a decoder that mirrors it to give images back.

    Args:
        images: (N, C, H, W) uint8, normal images, N >= 2, C 1 or 3.
        training: see the module; `encoder` must be "small".
        learning_rate: Adam's, annealed along a cosine to 0.
        device: where to train.

    Raises:
        ValueError: for images of another type or shape, or another encoder.
        DetectorError: if the loss diverges.
    """
    channels, height, width = check_images(images)
    if training.encoder != "small":
        raise ValueError(
            "encoder: the autoencoder mirrors the small encoder alone, expected 'small' (with width 64 it "
            f"has as many features as resnet18), got {training.encoder!r}"
        )
    images = images.to(device)
    with seeded(training.seed, images.device):
        network = AutoencoderNetwork(channels, (height, width), training.width)
    network.to(images.device)
    losses = minimise(
        lambda batch: F.mse_loss(network(batch), batch), network, images, training, learning_rate
    )
    return Autoencoder(network.eval(), (channels, height, width), losses)


class AutoencoderNetwork(nn.Module):
    """The small encoder up to its last maps, a code of `width` channels, and a decoder that mirrors it.

    Takes and gives images (N, C, H, W) in [0, 1]. At 64 pixels and width 16 the code has 4 x 4 x 16
    numbers: a sixteenth of a grey image's.

    Args:
        channels: of the images, 1 or 3.
        image_size: height and width in pixels.
        width: of the small encoder.
    """

    def __init__(self, channels: int, image_size: tuple[int, int], width: int) -> None:
        super().__init__()
        # Without biases, so that Deep SVDD can start from it.
        self.encoder = SmallEncoder(channels, width)
        remove_biases(self.encoder)
        self.code = nn.Conv2d(8 * width, width, 1, bias=False)
        widths = [width, 8 * width, 4 * width, 2 * width, width]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in itertools.pairwise(widths)
        )
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        # Of the encoder's maps in reverse: each of its strides halves a side, rounded up.
        self.sizes = [[-(-side // 2**halvings) for side in image_size] for halvings in (3, 2, 1, 0)]
        self.memory_format = memory_format_of(self)
        self.to(memory_format=self.memory_format)

    def forward(self, images: Tensor) -> Tensor:
        x = ((images - _MEAN) / _STD).contiguous(memory_format=self.memory_format)
        x = self.encoder.stages(F.relu(self.encoder.norm(self.encoder.stem(x))))
        x = self.code(x)
        for stage, size in zip(self.stages, self.sizes, strict=True):
            x = F.interpolate(stage(x), size)
        return torch.sigmoid(self.last(x))
