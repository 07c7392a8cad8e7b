"""A tuning's progress on disk: one file, replaced whole, from which it goes on as if never interrupted."""

from __future__ import annotations

import os
import pickle
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssad_hpo.bilevel.run import Setting

_FORMAT = 1


@dataclass
class Progress:
    """How far a tuning is.

    Attributes:
        warm_start: state of the shared warm start, under way or at its end; None where none is shared.
        finished: states of the starting points that are done, in order.
        current: state of the one that is under way, if a checkpoint was written in it.
    """

    warm_start: dict[str, Any] | None = None
    finished: list[dict[str, Any]] = field(default_factory=list)
    current: dict[str, Any] | None = None


def read_checkpoint(path: Path, setting: Setting, starts: list[Tensor]) -> Progress:
    """The progress that `write_checkpoint` wrote; none at all if there is no file.

    Raises:
        ValueError: if the file is no checkpoint, or one of another tuning; it names what differs.
    """
    if not path.exists():
        return Progress()
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found, settings = content["format"], content["settings"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        raise ValueError(
            f"checkpoint: {path} is no checkpoint of a tuning ({type(error).__name__})"
        ) from error
    if found != _FORMAT:
        raise ValueError(f"checkpoint: {path} was written by another version of ssad_hpo, format {found}")
    expected = _describe(setting, starts)
    if differing := sorted(name for name in expected if settings.get(name) != expected[name]):
        raise ValueError(
            f"checkpoint: {path} belongs to another tuning (differs in {', '.join(differing)}); "
            "give another file, or delete this one to begin anew"
        )
    return Progress(content["warm_start"], content["finished"], content["current"])


def write_checkpoint(path: Path, setting: Setting, starts: list[Tensor], progress: Progress) -> None:
    """Write the progress, whole or not at all."""
    content = {"format": _FORMAT, "settings": _describe(setting, starts), **vars(progress)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def _describe(setting: Setting, starts: list[Tensor]) -> dict[str, str]:
    """What a tuning must agree in with the checkpoint that it goes on from, as texts."""
    tuning, loss = setting.tuning, setting.tuning.loss
    settled = {f.name: getattr(tuning, f.name) for f in fields(tuning)}
    settled["loss"] = loss if isinstance(loss, str) else getattr(loss, "__qualname__", type(loss).__name__)
    settled["starts"] = [start.tolist() for start in starts]
    del settled["checkpoint_every"], settled["choose_by"]  # may change without harm
    return {
        "task": setting.task.content_hash,
        "augmentation": repr(setting.coordinates.augmentation),
        **{f"tuning.{name}": repr(value) for name, value in settled.items()},
        **{f"training.{name}": repr(value) for name, value in asdict(setting.training).items()},
    }
