"""Tunings as runs, for tests: images, settings that end in a second, and who kills them."""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ssad_hpo import data
from ssad_hpo.bilevel import Tuning
from ssad_hpo.experiment import StudyResult, read_trajectory, run_study
from ssad_hpo.search import candidates
from ssad_hpo.task import Augmentation, Training

TRAINING = Training(width=4, steps=12, batch_size=4)
# Two starts of 4 steps of the hyperparameters each, at the training steps 6, 8, 10 and 12.
TUNING = Tuning(
    "cutdiff",
    detector_steps=2,
    warm_start=1 / 3,
    validation_train=6,
    validation_unlabeled=5,
    starts=(0.5, {"patch_area": 0.2, "patch_aspect": 1.5}),
    checkpoint_every=2,
)
ANOMALY = Augmentation("cutdiff", {"patch_area": 0.1, "patch_aspect": 1.0})
SOURCE = data.Source("controlled", {"image_size": 32, "n_train": 20, "n_unlabeled": 14, "anomaly": ANOMALY})


def quick(run: str | Path = "tuned", **others: Any) -> StudyResult:
    """Run a tuning; `space` is another one's."""
    settings = {"images": SOURCE, "tuning": TUNING, "training": TRAINING, **others}
    tuning = settings.pop("tuning")
    tuning = replace(tuning, space=settings.pop("space", tuning.space))
    rest = {"tracking_uri": None, "threads": 1, **settings}
    return run_study(rest.pop("images"), tuning, rest.pop("training"), run=run, **rest)


def all_of(result: StudyResult) -> list[Any]:
    """All that a tuning found, to the last bit; addresses and durations are no part of it."""
    found: list[Any] = [result.selected.number, result.aucs]
    for start, trial in zip(candidates(result.study, result.run.artifacts), result.study.trials, strict=True):
        kept = start.kept()
        assert kept.detector is not None
        attributes = {k: v for k, v in trial.user_attrs.items() if k not in ("artifacts", "seconds")}
        weights = {name: tensor.tolist() for name, tensor in kept.detector.network.state_dict().items()}
        found += [trial.params, attributes, read_trajectory(start), kept.scores.tolist(), weights]
    return found


@dataclass(frozen=True)
class Tracked:
    """A tuning and the MLflow that has it."""

    uri: str
    result: StudyResult


class Kills:
    """A listener that has this process killed at the n-th event of a kind, or Ctrl-C pressed."""

    def __init__(self, event: str, at: int, of: signal.Signals = signal.SIGKILL) -> None:
        self.event, self.left, self.of = event, at, of

    def hear(self, event: str) -> None:
        self.left -= event == self.event
        if not self.left:
            self.left = -1
            signal.raise_signal(self.of)

    def trial_started(self, trial: str, params: Any, tags: Any) -> None:
        self.hear("started")

    def trial_progress(self, trial: str, step: int, metrics: Any) -> None:
        self.hear("progress")

    def trial_ended(self, trial: str, status: Any, metrics: Any, reason: str | None = None) -> None:
        self.hear("ended")
