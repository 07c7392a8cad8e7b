"""The task: images, and no label."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


class DetectorError(RuntimeError):
    """A training gave no usable detector: it diverged, or its embeddings collapsed.

    The one error that a search survives: the trial fails with this reason, the study goes on.
    """


@dataclass(frozen=True, eq=False)
class Task:
    """Images to search on: normal ones, and an unlabelled mixture. No labels, file names or paths.

    Attributes:
        name: what the task is called in tables and tracking, e.g. "gravel/cutavg".
        train: (N_trn, C, H, W) uint8, C 1 or 3, normal images only, N_trn >= 2.
        unlabeled: (N_test, C, H, W) uint8, same C, H, W, N_test >= 2: normal images and anomalies,
            in an order that says nothing about which is which.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """

    name: str
    train: torch.Tensor
    unlabeled: torch.Tensor

    def __post_init__(self) -> None:
        for field_name in ("train", "unlabeled"):
            images = getattr(self, field_name)
            if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8:
                came = getattr(images, "dtype", type(images).__name__)
                raise ValueError(f"{field_name}: expected a uint8 tensor, got {came}")
            if images.ndim != 4 or images.shape[0] < 2 or images.shape[1] not in (1, 3):
                raise ValueError(
                    f"{field_name}: expected (N, C, H, W) with N >= 2 and C 1 or 3, got {tuple(images.shape)}"
                )
        if self.train.shape[1:] != self.unlabeled.shape[1:]:
            raise ValueError(
                f"unlabeled: expected images of train's shape {tuple(self.train.shape[1:])}, "
                f"got {tuple(self.unlabeled.shape[1:])}"
            )

    @property
    def content_hash(self) -> str:
        """64 hexadecimal digits that change when any pixel of the task does; the name is not in it."""
        digest = hashlib.sha256()
        for images in (self.train, self.unlabeled):
            digest.update(repr(tuple(images.shape)).encode())
            digest.update(images.contiguous().numpy().data.cast("B"))
        return digest.hexdigest()
