"""Who hears what happens in a search or a tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

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
