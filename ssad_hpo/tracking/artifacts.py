"""Files of a run folder as MLflow's artifacts: what may be sent, and where to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ssad_hpo.address import without_password
from ssad_hpo.files import has_other_names
from ssad_hpo.tracking.outbox import Record
from ssad_hpo.tracking.uri import sqlite_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Folders, and object stores, to which a request is signed and no password sent.
_STORES = ("", "file", "s3", "gs", "wasbs", "abfss")
Refusals = Iterator[tuple[Record, str]]  # what MLflow will not take, as a record, and why


def log_artifacts(client: MlflowClient, run_id: str, records: Sequence[Record], folder: Path) -> Refusals:
    """Send the files of a run folder that records name."""
    for record in records:
        try:
            check_store(client, run_id)
            file = own_path(folder, record["artifact"])
            if not file.is_file():
                raise ValueError("there is no such file")
            if has_other_names(file):
                raise ValueError("has another name elsewhere (a hard link); own files alone are sent")
            client.log_artifact(run_id, str(file), record["folder"])
        except Exception as error:
            if is_unreachable(error):
                raise
            # A missing file, a store that needs a package, no permission: the rest must not wait for it.
            yield record, f"{folder / record['artifact']}: {error}"


def check_store(client: MlflowClient, run_id: str) -> None:
    """Raise ValueError where a database file, which may be anybody's, names a store that takes passwords."""
    if sqlite_file(client.tracking_uri) is None:
        return
    place = str(client.get_run(run_id).info.artifact_uri)
    if urlsplit(place).scheme not in _STORES:
        raise ValueError(
            f"its experiment keeps artifacts at {without_password(place)!r}, where your passwords would go; "
            "take another experiment"
        )


def own_path(folder: Path, path: str) -> Path:
    """What is a run's own, behind all links: an outbox from elsewhere may name any file of this machine.

    Raises:
        ValueError: if it lies elsewhere.
    """
    found = (folder / path).resolve()
    if not found.is_relative_to(folder.resolve()):
        raise ValueError(f"lies outside of {folder}, whose own files alone are sent; copy it there")
    return found


def is_refusal(error: Exception) -> bool:
    """Whether the server answered, and will answer the same again: an invalid name, a deleted run."""
    return getattr(error, "error_code", "") in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")


def is_unreachable(error: Exception) -> bool:
    """Whether a server did not answer, or cannot now, so that all must be tried again."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    if isinstance(error, RequestException) and error.response is not None:
        return error.response.status_code not in (400, 404, 411, 413, 415, 422)
    if isinstance(error, MlflowException):
        return not is_refusal(error)
    return isinstance(error, (RequestException, ConnectionError, TimeoutError))
