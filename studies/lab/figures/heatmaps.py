"""A sheet of images with their heat maps over them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ssad_hpo.detector import Detector
from ssad_hpo.experiment.heatmaps import colour_range
from ssad_hpo.report import overlay

_GAP = 6


def sheet(rows: Sequence[tuple[Detector, Tensor]], path: Path) -> None:
    """Write a PNG with a row for each detector: every image, and beside it the same with its heat map.

    Args:
        rows: a detector with its patches' density, and (N, 1, H, W) uint8 images.
        path: of the file.
    """
    lines = []
    for detector, images in rows:
        low, high = colour_range(detector)
        line = []
        for image, map_ in zip(images, detector.heatmaps(images), strict=True):
            shown = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
            line += [shown, overlay(shown.copy(), map_.numpy(), low, high)]
        lines.append(line)
    height, width = torch.tensor(lines[0][0].size).flip(0).tolist()
    size = (len(lines[0]) * (width + _GAP) - _GAP, len(lines) * (height + _GAP) - _GAP)
    whole = Image.new("RGB", size, "white")
    for i, line in enumerate(lines):
        for j, shown in enumerate(line):
            whole.paste(shown, (j * (width + _GAP), i * (height + _GAP)))
    whole.save(path, optimize=True)
