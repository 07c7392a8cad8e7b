"""Tasks that need no download: textures with anomalies made by a known f_gen, and digit images."""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import Literal

import numpy as np
import torch
from PIL import Image

from ssad_hpo.augment import Augmentation, Range, augment
from ssad_hpo.bounds import MOST_PIXELS, MOST_SEED, is_number, whole
from ssad_hpo.data.dataset import DataSet
from ssad_hpo.task import Task

TEXTURES = ("gravel", "brick", "grass")
DEFAULT_AREA = 0.05
ASPECT = Range(0.5, 2, log=True)

_TRAIN_COLUMNS = 300  # of 512: the rest is the unlabeled half's, so that no pixel is in both
_DEFAULT_ANOMALY = Augmentation("cutavg", {"patch_area": DEFAULT_AREA, "patch_aspect": ASPECT})


def controlled_data(
    texture: str = "gravel",
    anomaly: Augmentation | str = _DEFAULT_ANOMALY,
    *,
    image_size: int = 64,
    n_train: int = 256,
    n_unlabeled: int = 128,
    contamination: float = 0.5,
    seed: int = 0,
    n_held_out: int = 0,
    held_out_columns: Literal["unlabeled", "train"] = "unlabeled",
) -> DataSet:
    """Random crops of a texture, some of them made anomalous by a known f_gen.

    Train crops come from columns 0-300 of scikit-image's photograph, unlabeled ones from columns
    300-512: no pixel is in both. With the same seed, size and numbers, tasks with different anomalies
    have the same train images and the same crops beneath the anomalies.

    Args:
        texture: gravel, brick or grass.
        anomaly: f_gen; drawn anew for every anomalous image where it has ranges. Or another texture's
            name: its crops are the anomalies.
        image_size: height and width of a crop, pixels, 1..212.
        n_train, n_unlabeled: numbers of images, at least 2 each.
        contamination: share of anomalies among the unlabeled images, 0..1, rounded to whole images.
        seed: of crops, of which images become anomalies, and of f_gen.
        n_held_out: number of held-out normal images, 0 or at least 2; the other images stay the same.
        held_out_columns: where these come from: "unlabeled", so that they are as the unlabelled normal ones,
            or "train", so that they are shifted against these, as a share of train would be.

    Returns:
        A task with 1 channel, named TEXTURE/KIND, with /AREA if it is not 0.05, or TEXTURE/OTHER, and its
        labels. `unlabeled` is ordered by the digests of its pixels.

    Raises:
        ValueError: for an unknown texture or a number out of its range.
    """
    photograph = photograph_of(texture)
    widest = photograph.shape[1] - _TRAIN_COLUMNS
    if not isinstance(image_size, int) or not 1 <= image_size <= widest:
        raise ValueError(f"image_size: expected 1..{widest} pixels on a texture, got {image_size!r}")
    _check_numbers(n_train, n_unlabeled, contamination, seed, n_held_out)
    if held_out_columns not in ("unlabeled", "train"):
        raise ValueError(f"held_out_columns: expected 'unlabeled' or 'train', got {held_out_columns!r:.80}")
    generator = torch.Generator().manual_seed(seed)
    train = crops_of(photograph[:, :_TRAIN_COLUMNS], n_train, image_size, generator)
    unlabeled = crops_of(photograph[:, _TRAIN_COLUMNS:], n_unlabeled, image_size, generator)
    n_anomalous = round(contamination * n_unlabeled)
    anomalous = torch.randperm(n_unlabeled, generator=generator)[:n_anomalous]
    if isinstance(anomaly, str):
        other = photograph_of(anomaly)[:, _TRAIN_COLUMNS:]
        unlabeled[anomalous] = crops_of(other, n_anomalous, image_size, generator)
    elif n_anomalous:
        # By the very code that a search may imitate the anomalies with.
        changed = augment(unlabeled[anomalous].float() / 255, anomaly, generator)
        unlabeled[anomalous] = (changed * 255).round().to(torch.uint8)
    held_out = None
    if n_held_out:
        columns = slice(_TRAIN_COLUMNS, None) if held_out_columns == "unlabeled" else slice(_TRAIN_COLUMNS)
        held_out = crops_of(photograph[:, columns], n_held_out, image_size, generator)
    labels = np.zeros(n_unlabeled, np.int8)
    labels[anomalous.numpy()] = 1
    unlabeled, labels = _by_content(unlabeled, labels)
    return DataSet(Task(_controlled_name(texture, anomaly), train, unlabeled, held_out), labels)


def _by_content(unlabeled: torch.Tensor, labels: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """Both in the order of the images' digests, as folders have it: a place says nothing of a label."""
    digests = [hashlib.sha256(image.numpy().tobytes()).digest() for image in unlabeled]
    order = sorted(range(len(digests)), key=lambda i: (digests[i], labels[i]))
    return unlabeled[order], labels[order]


def _controlled_name(texture: str, anomaly: Augmentation | str) -> str:
    if isinstance(anomaly, str):
        return f"{texture}/{anomaly}"
    area = anomaly.hyperparameters.get("patch_area", DEFAULT_AREA)
    if isinstance(area, Range):
        return f"{texture}/{anomaly.kind}/{area.low:g}-{area.high:g}"
    return f"{texture}/{anomaly.kind}" + ("" if area == DEFAULT_AREA else f"/{area:g}")


def photograph_of(texture: str) -> torch.Tensor:
    """(512, 512) uint8, straight from the wheel: skimage.data would want a cache in the user's home."""
    if texture not in TEXTURES:
        raise ValueError(f"texture: expected one of {', '.join(TEXTURES)}, got {texture!r}")
    with resources.files("skimage").joinpath("data", f"{texture}.png").open("rb") as file:
        return torch.from_numpy(np.array(Image.open(file).convert("L")))


def crops_of(photograph: torch.Tensor, count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """(count, 1, size, size) squares at uniform places."""
    windows = photograph.unfold(0, size, 1).unfold(1, size, 1)  # (tops, lefts, size, size), a view
    tops = torch.randint(windows.shape[0], (count,), generator=generator)
    lefts = torch.randint(windows.shape[1], (count,), generator=generator)
    return windows[tops, lefts].unsqueeze(1)


def semantic_data(
    normal: int = 4,
    anomalies: Literal["others", "rotated"] = "others",
    *,
    image_size: int = 32,
    n_train: int = 90,
    n_unlabeled: int = 80,
    contamination: float = 0.5,
    seed: int = 0,
    n_held_out: int = 0,
) -> DataSet:
    """One handwritten digit is normal; anomalies are other digits, or the same digit turned.

    From scikit-learn's 8x8 digits (about 180 of each, 174 at least), enlarged bilinearly. No original
    is used twice: train, the normal and the anomalous unlabeled images are all different ones.

    Args:
        normal: the normal digit, 0..9.
        anomalies: "others", drawn from the nine other digits; "rotated", held-out images of the normal
            digit turned by 90, 180 or 270 degrees, drawn uniformly. A 0 or an 8 hardly changes when
            it is turned; a 4 does.
        image_size: height and width after enlarging, pixels, at least 8.
        n_train, n_unlabeled: numbers of images, at least 2 each.
        contamination: share of anomalies among the unlabeled images, 0..1, rounded to whole images.
        seed: of the choice of images, their order and their angles.
        n_held_out: number of held-out normal images, 0 or at least 2; the other images stay the same.

    Returns:
        A task with 1 channel, named digits/NORMAL or digits/NORMAL/rotated, and its labels.

    Raises:
        ValueError: for an argument out of its range, or more images than there are.
    """
    from sklearn.datasets import load_digits

    if normal not in range(10):
        raise ValueError(f"normal: expected a digit 0..9, got {normal!r}")
    if anomalies not in ("others", "rotated"):
        raise ValueError(f"anomalies: expected 'others' or 'rotated', got {anomalies!r}")
    whole("image_size", image_size, 1, MOST_PIXELS)
    if image_size < 8:
        raise ValueError(f"image_size: expected at least 8 pixels for digits, got {image_size}")
    _check_numbers(n_train, n_unlabeled, contamination, seed, n_held_out)
    generator = torch.Generator().manual_seed(seed)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16  # values are 0..16
    is_normal = torch.from_numpy(digits.target == normal)
    n_anomalous = round(contamination * n_unlabeled)
    n_normal = n_train + n_unlabeled - n_anomalous

    normals = _shuffled(images[is_normal], generator)
    needed = n_normal + (n_anomalous if anomalies == "rotated" else 0)
    if needed + n_held_out > len(normals):
        raise ValueError(
            f"n_train, n_unlabeled, n_held_out: expected no more than the {len(normals)} images of digit "
            f"{normal} together, got {needed + n_held_out}"
        )
    if anomalies == "rotated":
        turns = torch.randint(1, 4, (n_anomalous,), generator=generator)
        upright = normals[n_normal:needed]
        turned = [image.rot90(int(k), (1, 2)) for image, k in zip(upright, turns, strict=True)]
        changed = torch.stack(turned) if turned else upright
    else:
        changed = _shuffled(images[~is_normal], generator)[:n_anomalous]
    order = torch.randperm(n_unlabeled, generator=generator)
    unlabeled = torch.cat([normals[n_train:n_normal], changed])[order]
    labels = (order >= n_unlabeled - n_anomalous).numpy().astype(np.int8)
    name = f"digits/{normal}" + ("/rotated" if anomalies == "rotated" else "")
    unlabeled, labels = _by_content(_enlarged(unlabeled, image_size), labels)
    held_out = _enlarged(normals[needed : needed + n_held_out], image_size) if n_held_out else None
    return DataSet(Task(name, _enlarged(normals[:n_train], image_size), unlabeled, held_out), labels)


def _shuffled(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return images[torch.randperm(len(images), generator=generator)]


def _enlarged(images: torch.Tensor, size: int) -> torch.Tensor:
    images = torch.nn.functional.interpolate(images, (size, size), mode="bilinear")
    return (images * 255).round().to(torch.uint8)


def _check_numbers(n_train: int, n_unlabeled: int, contamination: float, seed: int, n_held_out: int) -> None:
    for name, count in (("n_train", n_train), ("n_unlabeled", n_unlabeled)):
        whole(name, count, 2, 100_000)
    whole("n_held_out", n_held_out, 0, 100_000)
    if n_held_out == 1:
        raise ValueError("n_held_out: expected 0 or at least 2, got 1")
    if not (is_number(contamination) and 0 <= contamination <= 1):
        raise ValueError(f"contamination: expected a share of anomalies, 0..1, got {contamination!r:.80}")
    whole("seed", seed, 0, MOST_SEED)
