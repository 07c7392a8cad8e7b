"""What the self-supervised detectors are compared with: an autoencoder, Deep SVDD, random augmentations.

The autoencoder and Deep SVDD are trained on normal images alone: no augmented ones, and no color jitter,
since showing the data as it is is all that they do. Once trained they score images as a detector does.
Of a `Training` they take encoder, width, steps, batch size, weight decay and seed. They have a learning
rate of their own, since Adam's is not SGD's, and always compute in float32: bfloat16 is coarser than the
distances that they score.

Random static (RS-) and random dynamic (RD-) are detectors trained with `random_static(kind, seed)` and
with `Augmentation(kind)`, whose default ranges are drawn anew for every image.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ssad_hpo.encoder import Network, SmallEncoder, build_network
from ssad_hpo.task import DEFAULT_RANGES, Augmentation, DetectorError, Range, Training

# Measured over 150 steps on digits 0, 1 and 4, brick against gravel, gravel against brick, and grass with
# CutDiff. The autoencoder's loss ends up to 4 times higher at 3e-4 (on digits; alike on gravel and grass)
# and within a tenth of this at 3e-3.
AUTOENCODER_LEARNING_RATE = 1e-3
# At 1e-3 Deep SVDD's loss falls further because all images, foreign ones too, move to the centre (random
# noise lies some 30 times nearer than at 1e-4); at 1e-5 it is hardly trained.
DEEP_SVDD_LEARNING_RATE = 3e-4

# Of Deep SVDD's output, and how far from 0 its centre's coordinates must be: Ruff et al.'s own code.
_SVDD_DIMENSIONS, _CENTRE_MARGIN = 32, 0.1
# Mean square of the train embeddings' distances to their mean, in units of the squared centre. Sound
# trainings end between 1e-1 and 6e-6; float32 can hardly tell embeddings apart below this.
_COLLAPSED = 1e-8
# A loss that ends so many times higher than it began has diverged: it was below 1 in sound trainings.
_DIVERGED = 2
_MEAN, _STD = 0.449, 0.226  # ImageNet's, averaged over channels: nearly what Deep SVDD's network subtracts
_SCORE_BATCH = 256


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
        return _scores(self, lambda batch: (self.network(batch) - batch).square().mean((1, 2, 3)), images)


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
        return _scores(self, lambda batch: (self.network(batch) - self.centre).square().sum(1), images)


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
    channels, height, width = _check_images(images)
    if training.encoder != "small":
        raise ValueError(
            "encoder: the autoencoder mirrors the small encoder alone, expected 'small' (with width 64 it "
            f"has as many features as resnet18), got {training.encoder!r}"
        )
    images = images.to(device)
    with _seeded(training.seed, images.device):
        network = AutoencoderNetwork(channels, (height, width), training.width)
    network.to(images.device).to(memory_format=torch.channels_last)
    losses = _minimise(
        lambda batch: F.mse_loss(network(batch), batch), network, images, training, learning_rate
    )
    return Autoencoder(network.eval(), (channels, height, width), losses)


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
    channels, height, width = _check_images(images)
    images = images.to(device)
    with _seeded(training.seed, images.device):
        network = build_network(
            training.encoder, channels=channels, image_size=(height, width), width=training.width
        )
        network.head = nn.Sequential(nn.Linear(network.features, _SVDD_DIMENSIONS))
    _remove_biases(network)
    if pretrained is not None:
        _start_from(pretrained, network, training, channels)
    network.to(images.device).to(memory_format=torch.channels_last)

    with torch.no_grad():
        # In training mode, as the first step will see them; a batch of one has no batch statistics.
        batches = [b for b in images.split(training.batch_size) if len(b) > 1]
        with _seeded(training.seed, images.device):
            centre = torch.cat([network(_to_float(batch)) for batch in batches]).mean(0)
    margin = torch.where(centre < 0, -_CENTRE_MARGIN, _CENTRE_MARGIN)
    centre = torch.where(centre.abs() < _CENTRE_MARGIN, margin, centre)

    losses = _minimise(
        lambda batch: (network(batch) - centre).square().sum(1).mean(),
        network,
        images,
        training,
        learning_rate,
    )
    network.eval()
    _check_spread(network, images, centre)
    return DeepSvdd(network, centre, (channels, height, width), losses)


def random_static(kind: str, seed: int) -> Augmentation:
    """A static augmentation drawn at random from the default ranges of a kind: RS- of the talk.

    Args:
        kind: a key of `task.DEFAULT_RANGES`.
        seed: of the draw; areas and aspects are log-uniform.

    Raises:
        ValueError: for an unknown kind.
    """
    names = list(Augmentation(kind).hyperparameters)
    fractions = torch.rand(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    ranges: dict[str, Range] = DEFAULT_RANGES[kind]
    return Augmentation(kind, {n: ranges[n].at(u) for n, u in zip(names, fractions, strict=True)})


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
        _remove_biases(self.encoder)
        self.code = nn.Conv2d(8 * width, width, 1, bias=False)
        widths = [width, 8 * width, 4 * width, 2 * width, width]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in itertools.pairwise(widths)
        )
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        # Of the encoder's maps in reverse: each of its strides halves a side, rounded up.
        self.sizes = [[-(-side // 2**halvings) for side in image_size] for halvings in (3, 2, 1, 0)]

    def forward(self, images: Tensor) -> Tensor:
        x = ((images - _MEAN) / _STD).contiguous(memory_format=torch.channels_last)
        x = self.encoder.stages(F.relu(self.encoder.norm(self.encoder.stem(x))))
        x = self.code(x)
        for stage, size in zip(self.stages, self.sizes, strict=True):
            x = F.interpolate(stage(x), size)
        return torch.sigmoid(self.last(x))


def _remove_biases(network: nn.Module) -> None:
    """No convolution, linear layer or batch norm adds a constant any more; nor do batch norms scale."""
    for module in network.modules():
        of_attention = isinstance(module, NonDynamicallyQuantizableLinear)  # which cannot do without
        if isinstance(module, _ConvNd | nn.Linear | _BatchNorm) and not of_attention:
            module.register_parameter("bias", None)
        if isinstance(module, _BatchNorm):
            module.register_parameter("weight", None)


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


def _minimise(
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
    # Dropout, in encoders that have it, draws from torch's global generator.
    with _seeded(training.seed, images.device):
        for step, batch in enumerate(_batches(len(images), training, generator)):
            loss = loss_of(_to_float(images[batch]))
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
            network(_to_float(batch))


@torch.inference_mode()
def _check_spread(network: Network, images: Tensor, centre: Tensor) -> None:
    """Raises DetectorError if Deep SVDD maps all train images to one point."""
    embeddings = torch.cat([network(_to_float(batch)) for batch in images.split(_SCORE_BATCH)])
    spread = float((embeddings - embeddings.mean(0)).square().sum(1).mean() / centre.square().sum())
    if spread < _COLLAPSED:
        raise DetectorError(
            f"collapsed: Deep SVDD maps all {len(images)} train images to one point (mean squared spread "
            f"{spread:.1g} of the squared centre); use a smaller learning_rate or weight_decay, an encoder "
            "with batch norm, and train images that differ"
        )


def _batches(n: int, training: Training, generator: torch.Generator) -> Tensor:
    """(steps, batch_size) indices of images: one random order after the other, as detectors have them."""
    needed = training.steps * training.batch_size
    orders = [torch.randperm(n, generator=generator, device=generator.device) for _ in range(-(-needed // n))]
    return torch.cat(orders)[:needed].view(training.steps, training.batch_size)


@torch.inference_mode()
def _scores(baseline: Autoencoder | DeepSvdd, score_of: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != baseline.image_shape:
        expected = ", ".join(map(str, baseline.image_shape))
        raise ValueError(f"images: expected uint8 (N, {expected}), got {images.dtype} {tuple(images.shape)}")
    device = next(baseline.network.parameters()).device
    blocks = [score_of(_to_float(block.to(device))) for block in images.split(_SCORE_BATCH)]
    scores = torch.cat(blocks).double().cpu()
    if not scores.isfinite().all():
        raise DetectorError(f"diverged: scores of the {type(baseline).__name__} are not finite")
    return scores


def _check_images(images: Tensor) -> tuple[int, int, int]:
    """Channels, height and width."""
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) < 2 or images.shape[1] not in (1, 3):
        raise ValueError(
            "images: expected uint8 (N, C, H, W) with N >= 2 and C 1 or 3, "
            f"got {images.dtype} {tuple(images.shape)}"
        )
    channels, height, width = images.shape[1:]
    return channels, height, width


def _to_float(images: Tensor) -> Tensor:
    return images.float() / 255


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's global generators set to a seed inside, and left as they were outside."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
