"""A small residual encoder for CPUs, trained from scratch."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn


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
