"""What a study is unless told otherwise: it depends on where the images come from."""

from __future__ import annotations

from ssad_hpo import data
from ssad_hpo.bilevel import (
    DEFAULT_TRAINING,
    PATCHES,
    PATCHES_HELD_OUT,
    PATCHES_IN_TURN,
    PATCHES_IN_TURN_HELD_OUT,
    PATCHES_IN_TURN_TRAINING,
    Tuning,
)
from ssad_hpo.encoder import NONE
from ssad_hpo.task import COMBINED, PRETRAINED, Search, Training


def search_for(source: data.Source | None) -> Search:
    """What a search is unless told otherwise.

    Args:
        source: of its images. Where some of a folder's are held out, all kinds of patches, chosen by `shift`,
            and the best eight combined; else `Search()`.
    """
    own = source is not None and _is_own(source) and data.holds_out(source)
    return COMBINED if own else Search()


def training_for(source: data.Source | None) -> Training:
    """What a search trains with unless told otherwise.

    Args:
        source: of its images. Those of folders begin with a pretrained encoder; built-in data sets and tasks
            in memory with the small one, from scratch.
    """
    return PRETRAINED if _is_own(source) else Training()


def tuning_for(source: data.Source | None, training: Training, *, in_turn: bool = False) -> Tuning:
    """What a tuning is unless told otherwise.

    Args:
        training: of its detectors. Folders with a pretrained encoder get all kinds of patches, which move
            before the training; where some normal images are held out, down the whitened contrast, with the
            choice by `shift` and all ends combined. Else `Tuning()`.
        in_turn: whether hyperparameters are to move while the detector trains (`steps_before` 0).
    """
    if not _is_own(source) or training.weights == NONE:
        return Tuning()
    holds_out = source is not None and data.holds_out(source)
    if in_turn:
        return PATCHES_IN_TURN_HELD_OUT if holds_out else PATCHES_IN_TURN
    return PATCHES_HELD_OUT if holds_out else PATCHES


def tuned_training_for(source: data.Source | None, tuning: Tuning) -> Training:
    """What a tuning trains with unless told otherwise.

    Args:
        source: of its images. Those of folders as in a search, or for longer where the hyperparameters move
            while the detector trains; built-in data sets and tasks in memory by `DEFAULT_TRAINING`.
        tuning: which of the two it is.
    """
    if not _is_own(source):
        return DEFAULT_TRAINING
    return PRETRAINED if tuning.steps_before else PATCHES_IN_TURN_TRAINING


def _is_own(source: data.Source | None) -> bool:
    """Whether images are the user's own, in folders."""
    return source is not None and source.loader in ("folder", "folders")
