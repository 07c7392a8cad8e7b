"""The augmentations f_aug, batched: draw the noise, then apply the hyperparameters to it.

All work on float images (N, C, H, W) in [0, 1], on their device, before normalisation. Every image gets
its own position, angle and, for ranges, its own hyperparameters. Drawing is separate from applying: the
noise of an image does not depend on the hyperparameters, so two candidates with one seed differ in their
hyperparameters alone, and the result is differentiable in hyperparameters that are given as tensors.

Sizes are fractions: a patch of area A and aspect R is sqrt(A R) of the image wide and sqrt(A / R) high.
Angles are degrees, counter-clockwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ssad_hpo.task import Augmentation, Range

# Uniform numbers of an image: area, aspect, angle, sign, centre x and y, source x and y.
_NOISE = 8
# CutDiff's spot falls off as exp(-r^2 / 0.2) with r in patch widths and heights [ST-SSAD].
_CUTDIFF_SPREAD = 0.2

Hyperparameter = float | Range | Tensor


def augment(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Pseudo anomalies: every image of the batch changed by f_aug.

    Args:
        images: (N, C, H, W) float in [0, 1].
        augmentation: kind and hyperparameters; ranges are drawn anew for every image.
        generator: source of all randomness; on any device.

    Returns:
        (N, C, H, W) in [0, 1], the dtype and device of `images`.

    Raises:
        ValueError: if a patch does not fit into the image, or `images` are not a float batch.
    """
    _check_images(images)
    check_fits(augmentation, height=images.shape[2], width=images.shape[3])
    noise = draw_noise(len(images), generator, images)
    return apply(images, augmentation.kind, augmentation.hyperparameters, noise)


def draw_noise(n: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """(n, 8) uniform numbers in [0, 1), all that `apply` needs to be random, on the device of `like`."""
    return torch.rand(n, _NOISE, generator=generator, device=generator.device).to(like)


def apply(
    images: Tensor,
    kind: str,
    hyperparameters: Mapping[str, Hyperparameter],
    noise: Tensor,
    temperature: float = 0.0,
) -> Tensor:
    """f_aug as a function of its hyperparameters and the noise, without checks of range or fit.

    Args:
        images: (N, C, H, W) float in [0, 1].
        kind: a key of `task.DEFAULT_RANGES`.
        hyperparameters: all that the kind has, as numbers, ranges, or tensors (scalar or (N,)) through
            which gradients flow.
        noise: (N, 8) from `draw_noise`.
        temperature: softness of a patch's edge in pixels. At 0 the mask is hard (a pixel belongs to the
            patch if its centre does), the limit of the soft ones. CutDiff and Rotation have no edge.

    Returns:
        (N, C, H, W) in [0, 1].
    """
    area, aspect, angle, sign, *position = noise.unbind(1)
    drawn = {
        name: _value(hyperparameters[name], u)
        for name, u in (("patch_area", area), ("patch_aspect", aspect), ("angle", angle))
        if name in hyperparameters
    }
    if kind == "rotation":
        changed = _rotate(images, torch.where(sign < 0.5, -1.0, 1.0) * drawn["angle"])
    else:
        width = (drawn["patch_area"] * drawn["patch_aspect"]).sqrt()
        height = (drawn["patch_area"] / drawn["patch_aspect"]).sqrt()
        changed = _PATCHES[kind](images, width, height, drawn.get("angle"), position, temperature)
    return changed.clamp(0, 1)  # CutDiff goes below 0; means and interpolation go over by rounding


def check_fits(augmentation: Augmentation, *, height: int, width: int) -> None:
    """Raise ValueError if some patch of the augmentation's hyperparameters does not fit into the image.

    A rotated patch must fit with its bounding box. CutDiff's spot may reach over the border, and
    Rotation has no patch.
    """
    if augmentation.kind in ("rotation", "cutdiff"):
        return
    values = augmentation.hyperparameters
    area = _ends(values["patch_area"])[-1]
    for aspect in _ends(values["patch_aspect"]):
        w, h = math.sqrt(area * aspect) * width, math.sqrt(area / aspect) * height
        for angle in _widest_angles(values.get("angle", 0.0), w, h):
            box_w = w * abs(math.cos(angle)) + h * abs(math.sin(angle))
            box_h = w * abs(math.sin(angle)) + h * abs(math.cos(angle))
            if box_w > width * (1 + 1e-9) or box_h > height * (1 + 1e-9):  # rounding alone is no misfit
                turned = f" at {math.degrees(angle):.0f} degrees" if angle else ""
                raise ValueError(
                    f"{augmentation.kind}: a patch of area {area:g} and aspect {aspect:g}{turned} does not "
                    f"fit into the image; use a smaller patch_area or a patch_aspect nearer to 1"
                )


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
    _check_images(images)
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


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images: expected (N, C, H, W) floats in [0, 1], got {images.dtype} {tuple(images.shape)}"
        )


def _value(hyperparameter: Hyperparameter, u: Tensor) -> Tensor:
    """(N,) values: a range is drawn by the uniform u, a number or tensor is repeated."""
    if isinstance(hyperparameter, Range):
        low, high = hyperparameter.low, hyperparameter.high
        return low * (high / low) ** u if hyperparameter.log else low + (high - low) * u
    if isinstance(hyperparameter, Tensor):
        return hyperparameter.to(u).expand_as(u)
    return torch.full_like(u, hyperparameter)  # filled on the device: no copy from the host to wait for


def _ends(value: float | Range) -> tuple[float, ...]:
    return (value.low, value.high) if isinstance(value, Range) else (value,)


def _widest_angles(angle: float | Range, w: float, h: float) -> list[float]:
    """The angles in radians at which the bounding box of a w x h patch may be widest or highest."""
    low, high = (math.radians(end) for end in (_ends(angle)[0], _ends(angle)[-1]))
    diagonals = [sign * turn for sign in (-1, 1) for turn in (math.atan2(h, w), math.atan2(w, h))]
    # A box repeats itself every half turn: the first such angle at or after the low end tells.
    firsts = [low + (diagonal - low) % math.pi for diagonal in diagonals]
    return [low, high, *(first for first in firsts if first < high)]


class _Patch:
    """Where a batch of rectangles lies: pixel coordinates along the patch's own axes, and its mask.

    Attributes:
        along, across: (N, H, W) coordinates of every pixel centre in the patch's frame, in pixels.
        mask: (N, 1, H, W), 1 inside, 0 outside, soft at the edge for a temperature above 0.
    """

    def __init__(
        self,
        images: Tensor,
        width: Tensor,
        height: Tensor,
        angle: Tensor | None,
        position: list[Tensor],
        temperature: float,
    ) -> None:
        image_h, image_w = images.shape[2:]
        width, height = width * image_w, height * image_h
        x, y = _pixel_centres(images)
        if angle is None:
            centre_x = width / 2 + position[0] * (image_w - width)
            centre_y = height / 2 + position[1] * (image_h - height)
            self.along = (x - centre_x[:, None, None]).expand(-1, image_h, -1)
            self.across = (y - centre_y[:, None, None]).expand(-1, -1, image_w)
        else:
            cos, sin = angle.deg2rad().cos(), angle.deg2rad().sin()
            box_w = width * cos.abs() + height * sin.abs()
            box_h = width * sin.abs() + height * cos.abs()
            centre_x = box_w / 2 + position[0] * (image_w - box_w)
            centre_y = box_h / 2 + position[1] * (image_h - box_h)
            dx, dy = x - centre_x[:, None, None], y - centre_y[:, None, None]
            cos, sin = cos[:, None, None], sin[:, None, None]
            self.along, self.across = dx * cos - dy * sin, dx * sin + dy * cos
        self.width, self.height, self.centre_x, self.centre_y = width, height, centre_x, centre_y
        over_x = self.along.abs() - width[:, None, None] / 2
        over_y = self.across.abs() - height[:, None, None] / 2
        if temperature == 0:
            self.mask = ((over_x < 0) & (over_y < 0))[:, None].to(images.dtype)
        else:
            self.mask = torch.sigmoid(-_edge_distance(over_x, over_y) / temperature)[:, None]


def _edge_distance(over_x: Tensor, over_y: Tensor) -> Tensor:
    """Signed distance to a rectangle's edge, negative inside, from the distances over its two sides."""
    out_x, out_y = over_x.clamp_min(0), over_y.clamp_min(0)
    square = out_x.square() + out_y.square()
    outside = torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)
    return outside + torch.maximum(over_x, over_y).clamp_max(0)


def _cutout(
    images: Tensor, w: Tensor, h: Tensor, angle: Tensor | None, position: list[Tensor], temperature: float
) -> Tensor:
    return images * (1 - _Patch(images, w, h, angle, position, temperature).mask)


def _cutavg(
    images: Tensor, w: Tensor, h: Tensor, angle: Tensor | None, position: list[Tensor], temperature: float
) -> Tensor:
    mask = _Patch(images, w, h, angle, position, temperature).mask
    # A patch smaller than a pixel may hold no pixel's centre: then there is nothing to average or fill.
    pixels = mask.sum((1, 2, 3), keepdim=True) * images.shape[1]
    mean = (images * mask).sum((1, 2, 3), keepdim=True) / torch.where(pixels > 0, pixels, 1)
    return torch.lerp(images, mean, mask)


def _cutpaste(
    images: Tensor, w: Tensor, h: Tensor, angle: Tensor | None, position: list[Tensor], temperature: float
) -> Tensor:
    patch = _Patch(images, w, h, angle, position, temperature)
    image_h, image_w = images.shape[2:]
    shift_x = _source_shift(patch.centre_x, patch.width, image_w, position[2])
    shift_y = _source_shift(patch.centre_y, patch.height, image_h, position[3])
    source_x = patch.along + (patch.centre_x + shift_x)[:, None, None]
    source_y = patch.across + (patch.centre_y + shift_y)[:, None, None]
    return torch.lerp(images, _sample(images, source_x, source_y, "border"), patch.mask)


def _source_shift(centre: Tensor, size: Tensor, image_size: int, u: Tensor) -> Tensor:
    """Whole pixels from a patch's place to the place it was cut from, uniform over those inside.

    Whole, so that a patch that is not rotated is copied without interpolation: a blur would give the
    pasted patch away.
    """
    with torch.no_grad():
        least = torch.ceil(size / 2 - centre)
        most = torch.floor(image_size - size / 2 - centre)
        return least + torch.floor(u * (most - least + 1).clamp_min(1))


def _cutdiff(
    images: Tensor, w: Tensor, h: Tensor, angle: Tensor | None, position: list[Tensor], temperature: float
) -> Tensor:
    image_h, image_w = images.shape[2:]
    x, y = _pixel_centres(images)
    dx = (x / image_w - position[0][:, None, None]) / w[:, None, None]
    dy = (y / image_h - position[1][:, None, None]) / h[:, None, None]
    spot = torch.exp(-(dx.square() + dy.square()) / _CUTDIFF_SPREAD)
    return images - spot[:, None]


_PATCHES: dict[str, Callable[..., Tensor]] = {
    "cutout": _cutout,
    "cutavg": _cutavg,
    "cutpaste": _cutpaste,
    "cutdiff": _cutdiff,
}


def _rotate(images: Tensor, angle: Tensor) -> Tensor:
    """Each image turned by its angle about its centre, with reflected borders."""
    image_h, image_w = images.shape[2:]
    x, y = _pixel_centres(images)
    cos, sin = angle.deg2rad().cos()[:, None, None], angle.deg2rad().sin()[:, None, None]
    dx, dy = x - image_w / 2, y - image_h / 2
    return _sample(images, dx * cos - dy * sin + image_w / 2, dx * sin + dy * cos + image_h / 2, "reflection")


def _pixel_centres(images: Tensor) -> tuple[Tensor, Tensor]:
    """x (1, 1, W) and y (1, H, 1) of the pixels' centres, in pixels; y points down."""
    h, w = images.shape[2:]
    x = torch.arange(w, dtype=images.dtype, device=images.device) + 0.5
    y = torch.arange(h, dtype=images.dtype, device=images.device) + 0.5
    return x[None, None, :], y[None, :, None]


def _sample(images: Tensor, x: Tensor, y: Tensor, padding: str) -> Tensor:
    """Bilinear values of the images at (N, H, W) pixel coordinates."""
    h, w = images.shape[2:]
    grid = torch.stack(torch.broadcast_tensors(2 * x / w - 1, 2 * y / h - 1), dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=padding, align_corners=False)


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
