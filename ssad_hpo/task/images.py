"""The task: images, and no label."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch

from ssad_hpo.bounds import is_number


class DetectorError(RuntimeError):
    """A training gave no usable detector: it diverged, or its embeddings collapsed.

    The one error that a search survives: the trial fails with this reason, the study goes on.
    """


@dataclass(frozen=True, eq=False)
class Task:
    """Images to search on: normal ones, and an unlabelled mixture. No labels, file names or paths.

    >>> import torch
    >>> from ssad_hpo import Task
    >>> images = torch.arange(40, dtype=torch.uint8).repeat(16, 16, 1, 1).T
    >>> Task("grey", images[:20], images[:10]).set_aside(0.25).held_out.shape
    torch.Size([5, 1, 16, 16])

    Attributes:
        name: what the task is called in tables and tracking, e.g. "gravel/cutavg".
        train: (N_trn, C, H, W) uint8, C 1 or 3, normal images only, N_trn >= 2.
        unlabeled: (N_test, C, H, W) uint8, same C, H, W, N_test >= 2: normal images and anomalies,
            in an order that says nothing about which is which.
        held_out: (N_held, C, H, W) uint8, same C, H, W, N_held >= 2: normal images like those among the
            unlabelled, which reach neither training nor density; None where there are none. Criteria such
            as `pu_auc` need them.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """

    name: str
    train: torch.Tensor
    unlabeled: torch.Tensor
    held_out: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for field_name, images in self.sets().items():
            if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8:
                came = getattr(images, "dtype", type(images).__name__)
                raise ValueError(f"{field_name}: expected a uint8 tensor, got {came}")
            if images.ndim != 4 or images.shape[0] < 2 or images.shape[1] not in (1, 3):
                raise ValueError(
                    f"{field_name}: expected (N, C, H, W) with N >= 2 and C 1 or 3, got {tuple(images.shape)}"
                )
            if images.shape[1:] != self.train.shape[1:]:
                raise ValueError(
                    f"{field_name}: expected images of train's shape {tuple(self.train.shape[1:])}, "
                    f"got {tuple(images.shape[1:])}"
                )

    def sets(self) -> dict[str, torch.Tensor]:
        """Its images by the name of the field, without what there is none of."""
        sets = {"train": self.train, "unlabeled": self.unlabeled}
        return sets if self.held_out is None else {**sets, "held_out": self.held_out}

    @property
    def content_hash(self) -> str:
        """64 hexadecimal digits that change when any pixel of the task does; the name is not in it."""
        digest = hashlib.sha256()
        for images in self.sets().values():
            digest.update(repr(tuple(images.shape)).encode())
            digest.update(images.contiguous().numpy().data.cast("B"))
        return digest.hexdigest()

    def set_aside(self, share: float) -> Task:
        """This task with a share of its train images as held-out ones; which, their content decides alone.

        Images of the same content stay together.

        Raises:
            ValueError: for a share outside 0..1, one that leaves fewer than two images on a side, or a task
                that has held-out images.
        """
        if self.held_out is not None:
            raise ValueError("held_out: the task has held-out images already, so none are set aside")
        if not (is_number(share) and 0 < share < 1):
            raise ValueError(f"held_out_share: expected a share of the train images, 0..1, got {share!r:.80}")
        digests = [hashlib.sha256(image.numpy().tobytes()).digest() for image in self.train]
        order = sorted(range(len(digests)), key=digests.__getitem__)
        count = round(share * len(order))
        while 0 < count < len(order) and digests[order[count]] == digests[order[count - 1]]:
            count += 1
        aside = torch.zeros(len(order), dtype=torch.bool)
        aside[order[:count]] = True
        if not 2 <= count <= len(order) - 2:
            raise ValueError(
                f"held_out_share: {share:g} of {len(order)} train images leaves fewer than two on a side; "
                "give another share, more images, or a folder of held-out ones"
            )
        return replace(self, train=self.train[~aside], held_out=self.train[aside])
