"""Images and folders of them, made for tests of data, and slow, obvious readings of them."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from PIL import Image

from ssad_hpo import data
from ssad_hpo.task import Task

SIZE = 16


def colours(seed, height=24, width=20, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def make_category(place, channels=3, defects=("crack", "scratch"), n=4):
    """n train images, n normal test images and n of each defect, all different."""
    seeds = iter(range(1000))
    for folder in ("train/good", "test/good", *(f"test/{defect}" for defect in defects)):
        for i in range(n):
            save(place / folder / f"{i:03}.png", colours(next(seeds), channels=channels))
    save(place / "ground_truth" / "crack" / "000_mask.png", colours(999, channels=1))
    return place


def pixels_of(path, channels=3):
    """The slow, obvious reading of an 8-bit file."""
    image = Image.open(path).convert("RGB" if channels == 3 else "L").resize((SIZE, SIZE), Image.BILINEAR)
    return np.asarray(image).reshape(SIZE, SIZE, channels).transpose(2, 0, 1)


def digest(image):
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


def same(a: Task, b: Task) -> bool:
    return torch.equal(a.train, b.train) and torch.equal(a.unlabeled, b.unlabeled)


def palette_image(grey):
    image = Image.fromarray(colours(5, channels=1) // 2).convert("P")
    rows = [(v, v, v) if grey else (v, 255 - v, v // 2) for v in range(256)]
    image.putpalette([value for row in rows for value in row])
    return image


def read_one(path, channels=1, size=SIZE):
    images, paths, _ = data.read_images([path], size, channels)
    assert paths == [path] and images.shape == (1, channels, size, size) and images.dtype == torch.uint8
    return images[0].numpy()


def break_image(path, how):
    save(path, colours(7, 64, 64), format="JPEG" if path.suffix == ".jpg" else None)
    content = path.read_bytes()
    broken = {"truncated": content[: len(content) // 2], "text": b"not an image", "empty": b""}
    path.write_bytes(broken[how])
