"""Judging a finished study's choice by the ground truth of its own images, again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ssad_hpo.experiment.outcome import StudyResult, open_result, record_result
from ssad_hpo.experiment.run_folder import UnwritableError, locked
from ssad_hpo.experiment.telling import tell_summary


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
