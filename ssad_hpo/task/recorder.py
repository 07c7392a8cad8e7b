"""Who hears what happens in a search or a tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from ssad_hpo.task.images import DetectorError

if TYPE_CHECKING:
    from ssad_hpo.augment import Augmentation

Status = Literal["complete", "pruned", "failed", "interrupted"]


class Recorder(Protocol):
    """Hears what happens in a search or a tuning. It answers nothing and may not hold the work up.

    `trial` is the trial's key, unique within the study and the same after a resume.
    """

    def trial_started(self, trial: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """A trial begins: its parameters, and tags such as the kind of augmentation."""

    def trial_progress(self, trial: str, step: int, metrics: Mapping[str, float]) -> None:
        """Finite or not, the values of criteria and losses after a training step."""

    def trial_ended(
        self, trial: str, status: Status, metrics: Mapping[str, float], reason: str | None = None
    ) -> None:
        """A trial is over; `reason` says why when it failed."""


class StudyRecorder(Recorder, Protocol):
    """A recorder that also hears of the study as a whole; it is open in a `with` block.

    Attributes:
        lost: records that could not be kept.
        trouble: why not all was delivered when it was closed, in a sentence; None where all was.
    """

    lost: int

    @property
    def trouble(self) -> str | None: ...

    def trial_metrics(self, trial: str, metrics: Mapping[str, float]) -> None:
        """Values found after the search, such as a trial's AUC."""

    def trial_tags(self, trial: str, tags: Mapping[str, str]) -> None:
        """Texts found when a trial was over, such as a sign of collapse."""

    def study_started(
        self, params: Mapping[str, Any], tags: Mapping[str, str], dataset: Mapping[str, str] | None = None
    ) -> None:
        """The study begins or is resumed; a parameter that changed since becomes the tag `resumed.NAME`.

        `dataset` says what its images are: name, digest, source_type, source, schema, profile; no labels.
        """

    def study_note(self, markdown: str) -> None:
        """A summary for people; `![text](artifact:PATH)` shows a picture among the artifacts."""

    def study_metrics(self, metrics: Mapping[str, float]) -> None:
        """Values of the whole study, such as `auc_selected`."""

    def study_tags(self, tags: Mapping[str, str]) -> None:
        """Texts that hold for the whole study."""

    def study_ended(self, status: Status, reason: str | None = None) -> None:
        """The study is over; `reason` says why when it failed."""

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """A file for the parent run. It is read when it is delivered: leave it where it is."""

    def model(
        self,
        path: Path,
        folder: str,
        requirements: Sequence[str],
        settings: Mapping[str, Any],
        register: str | None = None,
    ) -> None:
        """A detector for the parent run, as a model that can be served; it is read when it is delivered.

        Args:
            path: folder of the detector.
            folder: of the model among the run's artifacts.
            requirements: names of the packages that serving it takes.
            settings: plain values that serving it needs beside the detector.
            register: the name of a registered model of which it becomes a version; None for none.
        """

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


class Teller:
    """Tells a recorder, if there is one, of trials; searches, sweeps and tunings use the same words.

    Args:
        recorder: who hears; None is nobody.
        tags: of every trial, such as the task's name.
    """

    def __init__(self, recorder: Recorder | None, **tags: str) -> None:
        self._recorder, self._tags = recorder, tags

    def start(self, trial: int, augmentation: Augmentation) -> None:
        """A trial begins with an augmentation."""
        if self._recorder is not None:
            params = {"augmentation": augmentation.kind, **augmentation.hyperparameters}
            tags = {"augmentation": augmentation.kind, **self._tags}
            self._recorder.trial_started(str(trial), params, tags)

    def progress(self, trial: int, step: int, metrics: Mapping[str, float]) -> None:
        """What was found after a training step."""
        if self._recorder is not None:
            self._recorder.trial_progress(str(trial), step, metrics)

    def end(
        self,
        trial: int,
        status: Status,
        metrics: Mapping[str, float] | None = None,
        reason: str | None = None,
    ) -> None:
        """A trial is over."""
        if self._recorder is not None:
            self._recorder.trial_ended(str(trial), status, metrics or {}, reason)

    def failure(self, trial: int, error: BaseException) -> None:
        """A trial raised: by its own fault, or because it was stopped from outside."""
        if isinstance(error, DetectorError):
            self.end(trial, "failed", reason=str(error))
        else:
            self.end(trial, "interrupted", reason=repr(error))
