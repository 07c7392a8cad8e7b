"""Random static augmentations."""

from __future__ import annotations

import torch

from ssad_hpo.task import DEFAULT_RANGES, Augmentation, Range


def random_static(kind: str, seed: int) -> Augmentation:
    """A static augmentation drawn at random from the default ranges of a kind: RS- of the talk.

    Args:
        kind: a key of `task.DEFAULT_RANGES`.
        seed: of the draw; areas and aspects are log-uniform.

    Raises:
        ValueError: for an unknown kind.
    """
    names = list(Augmentation(kind).hyperparameters)
    fractions = torch.rand(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    ranges: dict[str, Range] = DEFAULT_RANGES[kind]
    return Augmentation(kind, {n: ranges[n].at(u) for n, u in zip(names, fractions, strict=True)})
