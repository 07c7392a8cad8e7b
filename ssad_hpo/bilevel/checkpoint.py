"""A tuning's progress on disk: one file, replaced whole, from which it goes on as if never interrupted."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssad_hpo.bilevel.descent import Descent
from ssad_hpo.bilevel.problem import Start
from ssad_hpo.bilevel.result import OuterStep
from ssad_hpo.bilevel.settings import Tuning
from ssad_hpo.bilevel.ways import Way
from ssad_hpo.files import check_archive, reading, replaced
from ssad_hpo.task import Training

_FORMAT = 1
_MOST_BYTES = 64 * 2**30


@dataclass
class Progress:
    """How far a tuning is.

    Attributes:
        warm_start: state of the shared warm start, under way or at its end; None where none is shared.
        looks: what a first look at each starting point found, in order; see `looking`.
        finished: states of the starting points that went on and are done, in order.
        current: state of the one that is under way, if a checkpoint was written in it.
    """

    warm_start: dict[str, Any] | None = None
    finished: list[dict[str, Any]] = field(default_factory=list)
    current: dict[str, Any] | None = None
    looks: list[dict[str, Any]] = field(default_factory=list)


class CheckpointFile:
    """The file of a tuning's progress, and the progress itself.

    Args:
        path: of the file; None keeps nothing.

    Raises:
        ValueError: if the file is no checkpoint, or one of another tuning; it names what differs.
    """

    def __init__(self, path: Path | None, starts: list[Start]) -> None:
        self.path, self._settings = path, _describe(starts)
        self.progress = Progress() if path is None or not path.exists() else self._read(path)

    def _read(self, path: Path) -> Progress:
        with self.reading():
            check_archive(path, _MOST_BYTES)
            content = torch.load(path, map_location="cpu", weights_only=True)
            found, settings = content["format"], dict(content["settings"])
            looks = content.get("looks", [])  # there were none at first
            progress = Progress(content["warm_start"], content["finished"], content["current"], looks)
            _check_finite(vars(progress))
        if found != _FORMAT:
            raise ValueError(f"checkpoint: {path} was written by another version of ssad_hpo, format {found}")
        expected = self._settings
        settings = _BEFORE | settings  # a setting that came later was at its default before
        if differing := sorted(name for name in expected if settings.get(name) != expected[name]):
            raise ValueError(
                f"checkpoint: {path} belongs to another tuning (differs in {', '.join(differing)}); "
                "give another file, or delete this one to begin anew"
            )
        return progress

    def reading(self) -> AbstractContextManager[None]:
        """What is wrong with the file's content, also where a tuning takes it up, is told as such."""
        return reading("checkpoint", f"{self.path} is no checkpoint of a tuning", "delete it to begin anew")

    def save(self) -> None:
        """Write the progress, whole or not at all."""
        if self.path is None:
            return
        content = {"format": _FORMAT, "settings": self._settings, **vars(self.progress)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()  # torch's own writer does not say that a disk is full
        torch.save(content, buffer)
        with replaced(self.path) as partial:
            partial.write_bytes(buffer.getbuffer())


def take_up(way: Way, file: CheckpointFile) -> None:
    """Go on where an earlier process left the starting point under way, or after the shared warm start."""
    progress = file.progress
    with file.reading():
        if progress.current is not None:
            way.load(progress.current)
        elif progress.warm_start is not None and isinstance(way, Descent):
            way.load_warm_start(progress.warm_start)


def advance(way: Way, file: CheckpointFile, until: int) -> Iterator[OuterStep]:
    """Every step of the hyperparameters up to a step, with checkpoints on the way."""
    tuning = way.problem.tuning
    for _ in warm_up(way):
        file.progress.current = way.state()
        file.save()
    for outer in way.train(until=until):
        yield outer
        if len(way.trajectory) % tuning.checkpoint_every == 0:
            file.progress.current = way.state()
            file.save()


def warm_up(way: Way) -> Iterator[None]:
    """What is left of a warm start, in stretches as long as those between two checkpoints."""
    stretch = way.problem.tuning.checkpoint_every * way.problem.tuning.detector_steps
    while way.step < way.problem.warm:
        for _ in way.train(until=min(way.step + stretch, way.problem.warm)):
            pass  # no step of the hyperparameters comes before the end of the warm start
        yield


_BEFORE = {
    f"{name}.{f.name}": repr(f.default)
    for name, settings in (("training", Training), ("tuning", Tuning))
    for f in fields(settings)
} | {"tuning.focus": repr(False)}


def _check_finite(content: Any) -> None:
    """Raise ValueError for numbers anywhere within that are not finite."""
    if isinstance(content, Mapping):
        _check_finite(list(content.values()))
    elif isinstance(content, list | tuple):
        for inner in content:
            _check_finite(inner)
    elif isinstance(content, float | Tensor) and not torch.as_tensor(content).isfinite().all():
        raise ValueError("it has numbers that are not finite")


def _describe(starts: list[Start]) -> dict[str, str]:
    """What a tuning must agree in with the checkpoint that it goes on from, as texts."""
    problem = starts[0].problem
    tuning, loss = problem.tuning, problem.tuning.loss
    settled = {f.name: getattr(tuning, f.name) for f in fields(tuning)}
    settled["loss"] = loss if isinstance(loss, str) else getattr(loss, "__qualname__", type(loss).__name__)
    settled["focus"] = tuning.focuses and problem.task.held_out is not None  # else it changes nothing
    settled["starts"] = [start.point.tolist() for start in starts]
    for name in ("space", "checkpoint_every", "choose_by", "combine", "contrast_heads"):
        del settled[name]  # the space is told as the augmentation; the others may change without harm
    if tuning.survivors is not None and not tuning.steps_before:
        settled["choose_by"] = tuning.choose_by  # it has decided who went on
    return {
        "task": problem.task.content_hash,
        "augmentation": ", ".join(map(repr, tuning.augmentations)),
        **{f"tuning.{name}": repr(value) for name, value in settled.items()},
        **{f"training.{name}": repr(value) for name, value in asdict(problem.training).items()},
    }
