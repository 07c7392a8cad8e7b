"""A network: an encoder of any family, its head for training, and what of it moves."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ssad_hpo.encoder.named import IMAGENET_MEAN, IMAGENET_STD, NamedEncoder, built_encoder, named_encoder
from ssad_hpo.encoder.small import SmallEncoder
from ssad_hpo.encoder.weights import NONE, digest_of_tensors, fit, load_weights, stamp_of
from ssad_hpo.numerics import seeded

_HEAD_FEATURES = 128
_LEAST_CHANNELS = 16  # of a strided 1x1 convolution with channels last; see `memory_format_of`


class Network(nn.Module):
    """Encoder and head: features -> features -> 128, each with batch norm and ReLU, then 2 logits.

    Takes images (N, C, H, W) in [0, 1] and normalises them with the encoder's mean and standard deviation,
    else ImageNet's (grey ones with those averaged over the channels). The logits are those of the pretext
    classes, 0 (normal) and 1 (augmented); the head serves training and the classifier's own score.

    Args:
        encoder: with its number of features as `features`.
        channels: of the images, 1 or 3.

    Attributes:
        held: modules that stay in evaluation mode while the rest trains.
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
        self.held: Sequence[nn.Module] = ()
        mean = torch.tensor(getattr(encoder, "mean", IMAGENET_MEAN))
        std = torch.tensor(getattr(encoder, "std", IMAGENET_STD))
        if channels == 1:
            mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
        self.register_buffer("mean", mean[:, None, None])
        self.register_buffer("std", std[:, None, None])
        self.memory_format = memory_format_of(self)
        self.to(memory_format=self.memory_format)

    @property
    def depthwise(self) -> bool:
        """Whether it has depthwise convolutions."""
        return any(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in self.modules())

    def features_of(self, images: Tensor) -> Tensor:
        """(N, D) features of images in [0, 1]: what embeddings are made of."""
        normalised = torch.addcmul(-self.mean / self.std, images, 1 / self.std)  # one pass, not two
        return self.encoder(normalised.contiguous(memory_format=self.memory_format))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features_of(images))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.held:
            module.eval()
        return self

    def hold(self, stages: int, *, batch_norm: bool) -> None:
        """Keep the encoder's first stages as they are, and, if asked for, the statistics of its batch norms.

        Raises:
            ValueError: for more stages than it has.
        """
        encoder = self.encoder
        if not isinstance(encoder, NamedEncoder):
            if stages:
                raise ValueError("frozen_stages: the small encoder has no stages that could stay, expected 0")
            return
        if stages > len(encoder.stages):
            raise ValueError(
                f"frozen_stages: expected at most the encoder's {len(encoder.stages)}, got {stages}; "
                "give fewer (--frozen-stages)"
            )
        for _, module in encoder.upto(stages) if stages else ():
            for weights in module.parameters(recurse=False):  # those of modules in it may be of a later stage
                weights.requires_grad_(False)
        frozen = [module for module in encoder.model.modules() if _stays(module)]
        norms = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.held = [*frozen, *(norms if batch_norm else ())]


def memory_format_of(network: nn.Module) -> torch.memory_format:
    """The layout of weights and images in which a network's convolutions are fast, and right everywhere.

    That is channels last, but oneDNN 3.12 writes beyond its buffers there when it computes the gradient of a
    strided 1x1 convolution's weights from fewer channels than its kernels take at once: 8 with AVX2, 16 with
    AVX-512 (its issue 6035). With large images this ends in a crash, with small ones in wrong numbers or in
    nothing to be seen. Under an allocator that ends each block at a forbidden page no other convolution of
    few channels is at fault (3x3, without a stride, forward), nor any with channels first. One layout
    on every machine, so that a detector's numbers follow from its settings.
    """
    for module in network.modules():
        narrow = isinstance(module, nn.Conv2d) and module.in_channels // module.groups < _LEAST_CHANNELS
        if narrow and module.kernel_size == (1, 1) and module.stride != (1, 1):
            return torch.contiguous_format
    return torch.channels_last


def _stays(module: nn.Module) -> bool:
    """Whether it has weights, and none that move."""
    moving = [weights.requires_grad for weights in module.parameters()]
    return bool(moving) and not any(moving)


def draws(network: nn.Module) -> bool:
    """Whether a network may draw random numbers while it trains, as dropout does: the small one does not."""
    return any(isinstance(module, NamedEncoder) for module in network.modules())


def build_network(
    encoder: str, *, channels: int, image_size: tuple[int, int], width: int, weights: str = NONE
) -> Network:
    """A network; weights that are not pretrained are drawn from torch's global generator.

    Args:
        encoder: "small", the name of a torchvision classifier such as "resnet18", or of a timm model.
        channels: of the images, 1 or 3.
        image_size: height and width of the images in pixels.
        width: of the small encoder.
        weights: of a named encoder: "none", "pretrained" or a file; see `load_weights`.

    Raises:
        ValueError: for an unknown name, an encoder that cannot take such images, or weights that cannot be
            had or do not fit.
    """
    if encoder == "small":
        if weights != NONE:
            raise ValueError(f"weights: the small encoder has none, expected 'none', got {weights!r}")
        return Network(SmallEncoder(channels, width), channels)
    if weights == NONE:
        return Network(named_encoder(encoder, image_size), channels)
    given = _GIVEN.get().get((encoder, weights))
    stamp = stamp_of(weights) if given is None else (digest_of_tensors(given),)
    return Network(copy.deepcopy(_pretrained(encoder, image_size, weights, stamp)), channels)


_Given = Mapping[tuple[str, str], Mapping[str, Tensor]]
_GIVEN: ContextVar[_Given] = ContextVar("given weights", default=MappingProxyType({}))  # of this thread


@contextlib.contextmanager
def given_weights(encoder: str, weights: str, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, networks of this thread begin with these, whatever its machine has: all nodes begin alike.

    Args:
        encoder, weights: as of `build_network`; what is given stands for these names.
        tensors: of the encoder's model, by their names in its `state_dict`.
    """
    before = _GIVEN.set({**_GIVEN.get(), (encoder, weights): tensors})
    try:
        yield
    finally:  # others who train in this process later have weights of their own under these names
        _GIVEN.reset(before)


@functools.lru_cache(maxsize=32)  # of a combined detector's members most are alike
def network_shapes(
    encoder: str, *, channels: int, image_size: tuple[int, int], width: int
) -> Mapping[str, torch.Size]:
    """The shapes of what `build_network` makes, by the names of its `state_dict`; no weight takes memory.

    Args:
        encoder, channels, image_size, width: as of `build_network`.

    Raises:
        ValueError: for an unknown name, or an encoder without feature maps.
    """
    given = encoder, channels, image_size, width
    try:
        with torch.device("meta"):
            return _shapes(*given)
    except (ValueError, RuntimeError):  # it computes sizes with tensors, or there is no such encoder
        with _WeightsOnMeta():
            return _shapes(*given)


def _shapes(encoder: str, channels: int, image_size: tuple[int, int], width: int) -> Mapping[str, torch.Size]:
    made = SmallEncoder(channels, width) if encoder == "small" else built_encoder(encoder, image_size)
    tensors = Network(made, channels).state_dict()
    return MappingProxyType({name: tensor.shape for name, tensor in tensors.items()})


class _WeightsOnMeta(TorchFunctionMode):
    """What modules make their weights of has shapes but no numbers inside: torch's device "meta".

    As `torch.device("meta")`, which also takes the numbers from ranges that some encoders (torchvision's
    RegNets) compute the sizes of their layers from. That, in turn, suits some that this does not.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MAKES_WEIGHTS and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


_MAKES_WEIGHTS = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}


@functools.lru_cache(maxsize=2)  # every trial begins with the same one
def _pretrained(
    name: str, image_size: tuple[int, int], weights: str, stamp: tuple[int | str, ...]
) -> NamedEncoder:
    """An encoder with weights; `stamp` tells a file from another that took its place since."""
    with seeded(0):  # what is drawn here is replaced, and may not move the draws of the head
        encoder = named_encoder(name, image_size)
        given = _GIVEN.get().get((name, weights))
        if given is not None:
            fit(encoder.model, given, f"the weights of {name}")
        else:
            load_weights(encoder, name, weights)
    return encoder
