"""Judging what a run has chosen: by the ground truth of its own images, or by labels that came later."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from ssad_hpo import data
from ssad_hpo.bounds import MOST_IMAGE_PIXELS
from ssad_hpo.evaluate import Alarms, auc, count_alarms
from ssad_hpo.experiment.outcome import (
    StudyResult,
    chosen,
    compare_with_truth,
    load_task,
    open_result,
    record_result,
)
from ssad_hpo.experiment.run_folder import UnwritableError, locked
from ssad_hpo.experiment.scoring import bit_depth_of
from ssad_hpo.experiment.telling import add_later, read_later, tell_summary, warn_undelivered

_BLOCK = 256


class NoGroundTruthError(ValueError):
    """There is nothing to judge a choice by; the message says how to give labels."""


def evaluate_run(run: str | Path, *, trust_addresses: bool = False) -> StudyResult:
    """Judge a study's choice by the ground truth, and write the figures to MLflow.

    Where the run folder cannot be written, MLflow is told nothing, and the result's `trouble` says so.

    Raises:
        RunError: if there is no such run. NoGroundTruthError: if there is none. ValueError: if there is no
            candidate, or for an address that needs `trust_addresses` (see `open_run`).
    """
    result = open_result(run, trust_addresses=trust_addresses)
    if result.evaluation is None:
        raise NoGroundTruthError(
            f"{result.run.settings.task_name}: there is no ground truth, so nothing to evaluate; give "
            "labels of some images, a CSV file of path and label (--labels FILE, `evaluate_labelled`); "
            f"the chosen detector is that of trial {result.selected.number}"
        )
    try:
        with locked(result.run.folder), result.run.open_recorder() as recorder:
            record_result(recorder, result)
            tell_summary(recorder, result)
    except UnwritableError as error:  # somebody else's run, whose figures can still be seen
        return replace(result, trouble=None if result.run.settings.tracking_uri is None else str(error))
    undelivered = result.run.undelivered()
    return replace(result, undelivered=undelivered, lost=recorder.lost, trouble=recorder.trouble)


@dataclass(frozen=True)
class LabelledEvaluation:
    """How a run's final detector fits labels of some images.

    Attributes:
        n_unlabeled, n_new: how many of them the search had as unlabelled ones, and how many it never saw.
        left_out: how many were left out, since the search had them as good ones.
        auc: 0..1, higher is better; None where all have the same label.
        alarms: false alarms and misses; None where the run held no images out to decide by.
    """

    n_unlabeled: int
    n_new: int
    left_out: int
    auc: float | None
    alarms: Alarms | None

    def sentence(self) -> str:
        """What is to be told beside other figures of the study."""
        told = [f"{self.n_unlabeled} labelled images of the unlabelled ones, {self.n_new} new"]
        told += [] if self.auc is None else [f"AUC {self.auc:.3f}"]
        return "; ".join([*told, *([] if self.alarms is None else [self.alarms.sentence()])])

    def metrics(self) -> dict[str, float]:
        """The figures by name, for tracking; without those that are undefined."""
        found = {"labelled_images": float(self.n_unlabeled + self.n_new)}
        if self.auc is not None:
            found["labelled_auc"] = self.auc
        if self.alarms is not None and self.alarms.n_good:
            found["labelled_false_alarm_rate"] = self.alarms.false_alarms / self.alarms.n_good
        if self.alarms is not None and self.alarms.n_anomalous:
            found["labelled_miss_rate"] = self.alarms.misses / self.alarms.n_anomalous
        return found


def evaluate_labelled(
    run: str | Path,
    labels: str | Path,
    *,
    alarm_rate: float | None = None,
    device: str = "cpu",
    trust_addresses: bool = False,
) -> LabelledEvaluation:
    """Judge what a run ends with by labels of some of its unlabelled images, or of new ones.

    Unlabelled images that the search had count with the scores that it gave them, where contrast heads are
    those that they have no part in; others are scored now. What comes out is added to what the run folder and
    MLflow have of the study; nothing is chosen anew.

    Args:
        run: the run folder, or its name below runs/.
        labels: a CSV file; see `data.read_label_file`.
        alarm_rate: the share of good images that may raise an alarm; None is `calibration.ALARM_RATE`, or the
            smallest that the run's held-out images can keep.
        device: where to score.
        trust_addresses: as in `open_run`.

    Raises:
        RunError: if there is no such run, or another process works on it. ValueError: for a wrong file of
            labels, an image that cannot be read, a rate that cannot be kept, or an address that needs
            `trust_addresses`. All but an image that cannot be read is told before the first is scored.
    """
    result = chosen(run, trust_addresses=trust_addresses)
    result.run.check_addresses("tracking_uri")
    with locked(result.run.folder):  # to the end: whoever came in between would make the scores work in vain
        read_later(result.run)
        evaluation = _evaluate(result, Path(labels), alarm_rate, device)
        _record(result, Path(labels).name, evaluation)
    return evaluation


def _evaluate(result: StudyResult, labels: Path, alarm_rate: float | None, device: str) -> LabelledEvaluation:
    """What `evaluate_labelled` finds, before anything of it is written."""
    detector = result.detector(device)
    calibration = detector.calibration
    if calibration is not None:
        alarm_rate = calibration.usual_rate if alarm_rate is None else alarm_rate
        calibration.check_rate(alarm_rate)
    elif alarm_rate is not None:
        raise ValueError(f"alarm_rate: {result.run.folder} held no normal images out, so it decides nothing")
    truths = data.read_label_file(labels)
    known = _known(result)
    kept = result.scores()[0]
    truth, scores, n_unlabeled = [], [], 0
    for images, of_images in _blocks(result, truths, detector.image_shape):
        fresh = detector.score(images).numpy()
        for image, value, score in zip(images, of_images, fresh, strict=True):
            place = known.get(_digest(image))
            if place == -1:
                continue
            truth.append(value)
            scores.append(float(score if place is None else kept[place]))
            n_unlabeled += place is not None
    if not truth:
        raise ValueError(f"{labels}: all its images are ones that the search had as good; label others")
    found = np.array(truth)
    alarms = None
    if calibration is not None and alarm_rate is not None:
        raised = calibration.alarms(torch.tensor(scores, dtype=torch.float64), alarm_rate)
        alarms = count_alarms(found, raised, alarm_rate)
    both = 0 < found.sum() < len(found)
    return LabelledEvaluation(
        n_unlabeled,
        len(truth) - n_unlabeled,
        len(truths) - len(truth),
        auc(found, np.array(scores)) if both else None,
        alarms,
    )


def _record(result: StudyResult, name: str, evaluation: LabelledEvaluation) -> None:
    """Add an evaluation to those that the run folder, which is locked, has, and tell MLflow."""
    run = result.run
    with run.open_recorder() as recorder:
        add_later(run, f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {name}: {evaluation.sentence()}")
        recorder.study_metrics(evaluation.metrics())
        try:
            whole = compare_with_truth(result)
        except (ValueError, OSError) as error:  # the note would lack figures that it has now
            warnings.warn(f"MLflow's note of the study stays as it was: {error}", stacklevel=3)
        else:
            tell_summary(recorder, whole)
    warn_undelivered(run, recorder.trouble)


def _blocks(
    result: StudyResult, truths: dict[Path, int], image_shape: tuple[int, int, int]
) -> Iterator[tuple[torch.Tensor, list[int]]]:
    channels, height, width = image_shape
    paths, depth, source = list(truths), bit_depth_of(result.run.folder), result.run.settings.source
    most = MOST_IMAGE_PIXELS
    most = most if source is None else source.arguments.get("max_pixels", most)
    for start in range(0, len(paths), _BLOCK):
        some = paths[start : start + _BLOCK]
        images, read, _ = data.read_images(some, (height, width), channels, bit_depth=depth, max_pixels=most)
        yield images, [truths[path] for path in read]


def _known(result: StudyResult) -> dict[bytes, int]:
    """Digest of each image of the search -> its place among the unlabelled ones, -1 of a good one."""
    if result.run.settings.source is None:
        return {}
    try:
        task = load_task(result.run)
    except (ValueError, OSError) as error:
        warnings.warn(f"all labelled images count as new ones: {error}", stacklevel=4)
        return {}
    good = [task.train] if task.held_out is None else [task.train, task.held_out]
    places = {_digest(image): -1 for images in good for image in images}
    return {_digest(image): i for i, image in enumerate(task.unlabeled)} | places


def _digest(image: torch.Tensor) -> bytes:
    return hashlib.sha256(image.contiguous().numpy().data.cast("B")).digest()
