"""What each kind of augmentation does to images.

A function takes float images (N, C, H, W) in [0, 1], the drawn hyperparameters by name, (N,) each, the
noise (N, 8) and the softness of edges in pixels, and gives the changed images; `augment.apply` calls it and
clamps what it gives. Of the noise it uses the columns that draw no hyperparameter of its kind: 3 for a sign,
4 and 5 for a place, 6 and 7 for a second one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

# CutDiff's spot falls off as exp(-r^2 / 0.2) with r in patch widths and heights (the ST-SSAD paper's).
_CUTDIFF_SPREAD = 0.2

Values = Mapping[str, Tensor]


def unchanged(images: Tensor, values: Values, noise: Tensor, temperature: float) -> Tensor:
    """The images as they are."""
    return images


def cutout(images: Tensor, values: Values, noise: Tensor, temperature: float) -> Tensor:
    """A black patch."""
    return images * (1 - _Patch(images, values, noise, temperature).mask)


def cutavg(images: Tensor, values: Values, noise: Tensor, temperature: float) -> Tensor:
    """A patch of the mean of the pixels beneath it, over all channels."""
    mask = _Patch(images, values, noise, temperature).mask
    # A patch smaller than a pixel may hold no pixel's centre: then there is nothing to average or fill.
    pixels = mask.sum((1, 2, 3), keepdim=True) * images.shape[1]
    mean = (images * mask).sum((1, 2, 3), keepdim=True) / torch.where(pixels > 0, pixels, 1)
    return torch.lerp(images, mean, mask)


def cutpaste(images: Tensor, values: Values, noise: Tensor, temperature: float) -> Tensor:
    """A patch cut from elsewhere in the image, turned by an angle."""
    patch = _Patch(images, values, noise, temperature)
    image_h, image_w = images.shape[2:]
    shift_x = _source_shift(patch.centre_x, patch.width, image_w, noise[:, 6])
    shift_y = _source_shift(patch.centre_y, patch.height, image_h, noise[:, 7])
    source_x = patch.along + (patch.centre_x + shift_x)[:, None, None]
    source_y = patch.across + (patch.centre_y + shift_y)[:, None, None]
    return torch.lerp(images, _sample(images, source_x, source_y, "border"), patch.mask)


def cutdiff(images: Tensor, values: Values, noise: Tensor, temperature: float) -> Tensor:
    """A dark spot without an edge, anywhere in the image; it may reach over the border."""
    image_h, image_w = images.shape[2:]
    width, height = _sizes(values)
    x, y = _pixel_centres(images)
    dx = (x / image_w - noise[:, 4, None, None]) / width[:, None, None]
    dy = (y / image_h - noise[:, 5, None, None]) / height[:, None, None]
    spot = torch.exp(-(dx.square() + dy.square()) / _CUTDIFF_SPREAD)
    return images - spot[:, None]


def rotation(images: Tensor, values: Values, noise: Tensor, temperature: float) -> Tensor:
    """Each image turned by its angle, either way, about its centre, with reflected borders."""
    angle = (torch.where(noise[:, 3] < 0.5, -1.0, 1.0) * values["angle"]).deg2rad()
    image_h, image_w = images.shape[2:]
    x, y = _pixel_centres(images)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    dx, dy = x - image_w / 2, y - image_h / 2
    return _sample(images, dx * cos - dy * sin + image_w / 2, dx * sin + dy * cos + image_h / 2, "reflection")


def _sizes(values: Values) -> tuple[Tensor, Tensor]:
    """Width and height of patches, as fractions of the image's."""
    area, aspect = values["patch_area"], values["patch_aspect"]
    return (area * aspect).sqrt(), (area / aspect).sqrt()


class _Patch:
    """Where a batch of rectangles lies: pixel coordinates along the patch's own axes, and its mask.

    Attributes:
        along, across: (N, H, W) coordinates of every pixel centre in the patch's frame, in pixels.
        mask: (N, 1, H, W), 1 inside, 0 outside, soft at the edge for a temperature above 0.
    """

    def __init__(self, images: Tensor, values: Values, noise: Tensor, temperature: float) -> None:
        image_h, image_w = images.shape[2:]
        width, height = _sizes(values)
        width, height = width * image_w, height * image_h
        place_x, place_y = noise[:, 4], noise[:, 5]
        x, y = _pixel_centres(images)
        if "angle" not in values:
            centre_x = width / 2 + place_x * (image_w - width)
            centre_y = height / 2 + place_y * (image_h - height)
            self.along = (x - centre_x[:, None, None]).expand(-1, image_h, -1)
            self.across = (y - centre_y[:, None, None]).expand(-1, -1, image_w)
        else:
            angle = values["angle"].deg2rad()
            cos, sin = angle.cos(), angle.sin()
            box_w = width * cos.abs() + height * sin.abs()
            box_h = width * sin.abs() + height * cos.abs()
            centre_x = box_w / 2 + place_x * (image_w - box_w)
            centre_y = box_h / 2 + place_y * (image_h - box_h)
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


def _source_shift(centre: Tensor, size: Tensor, image_size: int, u: Tensor) -> Tensor:
    """Whole pixels from a patch's place to the place it was cut from, uniform over those inside.

    Whole, so that a patch that is not rotated is copied without interpolation: a blur would give the
    pasted patch away.
    """
    with torch.no_grad():
        least = torch.ceil(size / 2 - centre)
        most = torch.floor(image_size - size / 2 - centre)
        return least + torch.floor(u * (most - least + 1).clamp_min(1))


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
