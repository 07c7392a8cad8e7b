"""A study's detector as an MLflow model: logged when the study ends, registered when that is asked for."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ssad_hpo import tracking
from ssad_hpo.experiment.outcome import StudyResult, chosen
from ssad_hpo.experiment.run_folder import locked
from ssad_hpo.search import detector_folder
from ssad_hpo.serving import requirements
from ssad_hpo.task import StudyRecorder

_LONGEST_NAME = 250  # MLflow's databases have room for 256
_MODEL = "model"  # the folder among MLflow's artifacts


def log_model(recorder: StudyRecorder, result: StudyResult) -> None:
    """Have the detector that a study ends with logged as an MLflow model, RUN_ID/model."""
    _log(recorder, result, _folder_of(result), _MODEL, None)


def register_run(
    run: str | Path, name: str, *, single: bool = False, trust_addresses: bool = False
) -> tracking.SyncResult:
    """Make a run's detector a version of a registered model of the MLflow that its study was tracked by.

    The version has files of its own, which no later work on the run changes. The same detector is registered
    again only where another has been since, so that the latest version is always this one. What a server
    cannot take now waits for `sync_run`.

    Args:
        run: the run folder, or its name below runs/.
        name: of the registered model, which is made if need be.
        single: the selected candidate alone, where several are combined.
        trust_addresses: vouch for the run's addresses; see `open_run`.

    Raises:
        RunError: if there is no such run. ValueError: for a run without tracking or without a candidate, a
            name that is empty, or an address that needs `trust_addresses`.
    """
    # MLflow's own rule, since models:/NAME/VERSION must be clear; and it is looked up between quotes.
    if not name.strip() or set(name) & set("/:'\"") or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise ValueError(
            f"name: expected a model's name of at most {_LONGEST_NAME} characters without / : and quotes, "
            f"got {name!r:.80}"
        )
    result = chosen(run, trust_addresses=trust_addresses)
    opened = result.run
    if opened.settings.tracking_uri is None:
        raise ValueError(f"{opened.folder}: was made without tracking, so there is no MLflow to register in")
    opened.check_addresses("tracking_uri")
    with locked(opened.folder), opened.open_recorder() as recorder:
        folder = _folder_of(result, single=single)
        _log(recorder, result, folder, f"registered-{_digest(folder)}", name)
    return tracking.sync(opened.outbox, opened.settings.tracking_uri)


def _folder_of(result: StudyResult, *, single: bool = False) -> Path:
    """Where the detector lies that a study ends with; a combined one that is lost is made anew."""
    if single or result.combined is None:
        return detector_folder(result.selected.address)
    if not result.run.combined.is_dir():
        result.detector().save(result.run.combined)
    return result.run.combined


def _log(recorder: StudyRecorder, result: StudyResult, path: Path, folder: str, register: str | None) -> None:
    settings, decided = result.run.settings, result.decided()
    told = {"bit_depth": settings.bit_depth, "alarm_rate": None if decided is None else decided.alarm_rate}
    recorder.model(path, folder, requirements(settings.training.encoder), told, register)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(file.relative_to(folder)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
