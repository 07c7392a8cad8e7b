"""How `studies.st_ssad_recovery` tunes: every loss by both orders, one setting at a time, and by share."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Literal

from ssad_hpo.bilevel import LOSSES, Tuning

STARTS = (0.045, 0.22)
TUNING = Tuning(starts=tuple({"patch_area": area} for area in STARTS))
ALIGNED = "trained with f_gen"  # no tuning: None

ORDERS: tuple[Literal[1, 2], ...] = (1, 2)
VARIANTS: dict[str, Tuning | None] = {
    **{
        f"{loss.replace('_', ' ').replace('mmd normalised', 'MMD2').replace('mmd', 'MMD1')}, order {order}": (
            replace(TUNING, loss=loss, order=order)
        )
        for loss, order in itertools.product(LOSSES, ORDERS)
    },
    ALIGNED: None,
}
ABLATION: dict[str, Tuning | None] = {
    "as it is": TUNING,
    "batch norm in training mode": replace(TUNING, batch_norm="train"),
    "second order": replace(TUNING, order=2),
    "1 detector step": replace(TUNING, detector_steps=1),
    "2 detector steps": replace(TUNING, detector_steps=2),
    "8 detector steps": replace(TUNING, detector_steps=8),
    "learning rate 0.01": replace(TUNING, learning_rate=0.01),
    "learning rate 0.1": replace(TUNING, learning_rate=0.1),
    "no warm start": replace(TUNING, warm_start=0.0),
    "warm start 0.15": replace(TUNING, warm_start=0.15),
    "warm start 0.5": replace(TUNING, warm_start=0.5),
    "warm start on each start's own": replace(TUNING, warm_start_on="start"),
    "annealed": replace(TUNING, annealing=True),
    "virtual step of 64 images": replace(TUNING, virtual_images=64),
    "L_val of 32, 32 and 64 images": replace(TUNING, validation_train=32, validation_unlabeled=64),
    "L_val of 64, 64 and 128 images": replace(TUNING, validation_train=64, validation_unlabeled=128),
    "soft": replace(TUNING, loss="soft_alignment"),
    "smooth": replace(TUNING, loss="smooth_alignment"),
    "smooth, batch norm in training mode": replace(TUNING, loss="smooth_alignment", batch_norm="train"),
    ALIGNED: None,
}
# First order: the default's, and the only one of which every encoder has the derivatives.
BY_SHARE: dict[str, Tuning | None] = {
    "two sided alignment": replace(TUNING, focus=False),
    "two sided alignment, focused": TUNING,
    "contrast alignment": replace(TUNING, loss="contrast_alignment", focus=False),
    "contrast alignment, focused": replace(TUNING, loss="contrast_alignment"),
    "PU-AUC of the discriminant": replace(TUNING, loss="pu_auc"),
    ALIGNED: None,
}
