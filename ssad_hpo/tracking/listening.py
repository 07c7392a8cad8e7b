"""A recorder that keeps nothing, and several recorders as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from ssad_hpo.task import Recorder, Status


class SilentRecorder:
    """A `StudyRecorder` that keeps nothing: tracking is off."""

    lost = 0
    trouble = None

    def trial_started(self, trial: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None: ...

    def trial_progress(self, trial: str, step: int, metrics: Mapping[str, float]) -> None: ...

    def trial_ended(
        self, trial: str, status: Status, metrics: Mapping[str, float], reason: str | None = None
    ) -> None: ...

    def trial_metrics(self, trial: str, metrics: Mapping[str, float]) -> None: ...

    def trial_tags(self, trial: str, tags: Mapping[str, str]) -> None: ...

    def study_started(
        self, params: Mapping[str, Any], tags: Mapping[str, str], dataset: Mapping[str, str] | None = None
    ) -> None: ...

    def study_note(self, markdown: str) -> None: ...

    def study_metrics(self, metrics: Mapping[str, float]) -> None: ...

    def study_tags(self, tags: Mapping[str, str]) -> None: ...

    def study_ended(self, status: Status, reason: str | None = None) -> None: ...

    def artifact(self, path: Path, folder: str | None = None) -> None: ...

    def model(
        self,
        path: Path,
        folder: str,
        requirements: Sequence[str],
        settings: Mapping[str, Any],
        register: str | None = None,
    ) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None: ...


class Joined:
    """A `task.Recorder` that tells several others, with the study's own tags on every trial."""

    def __init__(self, recorders: Sequence[Recorder], tags: Mapping[str, str]) -> None:
        self.recorders = recorders
        self.tags = tags

    def trial_started(self, trial: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        for recorder in self.recorders:
            recorder.trial_started(trial, params, {**self.tags, **tags})

    def trial_progress(self, trial: str, step: int, metrics: Mapping[str, float]) -> None:
        for recorder in self.recorders:
            recorder.trial_progress(trial, step, metrics)

    def trial_ended(
        self, trial: str, status: Status, metrics: Mapping[str, float], reason: str | None = None
    ) -> None:
        for recorder in self.recorders:
            recorder.trial_ended(trial, status, metrics, reason)
