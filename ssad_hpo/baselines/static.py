"""Random static augmentations."""

from __future__ import annotations

import torch

from ssad_hpo.augment import Augmentation, kind_of


def random_static(kind: str, seed: int) -> Augmentation:
    """A static augmentation drawn at random from the default ranges of a kind.

    What ST-SSAD (Yoo et al., KDD 2025) is compared with as RS-.

    Args:
        kind: a key of `augment.KINDS`.
        seed: of the draw; areas and aspects are log-uniform.

    Raises:
        ValueError: for an unknown kind.
    """
    known = kind_of(kind).hyperparameters
    fractions = torch.rand(len(known), generator=torch.Generator().manual_seed(seed)).tolist()
    return Augmentation(kind, {n: known[n].range.at(u) for n, u in zip(known, fractions, strict=True)})
