"""Feature maps of any encoder: what it makes of each place of an image."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ssad_hpo.encoder.network import Network

_MIDDLE = 3.5  # log2 of a stride between 8 and 16: where maps still know places, and already see structure
_MOST = 2  # maps whose places are looked at

_LOCKS: WeakKeyDictionary[Network, threading.RLock] = WeakKeyDictionary()  # networks are pickled


def passing(network: Network) -> AbstractContextManager[object]:
    """One thread at a time: hooks, and stages that are passed by, change a network for the time of a pass."""
    return _LOCKS.setdefault(network, threading.RLock())


def features_and_maps(
    network: Network, images: Tensor, strides: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """What the encoder makes of whole images, and of each place of them at several resolutions, in one pass.

    Args:
        network: in evaluation mode.
        images: (N, C, H, W) in [0, 1].
        strides: of the maps, in pixels of the image; from `map_strides`. None are quicker than some.

    Returns:
        (N, D) features, as `Network.features_of`; and for each stride (N, C_s, about H / stride, about
        W / stride).
    """
    if not strides:
        with passing(network):
            return network.features_of(images), []
    features, found = _recorded(network, images, set(strides))
    return features, [found[stride] for stride in strides]


def map_strides(network: Network, images: Tensor) -> tuple[int, ...]:
    """The strides of the encoder's maps that are best for places, finest first: 8 and 16, or what is nearest.

    Args:
        network: in evaluation mode.
        images: (N, C, H, W) in [0, 1]; one is enough.

    Raises:
        ValueError: for an encoder that has no feature maps, such as one of tokens.
    """
    found = [stride for stride in _recorded(network, images, None)[1] if stride > 1]
    if not found:
        raise ValueError(
            "encoder: it has no feature maps, which scores of patches and heat maps are made of; take "
            "another encoder, or score images as a whole (score density)"
        )
    return tuple(sorted(sorted(found, key=lambda s: abs(math.log2(s) - _MIDDLE))[:_MOST]))


def map_sizes(network: Network, images: Tensor) -> dict[int, tuple[int, int, int]]:
    """Channels, height and width of the feature map of each stride; the arguments are as of `map_strides`."""
    return {s: (m.shape[1], m.shape[2], m.shape[3]) for s, m in _recorded(network, images, None)[1].items()}


def _recorded(network: Network, images: Tensor, wanted: set[int] | None) -> tuple[Tensor, dict[int, Tensor]]:
    """Features, and the map of each stride or of the wanted ones: of the outermost modules the last one.

    Outermost, since the next stage often begins with a convolution at the old resolution.
    """
    height, width = images.shape[2:]
    found: dict[int, tuple[int, Tensor]] = {}

    def keep(depth: int, module: nn.Module, given: Any, output: Any) -> None:
        for each in output if isinstance(output, list | tuple) else (output,):
            placed = _placed(each, (height, width))
            if placed is not None:
                stride, cells = placed
                if (wanted is None or stride in wanted) and depth <= found.get(stride, (depth,))[0]:
                    found[stride] = depth, cells

    with passing(network):
        hooks = [
            module.register_forward_hook(partial(keep, name.count(".")))
            for name, module in network.encoder.named_modules()
        ]
        try:
            features = network.features_of(images)
        finally:
            for hook in hooks:
                hook.remove()
    return features, {stride: cells for stride, (_, cells) in found.items()}


def _placed(output: Any, image: tuple[int, int]) -> tuple[int, Tensor] | None:
    """Stride and (N, C, h, w) cells of what is a map of the image; None of anything else."""
    if isinstance(output, Tensor) and output.ndim == 4:
        # Most encoders have channels first; those of windows (Swin) have them last.
        for order in ((0, 1, 2, 3), (0, 3, 1, 2)):
            cells = output.permute(order)
            stride = _stride(image, (cells.shape[2], cells.shape[3]))
            if stride is not None:
                return stride, cells
    return None


def _stride(image: tuple[int, int], cells: tuple[int, int]) -> int | None:
    """The power of 2 by which a map is smaller than the image; None for what is no map, or of one cell."""
    if max(cells) < 2:
        return None
    for power in range(8):
        stride = 2**power
        if all(side // stride <= n <= -(-side // stride) for side, n in zip(image, cells, strict=True)):
            return stride
    return None
