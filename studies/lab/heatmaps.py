"""Designs of heat maps that are compared with the one that detectors have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ssad_hpo.detector import Detector, fit_gaussian, maps_of
from ssad_hpo.encoder import features_and_maps
from ssad_hpo.numerics import to_float

Maps = Mapping[int, Tensor]  # by stride: (N, C, h, w)
Distances = Callable[[Maps], Tensor]  # -> (N, h, w)
STRIDES = (4, 8, 16)
_PATCHES = 2**14
_RIDGE = 0.01  # of the mean variance, for a place's covariance, whose images are few: PaDiM adds 0.01


@torch.inference_mode()
def all_maps(detector: Detector, images: Tensor) -> Maps:
    """The encoder's maps of uint8 images, which every design is made from."""
    found: dict[int, list[Tensor]] = {stride: [] for stride in STRIDES}
    for block in images.split(32):
        _, maps = features_and_maps(detector.network, to_float(block), STRIDES)
        for stride, cells in zip(STRIDES, maps, strict=True):
            found[stride].append(cells.float())
    return {stride: torch.cat(blocks) for stride, blocks in found.items()}


def vectors(maps: Maps, strides: tuple[int, ...], around: int, unit: bool) -> Tensor:
    """(N, D, h, w) features of patches.

    Args:
        maps: of images.
        strides: of those that are joined.
        around: side of the square of cells that a map is averaged over; 1 is none.
        unit: whether each map's vectors become unit vectors.
    """
    chosen = [maps[stride] for stride in strides]
    if around > 1:
        chosen = [F.avg_pool2d(m, around, 1, around // 2, count_include_pad=False) for m in chosen]
    if unit:
        chosen = [F.normalize(m, dim=1) for m in chosen]
    return torch.cat([F.interpolate(m, chosen[0].shape[2:], mode="bilinear") for m in chosen], 1)


def anywhere(strides: tuple[int, ...], around: int, unit: bool, train: Maps) -> Distances:
    """One Gaussian for all places."""
    rows = vectors(train, strides, around, unit).permute(0, 2, 3, 1).flatten(0, 2)
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:_PATCHES]
    mean, whitening = (t.float() for t in fit_gaussian(rows[drawn]))
    return lambda maps: (
        (vectors(maps, strides, around, unit).permute(0, 2, 3, 1) - mean) @ whitening.T
    ).norm(dim=3)


def by_place(strides: tuple[int, ...], around: int, unit: bool, train: Maps) -> Distances:
    """A Gaussian for each place, as in PaDiM (Defard et al., ICPR 2021), of all channels."""
    rows = vectors(train, strides, around, unit).permute(2, 3, 0, 1)  # (h, w, N, D)
    mean = rows.mean(2, keepdim=True)
    centred = rows - mean
    covariance = centred.mT @ centred / (rows.shape[2] - 1)
    scale = covariance.diagonal(dim1=2, dim2=3).mean()
    lower = torch.linalg.cholesky(covariance + _RIDGE * scale * torch.eye(covariance.shape[-1]))

    def distances(maps: Maps) -> Tensor:
        new = vectors(maps, strides, around, unit).permute(2, 3, 0, 1) - mean
        return torch.linalg.solve_triangular(lower, new.mT, upper=False).norm(dim=2).permute(2, 0, 1)

    return distances


def without_places(strides: tuple[int, ...], around: int, unit: bool, train: Maps) -> Distances:
    """As `anywhere`, less what train images have on average at the place, such as at their edges."""
    distances = anywhere(strides, around, unit, train)
    usual = distances(train).mean(0)
    return lambda maps: distances(maps) - usual


def apart(strides: tuple[int, ...], around: int, unit: bool, train: Maps) -> Distances:
    """A Gaussian for each map, less what is usual at the place; the mean in standard deviations."""
    each = [without_places((stride,), around, unit, train) for stride in strides]
    spreads = [distances(train).std() for distances in each]

    def joined(maps: Maps) -> Tensor:
        scaled = [d(maps) / spread for d, spread in zip(each, spreads, strict=True)]
        size = scaled[0].shape[1], scaled[0].shape[2]
        return torch.stack([F.interpolate(d[:, None], size, mode="bilinear")[:, 0] for d in scaled]).mean(0)

    return joined


DESIGNS: dict[str, Callable[[Maps], Distances]] = {
    "8 and 16 apart, less the place's mean": partial(apart, (8, 16), 3, True),
    "4, 8 and 16 apart": partial(apart, (4, 8, 16), 3, True),
    "8 and 16 joined": partial(without_places, (8, 16), 3, True),
    "joined, with the place's mean": partial(anywhere, (8, 16), 3, True),
    "the same, single cells": partial(anywhere, (8, 16), 1, True),
    "the same, not of unit length": partial(anywhere, (8, 16), 3, False),
    "8 alone": partial(without_places, (8,), 3, True),
    "16 alone": partial(without_places, (16,), 3, True),
    "by place (PaDiM), joined": partial(by_place, (8, 16), 3, True),
}


def occlusion_maps(detector: Detector, images: Tensor, side: int = 16) -> Tensor:
    """How much an image's score falls when a square of it becomes the image's mean: (N, H, W).

    Args:
        detector: with its density.
        images: (N, C, H, W) uint8, H and W multiples of the side.
        side: of the squares, in pixels.
    """
    _, _, height, width = images.shape
    down, across, found = height // side, width // side, []
    for image in images:
        mean = image.float().mean((1, 2), keepdim=True).to(torch.uint8)
        copies = image.repeat(down * across, 1, 1, 1)
        for i in range(len(copies)):
            top, left = side * (i // across), side * (i % across)
            copies[i, :, top : top + side, left : left + side] = mean
        falls = detector.score(image[None]) - detector.score(copies)
        found.append(falls.view(1, down, across).float())
    return maps_of(torch.cat(found), (height, width))
