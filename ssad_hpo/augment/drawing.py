"""Draw the noise, then apply the hyperparameters of an augmentation to it; and what fits into an image."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ssad_hpo.augment.augmentation import Augmentation
from ssad_hpo.augment.kinds import NOISE, kind_of
from ssad_hpo.augment.ranges import Range

Value = float | Range | Tensor


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
    check_images(images)
    check_fits(augmentation, height=images.shape[2], width=images.shape[3])
    noise = draw_noise(len(images), generator, images)
    return apply(images, augmentation.kind, augmentation.hyperparameters, noise)


def draw_noise(n: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """(n, 8) uniform numbers in [0, 1), all that `apply` needs to be random, on the device of `like`."""
    return torch.rand(n, NOISE, generator=generator, device=generator.device).to(like)


def apply(
    images: Tensor,
    kind: str,
    hyperparameters: Mapping[str, Value],
    noise: Tensor,
    temperature: float = 0.0,
) -> Tensor:
    """f_aug as a function of its hyperparameters and the noise, without checks of range or fit.

    Args:
        images: (N, C, H, W) float in [0, 1].
        kind: a key of `KINDS`.
        hyperparameters: all that the kind has, as numbers, ranges, or tensors (scalar or (N,)) through
            which gradients flow.
        noise: (N, 8) from `draw_noise`.
        temperature: softness of a patch's edge in pixels. At 0 the mask is hard (a pixel belongs to the
            patch if its centre does), the limit of the soft ones. CutDiff and Rotation have no edge.

    Returns:
        (N, C, H, W) in [0, 1].
    """
    row = kind_of(kind)
    drawn = {name: _value(hyperparameters[name], noise[:, column]) for name, column in row.columns.items()}
    changed = row.function(images, drawn, noise, temperature)
    return changed.clamp(0, 1)  # CutDiff goes below 0; means and interpolation go over by rounding


def check_fits(augmentation: Augmentation, *, height: int, width: int) -> None:
    """Raise ValueError if some patch of the augmentation's hyperparameters does not fit into the image.

    A rotated patch must fit with its bounding box. Only kinds that say `must_fit` are held to it: CutDiff's
    spot may reach over the border, and Rotation has no patch.
    """
    if not kind_of(augmentation.kind).must_fit:
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


def fits(augmentation: Augmentation, *, height: int, width: int) -> bool:
    """Whether every patch of the augmentation's hyperparameters fits into the image; see `check_fits`."""
    try:
        check_fits(augmentation, height=height, width=width)
    except ValueError:
        return False
    return True


def check_images(images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images: expected (N, C, H, W) floats in [0, 1], got {images.dtype} {tuple(images.shape)}"
        )


def _value(value: Value, u: Tensor) -> Tensor:
    """(N,) values: a range is drawn by the uniform u, a number or tensor is repeated."""
    if isinstance(value, Range):
        low, high = value.low, value.high
        return low * (high / low) ** u if value.log else low + (high - low) * u
    if isinstance(value, Tensor):
        return value.to(u).expand_as(u)
    return torch.full_like(u, value)  # filled on the device: no copy from the host to wait for


def _ends(value: float | Range) -> tuple[float, ...]:
    return (value.low, value.high) if isinstance(value, Range) else (value,)


def _widest_angles(angle: float | Range, w: float, h: float) -> list[float]:
    """The angles in radians at which the bounding box of a w x h patch may be widest or highest."""
    low, high = (math.radians(end) for end in (_ends(angle)[0], _ends(angle)[-1]))
    diagonals = [sign * turn for sign in (-1, 1) for turn in (math.atan2(h, w), math.atan2(w, h))]
    # A box repeats itself every half turn: the first such angle at or after the low end tells.
    firsts = [low + (diagonal - low) % math.pi for diagonal in diagonals]
    return [low, high, *(first for first in firsts if first < high)]
