"""The networks: a small residual encoder, torchvision's classifiers by name, and the head for training.

An encoder maps normalised images (N, C, H, W) to features (N, D) and tells D as `features`; a network
takes images in [0, 1] and normalises them itself.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HEAD_FEATURES = 128
_LEAST_CHANNELS = 8  # of a strided 1x1 convolution with channels last; see `memory_format_of`
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class SmallEncoder(nn.Module):
    """A residual network of four stages for CPUs: 8 * width features, at 1/16 of the image's resolution.

    Args:
        channels: of the images, 1 or 3.
        width: channels of the first stage; each next one has twice as many at half the resolution.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.Sequential(
            *(_Block(a, b, stride=1 if a == b else 2) for a, b in itertools.pairwise(widths))
        )
        self.features = 8 * width

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(images)), inplace=True)
        return self.stages(x).mean((2, 3))


class _Block(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al., 2016, the basic block)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)), inplace=True)
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


class _TorchvisionEncoder(nn.Module):
    """A torchvision classifier without its last linear layer; grey images become 3 equal channels."""

    def __init__(self, model: nn.Module, features: int) -> None:
        super().__init__()
        self.model = model
        self.features = features

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images.expand(-1, 3, -1, -1))
        # In training, classifiers with auxiliary outputs (GoogLeNet, Inception) give these as well.
        return output if isinstance(output, Tensor) else output[0]


class Network(nn.Module):
    """Encoder and head: features -> features -> 128, each with batch norm and ReLU, then 2 logits.

    Takes images (N, C, H, W) in [0, 1] and normalises them with ImageNet's mean and standard deviation
    (grey ones with those averaged over the channels). The logits are those of the pretext classes, 0
    (normal) and 1 (augmented); the head serves training and the classifier's own score.

    Args:
        encoder: with its number of features as `features`.
        channels: of the images, 1 or 3.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: nn.Module, channels: int) -> None:
        super().__init__()
        features: int = encoder.features  # type: ignore[assignment]
        self.encoder = encoder
        self.features = features
        self.head = nn.Sequential(
            nn.Linear(features, features, bias=False),
            nn.BatchNorm1d(features),
            nn.ReLU(),
            nn.Linear(features, _HEAD_FEATURES, bias=False),
            nn.BatchNorm1d(_HEAD_FEATURES),
            nn.ReLU(),
            nn.Linear(_HEAD_FEATURES, 2),
        )
        mean, std = torch.tensor(_IMAGENET_MEAN), torch.tensor(_IMAGENET_STD)
        if channels == 1:
            mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
        self.register_buffer("mean", mean[:, None, None])
        self.register_buffer("std", std[:, None, None])
        self.memory_format = memory_format_of(self)
        self.to(memory_format=self.memory_format)

    def features_of(self, images: Tensor) -> Tensor:
        """(N, D) features of images in [0, 1]: what embeddings are made of."""
        normalised = torch.addcmul(-self.mean / self.std, images, 1 / self.std)  # one pass, not two
        return self.encoder(normalised.contiguous(memory_format=self.memory_format))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features_of(images))


def memory_format_of(network: nn.Module) -> torch.memory_format:
    """The layout of weights and images in which a network's convolutions are fast, and right everywhere.

    That is channels last, but on CPUs with AVX2 and without AVX-512 oneDNN 3.12 writes beyond its buffers
    in a 1x1 convolution with a stride that has 2 to 7 input channels in this layout. Valgrind finds no such
    fault in others of few channels (3x3, or without a stride), nor in any with channels first. One layout
    on every machine, so that a detector's numbers follow from its settings.
    """
    for module in network.modules():
        narrow = isinstance(module, nn.Conv2d) and module.in_channels // module.groups < _LEAST_CHANNELS
        if narrow and module.kernel_size == (1, 1) and module.stride != (1, 1):
            return torch.contiguous_format
    return torch.channels_last


def draws(network: nn.Module) -> bool:
    """Whether a network may draw random numbers while it trains, as dropout does: the small one does not."""
    return any(isinstance(module, _TorchvisionEncoder) for module in network.modules())


def build_network(encoder: str, *, channels: int, image_size: tuple[int, int], width: int) -> Network:
    """An untrained network; its weights are drawn from torch's global generator.

    Args:
        encoder: "small" or the name of a torchvision classifier, e.g. "resnet18".
        channels: of the images, 1 or 3.
        image_size: height and width of the images in pixels.
        width: of the small encoder.

    Raises:
        ValueError: for an unknown name, or a classifier that cannot take such images.
    """
    if encoder == "small":
        return Network(SmallEncoder(channels, width), channels)
    return Network(_torchvision_encoder(encoder, image_size), channels)


def _torchvision_encoder(name: str, image_size: tuple[int, int]) -> nn.Module:
    # Imported here: a second of start-up that the small encoder does not need.
    import torchvision.models

    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(
            f"encoder: expected 'small' or a torchvision classifier such as 'resnet18', got {name!r}"
        )
    model = torchvision.models.get_model(name, weights=None)
    linears = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise ValueError(f"encoder: {name!r} has no last linear layer to take features from")
    path, last = linears[-1]
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    encoder = _TorchvisionEncoder(model, last.in_features)
    try:
        with torch.no_grad():
            features = encoder.eval()(torch.zeros(2, 3, *image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        height, width = image_size
        raise ValueError(
            f"encoder: {name!r} cannot take images of {height}x{width} pixels ({error})"
        ) from error
    if not isinstance(features, Tensor) or features.shape != (2, last.in_features):
        raise ValueError(f"encoder: {name!r} gives no feature vector before its last linear layer")
    return encoder.train()
