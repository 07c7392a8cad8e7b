"""Color jitter: what is done to every normal image before it is augmented."""

from __future__ import annotations

import torch
from torch import Tensor

from ssad_hpo.augment.drawing import check_images


def jitter(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Color jitter drawn once per image: brightness, contrast, saturation, hue, in this order.

    Args:
        images: (N, C, H, W) float in [0, 1]; grey images (C = 1) have no saturation or hue to change.
        strength: factors are uniform in 1 - strength .. 1 + strength, the turn of the hue in
            -strength .. strength of the colour circle; 0 gives the images back.
        generator: source of all randomness.

    Returns:
        (N, C, H, W) in [0, 1].
    """
    check_images(images)
    if strength == 0:
        return images
    noise = torch.rand(len(images), 4, generator=generator, device=generator.device).to(images)
    brightness, contrast, saturation, hue = (
        strength * (2 * noise[:, i, None, None, None] - 1) for i in range(4)
    )
    images = (images * (1 + brightness)).clamp(0, 1)
    images = torch.lerp(_grey(images).mean((1, 2, 3), keepdim=True), images, 1 + contrast).clamp(0, 1)
    if images.shape[1] == 1:
        return images
    images = torch.lerp(_grey(images), images, 1 + saturation).clamp(0, 1)
    return _turn_hue(images, hue)


def _grey(images: Tensor) -> Tensor:
    """(N, 1, H, W) luma of RGB images (ITU-R BT.601); grey images as they are."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, 1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """RGB images with their hue moved by a fraction of the colour circle, value and saturation kept.

    An HSV colour of hue h (in sixths) has channel values v - c * max(0, min(k, 4 - k, 1)) with
    k = (n + h) mod 6 and n = 5, 3, 1 for red, green and blue.
    """
    red, green, blue = images.split(1, 1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    safe = torch.where(chroma > 0, chroma, 1)
    sixths = torch.where(
        red == value,
        (green - blue) / safe,
        torch.where(green == value, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    sixths += 6 * turn
    turned = torch.empty_like(images)
    for channel, n in enumerate((5, 3, 1)):
        k = sixths + n
        k -= 6 * torch.floor(k / 6)  # three times as fast as % 6
        turned[:, channel : channel + 1] = value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)
    return turned
